"""What an engine is: a frozen value that runs any cell it does not refuse over time."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
from jax import Array
from jaxtyping import Bool, Float

from lstmjax.cells.base import Carry, Cell, Params
from lstmjax.precision import Precision


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


@dataclasses.dataclass(frozen=True)
class Engine:
    """Base of all engines. The fields of a subclass are its settings, with defaults that suit most.

    Attributes:
        name: what ``unroll(engine=...)`` and ``--engine`` call it.
    """

    name: ClassVar[str]

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
        """Run ``cell``; masked inputs are zero already, resets follow the direction."""
        raise NotImplementedError


def select_rows(rows: Bool[Array, "*T B"], yes: Carry, no: Carry) -> Carry:
    """``yes`` for the rows marked, ``no`` for the others, in every array of a carry."""

    def select(a: Array, b: Array) -> Array:
        return jax.numpy.where(rows.reshape(rows.shape + (1,) * (a.ndim - rows.ndim)), a, b)

    return jax.tree.map(select, yes, no)
