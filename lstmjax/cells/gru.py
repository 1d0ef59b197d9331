"""The gated recurrent unit."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid

from lstmjax.cells.base import Cell


class GRU(Cell):
    """Gated recurrent unit, the reset gate applied after the recurrent product.

    Cho et al. 2014, arXiv:1406.1078 (version 1: this is the form that cuDNN, PyTorch and Keras
    run). With ``x = x_t W + b`` and ``h = h_{t-1} R + b'``, block by block::

        r = σ(x_r + h_r)
        z = σ(x_z + h_z)
        n = tanh(x_n + r ⊙ h_n)
        h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}

    Parameters: ``kernel (D, 3H)``, ``recurrent_kernel (H, 3H)``, ``bias (3H,)``,
    ``recurrent_bias (3H,)``.

    Example:
        >>> GRU(8).initial_carry(batch_size=2).state
        NoState()
    """

    gates = ("r", "z", "n")
    parts_apart = True
    uses_h = True

    def step(self, pre: Any, state: Any, params: Any, h: Array) -> tuple[Array, Any]:
        """The equations above."""
        r = sigmoid(pre.x.r + pre.h.r)
        z = sigmoid(pre.x.z + pre.h.z)
        n = jnp.tanh(pre.x.n + r * pre.h.n)
        return (1 - z) * n + z * h, state
