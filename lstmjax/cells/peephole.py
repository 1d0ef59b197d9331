"""The LSTM whose gates look at the cell state."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid

from lstmjax.cells.base import Cell, Named


class PeepholeLSTM(Cell):
    """LSTM with peephole connections.

    Gers, Schraudolph & Schmidhuber 2002, "Learning Precise Timing with LSTM Recurrent Networks".
    With ``(i, f, g, o) = x_t W + h_{t-1} R + b`` and per-unit weights ``p``::

        c_t = σ(f + p_f ⊙ c_{t-1}) ⊙ c_{t-1} + σ(i + p_i ⊙ c_{t-1}) ⊙ tanh(g)
        h_t = σ(o + p_o ⊙ c_t) ⊙ tanh(c_t)

    Parameters: the LSTM's and ``units``: ``p_i``, ``p_f``, ``p_o``, each ``(H,)``, starting at 0,
    so that an untrained cell is the plain LSTM.

    Example:
        >>> import jax
        >>> sorted(PeepholeLSTM(8).init(jax.random.key(0), input_size=4)["units"])
        ['p_f', 'p_i', 'p_o']
    """

    gates = ("i", "f", "g", "o")
    bias_init = {"f": 1.0}
    unit_params = {"p_i": 0.0, "p_f": 0.0, "p_o": 0.0}

    class State(NamedTuple):
        """Cell state ``c (B, H)``."""

        c: Array

    def step(self, pre: Named, state: State, params: Named) -> tuple[Array, State]:
        """The equations above."""
        i = sigmoid(pre.i + params.p_i * state.c)
        f = sigmoid(pre.f + params.p_f * state.c)
        c = f * state.c + i * jnp.tanh(pre.g)
        return sigmoid(pre.o + params.p_o * c) * jnp.tanh(c), self.State(c)
