"""Fused TPU kernels (Pallas, Mosaic) for any cell that has a ``step``: the engine.

The kernels are in `tpu.kernel`, their sizes in `tpu.plan`, layouts and calls in `tpu.calls`, which
is imported, and Pallas with it, when a recurrence first runs here.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from lstmjax.cells.base import Carry, Cell
from lstmjax.recurrence.derivatives import with_derivative
from lstmjax.recurrence.derived.engine import Derived
from lstmjax.recurrence.engine import Engine, How, Inputs, Outputs, Workload, odd_carry
from lstmjax.recurrence.layout import MIB, up
from lstmjax.recurrence.step import Step, no_kernel, step_of
from lstmjax.recurrence.tpu.plan import (
    FITTING,
    LANES,
    ROWS,
    UNROLL,
    TPUPlan,
    chunk_near,
    divisor,
    parts_of,
    tpu_device,
    vmem_bytes,
)
from lstmjax.traced import MixedRows


@dataclasses.dataclass(frozen=True)
class PallasTPU(Engine):
    """One fused kernel forward and one backward, derived from the cell's ``step``.

    Runs every cell that has a ``step``, mixed rows and heads included, in float32 or with bfloat16
    products. Kept for the gradient are h of each step and one carry a chunk. All other derivatives
    are those of the derived engine.

    Attributes:
        chunk: steps of a chunk; None chooses what the TPU's VMEM holds.
        rows: rows of a block; None chooses one block for each core, of 256 rows at most.
        unroll: steps written out in the loops over time; None chooses by the size of a step.
        interpret: run by the Pallas interpreter, on any platform: slow, for tests; or the
            parameters of the one that knows a TPU's memories and cores.

    Example:
        >>> from lstmjax.cells import LSTM
        >>> from lstmjax.recurrence import unroll
        >>> cell = LSTM(5)
        >>> params = cell.init(jax.random.key(0), input_size=3)
        >>> x = jax.numpy.ones((2, 4, 3))
        >>> hs, final = unroll(cell, params, x, engine=PallasTPU(chunk=2, interpret=True))
        >>> hs.shape
        (2, 4, 5)
    """

    name: ClassVar[str] = "pallas_tpu"
    only_on: ClassVar[str] = "tpu"

    chunk: int | None = None
    rows: int | None = None
    unroll: int | None = None
    interpret: object = False

    def __post_init__(self) -> None:
        for field in ("chunk", "rows", "unroll"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
        if self.rows is not None and self.rows % ROWS:
            raise ValueError(f"rows must be a multiple of {ROWS}, got {self.rows}")

    def refusal(self, cell: Cell, work: Workload) -> str | None:
        """Why not; see `Engine.refusal`."""
        if work.platform != "tpu" and not self.interpret:
            return f"it needs a TPU, this is a {work.platform}"
        if work.dtype != "float32":
            return f"a TPU computes in float32, the inputs are {work.dtype}"
        if refusal := odd_carry(cell) or no_kernel(cell, work):
            return refusal
        step = step_of(cell, work)
        if refusal := _no_blocks(step):
            return refusal
        if not self.interpret and (operation := _inexpressible(step)):
            return f"its step uses {operation}, which a TPU kernel does not have"
        if work.states:
            return "its kernel gives no states of all steps"
        capacity, _ = tpu_device()
        need = vmem_bytes(
            cell, self._rows(work.batch), self.chunk or 1, work.features, work.precision
        )
        if need > capacity:
            return f"it needs {need / MIB:.0f} MiB of VMEM, this TPU has {capacity / MIB:.0f}"
        return None

    def __call__(self, cell: Cell, inputs: Inputs, how: How) -> tuple[Outputs, Carry]:
        """Run ``cell`` over time."""
        from lstmjax.recurrence.tpu.calls import backward, forward, values

        steps, batch, features = inputs.xs.shape
        training = inputs.noises is not None
        work = Workload("tpu", "float32", how.precision, steps, batch, features, training=training)
        plan = self.plan(cell, work, how.reverse)
        run = with_derivative(
            functools.partial(forward, plan),
            functools.partial(backward, plan),
            Derived().function(cell, how),
            functools.partial(values, plan),
        )
        return run(inputs)

    def plan(self, cell: Cell, work: Workload, reverse: bool = False) -> TPUPlan:
        """The sizes that the kernels get for a batch."""
        steps, rows, precision = work.steps, self._rows(work.batch), work.precision
        vmem = functools.partial(
            vmem_bytes, cell, rows, features=work.features, precision=precision
        )
        capacity, _ = tpu_device()
        chunk = self.chunk
        if chunk is None:
            most = max(1, min(steps, FITTING // rows))
            while most > 1 and vmem(most) > capacity:
                most -= 1
            chunk = chunk_near(steps, most)
        size = rows * len(cell.gates) * up(cell.hidden_size, LANES)
        return TPUPlan(
            cell=cell,
            step=step_of(cell, work),
            reverse=reverse,
            parts=parts_of(precision),
            rows=rows,
            chunk=chunk,
            unroll=divisor(chunk, self.unroll or max(1, min(UNROLL, 2**17 // size))),
            group=divisor(chunk, max(1, 256 // rows)),
            vmem=vmem(chunk),
            vmem_forward=vmem(chunk, forward=True),
            interpret=self.interpret,
        )

    def _rows(self, batch: int) -> int:
        if self.rows is not None:
            return self.rows
        _, cores = tpu_device()
        blocks = min(max(cores, -(-batch // 256)), -(-batch // ROWS))
        return up(-(-batch // max(blocks, 1)), ROWS)


def _no_blocks(step: Step) -> str | None:
    """Why a step cannot run on blocks of rows that are kept in VMEM."""
    for program in (step.forward, step.backward):
        try:
            if reason := program.mapped("first"):
                return (
                    f"its step {reason.removeprefix('it ')}, which has no rule for blocks of rows"
                )
        except MixedRows as error:
            return f"its step mixes rows: {error}"
    for name, a in step.shapes.others.items():
        if len(a.shape) != 2:
            return f"its parameter {name} has shape {a.shape}; a kernel keeps two axes at most"
    return None


def _inexpressible(step: Step) -> str | None:
    """The name of an operation of the step, or of its gradient, that Mosaic has no rule for."""
    try:
        from jax._src.pallas.mosaic.lowering import lowering_rules
    except ImportError:  # no public way to ask; the compiler will say it
        return None
    known = {primitive.name for rules in lowering_rules.values() for primitive in rules}
    programs = (step.forward, step.backward)
    names = (name for program in programs for name in _operations(program.closed.jaxpr))
    return next((name for name in names if name not in known), None)


def _operations(jaxpr: Jaxpr) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if isinstance(inner, ClosedJaxpr):
                inner = inner.jaxpr
            if isinstance(inner, Jaxpr):
                yield from _operations(inner)


def _is_jaxpr(value: object) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)
