"""Where the derived engine's time goes on a CPU: ``python -m benchmarks.profile``.

Adds up what XLA's profiler says of every kernel of the recurrence, forward and backward at the
notebook's shape, by what the kernel does.
"""

import collections
import gzip
import json
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from benchmarks.contenders.ours import recurrence_program
from benchmarks.problems import S

CALLS = 20
TRACED = 4
KINDS = {
    "products": {"dot"},
    "functions (exp, tanh), with what is fused to them": {"exponential", "tanh", "logistic"},
    "other arithmetic": {"add", "multiply", "subtract", "divide", "select", "maximum", "reduce"},
}
"""What a kernel is called after: the first whose operations it has."""
MOVING = "moving: slices, copies, transposition, zeros"


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


def seconds_a_call(function: Any, arguments: Any, calls: int) -> float:
    """Median."""
    found = []
    for _ in range(calls):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def main() -> None:
    """Print the table."""
    case: dict[str, Any] = S | {"mode": "forward+backward"}
    function, arguments, mesh = recurrence_program(case, "derived")
    kinds = kinds_of(function.lower(*arguments).compile().as_text())
    wall = 1e3 * seconds_a_call(function, arguments, CALLS)
    spent: dict[str, list[float]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            traced = 1e3 * seconds_a_call(function, arguments, TRACED)
        for name, duration in events(pathlib.Path(folder)):
            if name in kinds:
                spent[kinds[name]].append(duration)
    parts = TRACED * mesh.size
    total = sum(map(sum, spent.values())) / parts
    print("| kernels | a call and device | ms | share |\n|---|---|---|---|")
    for kind, each in sorted(spent.items(), key=lambda item: -sum(item[1])):
        mine = sum(each) / parts
        print(f"| {kind} | {len(each) / parts:,.0f} | {mine:.1f} | {mine / total:.0%} |")
    print(
        f"\n{wall:.0f} ms a call, {traced:.0f} ms under the profiler. Kernels of one device may run"
    )
    print(f"side by side: those of each of {mesh.size} devices add up to {total:.0f} ms.")


if __name__ == "__main__":
    main()
