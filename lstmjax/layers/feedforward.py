"""Layers before and behind the recurrent ones: embedding, convolution, dense."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, PRNGKeyArray

from lstmjax.layers.base import cleared
from lstmjax.precision import DotGeneral, Precision, PrecisionLike, as_precision, make_dot
from lstmjax.shown import Shown


@dataclasses.dataclass(frozen=True)
class _Product:
    """A convolution over time as one product with the windows, as `nnx.Conv` calls it.

    On CPUs XLA's own is 55 times slower inside a loop, and three times with a kernel a replica.
    """

    precision: Precision

    def __call__(
        self, x: Float[Array, "B T D"], kernel: Float[Array, "W D F"], *_: object, **__: object
    ) -> Float[Array, "B T F"]:
        width, steps = kernel.shape[0], x.shape[1]
        before = (width - 1) // 2
        x = jnp.pad(x, [(0, 0), (before, width - 1 - before), (0, 0)])
        windows = jnp.concatenate([x[:, n : n + steps] for n in range(width)], axis=-1)
        return make_dot(self.precision)(windows, kernel.reshape(-1, kernel.shape[-1]))


class ConvPool(Shown, nnx.Module):
    """Convolution over time, ReLU, max pooling: a front end that shortens the sequence.

    The convolution pads with zeros ("same"); masked inputs count as zeros, and a pooled step is
    valid if any of its steps was. A last, incomplete window is pooled as it is. Windows are counted
    from the first step, so left padding of a length that they do not divide shifts them.

    Example:
        >>> layer = ConvPool(3, filters=8, pool=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 7, 3)))[0].shape
        (4, 4, 8)
    """

    def __init__(
        self,
        input_size: int,
        filters: int,
        *,
        width: int = 3,
        pool: int = 2,
        precision: PrecisionLike = "float32",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = nnx.Conv(
            input_size,
            filters,
            kernel_size=(width,),
            kernel_init=nnx.initializers.glorot_uniform(),
            conv_general_dilated=_Product(as_precision(precision)),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.dtype = dtype
        self.pool = pool

    def _made_of(self) -> dict[str, object]:
        conv = self.conv
        sizes = {"input_size": conv.in_features, "filters": conv.out_features}
        return {**sizes, "width": conv.kernel_size[0], "param_dtype": conv.param_dtype}

    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B P F"], Bool[Array, "B P"] | None]:
        """Pooled features ``(B, ceil(T / pool), filters)`` and their mask."""
        dtype = self.dtype or x.dtype
        x = nnx.relu(self.conv(cleared(x, mask))).astype(dtype)
        if mask is not None:
            x = cleared(x, mask)
            mask = self._windows(mask).any(axis=2)
        return self._windows(x).max(axis=2), mask

    def _windows(self, a: Array) -> Array:
        batch, steps, *rest = a.shape
        windows = -(-steps // self.pool)
        a = jnp.pad(a, [(0, 0), (0, windows * self.pool - steps)] + [(0, 0)] * len(rest))
        return a.reshape(batch, windows, self.pool, *rest)


def embedding(
    vocabulary_size: int,
    size: int,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Embed:
    """A table of vectors, uniform in ±0.05 as in Keras."""
    return nnx.Embed(
        vocabulary_size,
        size,
        embedding_init=_uniform,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def dense(
    input_size: int,
    size: int,
    *,
    precision: PrecisionLike = "float32",
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A linear layer, Glorot-uniform as in Keras, in the given precision."""
    return nnx.Linear(
        input_size,
        size,
        kernel_init=nnx.initializers.glorot_uniform(),
        dot_general=DotGeneral(as_precision(precision)),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def _uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, **_: object
) -> Array:
    return jax.random.uniform(key, shape, dtype, -0.05, 0.05)
