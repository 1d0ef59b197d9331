"""What an engine is: a frozen value that runs any cell it does not refuse over time."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, PyTree

from lstmjax.cells.base import Carry, Cell, Params, start
from lstmjax.cells.contract import Arguments
from lstmjax.precision import Precision
from lstmjax.recurrence.noise import Noises
from lstmjax.traced import Size

Outputs = Carry
"""h, and where they are asked for the states, of all steps: ``(T, B, ...)``; else state is None."""


class Inputs(NamedTuple):
    """What depends on the data. Masked inputs are zero already.

    Attributes:
        params: after `Cell.prepare`.
        xs: ``(T, B, D)``.
        initial: the carry before the first step, arrays ``(B, ...)``.
        start: what a reset puts in place of a row's carry, likewise; None where there are none.
        inputs: the cell's ``step_inputs`` by name, ``(T, B, width)``.
        noises: where the cell's noise comes from; None in evaluation.
        mask: ``(T, B)``, True where a step is valid; None where all are.
        resets: ``(T, B)``, True where the carry is replaced on the way in, in the direction of
            the run; None where there are none.
    """

    params: Params
    xs: Float[Array, "T B D"]
    initial: Carry
    start: Carry | None
    inputs: dict[str, Array]
    noises: Noises | None
    mask: Bool[Array, "T B"] | None
    resets: Bool[Array, "T B"] | None


class How(NamedTuple):
    """What does not depend on the data.

    Attributes:
        reverse: from the last step to the first.
        precision: of the products.
        states: return the states of all steps, too.
    """

    reverse: bool = False
    precision: Precision = "float32"
    states: bool = False


class Workload(NamedTuple):
    """What an engine is asked to run a cell on.

    Attributes:
        platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
        dtype: of inputs, carry and parameters, ``"float32"`` or ``"float64"``.
        precision: of the products.
        steps: length in time, T.
        batch: rows, B.
        features: size of an input, D.
        training: there are keys to draw the cell's noise from.
        states: the states of all steps are asked for.
        resets: there may be resets.
        args: shapes of one step's arguments, where they are known; else those of `Cell.init`.
    """

    platform: str
    dtype: str
    precision: Precision
    steps: Size
    batch: Size
    features: int
    training: bool = False
    states: bool = False
    resets: bool = False
    args: Arguments | None = None


def platform() -> str:
    """The platform that a program traced now is for: ``"cpu"``, ``"gpu"`` or ``"tpu"``.

    That of the mesh in `jax.set_mesh`, whose devices need not be there, else of the default device.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return {"cuda": "gpu"}.get(described.platform, described.platform)
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


@dataclasses.dataclass(frozen=True)
class Engine:
    """Base of all engines. The fields of a subclass are its settings, with defaults that suit most.

    Attributes:
        name: what ``unroll(engine=...)`` and ``--engine`` call it.
        only_on: the platform it is made for; elsewhere nobody gets it without asking for it.
    """

    name: ClassVar[str]
    only_on: ClassVar[str | None] = None

    def offers(self, cell: Cell, work: Workload) -> bool:
        """Whether somebody who asks for no engine in particular may get this one."""
        return self.only_on in (None, work.platform)

    def refusal(self, cell: Cell, work: Workload) -> str | None:
        """Why this engine cannot run ``cell`` on ``work``, in one clause; None where it can."""
        return None

    def __call__(self, cell: Cell, inputs: Inputs, how: How) -> tuple[Outputs, Carry]:
        """Run ``cell`` over one step and one row at least: the outputs and the final carry."""
        raise NotImplementedError

    def function(self, cell: Cell, how: How) -> Callable[[Inputs], tuple[Outputs, Carry]]:
        """A call of this engine as a function of nothing but what depends on the data."""

        def run(inputs: Inputs) -> tuple[Outputs, Carry]:
            return self(cell, inputs, how)

        return run


def overridden(cell: Cell) -> str | None:
    """Which method stands between a cell and its ``step``, so that nothing derives from that."""
    for method in ("transition", "recurrent_product", "apply_step"):
        if getattr(type(cell), method) is not getattr(Cell, method):
            return f"{type(cell).__name__} overrides {method}"
    return None


def odd_carry(cell: Cell, dtype: str = "float32") -> str | None:
    """Why a kernel cannot hold the cell's carry: it takes arrays ``(B, H)`` of one type."""
    carry = jax.eval_shape(lambda: start(cell, None, 2, None, dtype))
    for a in jax.tree.leaves(carry):
        if (a.shape, a.dtype) != ((2, cell.hidden_size), dtype):
            shape = ", ".join(["B", *map(str, a.shape[1:])])
            return f"{type(cell).__name__} carries a ({shape}) {a.dtype}, not (B, H) {dtype}"
    return None


def select_rows(rows: Bool[Array, "*T B"], yes: PyTree, no: PyTree) -> PyTree:
    """``yes`` for the rows marked, ``no`` for the others, in every array of a tree."""

    def select(a: Array, b: Array) -> Array:
        return jnp.where(rows.reshape(rows.shape + (1,) * (a.ndim - rows.ndim)), a, b)

    return jax.tree.map(select, yes, no)


def cleared(valid: Bool[Array, "*T B"] | None, outs: PyTree) -> PyTree:
    """Zeros where a step is masked, in all arrays of numbers."""
    if valid is None:
        return outs

    def clear(a: Array) -> Array:
        if not jnp.issubdtype(a.dtype, jnp.number):
            return a
        return jnp.where(valid.reshape(valid.shape + (1,) * (a.ndim - valid.ndim)), a, 0)

    return jax.tree.map(clear, outs)


def step_arguments(cell: Cell, inputs: Inputs) -> Arguments:
    """The shapes of one step's arguments."""
    noises = inputs.noises

    def first() -> Arguments:
        noise = {} if noises is None else noises.draw(cell, inputs.xs.dtype, 0, 1)
        x, more, drawn = jax.tree.map(lambda a: a[0], (inputs.xs, inputs.inputs, noise))
        return Arguments(inputs.params, x, inputs.initial, more, drawn)

    return jax.eval_shape(first)
