"""What every cell costs, and what runs it.

    python -m benchmarks.cells --compile    for a TPU and a Hopper GPU that are not there (`.[aot]`)
    python -m benchmarks.cells              on this CPU; renews the table of docs/modify_the_cell.md

Times are those of the forward and backward pass, all cells taking turns in one process, as
multiples of the LSTM's with as many features.
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
import subprocess
import sys
import tempfile
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
from lstmjax.recurrence import Derived, PallasGPU, PallasTPU, Scan, Workload, choose_engine, unroll

FOLDER, PAGE = ROOT / "benchmarks" / "results" / "cells", ROOT / "docs" / "modify_the_cell.md"
COMPILED = FOLDER / "compiled.json"
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
    gpu = work._replace(platform="gpu")
    refusal = hopper.refusal(cell, gpu)
    everywhere = next(e.name for e in (Derived(), Scan()) if e.refusal(cell, gpu) is None)
    name = hopper.name if refusal is None else everywhere
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


def compile_all(sizes: Sizes) -> dict[str, dict[str, str]]:
    """What the compilers say of every kernel, by cell, in a process with `tpu.environment`."""
    from lstmjax.aot import gpu, tpu

    mesh, found = tpu.described_mesh("v5e", 1), {}
    for cell in tqdm(every_cell(sizes.hidden), desc="compiling", disable=None):
        shape = tpu.Shape(*sizes[:2], features_of(cell, sizes), "float32")
        engines, row = engines_of(cell, sizes), {}
        if engines["tpu"]["engine"] == "pallas_tpu":
            program = "forward+backward"
            f, args = tpu.cell_programs(cell, shape, PallasTPU(), mesh)[program]
            done = tpu.compile_program(program, "pallas_tpu", f, args, cell, shape, mesh)
            row["v5e"] = "compiles" if done.bundles is None else f"{done.bundles:,.0f}"
        if engines["hopper"]["engine"] == "pallas_gpu":
            kernels = gpu.cell_rows(
                cell,
                steps=shape.steps,
                batch=shape.batch,
                features=shape.features,
                precision="float32",
            )
            spilled = sum(kernel.spilled for kernel in kernels)
            registers = " / ".join(str(kernel.registers) for kernel in kernels)
            row["hopper"] = registers + (f", {spilled} B spilled" if spilled else "")
        found[type(cell).__name__] = row
    return found


def table(found: Mapping[str, Any], compiled: Mapping[str, Mapping[str, str]]) -> str:
    """The measurement in Markdown."""
    facts, sizes = found["machine"], found["sizes"]
    lines = [
        f"`python -m benchmarks.cells`, {found['date']}; {facts['processor']}, {facts['cores']} "
        f"cores; JAX {found['versions']['jax']}. T {sizes['steps']}, B {sizes['batch']}, "
        f"D {sizes['features']} (¹ {sizes['hidden']}), H {sizes['hidden']}, float32, forward and "
        f"backward; medians of {sizes['turns']} turns. `--compile` says of the kernels: bundles a "
        "step on a v5e, registers of a thread on Hopper, forward / backward.\n",
        "| cell | lines | CPU | time / LSTM's | TPU | bundles | Hopper | registers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        engine = {name: f"`{row['engines'][name]['engine']}`" for name in (*PLATFORMS, "hopper")}
        said = compiled.get(row["cell"], {})
        cells = [
            f"`{row['cell']}`{'' if row['features'] == sizes['features'] else ' ¹'}",
            str(row["lines"]),
            engine["cpu"],
            f"{row['ratio']:.2f}",
            engine["tpu"],
            said.get("v5e", ""),
            engine["hopper"],
            said.get("hopper", ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_page(
    found: Mapping[str, Any], compiled: Mapping[str, Mapping[str, str]], page: pathlib.Path = PAGE
) -> None:
    """Renew the table of the page."""
    before, rest = page.read_text().split(BEGIN)
    text = f"{before}{BEGIN}\n\n{table(found, compiled)}\n{END}{rest.split(END)[1]}"
    temporary = page.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, page)


def known() -> dict[str, dict[str, str]]:
    """What `compile_all` said the last time."""
    found: dict[str, dict[str, str]] = json.loads(COMPILED.read_text()) if COMPILED.exists() else {}
    return found


def main(arguments: list[str]) -> None:
    """Measure, print, keep, renew the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.cells", description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, help="write the results here, and no page")
    parser.add_argument("--compile", action="store_true", help="for devices that are not there")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.here:
        COMPILED.parent.mkdir(parents=True, exist_ok=True)
        COMPILED.write_text(json.dumps(compile_all(Sizes()), indent=1) + "\n")
        return
    if options.compile:
        from lstmjax.aot import tpu

        with tempfile.TemporaryDirectory() as dump:
            command = [sys.executable, "-m", "benchmarks.cells", "--here"]
            subprocess.run(command, env=os.environ | tpu.environment(dump), check=True)
        return
    facts = machine()
    found = measure(Sizes()) | {"machine": facts, "versions": versions()}
    found["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    print(table(found, known()))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        return
    merge(FOLDER / f"{device_name(facts)}.json", "cells", found)
    write_page(found, known())


if __name__ == "__main__":
    main(sys.argv[1:])
