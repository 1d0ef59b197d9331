"""Biases that make an LSTM remember for as long as it has to."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from lstmjax.cells.base import Initializer, Params
from lstmjax.cells.lstm import LSTM


def chrono(longest: int) -> Initializer:
    """Biases of a forget gate: units forget over times uniform between 1 step and ``longest`` - 1.

    Tallec & Ollivier 2018, "Can recurrent neural networks warp time?", arXiv:1804.11188::

        b_f = log u,  u uniform in [1, longest - 1]

    Example:
        >>> float(chrono(100)(jax.random.key(0), (1000,), jnp.float32).max()) < 4.6
        True
    """
    if longest <= 2:
        raise ValueError(f"longest must be more than 2, got {longest}")

    def draw(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, 1, longest - 1))

    return draw


class ChronoLSTM(LSTM):
    """LSTM with chrono initialisation: ``b_f`` as `chrono` draws it, and ``b_i = -b_f``.

    Tallec & Ollivier 2018, arXiv:1804.11188. ``longest`` is how many steps apart things may be that
    have to do with each other.

    Parameters: the LSTM's; the equations are the LSTM's, too.

    Example:
        >>> bias = ChronoLSTM(8).init(jax.random.key(0), input_size=4)["bias"]
        >>> bool((bias[:8] == -bias[8:16]).all())
        True
    """

    longest: int = 1000

    def init(
        self, key: PRNGKeyArray, input_size: int, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> Params:
        """As the LSTM's, but for the biases of input and forget gate."""
        params = super().init(key, input_size, dtype)
        _, _, g, o = jnp.split(params["bias"], 4)
        f = chrono(self.longest)(jax.random.fold_in(key, 1), g.shape, g.dtype)
        return {**params, "bias": jnp.concatenate([-f, f, g, o])}
