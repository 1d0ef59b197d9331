"""Recurrent layers on top of one another."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array

from lstmjax.layers.base import Carries, Layer, Options, Settings, Unrolled, cleared, one_each
from lstmjax.layers.bidirectional import Bidirectional, Merge, OneOrBoth
from lstmjax.layers.keys import check_rates, dropout, fold_keys
from lstmjax.layers.recurrent import Recurrent
from lstmjax.recurrence.noise import Keys
from lstmjax.shown import InitSignature
from lstmjax.traced import Size


class Stack(Layer):
    """Recurrent layers on top of one another, with dropout between them.

    Args:
        cell: the recurrence of all layers, or a list, one a layer; pairs, forward and backward, if
            ``bidirectional``.
        input_size: features D of the first layer.
        num_layers: 1 by default, or as many as are listed.
        bidirectional: each layer runs in both directions.
        merge: of the directions, as in `Bidirectional`.
        dropout_rate: dropped of the input of each layer but the first.
        residual: adds a layer's input to its output, in every layer where both have one size.
        layer_norm: ``"pre"`` normalises each layer's input, ``"post"`` its output, after the
            residual (Ba et al. 2016, arXiv:1607.06450).
        return_carry: whether a call returns the final carries, too.
        rngs: draws the parameters.
        settings: as of `Recurrent`, for all layers.

    Raises:
        ValueError: settings that contradict each other.

    Example:
        >>> from lstmjax.cells import GRU, LSTM
        >>> stack = Stack(GRU(8), 3, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0))
        >>> hs, finals = stack(jnp.ones((2, 5, 3)))
        >>> hs.shape, len(finals)
        ((2, 5, 16), 2)
        >>> deep = Stack([LSTM(8), GRU(8)], 3, residual=True, layer_norm="pre", rngs=nnx.Rngs(0))
        >>> deep(jnp.ones((2, 5, 3)))[0].shape
        (2, 5, 8)
    """

    def __init__(
        self,
        cell: OneOrBoth | Sequence[OneOrBoth],
        input_size: int,
        *,
        num_layers: int | None = None,
        bidirectional: bool = False,
        merge: Merge = "concat",
        dropout_rate: float = 0.0,
        residual: bool = False,
        layer_norm: Literal["pre", "post"] | None = None,
        return_carry: bool = True,
        rngs: nnx.Rngs,
        **settings: Unpack[Settings],
    ) -> None:
        check_rates(dropout_rate=dropout_rate)
        if layer_norm not in (None, "pre", "post"):
            raise ValueError(f'layer_norm must be "pre", "post" or None, got {layer_norm!r}')
        sizes, layers = [input_size], []
        kind: Callable[..., Recurrent | Bidirectional] = Recurrent
        if bidirectional:
            kind = functools.partial(Bidirectional, merge=merge)
        for one in _cells(cell, num_layers, bidirectional):
            layers.append(kind(one, sizes[-1], rngs=rngs, **settings))
            sizes.append(layers[-1].output_size)
        if residual and not any(a == b for a, b in itertools.pairwise(sizes)):
            raise ValueError(
                f"residual=True has no layer whose input and output have one size: {sizes}"
            )
        self.layers = nnx.List(layers)
        self.dropout_rate = dropout_rate
        self.residual = residual
        self.layer_norm = layer_norm
        self.return_carry = return_carry
        if layer_norm:
            normed = sizes[:-1] if layer_norm == "pre" else sizes[1:]
            norm = functools.partial(
                nnx.LayerNorm,
                dtype=settings.get("dtype"),
                param_dtype=settings.get("param_dtype", jnp.float32),
                use_fast_variance=False,
                rngs=rngs,
            )
            self.norms = nnx.List(norm(size) for size in normed)

    __signature__ = InitSignature(Recurrent)

    def _made_of(self) -> dict[str, object]:
        first = self.layers[0]
        made = [{**layer._made_of(), **vars(layer)} for layer in self.layers]
        cells = [one["cell"] for one in made]
        alike = all(cell == cells[0] for cell in cells)
        several = alike and len(cells) > 1
        return {
            **made[0],
            "cell": cells[0] if alike else cells,
            "num_layers": len(cells) if several else None,
            "bidirectional": isinstance(first, Bidirectional),
        }

    @property
    def output_size(self) -> int:
        """Features of the output."""
        return self.layers[-1].output_size

    def initial_carry(self, *batch: Size) -> list[Carries]:
        """A list of what each layer begins with."""
        return [layer.initial_carry(*batch) for layer in self.layers]

    def _run(
        self,
        x: Array,
        initial: Sequence[Carries] | None,
        keys: Keys | None,
        options: Options,
    ) -> Unrolled:
        found = [part for _, part in stages(self, x, initial, keys, options)]
        states = [part.states for part in found] if options.return_states else None
        return Unrolled(found[-1].outputs, [part.carry for part in found], states)

    def _step_inputs(self) -> set[str]:
        return set().union(*(layer._step_inputs() for layer in self.layers))


def _cells(
    cell: OneOrBoth | Sequence[OneOrBoth], num_layers: int | None, bidirectional: bool
) -> Sequence[OneOrBoth]:
    """One entry a layer."""
    if isinstance(cell, list):
        cells = cell
        if num_layers not in (None, len(cells)):
            raise ValueError(f"num_layers is {num_layers}, but {len(cells)} cells are listed")
    else:
        cells = [cell] * (1 if num_layers is None else num_layers)
    if not cells:
        raise ValueError("a stack needs at least one layer")
    if not bidirectional and any(isinstance(one, tuple) for one in cells):
        raise ValueError("a pair of cells needs bidirectional=True; list those of the layers")
    return cells


def stages(
    stack: Stack,
    x: Array,
    initial: Sequence[Carries] | None,
    keys: Keys | None,
    options: Options,
) -> Iterator[tuple[Layer, Unrolled]]:
    """A stack layer by layer: the layer, and what it makes of what the one below made."""
    count = len(stack.layers)
    initial = one_each(initial, count, f"a list of {count}, one a layer")
    # The first keys are those for dropout, whatever the layers need beside them.
    folded = fold_keys(keys, 2 * count)
    clears = stack.residual or stack.layer_norm is not None
    valid = options.valid(x.shape) if clears else None
    x = cleared(x, valid)
    for number, layer in enumerate(stack.layers):
        below = x
        if stack.layer_norm == "pre":
            x = stack.norms[number](x)
        if number:
            x = _dropout_rows(x, stack.dropout_rate, folded[number], options)
        found = layer._run(x, initial[number], folded[count + number], options)
        x = found.outputs
        if stack.residual and x.shape == below.shape:
            x = x + below
        if stack.layer_norm == "post":
            x = stack.norms[number](x)
        x = cleared(x, valid)
        yield layer, found._replace(outputs=x)


def _dropout_rows(x: Array, rate: float, keys: Keys | None, options: Options) -> Array:
    """`dropout` where the rows are on the axes that the options say."""
    if keys is None or rate == 0:
        return x
    rows_first = jnp.moveaxis(x, 0, -2) if options.time_major else x
    flat = rows_first if x.ndim == 3 else rows_first.reshape(-1, *rows_first.shape[-2:])
    dropped = dropout(flat, rate, keys.rows).reshape(rows_first.shape)
    return jnp.moveaxis(dropped, -2, 0) if options.time_major else dropped
