"""Where the time goes on a CPU: ``python -m benchmarks.profile [recurrence|cumsum]``.

Adds up what XLA's profiler says of every kernel, by what the kernel does: of the recurrence forward
and backward at the notebook's shape, or of an update of the cumulative sum.
"""

import argparse
import collections
import gzip
import json
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from benchmarks.contenders.ours import cumsum_program, recurrence_program
from benchmarks.problems import S

CALLS = 20
UPDATES = 1_000
KINDS = {
    "products": {"dot"},
    "functions (exp, tanh), with what is fused to them": {"exponential", "tanh", "logistic"},
    "other arithmetic": {"add", "multiply", "subtract", "divide", "select", "maximum", "reduce"},
}
"""What a kernel is called after: the first whose operations it has."""
MOVING = "moving: slices, copies, transposition, zeros"


class Profiled(NamedTuple):
    """A jitted function and its arguments; a call of it consists of so many units."""

    function: Any
    arguments: tuple[Any, ...]
    unit: str
    units: int
    devices: int
    traced: int  # calls


def recurrence() -> Profiled:
    """Forward and backward at the notebook's shape, on one device a core."""
    case: dict[str, Any] = S | {"mode": "forward+backward"}
    function, arguments, mesh = recurrence_program(case, "derived")
    return Profiled(function, arguments, "call", 1, mesh.size, traced=4)


def cumsum() -> Profiled:
    """An update, on one device; what is not done in each of them is left out."""
    return Profiled(cumsum_program(UPDATES), (), "update", UPDATES, 1, traced=1)


def kinds_of(program: str) -> Mapping[str, str]:
    """The kind of every instruction of a compiled program, from its text."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%([\w.-]+) \(.*?\{\n(.*?)^\}", program, re.M | re.S))
    found = {}
    for line in program.splitlines():
        if (match := re.match(r"\s*(?:ROOT )?%([\w.-]+) = .*?\s([\w-]+)\(", line)) is None:
            continue
        name, operation = match.groups()
        called = re.search(r"calls=%([\w.-]+)", line)
        operations = {operation}
        if called is not None:
            operations |= set(re.findall(r" ([\w-]+)\(", bodies.get(called[1], "")))
        if operation not in ("while", "conditional", "call"):
            found[name] = next((k for k, some in KINDS.items() if some & operations), MOVING)
    return found


def events(folder: pathlib.Path) -> Iterator[tuple[str, float]]:
    """Name and milliseconds of everything in a trace."""
    (path,) = folder.rglob("*.trace.json.gz")
    with gzip.open(path) as file:
        for event in json.load(file)["traceEvents"]:
            if event.get("ph") == "X":
                yield event["name"], event["dur"] / 1e3


def seconds_a_call(profiled: Profiled, calls: int) -> float:
    """Median."""
    found = []
    for _ in range(calls):
        started = time.perf_counter()
        jax.block_until_ready(profiled.function(*profiled.arguments))
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def table(profiled: Profiled) -> str:
    """The kernels of one unit on one device, by kind."""
    lowered = profiled.function.lower(*profiled.arguments)
    kinds = kinds_of(lowered.compile().as_text())
    parts = profiled.traced * profiled.devices * profiled.units
    wall = 1e3 * seconds_a_call(profiled, CALLS)
    spent: dict[str, list[float]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            traced = 1e3 * seconds_a_call(profiled, profiled.traced)
        for name, duration in events(pathlib.Path(folder)):
            if name in kinds:
                spent[name].append(duration)
    by_kind: dict[str, list[float]] = collections.defaultdict(list)
    for name, each in spent.items():
        if len(each) >= parts:  # else it is not part of every unit
            by_kind[kinds[name]] += each
    total = sum(map(sum, by_kind.values())) / parts
    if not total:
        raise RuntimeError("the profiler saw no kernel that often; trace fewer units")
    lines = ["| kernels | number | ms | share |", "|---|---|---|---|"]
    for kind, each in sorted(by_kind.items(), key=lambda item: -sum(item[1])):
        mine = sum(each) / parts
        lines.append(f"| {kind} | {len(each) / parts:,.0f} | {mine:.3g} | {mine / total:.0%} |")
    unit, devices = profiled.unit, profiled.devices
    lines += [
        "",
        f"Number and ms are those of one {unit} on one of {devices} device(s); kernels may",
    ]
    lines += [f"run side by side. {wall:.0f} ms a call, {traced:.0f} ms under the profiler."]
    return "\n".join(lines)


def main() -> None:
    """Print the table of the program asked for."""
    programs: dict[str, Callable[[], Profiled]] = {"recurrence": recurrence, "cumsum": cumsum}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("program", nargs="?", choices=programs, default="recurrence")
    print(table(programs[parser.parse_args().program]()))


if __name__ == "__main__":
    main()
