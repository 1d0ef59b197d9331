"""The LSTM with a projection of its output."""

import jax
from jax import Array

from lstmjax.cells.base import Carry, Named, Params, StepParams
from lstmjax.cells.peephole import PeepholeLSTM
from lstmjax.precision import Dot


class ProjectedLSTM(PeepholeLSTM):
    """LSTM with peepholes and a recurrent projection (LSTMP): many units, narrow products.

    Sak, Senior & Beaufays 2014, arXiv:1402.1128. With m_t what the LSTM with peepholes puts out::

        h_t = m_t P

    Outputs, and what the next step's gates see, are the ``projection`` numbers of h_t. Leave
    the peepholes at zero for what PyTorch calls ``proj_size``.

    Parameters: those of `lstmjax.cells.PeepholeLSTM` but for ``recurrent_kernel (P, 4H)``, and in
    ``step`` ``projection (H, P)``; P is ``projection``, by default half of the units.

    Example:
        >>> from lstmjax.recurrence import unroll
        >>> cell = ProjectedLSTM(100, projection=20)
        >>> params = cell.init(jax.random.key(0), input_size=32)
        >>> unroll(cell, params, jnp.ones((64, 10, 32)))[0].shape
        (64, 10, 20)
    """

    projection: int | None = None

    @property
    def output_size(self) -> int:
        """Numbers of h."""
        return self.projection or max(1, self.hidden_size // 2)

    @property
    def step_params(self) -> StepParams:
        """The projection."""
        shape = ("H", self.output_size)
        return {"projection": (shape, jax.nn.initializers.glorot_uniform())}

    def transition(self, params: Params, x: Array, carry: Carry, dot: Dot, **more: Named) -> Carry:
        """The equation above."""
        m, state = super().transition(params, x, carry, dot, **more)
        return Carry(dot(m, params["step"]["projection"]), state)
