"""Fused TPU kernels (Pallas, Mosaic) for any cell that has a ``step``: the engine.

The kernels are in `tpu.kernel`, their sizes in `tpu.plan`, layouts and calls in `tpu.calls`, which
is imported, and Pallas with it, when a recurrence first runs here.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct
from jaxtyping import Bool, Float

from lstmjax.cells.base import Carry, Cell, Params, Parts
from lstmjax.precision import Precision
from lstmjax.recurrence.derivatives import with_derivative
from lstmjax.recurrence.derived import Derived
from lstmjax.recurrence.engine import Engine, Workload, odd_carry, overridden
from lstmjax.recurrence.layout import MIB, up
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


@dataclasses.dataclass(frozen=True)
class PallasTPU(Engine):
    """One fused kernel forward and one backward, derived from the cell's ``step``.

    Runs every cell that has a ``step``, mixed rows and heads included, in float32 or with bfloat16
    products. Kept for the gradient are h of each step and one carry a chunk. Second and higher
    reverse-mode derivatives are those of the derived engine; forward mode is refused by JAX.

    Attributes:
        chunk: steps of a chunk; None chooses what the TPU's VMEM holds.
        rows: rows of a block; None chooses one block for each core, of 256 rows at most.
        unroll: steps written out in the loops over time; None chooses by the size of a step.
        interpret: run by the Pallas interpreter, on any platform: slow, for tests.

    Example:
        >>> from lstmjax.cells import LSTM
        >>> from lstmjax.recurrence import unroll
        >>> cell = LSTM(5)
        >>> params = cell.init(jax.random.key(0), input_size=3)
        >>> x = jnp.ones((2, 4, 3))
        >>> hs, final = unroll(cell, params, x, engine=PallasTPU(chunk=2, interpret=True))
        >>> hs.shape
        (2, 4, 5)
    """

    name: ClassVar[str] = "pallas_tpu"
    only_on: ClassVar[str] = "tpu"

    chunk: int | None = None
    rows: int | None = None
    unroll: int | None = None
    interpret: bool = False

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
        if refusal := overridden(cell) or odd_carry(cell):
            return refusal
        if not self.interpret and (operation := _inexpressible(cell)):
            return f"its step uses {operation}, which a TPU kernel does not have"
        capacity, _ = tpu_device()
        need = vmem_bytes(
            cell, self._rows(work.batch), self.chunk or 1, work.features, work.precision
        )
        if need > capacity:
            return f"it needs {need / MIB:.0f} MiB of VMEM, this TPU has {capacity / MIB:.0f}"
        return None

    def __call__(
        self,
        cell: Cell,
        params: Params,
        xs: Float[Array, "T B D"],
        initial: Carry,
        mask: Bool[Array, "T B"] | None,
        resets: Bool[Array, "T B"] | None,
        reverse: bool,
        precision: Precision,
    ) -> tuple[Float[Array, "T B H"], Carry]:
        """Run ``cell`` over time."""
        steps, batch, features = xs.shape
        from lstmjax.recurrence.tpu.calls import backward, forward, values

        plan = self.plan(cell, steps, batch, features, reverse, precision)
        run = with_derivative(
            functools.partial(forward, plan),
            functools.partial(backward, plan),
            Derived().function(cell, reverse, precision),
            functools.partial(values, plan),
        )
        return run((params, xs, initial, mask, resets))

    def plan(
        self,
        cell: Cell,
        steps: int,
        batch: int,
        features: int,
        reverse: bool = False,
        precision: Precision = "float32",
    ) -> TPUPlan:
        """The sizes that the kernels get for a batch."""
        rows = self._rows(batch)
        vmem = functools.partial(vmem_bytes, cell, rows, features=features, precision=precision)
        capacity, _ = tpu_device()
        chunk = self.chunk
        if chunk is None:
            most = max(1, min(steps, FITTING // rows))
            while most > 1 and vmem(most) > capacity:
                most -= 1
            chunk = chunk_near(steps, most)
        work = rows * len(cell.gates) * up(cell.hidden_size, LANES)
        return TPUPlan(
            cell=cell,
            reverse=reverse,
            parts=parts_of(precision),
            rows=rows,
            chunk=chunk,
            unroll=divisor(chunk, self.unroll or max(1, min(UNROLL, 2**17 // work))),
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


@functools.lru_cache
def _inexpressible(cell: Cell) -> str | None:
    """The name of an operation of the step, or of its gradient, that Mosaic has no rule for."""
    try:
        from jax._src.pallas.mosaic.lowering import lowering_rules
    except ImportError:  # no public way to ask; the compiler will say it
        return None
    known = {primitive.name for rules in lowering_rules.values() for primitive in rules}
    rows = (ROWS, cell.hidden_size)
    pre = jax.eval_shape(lambda: cell.named([jnp.zeros(rows) for _ in cell.gates]))
    carry = jax.eval_shape(lambda: cell.initial_carry(ROWS))
    units = {name: ShapeDtypeStruct((cell.hidden_size,), jnp.float32) for name in cell.unit_params}

    def step_and_gradient(pre: Any, carry: Carry, units: Any, d_new: Carry) -> Any:
        def step(pre: Any, carry: Carry, units: Any) -> Carry:
            return cell.apply_step(pre, carry, {"units": units})

        return jax.vjp(step, pre, carry, units)[1](d_new)

    both = Parts(pre, pre) if cell.parts_apart else pre
    jaxpr = jax.make_jaxpr(step_and_gradient)(both, carry, units, carry)
    return next((name for name in _operations(jaxpr.jaxpr) if name not in known), None)


def _operations(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda a: hasattr(a, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from _operations(getattr(inner, "jaxpr", inner))
