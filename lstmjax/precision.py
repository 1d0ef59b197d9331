"""Matrix products in the two precisions that every layer and engine offers."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

Precision = Literal["float32", "bfloat16"]
"""``"float32"``: operands as they are (float64 stays float64), products in full precision.
``"bfloat16"``: operands rounded to bfloat16, accumulation in float32."""

Dot = Callable[[Array, Array], Array]
"""Contracts the last axis of ``x (..., K)`` with the first of ``w (K, N)``."""


def dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    mode: Precision = "float32",
    **kwargs: Any,
) -> Array:
    """`jax.lax.dot_general` in the given mode; Flax layers accept it as their ``dot_general``.

    The result has the operands' dtype in both modes, so states and sums stay wide.
    """
    del precision, preferred_element_type
    if mode == "float32":
        return lax.dot_general(lhs, rhs, dimension_numbers, precision="highest", **kwargs)
    out = lax.dot_general(
        lhs.astype(jnp.bfloat16),
        rhs.astype(jnp.bfloat16),
        dimension_numbers,
        preferred_element_type=jnp.float32,
        **kwargs,
    )
    return out.astype(lhs.dtype)


def make_dot(mode: Precision) -> Dot:
    """The product ``(..., K) x (K, N) -> (..., N)`` in the given mode."""
    product = functools.partial(dot_general, mode=mode)

    def dot(x: Array, w: Array) -> Array:
        return product(x, w, (((x.ndim - 1,), (0,)), ((), ())))

    return dot
