"""What neither passes nor fails: which engines run a cell, how fast, and whether it compiles."""

import contextlib
import dataclasses
import importlib.util
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lstmjax.cells import LSTM
from lstmjax.cells.base import Cell
from lstmjax.check.problem import features_of
from lstmjax.recurrence import PallasGPU, Workload, choose_engine, unroll
from lstmjax.recurrence.engine import overridden, platform
from lstmjax.recurrence.step import step_of
from lstmjax.traced import NoRule

STEPS, BATCH, FEATURES, HIDDEN = 100, 32, 32, 64
"""Of the recurrence that is timed, and that engines are asked for."""
TARGETS = {"v5e": "libtpu", "hopper": "jax_cuda12_plugin"}
"""What `lstmjax.aot` compiles for, and the module that it needs."""


def _sized(cell: Cell) -> tuple[Cell, int]:
    """The cell in a size of practice, if it can be had; and its number of features."""
    with contextlib.suppress(ValueError):  # another field has to fit it: as it is, then
        cell = dataclasses.replace(cell, hidden_size=HIDDEN)
    wide = features_of(cell) == cell.hidden_size
    return cell, cell.hidden_size if wide else FEATURES


def kind(cell: Cell) -> str:
    """Element-wise or by row, as far as its step can be looked at."""
    cell, features = _sized(cell)
    work = Workload("cpu", "float32", "float32", STEPS, BATCH, features, bool(cell.noise))
    if reason := overridden(cell):
        return f"products and step in one: {reason}"
    try:
        reason = step_of(cell, work).forward.elementwise()
    except NoRule as error:
        reason = str(error)
    if reason:
        return f"by row: {reason}"
    return "element-wise: each unit depends on its own pre-activations and state alone"


def engines(cell: Cell) -> dict[str, str]:
    """Which engine trains it on a CPU, a TPU and a Hopper GPU, and why no faster one does."""
    cell, features = _sized(cell)
    work = Workload("cpu", "float32", "float32", STEPS, BATCH, features, bool(cell.noise))
    found = {}
    for where in ("cpu", "tpu"):
        engine, reason = choose_engine(cell, work._replace(platform=where))
        found[f"on a {where.upper()}"] = f"{engine.name}: {reason}"
    refusal = PallasGPU(attached=False).refusal(cell, work._replace(platform="gpu"))
    derived = choose_engine(cell, work)[0].name
    found["on a Hopper"] = (
        f"{derived}: no pallas_gpu: {refusal}" if refusal else "pallas_gpu: the first choice"
    )
    return found


def speed(cell: Cell, turns: int = 5) -> str:
    """Forward and gradient, in turn with the LSTM, the best of some turns."""
    cell, features = _sized(cell)
    runs = [_runner(one, features) for one in (cell, LSTM(cell.hidden_size))]
    best = [float("inf")] * 2
    for _, (k, run) in itertools.product(range(turns), enumerate(runs)):
        begun = time.perf_counter()
        run()
        best[k] = min(best[k], time.perf_counter() - begun)
    ours, theirs = best
    return (
        f"{ours / theirs:.2f} times the LSTM's time, forward and gradient ({1e3 * ours:.1f} ms to "
        f"{1e3 * theirs:.1f}: T {STEPS}, B {BATCH}, D {features}, H {cell.hidden_size}, on this "
        f"{platform()})"
    )


def _runner(cell: Cell, features: int) -> Callable[[], Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    params = cell.init(keys[0], features)
    x = jax.random.normal(keys[1], (BATCH, STEPS, features))
    inputs = {
        name: jnp.ones((BATCH, STEPS, cell.width(width, features)))
        for name, width in cell.step_inputs.items()
        if name != "x"
    }
    noise = keys[2] if cell.noise else None

    @jax.jit
    def run(params: Any, x: Any) -> Any:
        def total(params: Any, x: Any) -> Any:
            return jnp.sum(unroll(cell, params, x, inputs=inputs, keys=noise)[0])

        return jax.grad(total, argnums=(0, 1))(params, x)

    jax.block_until_ready(run(params, x))
    return lambda: jax.block_until_ready(run(params, x))


def compile_targets(spec: str | None, targets: Sequence[str] | None) -> dict[str, str]:
    """Whether the real compilers take it, each in a process of its own.

    Args:
        spec: the cell as ``file.py:MyCell``; None where it is in no file.
        targets: of `lstmjax.aot`; None for those whose compiler is installed.
    """
    if targets is None:
        targets = [t for t, module in TARGETS.items() if importlib.util.find_spec(module)]
    found = {}
    for target in targets:
        name = f"for {target}"
        if spec is None:
            found[name] = "not compiled: the cell is in no file"
            continue
        command = [sys.executable, "-m", "lstmjax.aot", "--cell", spec, "--target", target]
        command += ["--hidden", str(HIDDEN), "--features", str(FEATURES), "--steps", str(STEPS)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in (run.stderr or run.stdout).strip().splitlines() if line]
        told = lines[-1] if lines else f"exit {run.returncode}"
        if run.returncode == 0:
            told = f"compiles (python {' '.join(command[1:])})"
        found[name] = told[:200]
    return found
