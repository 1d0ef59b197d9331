"""A cell run in both directions."""

from collections.abc import Callable, Sequence
from typing import Literal, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import PyTree

from lstmjax.cells.base import Carry, Cell, Params
from lstmjax.layers.base import Layer, Options, Settings, Unrolled, one_each
from lstmjax.layers.keys import fold_keys
from lstmjax.layers.recurrent import Recurrent
from lstmjax.recurrence.engine import platform
from lstmjax.recurrence.noise import Keys
from lstmjax.shown import InitSignature
from lstmjax.traced import Size

Merge = Literal["concat", "sum", "mean"] | Callable[[Array, Array], Array]
OneOrBoth = Cell | tuple[Cell, Cell]
"""The recurrence, or those forward and backward."""


def _concatenated(forward: Array, backward: Array) -> Array:
    return jnp.concatenate([forward, backward], axis=-1)


def _mean(forward: Array, backward: Array) -> Array:
    return (forward + backward) / 2


_MERGES: dict[str, Callable[[Array, Array], Array]] = {
    "concat": _concatenated,
    "sum": jnp.add,
    "mean": _mean,
}


class Bidirectional(Layer):
    """A cell run in both directions, outputs side by side (Schuster & Paliwal 1997).

    Each direction has parameters of its own. Outputs are ``(B, T, 2H)``; the carries form a pair
    (forward, backward).

    Args:
        cell: the recurrence, or a pair of them, forward and backward.
        input_size: features D.
        merge: ``"concat"``, ``"sum"``, ``"mean"``, or a function of both outputs; on masked steps
            both are zero.
        return_carry: whether a call returns the final carries, too.
        rngs: draws the parameters.
        settings: as of `Recurrent`, for both directions.

    Raises:
        ValueError: outputs that cannot be merged, or ``reverse``, which means nothing here.

    Example:
        >>> from lstmjax.cells import GRU, LSTM
        >>> layer = Bidirectional((LSTM(8), GRU(8)), 3, merge="sum", rngs=nnx.Rngs(0))
        >>> hs, (last, first) = layer(jnp.ones((2, 5, 3)))
        >>> hs.shape, first.h.shape
        ((2, 5, 8), (2, 8))
    """

    def __init__(
        self,
        cell: OneOrBoth,
        input_size: int,
        *,
        merge: Merge = "concat",
        return_carry: bool = True,
        rngs: nnx.Rngs,
        **settings: Unpack[Settings],
    ) -> None:
        if settings.pop("reverse", False):
            raise ValueError("Bidirectional runs in both directions: leave out reverse")
        if callable(merge) or merge in _MERGES:
            self.merge = merge
        else:
            raise ValueError(f"merge must be one of {', '.join(_MERGES)} or a function: {merge!r}")
        forward, backward = cell if isinstance(cell, tuple) else (cell, cell)
        self.forward = Recurrent(forward, input_size, rngs=rngs, **settings)
        self.backward = Recurrent(backward, input_size, rngs=rngs, **settings | {"reverse": True})
        self.return_carry = return_carry
        sizes = self.forward.output_size, self.backward.output_size
        if merge in ("sum", "mean") and sizes[0] != sizes[1]:
            raise ValueError(
                f'merge="{merge}" needs outputs of one size, these are {sizes[0]} and {sizes[1]}; '
                'merge="concat" takes any'
            )

    __signature__ = InitSignature(Recurrent, without=("reverse",))

    def _made_of(self) -> dict[str, object]:
        both = (self.forward.cell, self.backward.cell)
        return {**vars(self.forward), "cell": both[0] if both[0] == both[1] else both}

    @property
    def output_size(self) -> int:
        """Features of the output."""
        outs = [
            jax.ShapeDtypeStruct((1, 1, layer.output_size), jnp.float32)
            for layer in (self.forward, self.backward)
        ]
        return jax.eval_shape(self._merged, *outs).shape[-1]

    def initial_carry(self, *batch: Size) -> tuple[Carry, Carry]:
        """The pair of carries before the first step of each direction."""
        return self.forward.initial_carry(*batch), self.backward.initial_carry(*batch)

    def _run(
        self,
        x: Array,
        initial: Sequence[Carry | None] | None,
        keys: Keys | None,
        options: Options,
    ) -> Unrolled:
        last, first = one_each(initial, 2, "a pair: forward and backward")
        if self._at_once(last, first, keys, options):
            return self._both(x, last, first, options)
        forward_keys, backward_keys = fold_keys(keys, 2)
        forward = self.forward._run(x, last, forward_keys, options)
        backward = self.backward._run(x, first, backward_keys, options)
        outputs = self._merged(forward.outputs, backward.outputs)
        states = (forward.states, backward.states) if options.return_states else None
        return Unrolled(outputs, (forward.carry, backward.carry), states)

    def _at_once(
        self, last: Carry | None, first: Carry | None, keys: Keys | None, options: Options
    ) -> bool:
        """Whether one run of both directions, the second on flipped inputs, is the same and faster.

        On a GPU, where either direction alone leaves most of the device idle.
        """
        one, other = self.forward, self.backward
        alike = (one.cell, one.precision, one.engine) == (other.cell, other.precision, other.engine)
        drawn = one.cell.noise or type(one.cell).prepare is not Cell.prepare
        given = one.cell.step_inputs or options.resets is not None
        plain = not given and not (keys and drawn) and (last is None) == (first is None)
        return alike and plain and platform() == "gpu"

    def _both(
        self, x: Array, last: Carry | None, first: Carry | None, options: Options
    ) -> Unrolled:
        time = len(options.batch(x.shape)) * (not options.time_major)

        def flipped(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda a: jnp.flip(a, time), tree)

        def pair(one: PyTree, other: PyTree) -> PyTree:
            return jax.tree.map(lambda *a: jnp.stack(a), one, other)

        def run(params: Params, x: Array, initial: Carry | None, mask: Array | None) -> Unrolled:
            valid = options._replace(mask=mask, lengths=None)
            return self.forward._with(params, x, initial, None, valid)

        mask = options.valid(x.shape)
        params = pair(self.forward.arrays(), self.backward.arrays())
        given = pair((x, mask), flipped((x, mask)))
        found = jax.vmap(run)(params, given[0], pair(last, first), given[1])
        there, back = (jax.tree.map(lambda a, k=k: a[k], found) for k in range(2))
        outputs = self._merged(there.outputs, flipped(back.outputs))
        states = (there.states, flipped(back.states)) if options.return_states else None
        return Unrolled(outputs, (there.carry, back.carry), states)

    def _merged(self, forward: Array, backward: Array) -> Array:
        merge = self.merge if callable(self.merge) else _MERGES[self.merge]
        return merge(forward, backward)

    def _step_inputs(self) -> set[str]:
        return self.forward._step_inputs() | self.backward._step_inputs()
