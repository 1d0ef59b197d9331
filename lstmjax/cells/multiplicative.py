"""LSTMs whose input and hidden state act on one another before the gates see them."""

from typing import ClassVar

import jax
from jax import Array
from jax.nn import sigmoid

from lstmjax.cells.base import Carry, Named, Params, StepParams
from lstmjax.cells.lstm import LSTM
from lstmjax.precision import Dot

_glorot = jax.nn.initializers.glorot_uniform()
_orthogonal = jax.nn.initializers.orthogonal()


class MultiplicativeLSTM(LSTM):
    """LSTM with recurrent weights of its own for each input.

    Krause et al. 2016, arXiv:1609.07959. In place of h_{t-1} the products of the gates see::

        m_t = (x_t W_m) ⊙ (h_{t-1} R_m)

    Parameters: the LSTM's and, in ``step``, ``input_factor (D, H)`` and ``hidden_factor (H, H)``,
    which are W_m and R_m.

    Example:
        >>> params = MultiplicativeLSTM(8).init(jax.random.key(0), input_size=4)
        >>> params["step"]["input_factor"].shape
        (4, 8)
    """

    step_params: ClassVar = {
        "input_factor": (("D", "H"), _glorot),
        "hidden_factor": (("H", "H"), _orthogonal),
    }

    def transition(self, params: Params, x: Array, carry: Carry, dot: Dot, **more: Named) -> Carry:
        """The equation above."""
        own = params["step"]
        m = dot(x, own["input_factor"]) * dot(carry.h, own["hidden_factor"])
        return super().transition(params, x, Carry(m, carry.state), dot, **more)


class MogrifierLSTM(LSTM):
    """LSTM whose input and hidden state gate each other in turns before its step.

    Melis, Kočiský & Blunsom 2020, arXiv:1909.01792. With x^{-1} = x_t and h^0 = h_{t-1}::

        x^i = 2 σ(h^{i-1} Q_i) ⊙ x^{i-2}    i odd, up to ``rounds``
        h^i = 2 σ(x^{i-1} R_i) ⊙ h^{i-2}    i even

    The LSTM's products see the last of both.

    Parameters: the LSTM's and, in ``step``, ``q1 (H, D)``, ``r2 (D, H)``, ``q3 (H, D)`` and so on.

    Example:
        >>> sorted(MogrifierLSTM(8, rounds=3).init(jax.random.key(0), input_size=4)["step"])
        ['q1', 'q3', 'r2']
    """

    rounds: int = 5

    @property
    def step_params(self) -> StepParams:
        """The matrices of the rounds."""
        kinds = {1: ("q", ("H", "D")), 0: ("r", ("D", "H"))}
        rounds = [(i, *kinds[i % 2]) for i in range(1, self.rounds + 1)]
        return {f"{name}{i}": (shape, _glorot) for i, name, shape in rounds}

    def transition(self, params: Params, x: Array, carry: Carry, dot: Dot, **more: Named) -> Carry:
        """The equations above."""
        own, h = params["step"], carry.h
        for i in range(1, self.rounds + 1):
            if i % 2:
                x = 2 * sigmoid(dot(h, own[f"q{i}"])) * x
            else:
                h = 2 * sigmoid(dot(x, own[f"r{i}"])) * h
        return super().transition(params, x, Carry(h, carry.state), dot, **more)
