"""Functions for NumPy references that also take complex numbers, analytic where they are smooth.

A gradient is then Im f(p + iε) / ε (`tests.test_every_cell`), exact at ε = 1e-30.
"""

from typing import Any

import numpy as np

from tests.numpy_reference import Params, sigmoid

Array = Any
"""`numpy.ndarray` of float64 or complex128."""

Step = tuple[Array, tuple[Array, ...], dict]
"""h, the state, and what a hand-derived backward pass would need: nothing here."""

__all__ = [
    "Array",
    "Params",
    "Step",
    "absolute",
    "blocks",
    "maximum",
    "relu",
    "sigmoid",
    "softplus",
]


def blocks(params: Params, x: Array, h: Array, gates: int) -> list[Array]:
    """``x W + h R + b`` of all gates, which all have the three of them."""
    a = x @ params["kernel"] + h @ params["recurrent_kernel"] + params["bias"]
    return np.split(a, gates, axis=-1)


def maximum(a: Array, b: Array) -> Array:
    return np.where(np.real(a) >= np.real(b), a, b)


def absolute(a: Array) -> Array:
    return np.where(np.real(a) < 0, -a, a)


def relu(a: Array) -> Array:
    return maximum(a, np.zeros_like(a))


def softplus(a: Array) -> Array:
    return np.log(1 + np.exp(a))
