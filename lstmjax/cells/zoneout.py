"""The LSTM with zoneout."""

from collections.abc import Mapping

from jax import Array

from lstmjax.cells.base import Named
from lstmjax.cells.lstm import LSTM
from lstmjax.cells.noise import Noise, kept


class ZoneoutLSTM(LSTM):
    """LSTM some of whose units keep their value for a step, drawn anew at each.

    Krueger et al. 2017, arXiv:1606.01305. With ``c̃, h̃`` the LSTM's new cell state and output, and
    ``d_c, d_h`` 1 at the rates ``zoneout_c`` and ``zoneout_h``, else 0 (in evaluation: the rates)::

        c_t = d_c ⊙ c_{t-1} + (1 - d_c) ⊙ c̃
        h_t = d_h ⊙ h_{t-1} + (1 - d_h) ⊙ h̃

    Parameters: the LSTM's. The rates are the paper's for characters.

    Example:
        >>> from lstmjax.recurrence import unroll
        >>> cell = ZoneoutLSTM(8, zoneout_c=0.3)
        >>> params, x = cell.init(jax.random.key(0), input_size=4), jnp.ones((2, 5, 4))
        >>> training, _ = unroll(cell, params, x, keys=jax.random.key(1))
        >>> evaluation, _ = unroll(cell, params, x)
    """

    zoneout_c: float = 0.5
    zoneout_h: float = 0.05
    uses_h = True

    @property
    def noise(self) -> Mapping[str, Noise]:
        """Which units keep their values."""
        return {"c": kept(self.zoneout_c), "h": kept(self.zoneout_h)}

    def step(
        self, pre: Named, state: LSTM.State, params: Named, h: Array, noise: Named
    ) -> tuple[Array, LSTM.State]:
        """The equations above."""
        new, (c,) = super().step(pre, state, params)
        c = noise.c * state.c + (1 - noise.c) * c
        return noise.h * h + (1 - noise.h) * new, self.State(c)
