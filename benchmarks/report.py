"""Results on disk, their tables and plots, and the page that shows them, docs/performance.md."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import ROOT, Session
from benchmarks.parts import PARTS
from benchmarks.problems import S

FOLDER, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PACKAGES = (
    *("jax", "flax", "numpy", "torch", "keras", "tensorflow-cpu", "tensorflow"),
    *("dm-haiku", "equinox"),
)

Part = Mapping[str, Any]
"""One part's results, as `record` makes them."""


# --- Results --------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What times depend on: processor, cores that may be used, memory, system."""
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"model name\s*: (.+)", text)
    instructions = set(re.findall(r"\b(?:avx2|avx512f|avx512_bf16|amx_bf16)\b", text))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model[1].strip() if model else platform.processor() or platform.machine(),
        "instructions": sorted(instructions),
        "cores": cores,
        "memory_gib": round(memory / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def device_name(facts: Mapping[str, Any]) -> str:
    """What the results of a CPU are called, ``"amd-epyc-avx2-2-cores"``: some hide which they are,
    but not how wide their vectors are."""
    processor = re.sub(r"\((?:r|tm|c)\)|@.*", "", facts["processor"].lower())
    there = [i.rstrip("f") for i in ("avx512f", "avx2") if i in facts["instructions"]]
    name = " ".join([processor, *there[:1], f"{facts['cores']} cores"])
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def versions() -> dict[str, str]:
    """Versions of the packages compared, as far as they are installed."""
    there = {
        d.metadata["Name"].replace("_", "-"): d.version for d in importlib.metadata.distributions()
    }
    return {name: there[name] for name in PACKAGES if name in there}


def record(session: Session, facts: Mapping[str, float], command: str, seconds: float) -> Any:
    """A part's results, JSON-ready: four digits, and nothing that names a folder."""
    rows = [
        row | {"case": {k: v for k, v in row["case"].items() if k != "data_dir"}}
        for row in session.rows
    ]
    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": command,
        "took": seconds,
        "machine": machine(),
        "versions": versions(),
        "skipped": session.skipped,
        "deviations": session.deviations,
        "facts": facts,
        "rows": rows,
    }
    return json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.4g}"))


def merge(path: pathlib.Path, name: str, part: Part) -> None:
    """Put one part into the file, leaving the others as they are."""
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[name] = part
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def load(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """All results, by device and part."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


# --- Text -----------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def table(part: Part, what: str = "seconds") -> str:
    """Medians in Markdown, contenders across (down, if the cases are fewer).

    In brackets the ratio to the first contender; what was not measured stays empty.
    """
    names = list(dict.fromkeys(row["contender"] for row in part["rows"]))
    cells: dict[str, dict[str, float]] = {}
    for row in part["rows"]:
        cells.setdefault(row["column"], {})[row["contender"]] = row[what]

    def cell(line: Mapping[str, float], name: str) -> str:
        if name not in line:
            return ""
        ratio = f" ({line[name] / line[names[0]]:.2f})" if names[0] in line else ""
        return duration(line[name]) + ratio

    lines = [
        ["", *names],
        *([case, *(cell(line, n) for n in names)] for case, line in cells.items()),
    ]
    if len(cells) < len(names):
        lines = [list(column) for column in zip(*lines, strict=True)]
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [" | ".join(text.ljust(w) for text, w in zip(line, wide, strict=True)) for line in lines]
    rows.insert(1, " | ".join("-" * w for w in wide))
    return "\n".join(f"| {row} |" for row in rows)


def text(name: str, part: Part) -> str:
    """A part in Markdown: what, when, on what; its table and what follows from it."""
    facts, took = part["machine"], part["took"]
    timed = part["rows"] and all("cpu" in row for row in part["rows"])
    packages = ", ".join(f"{package} {version}" for package, version in part["versions"].items())
    lines = [
        f"{(PARTS[name].__doc__ or '').splitlines()[0]}\n" if name in PARTS else "",
        f"`{part['command']}`, {part['date']}, {took:.0f} s; {facts['processor']}, "
        f"{facts['cores']} cores ({', '.join(facts['instructions'])}), {facts['memory_gib']} GiB; "
        f"Python {facts['python']}, {packages}.\n",
        f"{table(part)}\n" if part["rows"] else "",
        f"Time of all cores together:\n\n{table(part, 'cpu')}\n" if timed else "",
        *(f"- {fact}: {value:.4g}" for fact, value in part["facts"].items()),
        *(f"- {contender} was skipped: {why}" for contender, why in part["skipped"].items()),
    ]
    if part["deviations"]:
        worst = max(part["deviations"], key=part["deviations"].get)
        found = f"{part['deviations'][worst]:.1e} ({worst})"
        lines.append(f"- largest deviation from the first contender: {found}")
    return "\n".join(line for line in lines if line) + "\n"


def block(results: Mapping[str, Mapping[str, Part]], plots: Mapping[str, str]) -> str:
    """The measured part of the page; ``plots`` are links by ``<device>-<part>``."""
    lines = []
    for device, parts in results.items():
        lines.append(f"## {device}\n")
        for name in sorted(parts, key=[*PARTS, *parts].index):
            lines.append(f"### {name}\n\n{text(name, parts[name])}")
            if link := plots.get(f"{device}-{name}"):
                lines.append(f"![{name} on {device}]({link})\n")
    return "\n".join(lines)


def write_page(folder: pathlib.Path = FOLDER, page: pathlib.Path = PAGE) -> None:
    """Draw the plots beside the results and renew the measured part of the page."""
    results, plots = load(folder), {}
    for device, parts in results.items():
        for name, part in parts.items():
            path = folder / f"{device}-{name}.png"
            if (draw_growth if name == "growth" else draw_bars)(path, part):
                plots[path.stem] = os.path.relpath(path, page.parent)
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{block(results, plots)}\n{END}{rest.split(END)[1]}")


# --- Plots ----------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:
    import matplotlib.figure

    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def draw_bars(path: pathlib.Path, part: Part) -> bool:
    """Bars of the medians, a panel a case; of a grid the notebook's shape. False if none."""
    rows = [r for r in part["rows"] if all(r["case"].get(k, n) == n for k, n in S.items())]
    columns = list(dict.fromkeys(row["column"] for row in rows))
    if not columns:
        return False
    figure = _figure(5 * len(columns), 3.2)
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        here: Sequence[Any] = [row for row in rows if row["column"] == column][::-1]
        seconds = [row["seconds"] for row in here]
        colours = ["tab:blue" if "lstmjax" in row["contender"] else "tab:gray" for row in here]
        bars = axes.barh([row["contender"] for row in here], seconds, color=colours)
        axes.bar_label(bars, [duration(s) for s in seconds], padding=3, fontsize=8)
        axes.set_title(column, fontsize=9)
        axes.set(xlabel="seconds (median)", xlim=(0, 1.25 * max(seconds)))
        axes.locator_params(axis="x", nbins=4)
    figure.savefig(path, dpi=110)
    return True


def draw_growth(path: pathlib.Path, part: Part) -> bool:
    """Time and memory against T, B and H, all logarithmic. False if there is nothing."""
    figure = _figure(11, 6)
    panels = figure.subplots(2, 3, sharey="row")
    for axis, pair in zip(("steps", "batch", "hidden"), panels.T, strict=True):
        rest = {name: n for name, n in S.items() if name != axis}
        rows = [r for r in part["rows"] if rest.items() <= r["case"].items()]
        rows.sort(key=lambda row: row["case"][axis])
        for name in dict.fromkeys(row["contender"] for row in part["rows"]):
            for axes, value, unit in zip(pair, ("seconds", "memory"), (1, 2**20), strict=True):
                mine = [r for r in rows if r["contender"] == name and r.get(value)]
                points = [r["case"][axis] for r in mine], [r[value] / unit for r in mine]
                axes.loglog(*points, marker="o", label=name)
                axes.grid(alpha=0.3, which="both")
        sizes = sorted({row["case"][axis] for row in rows})
        for axes in pair:
            axes.set_xticks(sizes, sizes)
            axes.set_xticks([], minor=True)
        pair[1].set_xlabel({"steps": "T", "batch": "B", "hidden": "H"}[axis])
    panels[0, 0].set_ylabel("seconds (median)")
    panels[1, 0].set_ylabel("memory of the program, MiB")
    panels[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return bool(part["rows"])
