"""Flax (NNX) layers. They hold parameters and nothing else: keys, masks and carries are arguments.

Shapes: ``B`` rows, ``T`` steps, ``D`` features, ``H`` units. Random bits are drawn row by row from
one key a row, so they do not depend on how a batch is spread over devices.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Key, PRNGKeyArray

from lstmjax.cells.base import Carry, Cell, Params
from lstmjax.precision import Precision, make_dot_general
from lstmjax.recurrence import Engine, unroll

Pooling = Literal["last", "mean", "max"]
RowKeys = Key[Array, " B"]
"""One key a row, ``(B,)``; None in its place means evaluation: nothing is dropped."""


def row_keys(key: PRNGKeyArray, batch_size: int) -> RowKeys:
    """One key for each row of the global batch, ``(batch_size,)``."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch_size))


def dropout(x: Float[Array, "B ..."], rate: float, keys: RowKeys | None) -> Float[Array, "B ..."]:
    """Zero each element with probability ``rate``, scale the rest (Srivastava et al. 2014).

    Args:
        x: values, the rows first.
        rate: in ``[0, 1)``.
        keys: one key a row, or None to return ``x`` as it is.

    Example:
        >>> x = jnp.ones((2, 1000))
        >>> kept = dropout(x, 0.25, row_keys(jax.random.key(0), 2)) != 0
        >>> bool(abs(kept.mean() - 0.75) < 0.03)
        True
    """
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)


def fold_keys(keys: RowKeys | None, uses: int) -> tuple[RowKeys | None, ...]:
    """Fresh row keys for each of several uses, all derived at once; of None, as many None."""
    if keys is None:
        return (None,) * uses
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
    return tuple(fold(keys, jnp.arange(uses)))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _init(cell: Cell, key: PRNGKeyArray, input_size: int) -> Params:
    return cell.init(key, input_size)


class Recurrent(nnx.Module):
    """One cell run over time.

    Example:
        >>> from lstmjax.cells import LSTM
        >>> layer = Recurrent(LSTM(100), input_size=32, rngs=nnx.Rngs(0))
        >>> hs, final = layer(jnp.ones((64, 500, 32)))
        >>> hs.shape, final.h.shape
        ((64, 500, 100), (64, 100))
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        *,
        reverse: bool = False,
        precision: Precision = "float32",
        engine: str | Engine | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.cell = cell
        self.reverse = reverse
        self.precision = precision
        self.engine = engine
        self.params = nnx.data(jax.tree.map(nnx.Param, _init(cell, rngs.params(), input_size)))

    @property
    def output_size(self) -> int:
        """Features of the output."""
        return jax.eval_shape(lambda: self.cell.initial_carry(1)).h.shape[-1]

    def arrays(self) -> Params:
        """The parameters as the plain pytree that `unroll` takes."""
        return jax.tree.map(
            lambda param: param[...], self.params, is_leaf=lambda p: isinstance(p, nnx.Variable)
        )

    def __call__(
        self, x: Float[Array, "B T D"], initial: Carry | None = None, **options: Any
    ) -> tuple[Float[Array, "B T H"], Carry]:
        """Hidden states and the final carry; ``options`` as in `unroll` (``mask`` etc.)."""
        return unroll(
            self.cell,
            self.arrays(),
            x,
            initial,
            reverse=self.reverse,
            precision=self.precision,
            engine=self.engine,
            **options,
        )


class Bidirectional(nnx.Module):
    """A cell run in both directions, outputs side by side (Schuster & Paliwal 1997).

    Each direction has parameters of its own. Outputs are ``(B, T, 2H)``; the carries form a pair
    (forward, backward).
    """

    def __init__(self, cell: Cell, input_size: int, *, rngs: nnx.Rngs, **settings: Any) -> None:
        self.forward = Recurrent(cell, input_size, rngs=rngs, **settings)
        self.backward = Recurrent(cell, input_size, reverse=True, rngs=rngs, **settings)

    @property
    def output_size(self) -> int:
        """Features of the output."""
        return self.forward.output_size + self.backward.output_size

    def __call__(
        self,
        x: Float[Array, "B T D"],
        initial: tuple[Carry | None, Carry | None] = (None, None),
        **options: Any,
    ) -> tuple[Float[Array, "B T H2"], tuple[Carry, Carry]]:
        """Outputs ``(B, T, 2H)`` and both final carries; ``options`` as in `unroll`."""
        forward, last = self.forward(x, initial[0], **options)
        backward, first = self.backward(x, initial[1], **options)
        return jnp.concatenate([forward, backward], axis=-1), (last, first)


class Stack(nnx.Module):
    """Recurrent layers on top of one another, with dropout between them.

    Example:
        >>> from lstmjax.cells import GRU
        >>> stack = Stack(GRU(8), 3, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0))
        >>> hs, finals = stack(jnp.ones((2, 5, 3)))
        >>> hs.shape, len(finals)
        ((2, 5, 16), 2)
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
        **settings: Any,
    ) -> None:
        kind = Bidirectional if bidirectional else Recurrent
        layers = []
        for _ in range(num_layers):
            layers.append(kind(cell, input_size, rngs=rngs, **settings))
            input_size = layers[-1].output_size
        self.layers = nnx.List(layers)
        self.dropout_rate = dropout_rate

    @property
    def output_size(self) -> int:
        """Features of the output."""
        return self.layers[-1].output_size

    def __call__(
        self,
        x: Float[Array, "B T D"],
        initial: Sequence[Any] | None = None,
        *,
        keys: RowKeys | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "B T H"], list[Any]]:
        """Outputs of the top layer and every layer's final carry, in order."""
        _, outputs, finals = zip(*self.stages(x, initial, keys=keys, **options), strict=True)
        return outputs[-1], list(finals)

    def stages(
        self,
        x: Float[Array, "B T D"],
        initial: Sequence[Any] | None = None,
        *,
        keys: RowKeys | None = None,
        **options: Any,
    ) -> Iterator[tuple[nnx.Module, Array, Any]]:
        """Layer by layer: the layer, its outputs, its final carry."""
        layer_keys = fold_keys(keys, len(self.layers))
        for number, layer in enumerate(self.layers):
            if number:
                x = dropout(x, self.dropout_rate, layer_keys[number])
            carry = () if initial is None else (initial[number],)
            x, final = layer(x, *carry, **options)
            yield layer, x, final


class ConvPool(nnx.Module):
    """Convolution over time, ReLU, max pooling: a front end that shortens the sequence.

    The convolution pads with zeros ("same"); masked inputs count as zeros, and a pooled step is
    valid if any of its steps was. A last, incomplete window is pooled as it is. Windows are counted
    from the first step, so left padding of a length that they do not divide shifts them.
    """

    def __init__(
        self,
        input_size: int,
        filters: int,
        *,
        width: int = 3,
        pool: int = 2,
        precision: Precision = "float32",
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = nnx.Conv(
            input_size,
            filters,
            kernel_size=(width,),
            kernel_init=nnx.initializers.glorot_uniform(),
            precision="highest",
            dtype=jnp.bfloat16 if precision == "bfloat16" else None,
            preferred_element_type=jnp.float32 if precision == "bfloat16" else None,
            rngs=rngs,
        )
        self.pool = pool

    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B P F"], Bool[Array, "B P"] | None]:
        """Pooled features ``(B, ceil(T / pool), filters)`` and their mask."""
        dtype = x.dtype
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
        x = nnx.relu(self.conv(x)).astype(dtype)
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
            mask = self._windows(mask).any(axis=2)
        return self._windows(x).max(axis=2), mask

    def _windows(self, a: Array) -> Array:
        missing = -a.shape[1] % self.pool
        pad = [(0, 0), (0, missing)] + [(0, 0)] * (a.ndim - 2)
        a = jnp.pad(a, pad)
        return a.reshape(a.shape[0], -1, self.pool, *a.shape[2:])


def embedding(vocabulary_size: int, size: int, *, rngs: nnx.Rngs) -> nnx.Embed:
    """A table of vectors, uniform in ±0.05 as in Keras."""
    init = _uniform(0.05)
    return nnx.Embed(vocabulary_size, size, embedding_init=init, rngs=rngs)


def dense(
    input_size: int, size: int, *, precision: Precision = "float32", rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear layer, Glorot-uniform as in Keras, in the given precision."""
    return nnx.Linear(
        input_size,
        size,
        kernel_init=nnx.initializers.glorot_uniform(),
        dot_general=make_dot_general(precision),
        rngs=rngs,
    )


def pool(
    hs: Float[Array, "B T H"],
    final: Any,
    mask: Bool[Array, "B T"] | None,
    kinds: Sequence[Pooling],
) -> Float[Array, "B F"]:
    """One vector a row from the outputs of a recurrence, the kinds side by side.

    Args:
        hs: outputs, zero on masked steps.
        final: final carry, or the pair of both directions.
        mask: valid steps; None means all.
        kinds: ``"last"`` (the final hidden state), ``"mean"``, ``"max"`` over valid steps; a row
            with no valid step pools to zeros.
    """
    steps = jnp.ones(hs.shape[:2], bool) if mask is None else mask
    parts = []
    for kind in kinds:
        if kind == "last":
            carries = [final] if isinstance(final, Carry) else list(final)
            parts.append(jnp.concatenate([carry.h for carry in carries], axis=-1))
        elif kind == "mean":
            count = jnp.maximum(steps.sum(axis=1), 1).astype(hs.dtype)
            parts.append(jnp.where(steps[..., None], hs, 0).sum(axis=1) / count[:, None])
        elif kind == "max":
            top = jnp.where(steps[..., None], hs, jnp.finfo(hs.dtype).min).max(axis=1)
            parts.append(jnp.where(steps.any(axis=1)[:, None], top, 0))
        else:
            raise ValueError(f'pooling must be "last", "mean" or "max", got {kind!r}')
    return jnp.concatenate(parts, axis=-1)


def _uniform(scale: float) -> nnx.Initializer:
    def init(key: PRNGKeyArray, shape: Any, dtype: Any = jnp.float32, **_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -scale, scale)

    return init
