"""The CPU engine: all of time in one function, made from a cell's step by LLVM."""

import dataclasses
import functools
from typing import ClassVar

from lstmjax.cells.base import Carry, Cell
from lstmjax.recurrence.engine import (
    Engine,
    How,
    Inputs,
    Outputs,
    Workload,
    odd_carry,
    overridden,
)
from lstmjax.recurrence.step import Step, step_of
from lstmjax.traced import NoRule


@dataclasses.dataclass(frozen=True)
class CPU(Engine):
    """Runs cells that have a step on a CPU in one function, forward and backward.

    The function multiplies, steps and, on the way back, adds up the gradients of the weights while
    the numbers are in the core's caches. It is compiled in a second or two for a cell and the
    number of features; steps and rows are read when it runs. Cores that are no devices of their own
    share its rows, as threads of XLA's.

    The gradient keeps, for each step, the carry and the pre-activations. Steps in which no row of
    a block of 64 counts are skipped. All other derivatives are those of the derived engine; a
    program that is exported is the same recurrence in plain JAX.

    It needs llvmlite (``pip install "lstmjax[cpu]"``).

    Example:
        >>> from lstmjax.cells import LSTM
        >>> work = Workload("tpu", "float32", "float32", steps=500, batch=64, features=32)
        >>> CPU().refusal(LSTM(100), work)
        'it runs on CPUs, not on tpu'
    """

    name: ClassVar[str] = "cpu"
    only_on: ClassVar[str | None] = "cpu"

    def refusal(self, cell: Cell, work: Workload) -> str | None:
        """Why not, in one clause: the device, what is missing, the types, or the cell."""
        if work.platform != "cpu":
            return f"it runs on CPUs, not on {work.platform}"
        if reason := _missing():
            return reason
        if work.dtype not in ("float32", "float64"):
            return f"it computes in float32 and float64, the inputs are {work.dtype}"
        if work.precision != "float32":
            return f"its products are in full precision, not in {work.precision}"
        if not (isinstance(work.steps, int) and isinstance(work.batch, int)):
            return "the length or the batch is not known when it is traced"
        if reason := overridden(cell) or odd_carry(cell, work.dtype):
            return reason
        try:
            step = step_of(cell, work)
        except NoRule as error:
            return str(error)
        reason = _not_emitted(step)
        return None if reason is None else f"its step {reason.removeprefix('it ')}"

    def __call__(self, cell: Cell, inputs: Inputs, how: How) -> tuple[Outputs, Carry]:
        """Run ``cell`` over time."""
        from lstmjax.recurrence.cpu.run import run_kernels

        steps, batch, features = inputs.xs.shape
        training = inputs.noises is not None
        dtype = str(inputs.xs.dtype)
        work = Workload("cpu", dtype, how.precision, steps, batch, features, training)
        return run_kernels(cell, step_of(cell, work), inputs, how)


@functools.lru_cache(maxsize=256)
def _not_emitted(step: Step) -> str | None:
    """Which operation of a step has no emission, neither element by element nor row by row."""
    from lstmjax.recurrence.cpu import emit, rows  # of no use without llvmlite

    every = (step.forward, step.backward, step.recur, step.recur_back)
    programs = [program for program in every if program is not None]
    if not any(map(emit.refusal, programs)):
        return None
    return next((reason for program in programs if (reason := rows.refusal(program))), None)


@functools.cache
def _missing() -> str | None:
    """Why no function can be made here at all."""
    try:
        from lstmjax.recurrence.cpu.calls import check_calls
    except ImportError as error:
        if not (error.name or "").startswith(("llvmlite", "lstmjax")):
            raise
        return 'llvmlite is not installed (pip install "lstmjax[cpu]")'
    try:
        check_calls()
    except (OSError, RuntimeError) as error:
        return f"this system does not let it make functions: {error}"
    return None
