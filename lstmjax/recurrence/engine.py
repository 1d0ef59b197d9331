"""What an engine is: a frozen value that runs any cell it does not refuse over time."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
from jax import Array, lax
from jaxtyping import Bool, Float

from lstmjax.cells.base import Carry, Cell, Params
from lstmjax.precision import Precision

Inputs = tuple[Params, Array, Carry, Array | None, Array | None]
"""What depends on the data: params, xs (T, B, D), initial, mask (T, B), resets (T, B)."""


class Workload(NamedTuple):
    """What an engine is asked to run a cell on.

    Attributes:
        platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
        dtype: of inputs, carry and parameters, ``"float32"`` or ``"float64"``.
        precision: of the products.
        steps: length in time, T.
        batch: rows, B.
        features: size of an input, D.
    """

    platform: str
    dtype: str
    precision: Precision
    steps: int
    batch: int
    features: int


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

    def refusal(self, cell: Cell, work: Workload) -> str | None:
        """Why this engine cannot run ``cell`` on ``work``, in one clause; None where it can."""
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
        """Run ``cell`` over one step and one row at least.

        Masked inputs are zero already, resets follow the direction.
        """
        raise NotImplementedError

    def function(
        self, cell: Cell, reverse: bool, precision: Precision
    ) -> Callable[[Inputs], tuple[Array, Carry]]:
        """A call of this engine as a function of nothing but what depends on the data."""

        def run(inputs: Inputs) -> tuple[Array, Carry]:
            return self(cell, *inputs, reverse, precision)

        return run


def overridden(cell: Cell) -> str | None:
    """Which method stands between a cell and its ``step``, so that nothing derives from that."""
    for method in ("transition", "recurrent_product", "apply_step"):
        if getattr(type(cell), method) is not getattr(Cell, method):
            return f"{type(cell).__name__} overrides {method}"
    return None


def odd_carry(cell: Cell) -> str | None:
    """Why a kernel cannot hold the cell's carry: it takes arrays ``(B, H)`` of float32."""
    carry = jax.eval_shape(lambda: cell.initial_carry(2))
    for a in jax.tree.leaves(carry):
        if (a.shape, a.dtype) != ((2, cell.hidden_size), jax.numpy.float32):
            shape = ", ".join(["B", *map(str, a.shape[1:])])
            return f"{type(cell).__name__} carries a ({shape}) {a.dtype}, not (B, H) float32"
    return None


def select_rows(rows: Bool[Array, "*T B"], yes: Carry, no: Carry) -> Carry:
    """``yes`` for the rows marked, ``no`` for the others, in every array of a carry."""

    def select(a: Array, b: Array) -> Array:
        return jax.numpy.where(rows.reshape(rows.shape + (1,) * (a.ndim - rows.ndim)), a, b)

    return jax.tree.map(select, yes, no)


def vary_alike(tree: Any, *references: Any) -> Any:
    """``tree`` marked as varying over the mesh axes, inside `jax.shard_map`, of any reference.

    Loops ask for carries of one type; and the gradient of what is the same on all devices is then
    summed over them here, once, and not at every step.
    """

    def varying(a: Array) -> frozenset[Any]:
        return jax.typeof(a).manual_axis_type.varying

    axes = frozenset().union(*map(varying, jax.tree.leaves(references)))

    def vary(a: Array) -> Array:
        missing = tuple(axes - varying(a))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(vary, tree)
