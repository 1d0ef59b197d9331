"""Cells in continuous time: CfC, LMU, phased LSTM, antisymmetric RNN."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import sigmoid
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from lstmjax.cells.base import Carry, Cell, Named, NoState, Params, Parts, StepParams, UnitParams
from lstmjax.cells.lstm import LSTM
from lstmjax.precision import Dot
from lstmjax.traced import Size


class CfC(Cell):
    """Closed-form continuous-time network: how long a step took decides how far it goes.

    Hasani et al. 2022, arXiv:2106.13898, equation 3 without a common backbone. With
    ``(f, g, k) = x_t W + h_{t-1} R + b`` and the time gap ``dt``, a step input::

        s = σ(-f ⊙ dt)
        h_t = s ⊙ tanh(g) + (1 - s) ⊙ tanh(k)

    Parameters: ``kernel (D, 3H)``, ``recurrent_kernel (H, 3H)``, ``bias (3H,)``.

    Example:
        >>> from lstmjax.recurrence import unroll
        >>> cell = CfC(8)
        >>> params = cell.init(jax.random.key(0), input_size=4)
        >>> hs, _ = unroll(cell, params, jnp.ones((2, 5, 4)), inputs={"dt": jnp.ones((2, 5))})
    """

    gates = ("f", "g", "k")
    step_inputs = {"dt": 1}

    def step(
        self, pre: Named, state: NoState, params: Named, inputs: Named
    ) -> tuple[Array, NoState]:
        """The equations above."""
        s = sigmoid(-pre.f * inputs.dt)
        return s * jnp.tanh(pre.g) + (1 - s) * jnp.tanh(pre.k), state


class PhasedLSTM(LSTM):
    """LSTM whose units open for a part of a period of their own only.

    Neil, Pfeiffer & Liu 2016, arXiv:1610.09513. With the time ``t`` of a step, a step input, and
    ``φ = ((t - s) mod τ) / τ``::

        k = 2 φ / r           φ < r / 2
            2 - 2 φ / r       r / 2 ≤ φ < r
            leak φ            else
        c_t = k ⊙ c̃ + (1 - k) ⊙ c_{t-1}
        h_t = k ⊙ h̃ + (1 - k) ⊙ h_{t-1}

    with ``c̃, h̃`` the LSTM's new cell state and output. ``leak`` is 0 in evaluation.

    Parameters: the LSTM's and ``units``: ``log_period``, ``shift`` and ``open`` (log τ, s and r),
    each ``(H,)``.

    Example:
        >>> sorted(PhasedLSTM(8).init(jax.random.key(0), input_size=4)["units"])
        ['log_period', 'open', 'shift']
    """

    leak: float = 1e-3
    longest: float = 1000.0
    uses_h = True
    step_inputs = {"t": 1}

    @property
    def unit_params(self) -> UnitParams:
        """Periods between 1 and ``longest``, open for a twentieth of them."""

        def log_period(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            return jax.random.uniform(key, shape, dtype, 0, float(np.log(self.longest)))

        return {"log_period": log_period, "shift": jax.nn.initializers.uniform(1.0), "open": 0.05}

    def step(
        self, pre: Named, state: LSTM.State, params: Named, h: Array, inputs: Named
    ) -> tuple[Array, LSTM.State]:
        """The equations above."""
        new, (c,) = super().step(pre, state, params)
        turns = (inputs.t - params.shift) * jnp.exp(-params.log_period)
        phase = turns - jnp.floor(turns)
        up = 2 * phase / params.open
        k = jnp.where(up < 1, up, jnp.where(up < 2, 2 - up, self.leak * phase))
        return k * new + (1 - k) * h, self.State(k * c + (1 - k) * state.c)


class AntisymmetricRNN(Cell):
    """Recurrent network that is a stable differential equation, one small step of it at a time.

    Chang et al. 2019, arXiv:1902.09689, with its gate. With ``M = R - Rᵀ - γ I`` and
    ``(a, z) = x_t W + b``::

        h_t = h_{t-1} + ε σ(z + h_{t-1} M) ⊙ tanh(a + h_{t-1} M)

    Parameters: ``kernel (D, 2H)``, ``recurrent_kernel (H, H)``, ``bias (2H,)``.

    Example:
        >>> params = AntisymmetricRNN(8).init(jax.random.key(0), input_size=4)
        >>> params["recurrent_kernel"].shape
        (8, 8)
    """

    epsilon: float = 0.1
    gamma: float = 0.01
    gates = ("a", "z")
    recurrent_gates = ("a",)
    recurrent_bias_gates = ()
    parts_apart = True
    uses_h = True

    def prepare(self, params: Params, key: PRNGKeyArray | None = None) -> Params:
        """M in place of R."""
        r = params["recurrent_kernel"]
        m = r - r.T - self.gamma * jnp.eye(len(r), dtype=r.dtype)
        return {**params, "recurrent_kernel": m}

    def step(
        self, pre: Parts[Named], state: NoState, params: Named, h: Array
    ) -> tuple[Array, NoState]:
        """The equation above."""
        change = sigmoid(pre.x.z + pre.h.a) * jnp.tanh(pre.x.a + pre.h.a)
        return h + self.epsilon * change, state


class LMU(Cell):
    """Legendre memory unit: a memory of fixed weights that holds the last ``window`` steps.

    Voelker, Kajić & Eliasmith 2019, "Legendre Memory Units". The memory m has ``order`` numbers::

        u_t = x_t e_x + h_{t-1} e_h + m_{t-1} e_m         one number
        m_t = m_{t-1} A + u_t B
        h_t = tanh(x_t W + h_{t-1} R + m_t V)

    A and B are what holding u for one step makes of the Legendre delay system of ``window`` steps.

    Parameters: ``kernel (D, H)``, ``recurrent_kernel (H, H)`` and, in ``step``, ``e_x (D, 1)``,
    ``e_h (H, 1)``, ``e_m (order, 1)``, ``memory_kernel (order, H)``, which is V.

    Example:
        >>> LMU(8, order=4).initial_carry(2).state.m.shape
        (2, 4)
    """

    order: int = 6
    window: float = 100.0
    gates = ("a",)
    bias_gates = ()

    class State(NamedTuple):
        """Memory ``m (B, order)``."""

        m: Array

    @property
    def step_params(self) -> StepParams:
        """What writes the memory, and what reads it."""
        lecun, glorot = jax.nn.initializers.lecun_uniform(), jax.nn.initializers.glorot_normal()
        return {
            "e_x": (("D", 1), lecun),
            "e_h": (("H", 1), lecun),
            "e_m": ((self.order, 1), 0.0),
            "memory_kernel": ((self.order, "H"), glorot),
        }

    def initial_carry(self, batch_size: Size, dtype: DTypeLike = jnp.float32, **_: object) -> Carry:
        """Zeros."""
        h = jnp.zeros((batch_size, self.hidden_size), dtype)
        return Carry(h, self.State(jnp.zeros((batch_size, self.order), dtype)))

    def transition(self, params: Params, x: Array, carry: Carry, dot: Dot, **more: Named) -> Carry:
        """The equations above."""
        own, h, (m,) = params["step"], carry.h, carry.state
        a, b = (jnp.asarray(w, x.dtype) for w in self._memory())
        u = dot(x, own["e_x"]) + dot(h, own["e_h"]) + dot(m, own["e_m"])
        m = dot(m, a) + u * b
        pre = self.pre_activations(params, x, h, dot)
        return Carry(jnp.tanh(pre.a + dot(m, own["memory_kernel"])), self.State(m))

    def _memory(self) -> tuple[np.ndarray, np.ndarray]:
        """A ``(order, order)`` and B ``(1, order)``, for m as a row."""
        from scipy.linalg import expm  # which JAX needs, too, but not to be imported

        i, j = np.meshgrid(np.arange(self.order), np.arange(self.order), indexing="ij")
        rates = np.where(i < j, -1.0, (-1.0) ** (i - j + 1)) * (2 * i + 1) / self.window
        input_rates = (-1.0) ** i[:, :1] * (2 * i[:, :1] + 1) / self.window
        whole = np.zeros((self.order + 1, self.order + 1))
        whole[:-1, :-1], whole[:-1, -1:] = rates, input_rates
        held = expm(whole)
        return held[:-1, :-1].T, held[:-1, -1:].T
