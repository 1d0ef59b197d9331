"""Cells without anything recurrent in their gates: minGRU and minLSTM."""

from jax import Array
from jax.nn import log_sigmoid, sigmoid

from lstmjax.cells.base import Cell, Named, NoState


class MinGRU(Cell):
    """GRU without its reset gate, its tanh, and h in its gates.

    Feng et al. 2024, "Were RNNs All We Needed?", arXiv:2410.01201. With ``(z, n) = x_t W + b``::

        h_t = (1 - σ(z)) ⊙ h_{t-1} + σ(z) ⊙ n

    Parameters: ``kernel (D, 2H)``, ``bias (2H,)``.

    Example:
        >>> sorted(MinGRU(8).init(jax.random.key(0), input_size=4))
        ['bias', 'kernel']
    """

    gates = ("z", "n")
    recurrent_gates = ()
    uses_h = True

    def step(self, pre: Named, state: NoState, params: Named, h: Array) -> tuple[Array, NoState]:
        """The equation above."""
        z = sigmoid(pre.z)
        return (1 - z) * h + z * pre.n, state


class MinLSTM(Cell):
    """LSTM without its output gate, its tanh, and h in its gates, which add up to 1.

    Feng et al. 2024, "Were RNNs All We Needed?", arXiv:2410.01201. With ``(f, i, n) = x_t W + b``::

        f' = σ(f) / (σ(f) + σ(i)),   i' = σ(i) / (σ(f) + σ(i))
        h_t = f' ⊙ h_{t-1} + i' ⊙ n

    Parameters: ``kernel (D, 3H)``, ``bias (3H,)``.

    Example:
        >>> MinLSTM(8).init(jax.random.key(0), input_size=4)["kernel"].shape
        (4, 24)
    """

    gates = ("f", "i", "n")
    recurrent_gates = ()
    uses_h = True

    def step(self, pre: Named, state: NoState, params: Named, h: Array) -> tuple[Array, NoState]:
        """The equations above, in a form that no sum of two small numbers divides."""
        f = sigmoid(log_sigmoid(pre.f) - log_sigmoid(pre.i))
        return f * h + (1 - f) * pre.n, state
