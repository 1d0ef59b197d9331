"""The long short-term memory: the shortest complete example of a cell."""

from typing import NamedTuple

from jax import Array
from jax.nn import sigmoid, tanh

from lstmjax.cells.base import Activation, Cell, Named


class LSTM(Cell):
    """Long short-term memory with forget gate.

    Hochreiter & Schmidhuber 1997, "Long Short-Term Memory"; forget gate of Gers et al. 2000,
    "Learning to Forget". With ``(i, f, g, o) = x_t W + h_{t-1} R + b``::

        c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ tanh(g)
        h_t = σ(o) ⊙ tanh(c_t)

    Parameters: ``kernel (D, 4H)``, ``recurrent_kernel (H, 4H)``, ``bias (4H,)``, that of the
    forget gate starting at 1 (Jozefowicz et al. 2015).

    Example:
        >>> from lstmjax.recurrence import unroll
        >>> params = LSTM(100).init(jax.random.key(0), input_size=32)
        >>> hs, final = unroll(LSTM(100), params, jnp.ones((64, 500, 32)))
        >>> hs.shape, final.h.shape, final.state.c.shape
        ((64, 500, 100), (64, 100), (64, 100))
    """

    activation: Activation = tanh
    recurrent_activation: Activation = sigmoid
    gates = ("i", "f", "g", "o")
    bias_init = {"f": 1.0}

    class State(NamedTuple):
        """Cell state ``c (B, H)``."""

        c: Array

    def step(self, pre: Named, state: State, params: Named) -> tuple[Array, State]:
        """The equations above."""
        i, f, o = map(self.recurrent_activation, (pre.i, pre.f, pre.o))
        c = f * state.c + i * self.activation(pre.g)
        return o * self.activation(c), self.State(c)
