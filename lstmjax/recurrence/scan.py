"""The plain engine: one `jax.lax.scan` over `Cell.transition`. The oracle for all others."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from lstmjax.cells.base import Carry, Cell, arguments
from lstmjax.cells.contract import Arguments
from lstmjax.precision import make_dot
from lstmjax.recurrence.engine import Engine, How, Inputs, Outputs, cleared, select_rows


@dataclasses.dataclass(frozen=True)
class Scan(Engine):
    """Differentiable any number of times, forward and backward; runs every cell.

    Attributes:
        recompute: the gradient keeps each step's carry and recomputes the rest, which costs less
            than reading every intermediate back; False is `jax.lax.scan` as it is.

    Example:
        >>> from lstmjax import GRU, unroll
        >>> params = GRU(5).init(jax.random.key(0), input_size=3)
        >>> hs, _ = unroll(GRU(5), params, jnp.ones((2, 4, 3)), engine=Scan(recompute=False))
        >>> hs.shape
        (2, 4, 5)
    """

    recompute: bool = True

    name: ClassVar[str] = "scan"

    def __call__(self, cell: Cell, inputs: Inputs, how: How) -> tuple[Outputs, Carry]:
        """Run ``cell`` over time."""
        dot = make_dot(how.precision)

        def transition(given: Arguments) -> Carry:
            x = given.x
            more = arguments(cell, x, {"x": x} | given.inputs, given.noise)
            return cell.transition(given.params, x, given.carry, dot, **more)

        return scan_over_time(cell, transition, inputs, how, self.recompute)


_Now = tuple[Array, Array, dict[str, Array], Array | None, Array | None]
"""Of a step: its number, x, step inputs, which rows are valid, which are reset."""


def scan_over_time(
    cell: Cell,
    transition: Callable[[Arguments], Carry],
    inputs: Inputs,
    how: How,
    recompute: bool = True,
) -> tuple[Outputs, Carry]:
    """Some transition in place of the cell's own, one step after another."""
    dtype, noises = inputs.xs.dtype, inputs.noises

    def body(carry: Carry, now: _Now) -> tuple[Carry, Outputs]:
        t, x, more, valid, reset = now
        if reset is not None:
            carry = select_rows(reset, inputs.start, carry)
        drawn = {} if noises is None else noises.draw(cell, dtype, t, 1)
        noise = {name: a[0] for name, a in drawn.items()}
        given = carry if valid is None else harmless(valid, carry)
        new = transition(Arguments(inputs.params, x, given, more, noise))
        if valid is None:
            return new, _outputs(new, how)
        return select_rows(valid, new, carry), cleared(valid, _outputs(new, how))

    step = jax.checkpoint(body, prevent_cse=False) if recompute else body
    times = jnp.arange(inputs.xs.shape[0])
    over = (times, inputs.xs, inputs.inputs, inputs.mask, inputs.resets)
    final, outs = lax.scan(step, inputs.initial, over, reverse=how.reverse)
    return outs, final


def _outputs(carry: Carry, how: How) -> Outputs:
    return carry if how.states else carry._replace(state=None)


def harmless(valid: Array, carry: Carry) -> Carry:
    """Numbers like no cell's start in rows whose step does not count.

    What a step does there is thrown away; but where its derivative is infinite, as that of sqrt at
    a start of zeros, zero times it would be no zero.
    """
    found = []
    leaves, structure = jax.tree.flatten(carry)
    for number, a in enumerate(leaves):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            found.append(a)
            continue
        width = a.shape[-1] if a.ndim > 1 else 1
        ramp = jnp.linspace(0.31, 0.47, width, dtype=a.dtype)
        found.append(select_rows(valid, a, jnp.broadcast_to(ramp + 0.05 * number, a.shape)))
    return jax.tree.unflatten(structure, found)
