"""The plain recurrent network."""

from jax import Array
from jax.nn import tanh

from lstmjax.cells.base import Activation, Cell, Named, NoState


class SimpleRNN(Cell):
    """Plain recurrent network.

    Elman 1990, "Finding Structure in Time"::

        h_t = tanh(x_t W + h_{t-1} R + b)

    Parameters: ``kernel (D, H)``, ``recurrent_kernel (H, H)``, ``bias (H,)``.

    Example:
        >>> SimpleRNN(8, activation=jax.nn.relu)
        SimpleRNN(8, activation=relu)
    """

    activation: Activation = tanh
    gates = ("a",)

    def step(self, pre: Named, state: NoState, params: Named) -> tuple[Array, NoState]:
        """The equation above."""
        return self.activation(pre.a), state
