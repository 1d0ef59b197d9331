"""Matrix products in the two precisions that every layer and engine offers."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

Precision = Literal["float32", "bfloat16"]
"""``"float32"``: operands as they are (float64 stays float64), products in full precision.
``"bfloat16"``: operands of every product, those of the gradient too, rounded to bfloat16; sums in
float32; results as wide as the operands came."""

Dot = Callable[[Array, Array], Array]
"""Contracts the last axis of ``x (..., K)`` with the first of ``w (K, N)``."""


def make_dot(mode: Precision) -> Dot:
    """The product ``(..., K) x (K, N) -> (..., N)`` in the given mode.

    Example:
        >>> x, w = jnp.full((2, 3), 1.001), jnp.ones((3, 4))
        >>> [round(float(make_dot(mode)(x, w)[0, 0]), 3) for mode in ("float32", "bfloat16")]
        [3.003, 3.0]
    """
    return _wide_dot if mode == "float32" else _bfloat16_dot


def make_dot_general(mode: Precision) -> Callable[..., Array]:
    """`make_dot` in the form that Flax' layers take as their ``dot_general``."""
    dot = make_dot(mode)

    def dot_general(x: Array, w: Array, dimension_numbers: Any, **_: Any) -> Array:
        assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())), dimension_numbers
        return dot(x, w)

    return dot_general


def make_matmul(
    mode: Precision, dtype: jax.typing.DTypeLike = jnp.float32
) -> Callable[[Array, Array], Array]:
    """`jnp.matmul` in the given mode with results of ``dtype``, for code with its own gradient.

    Operands may have been rounded to bfloat16 beforehand.

    Example:
        >>> a = jnp.full((2, 2), 1.001)
        >>> round(float(make_matmul("bfloat16")(a, a)[0, 0]), 3)
        2.0
    """

    def matmul(a: Array, b: Array) -> Array:
        if mode == "float32":
            return jnp.matmul(a, b, precision="highest")
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(dtype)

    return matmul


def _wide_dot(x: Array, w: Array) -> Array:
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), precision="highest")


# A rule of its own: that of a rounded product would multiply a float32 cotangent with bfloat16
# operands, and round each step's share of the weight gradient.
@jax.custom_vjp
def _bfloat16_dot(x: Array, w: Array) -> Array:
    return _forward(x, w)[0]


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    narrow = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return _contract(*narrow, ((x.ndim - 1,), (0,))).astype(x.dtype), narrow


def _backward(operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = operands
    narrow = g.astype(jnp.bfloat16)
    rows = tuple(range(x.ndim - 1))
    dx = _contract(narrow, w, ((g.ndim - 1,), (1,)))
    dw = _contract(x, narrow, (rows, rows))
    return dx.astype(g.dtype), dw.astype(g.dtype)


def _contract(a: Array, b: Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)


_bfloat16_dot.defvjp(_forward, _backward)
