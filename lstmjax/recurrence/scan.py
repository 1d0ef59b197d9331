"""The plain engine: one `jax.lax.scan` over `Cell.transition`. The oracle for all others."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from lstmjax.cells.base import Carry, Cell, Params
from lstmjax.precision import Precision, make_dot
from lstmjax.recurrence.engine import Engine, select_rows


@dataclasses.dataclass(frozen=True)
class Scan(Engine):
    """Differentiable any number of times, forward and backward; runs every cell.

    Attributes:
        recompute: the gradient keeps each step's carry and recomputes the rest, which costs less
            than reading every intermediate back; False is `jax.lax.scan` as it is.
    """

    recompute: bool = True

    name: ClassVar[str] = "scan"

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
        dot = make_dot(precision)
        start = cell.initial_carry(xs.shape[1], xs.dtype)

        def body(
            carry: Carry, inputs: tuple[Array, Array | None, Array | None]
        ) -> tuple[Carry, Array]:
            x, valid, reset = inputs
            if reset is not None:
                carry = select_rows(reset, start, carry)
            new = cell.transition(params, x, carry, dot)
            if valid is None:
                return new, new.h
            return select_rows(valid, new, carry), jnp.where(valid[:, None], new.h, 0)

        step = jax.checkpoint(body, prevent_cse=False) if self.recompute else body
        final, hs = lax.scan(step, initial, (xs, mask, resets), reverse=reverse)
        return hs, final
