"""LSTMs that drop what recurs: updates of the cell state, h, or the weights of h."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PRNGKeyArray

from lstmjax.cells.base import Named, Params
from lstmjax.cells.lstm import LSTM
from lstmjax.cells.noise import Noise, dropped


class RecurrentDropoutLSTM(LSTM):
    """LSTM that drops elements of the update of its cell state: dropout without memory loss.

    Semeniuta, Severyn & Barth 2016, arXiv:1603.05118. With ``d`` 0 at the rate ``rate``, else
    ``1 / (1 - rate)``::

        c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ d ⊙ tanh(g)
        h_t = σ(o) ⊙ tanh(c_t)

    Parameters: the LSTM's. ``every`` says whether d is drawn for each step or for a sequence; the
    paper has both.

    Example:
        >>> RecurrentDropoutLSTM(8, rate=0.5, every="sequence").noise["g"].every
        'sequence'
    """

    rate: float = 0.25
    every: Literal["step", "sequence"] = "step"

    @property
    def noise(self) -> Mapping[str, Noise]:
        """What the updates are multiplied with."""
        return {"g": dropped(self.rate, self.every)}

    def step(
        self, pre: Named, state: LSTM.State, params: Named, noise: Named
    ) -> tuple[Array, LSTM.State]:
        """The equations above."""
        i, f, o = map(self.recurrent_activation, (pre.i, pre.f, pre.o))
        c = f * state.c + i * noise.g * self.activation(pre.g)
        return o * self.activation(c), self.State(c)


class VariationalLSTM(LSTM):
    """LSTM whose products see h with the same units dropped at every step of a sequence.

    Gal & Ghahramani 2016, arXiv:1512.05287, with one mask for all gates: ``h_{t-1} ⊙ d`` in place
    of h_{t-1} in the products, d being 0 at the rate ``rate``, else ``1 / (1 - rate)``. Drop units
    of the input likewise before the recurrence.

    Parameters: the LSTM's.

    Example:
        >>> VariationalLSTM(8, rate=0.5).noise["h"].every
        'sequence'
    """

    rate: float = 0.25

    @property
    def noise(self) -> Mapping[str, Noise]:
        """What h is multiplied with."""
        return {"h": dropped(self.rate, "sequence")}

    def recur(self, h: Array, noise: Named) -> Array:
        """What the recurrent product sees."""
        return h * noise.h

    def step(
        self, pre: Named, state: LSTM.State, params: Named, noise: Named
    ) -> tuple[Array, LSTM.State]:
        """The LSTM's."""
        return super().step(pre, state, params)


class WeightDropLSTM(LSTM):
    """LSTM that drops recurrent weights, the same ones at every step and in every row.

    Merity, Keskar & Socher 2018, "Regularizing and Optimizing LSTM Language Models", arXiv:
    1708.02182 (DropConnect of Wan et al. 2013 on R)::

        R ⊙ d in place of R;  d = 0 at the rate ``rate``, else 1 / (1 - rate)

    Parameters: the LSTM's.

    Example:
        >>> cell = WeightDropLSTM(8)
        >>> params = cell.init(jax.random.key(0), input_size=4)
        >>> dropped = cell.prepare(params, jax.random.key(1))["recurrent_kernel"] == 0
        >>> bool(abs(dropped.mean() - 0.5) < 0.1)
        True
    """

    rate: float = 0.5

    def prepare(self, params: Params, key: PRNGKeyArray | None = None) -> Params:
        """With weights dropped, while training."""
        if key is None:
            return params
        r = params["recurrent_kernel"]
        keep = jax.random.bernoulli(key, 1 - self.rate, r.shape)
        return {**params, "recurrent_kernel": jnp.where(keep, r / (1 - self.rate), 0)}
