"""What every cell costs, and what runs it: ``python -m benchmarks.cells``.

Renews the table of docs/modify_the_cell.md. Times are those of the forward and backward pass on
this CPU, all cells taking turns in one process, as multiples of the LSTM's with as many features.
"""

import argparse
import ast
import datetime
import inspect
import itertools
import json
import os
import pathlib
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.harness import LEAST, ROOT
from benchmarks.report import BEGIN, END, device_name, machine, merge, versions
from lstmjax import cells
from lstmjax.cells import LSTM, Cell
from lstmjax.recurrence import PallasGPU, Workload, choose_engine, unroll

FOLDER, PAGE = ROOT / "benchmarks" / "results" / "cells", ROOT / "docs" / "modify_the_cell.md"
SETTINGS: dict[str, Any] = {"SLSTM": {"heads": 4}, "MLSTM": {"heads": 4}}
"""Hyper-parameters that are not the cell's own."""
PLATFORMS = ("cpu", "tpu")
"""Whose choice of an engine needs no such device; a Hopper GPU is asked by itself."""


class Sizes(NamedTuple):
    """Of the recurrence, T, B, D, H, and how many turns there are."""

    steps: int = 100
    batch: int = 64
    features: int = 32
    hidden: int = 100
    turns: int = 9


def every_cell(hidden: int) -> list[Cell]:
    """All cells of the library, the LSTM first."""
    classes = [
        value
        for value in vars(cells).values()
        if inspect.isclass(value) and issubclass(value, Cell) and value is not Cell
    ]
    made = [one(hidden, **SETTINGS.get(one.__name__, {})) for one in classes]
    return sorted(made, key=lambda cell: (type(cell) is not LSTM, type(cell).__name__.lower()))


def lines_of(kind: type[Cell]) -> int:
    """Lines of code of a class body, without docstrings, comments and blank lines."""
    source = textwrap.dedent(inspect.getsource(kind))
    tree = ast.parse(source)
    gone: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            first = node.body[0]
            gone |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    code = [
        line.strip() for k, line in enumerate(source.splitlines()[1:], start=2) if k not in gone
    ]
    return sum(bool(line) and not line.startswith("#") for line in code)


def features_of(cell: Cell, sizes: Sizes) -> int:
    """As asked for, unless the cell takes as many as it has units."""
    return sizes.hidden if cell.step_inputs.get("x") == "H" else sizes.features


def engines_of(cell: Cell, sizes: Sizes) -> dict[str, dict[str, str]]:
    """Which engine trains a cell on which platform, and why no faster one does."""
    work = Workload("cpu", "float32", "float32", *sizes[:2], features_of(cell, sizes))
    work = work._replace(training=bool(cell.noise))
    found = {}
    for platform in PLATFORMS:
        engine, reason = choose_engine(cell, work._replace(platform=platform))
        found[platform] = {"engine": engine.name, "reason": reason}
    hopper = PallasGPU(attached=False)
    refusal = hopper.refusal(cell, work._replace(platform="gpu"))
    name = hopper.name if refusal is None else found["cpu"]["engine"]
    return found | {"hopper": {"engine": name, "reason": refusal or "the first choice"}}


def runner(cell: Cell, features: int, sizes: Sizes) -> Callable[[], Any]:
    """The gradients of parameters and inputs, compiled; with keys where there is noise."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = cell.init(keys[0], features)
    x = jax.random.normal(keys[1], (sizes.batch, sizes.steps, features))
    inputs = {
        name: jnp.ones((sizes.batch, sizes.steps, cell.width(width, features)))
        for name, width in cell.step_inputs.items()
        if name != "x"
    }

    @jax.jit
    def run(params: Any, x: Any) -> Any:
        def hs(params: Any, x: Any) -> Any:
            return unroll(cell, params, x, inputs=inputs, keys=keys[2])[0]

        out, pull_back = jax.vjp(hs, params, x)
        return pull_back(out)

    return lambda: jax.block_until_ready(run(params, x))


def seconds_of(run: Callable[[], Any]) -> float:
    """Of one call, among as many as fill a turn."""
    start = time.perf_counter()
    for count in itertools.count(1):
        run()
        if (passed := time.perf_counter() - start) >= LEAST:
            return passed / count
    raise AssertionError


def measure(sizes: Sizes, every: Sequence[Cell] | None = None) -> dict[str, Any]:
    """Lines, engines and times of the cells."""
    every = every_cell(sizes.hidden) if every is None else every
    base = LSTM(sizes.hidden)
    work: list[tuple[Cell, int]] = [
        (base, d) for d in sorted({features_of(cell, sizes) for cell in every})
    ]
    work += [(cell, features_of(cell, sizes)) for cell in every if cell != base]
    runs = [runner(cell, d, sizes) for cell, d in tqdm(work, desc="compiling", disable=None)]
    for run in runs:
        run()
    turns: list[list[float]] = [[] for _ in runs]
    for count in tqdm(range(sizes.turns), desc="turns", disable=None):
        for k in range(len(runs)):
            which = (k + count) % len(runs)
            turns[which].append(seconds_of(runs[which]))
    medians = [statistics.median(times) for times in turns]
    against = {d: t for (cell, d), t in zip(work, medians, strict=True) if cell == base}
    rows = []
    for cell in every:
        d = features_of(cell, sizes)
        seconds = next(t for job, t in zip(work, medians, strict=True) if job == (cell, d))
        row = {"cell": type(cell).__name__, "features": d, "lines": lines_of(type(cell))}
        row |= {"engines": engines_of(cell, sizes), "seconds": seconds}
        rows.append(row | {"ratio": seconds / against[d]})
    return {"sizes": sizes._asdict(), "rows": rows}


def table(found: Mapping[str, Any]) -> str:
    """The measurement in Markdown."""
    facts, sizes = found["machine"], found["sizes"]
    lines = [
        f"`python -m benchmarks.cells`, {found['date']}; {facts['processor']}, {facts['cores']} "
        f"cores; JAX {found['versions']['jax']}. T {sizes['steps']}, B {sizes['batch']}, "
        f"D {sizes['features']} (¹ {sizes['hidden']}), H {sizes['hidden']}, float32, forward and "
        f"backward; medians of {sizes['turns']} turns.\n",
        "| cell | lines | CPU | TPU | Hopper | time / LSTM's |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        engines = " | ".join(
            f"`{row['engines'][platform]['engine']}`" for platform in (*PLATFORMS, "hopper")
        )
        mark = "" if row["features"] == sizes["features"] else " ¹"
        lines.append(f"| `{row['cell']}`{mark} | {row['lines']} | {engines} | {row['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


def write_page(found: Mapping[str, Any], page: pathlib.Path = PAGE) -> None:
    """Renew the table of the page."""
    before, rest = page.read_text().split(BEGIN)
    temporary = page.with_suffix(".tmp")
    temporary.write_text(f"{before}{BEGIN}\n\n{table(found)}\n{END}{rest.split(END)[1]}")
    os.replace(temporary, page)


def main(arguments: list[str]) -> None:
    """Measure, print, keep, renew the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.cells", description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, help="write the results here, and no page")
    options = parser.parse_args(arguments)
    facts = machine()
    found = measure(Sizes()) | {"machine": facts, "versions": versions()}
    found["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    print(table(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        return
    merge(FOLDER / f"{device_name(facts)}.json", "cells", found)
    write_page(found)


if __name__ == "__main__":
    main(sys.argv[1:])
