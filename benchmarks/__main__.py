"""Side by side with what a user would take instead: ``python -m benchmarks [parts] [options]``."""

import argparse
import pathlib
import sys
import time

from benchmarks import report
from benchmarks.harness import BenchmarkError, Session
from benchmarks.parts import DEFAULT, PARTS
from lstmjax.errors import UserError


def main(arguments: list[str]) -> int:
    """Run the parts asked for, print their tables, keep their results; 1 if one failed."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all but the last"
    )
    parser.add_argument("--full", action="store_true", help="whole grids, slow contenders too")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: only shows that it runs")
    parser.add_argument("--data-dir", help="TFDS folder with IMDB; else TFDS_DATA_DIR")
    parser.add_argument("--seeds", type=int, default=3, help="of to_accuracy")
    parser.add_argument("--results", type=pathlib.Path, default=report.FOLDER, help="folder")
    parser.add_argument("--report", action="store_true", help="only renew docs/performance.md")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    if options.tiny and options.results == report.FOLDER:
        parser.error("--tiny measures nothing of use: name a folder for it by --results")
    if options.report:
        report.write_page(options.results)
        return 0
    return max(run(name, options) for name in options.parts or DEFAULT)


def run(name: str, options: argparse.Namespace) -> int:
    """One part; 1 if it failed."""
    flags = [f"--{flag}" for flag in ("full", "tiny") if getattr(options, flag)]
    started = time.perf_counter()
    try:
        with Session(name, options.full) as session:
            facts = PARTS[name](session, options)
    except (BenchmarkError, UserError) as error:
        print(f"{name} failed, nothing of it was kept: {error}", file=sys.stderr)
        return 1
    command = " ".join(["python -m benchmarks", name, *flags])
    found = report.record(session, facts, command, time.perf_counter() - started)
    print(f"\n## {name}\n\n{report.text(name, found)}")
    if session.rows:
        device = report.device_name(found["machine"])
        report.merge(options.results / f"{device}.json", name, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
