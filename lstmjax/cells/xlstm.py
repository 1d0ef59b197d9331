"""The cells of xLSTM, with exponential gates that cannot overflow: sLSTM and mLSTM."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import log_sigmoid, sigmoid
from jax.typing import DTypeLike

from lstmjax.cells.base import Carry, Cell, Named, Params, StepParams
from lstmjax.precision import Dot
from lstmjax.traced import Size


def _gates(first: Array, m: Array, i: Array, f: Array) -> tuple[Array, Array, Array]:
    """Input and forget gate over exp(m_t), and m_t: what both are kept in proportion to.

    In a sequence's ``first`` step there is nothing to keep in proportion, and m_t = i.
    """
    log_f = log_sigmoid(f)
    new = jnp.where(first, i, jnp.maximum(log_f + m, i))
    return jnp.exp(i - new), jnp.exp(jnp.minimum(log_f + m - new, 0)), new


class SLSTM(Cell):
    """sLSTM: exponential input gate, a normaliser, and recurrence within heads.

    Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", arXiv:2405.04517. With
    ``(z, i, f, o) = x_t W + h_{t-1} R + b``, R block-diagonal in ``heads`` blocks::

        c_t = σ(f) ⊙ c_{t-1} + exp(i) ⊙ tanh(z)
        n_t = σ(f) ⊙ n_{t-1} + exp(i)
        h_t = σ(o) ⊙ c_t / n_t

    c and n are kept as multiples of exp(m_t), ``m_t = max(log σ(f) + m_{t-1}, i)``, which changes
    nothing in h.

    Parameters: ``kernel (D, 4H)``, ``recurrent_kernel (H / heads, 4H)``, ``bias (4H,)``, that of
    the forget gate starting at 1.

    Example:
        >>> SLSTM(8, heads=4).init(jax.random.key(0), input_size=4)["recurrent_kernel"].shape
        (2, 32)
    """

    heads: int = 1
    gates = ("z", "i", "f", "o")
    bias_init = {"f": 1.0}

    class State(NamedTuple):
        """Cell state, normaliser and stabiliser, each ``(B, H)``; n is 0 before the first step."""

        c: Array
        n: Array
        m: Array

    def step(self, pre: Named, state: State, params: Named) -> tuple[Array, State]:
        """The equations above."""
        i, f, m = _gates(state.n == 0, state.m, pre.i, pre.f)
        c = f * state.c + i * jnp.tanh(pre.z)
        n = f * state.n + i
        return sigmoid(pre.o) * c / n, self.State(c, n, m)


class MLSTM(Cell):
    """mLSTM: a matrix for memory in each head, and no recurrence through h.

    Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", arXiv:2405.04517. With
    ``(q, k, v, o) = x_t W + b`` in heads of d units, and ``(i, f) = x_t V + b'``, numbers a head::

        C_t = σ(f) C_{t-1} + exp(i) v kᵀ / √d
        n_t = σ(f) n_{t-1} + exp(i) k / √d
        h_t = σ(o) ⊙ (C_t q) / max(|n_tᵀ q|, 1)

    C and n are kept as multiples of exp(m_t), ``m_t = max(log σ(f) + m_{t-1}, i)``, which changes
    nothing in h.

    Parameters: ``kernel (D, 4H)``, ``bias (4H,)`` and, in ``step``, ``gates (D, 2 heads)`` (i, then
    f), ``gates_bias (2 heads,)``.

    Example:
        >>> MLSTM(8, heads=2).initial_carry(3).state.c.shape
        (3, 2, 4, 4)
    """

    heads: int = 1
    gates = ("q", "k", "v", "o")
    recurrent_gates = ()

    class State(NamedTuple):
        """``c (B, heads, d, d)``, values by keys; ``n (B, heads, d)``; ``m (B, heads)``."""

        c: Array
        n: Array
        m: Array

    @property
    def step_params(self) -> StepParams:
        """What makes input and forget gate."""
        both = 2 * self.heads
        glorot = jax.nn.initializers.glorot_uniform()
        return {"gates": (("D", both), glorot), "gates_bias": ((both,), 0.0)}

    def initial_carry(self, batch_size: Size, dtype: DTypeLike = jnp.float32, **_: object) -> Carry:
        """Zeros."""
        d = self.hidden_size // self.heads
        shapes = (d, d), (d,), ()
        state = (jnp.zeros((batch_size, self.heads, *shape), dtype) for shape in shapes)
        return Carry(jnp.zeros((batch_size, self.hidden_size), dtype), self.State(*state))

    def transition(
        self, params: Params, x: Array, carry: Carry[State], dot: Dot, **more: Named
    ) -> Carry[State]:
        """The equations above."""
        own = params["step"]
        before = carry.state
        q, k, v, o = self.pre_activations(params, x, carry.h, dot)
        q, k, v = (a.reshape(x.shape[0], self.heads, -1) for a in (q, k, v))
        i, f = jnp.split(dot(x, own["gates"]) + own["gates_bias"][None], 2, axis=-1)
        first = jnp.all(before.n == 0, axis=-1)
        i, f, m = _gates(first, before.m, i, f)
        i, f, k = i[..., None], f[..., None], k / k.shape[-1] ** 0.5
        c = f[..., None] * before.c + i[..., None] * v[..., :, None] * k[..., None, :]
        n = f * before.n + i * k
        value = jnp.einsum("bhvk,bhk->bhv", c, q)
        weight = jnp.abs((n * q).sum(-1))
        small, large = jnp.exp(jnp.minimum(m, 0)), jnp.exp(-jnp.maximum(m, 0))
        scale = small / jnp.maximum(weight * small, large)
        h = sigmoid(o) * (value * scale[..., None]).reshape(o.shape)
        return Carry(h, self.State(c, n, m))
