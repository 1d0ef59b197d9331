"""LSTMs with one gate for what to forget and what to take in."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid

from lstmjax.cells.base import Cell, Named, NoState


class CoupledLSTM(Cell):
    """LSTM with coupled input and forget gate, without peepholes.

    Greff et al. 2017, "LSTM: A Search Space Odyssey", arXiv:1503.04069 (CIFG and NP at once, which
    cost nothing there; `lstmjax.cells.CIFG` has the peepholes). With
    ``(i, g, o) = x_t W + h_{t-1} R + b``::

        c_t = (1 - σ(i)) ⊙ c_{t-1} + σ(i) ⊙ tanh(g)
        h_t = σ(o) ⊙ tanh(c_t)

    Parameters: ``kernel (D, 3H)``, ``recurrent_kernel (H, 3H)``, ``bias (3H,)``, that of the input
    gate starting at -1, so that 1 - σ(i) is the LSTM's σ(1).

    Example:
        >>> CoupledLSTM(8).init(jax.random.key(0), input_size=4)["kernel"].shape
        (4, 24)
    """

    gates = ("i", "g", "o")
    bias_init = {"i": -1.0}

    class State(NamedTuple):
        """Cell state ``c (B, H)``."""

        c: Array

    def step(self, pre: Named, state: State, params: Named) -> tuple[Array, State]:
        """The equations above."""
        i = sigmoid(pre.i)
        c = (1 - i) * state.c + i * jnp.tanh(pre.g)
        return sigmoid(pre.o) * jnp.tanh(c), self.State(c)


class JANET(Cell):
    """LSTM that is left with a forget gate only.

    van der Westhuizen & Lasenby 2018, "The unreasonable effectiveness of the forget gate",
    arXiv:1804.04849. With ``(f, g) = x_t W + h_{t-1} R + b``::

        h_t = σ(f) ⊙ h_{t-1} + (1 - σ(f - β)) ⊙ tanh(g)

    The paper's c and h are one and the same. It starts with the biases of chrono initialisation:
    `lstmjax.cells.chrono` as ``f_bias``.

    Parameters: ``kernel (D, 2H)``, ``recurrent_kernel (H, 2H)``, ``bias (2H,)``, that of the forget
    gate starting at 1.

    Example:
        >>> JANET(8, beta=0.0)
        JANET(8, beta=0.0)
    """

    beta: float = 1.0
    gates = ("f", "g")
    bias_init = {"f": 1.0}
    uses_h = True

    def step(self, pre: Named, state: NoState, params: Named, h: Array) -> tuple[Array, NoState]:
        """The equation above."""
        return sigmoid(pre.f) * h + (1 - sigmoid(pre.f - self.beta)) * jnp.tanh(pre.g), state
