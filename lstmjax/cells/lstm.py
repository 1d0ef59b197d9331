"""The long short-term memory: the shortest complete example of a cell."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid

from lstmjax.cells.base import Cell


class LSTM(Cell):
    """Long short-term memory with forget gate.

    Hochreiter & Schmidhuber 1997, "Long Short-Term Memory"; forget gate of Gers et al. 2000,
    "Learning to Forget". With ``(i, f, g, o) = x_t W + h_{t-1} R + b``::

        c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ tanh(g)
        h_t = σ(o) ⊙ tanh(c_t)

    Parameters: ``kernel (D, 4H)``, ``recurrent_kernel (H, 4H)``, ``bias (4H,)``, the forget
    gate's bias starting at 1 (Jozefowicz et al. 2015).

    Example:
        >>> import jax
        >>> from lstmjax.recurrence import unroll
        >>> cell = LSTM(100)
        >>> params = cell.init(jax.random.key(0), input_size=32)
        >>> hs, final = unroll(cell, params, jax.numpy.ones((64, 500, 32)))
        >>> hs.shape, final.h.shape, final.state.c.shape
        ((64, 500, 100), (64, 100), (64, 100))
    """

    gates = ("i", "f", "g", "o")
    bias_init = {"f": 1.0}

    class State(NamedTuple):
        """Cell state ``c (B, H)``."""

        c: Array

    def step(self, pre: Any, state: Any, params: Any) -> tuple[Array, Any]:
        """The equations above."""
        c = sigmoid(pre.f) * state.c + sigmoid(pre.i) * jnp.tanh(pre.g)
        return sigmoid(pre.o) * jnp.tanh(c), self.State(c)
