"""The gated recurrent unit, with the reset gate after the recurrent product and before it."""

from typing import ClassVar

import jax
from jax import Array
from jax.nn import sigmoid, tanh

from lstmjax.cells.base import Activation, Carry, Cell, Named, NoState, Params, Parts
from lstmjax.precision import Dot


class GRU(Cell):
    """Gated recurrent unit, the reset gate applied after the recurrent product.

    Cho et al. 2014, arXiv:1406.1078 (version 1: this is the form that cuDNN, PyTorch and Keras
    run). With ``x = x_t W + b`` and ``h = h_{t-1} R + b'``, block by block::

        r = σ(x_r + h_r)
        z = σ(x_z + h_z)
        n = tanh(x_n + r ⊙ h_n)
        h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}

    Parameters: ``kernel (D, 3H)``, ``recurrent_kernel (H, 3H)``, ``bias (3H,)``,
    ``recurrent_bias (3H,)``.

    Example:
        >>> GRU(8).initial_carry(batch_size=2).state
        NoState()
    """

    activation: Activation = tanh
    recurrent_activation: Activation = sigmoid
    gates = ("r", "z", "n")
    parts_apart = True
    uses_h = True

    def step(
        self, pre: Parts[Named], state: NoState, params: Named, h: Array
    ) -> tuple[Array, NoState]:
        """The equations above."""
        r = self.recurrent_activation(pre.x.r + pre.h.r)
        z = self.recurrent_activation(pre.x.z + pre.h.z)
        n = self.activation(pre.x.n + r * pre.h.n)
        return (1 - z) * n + z * h, state


class ResetFirstGRU(Cell):
    """Gated recurrent unit, the reset gate applied before the recurrent product.

    Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP (arXiv:
    1406.1078, version 3). With ``(r, z) = σ(x_t W_rz + h_{t-1} R_rz + b_rz)``::

        n = tanh(x_t W_n + (r ⊙ h_{t-1}) U + b_n)
        h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}

    The product of ``r ⊙ h`` has to wait for that of h, so a step takes two of them, one after the
    other: `GRU` is the faster one.

    Parameters: ``kernel (D, 3H)``, ``recurrent_kernel (H, 2H)``, ``bias (3H,)`` and, in ``step``,
    ``candidate_kernel (H, H)``, which is U.

    Example:
        >>> params = ResetFirstGRU(8).init(jax.random.key(0), input_size=4)
        >>> params["recurrent_kernel"].shape, params["step"]["candidate_kernel"].shape
        ((8, 16), (8, 8))
    """

    activation: Activation = tanh
    recurrent_activation: Activation = sigmoid
    gates = ("r", "z", "n")
    recurrent_gates = ("r", "z")
    step_params: ClassVar = {"candidate_kernel": (("H", "H"), jax.nn.initializers.orthogonal())}

    def transition(self, params: Params, x: Array, carry: Carry, dot: Dot, **more: Named) -> Carry:
        """The equations above."""
        h = carry.h
        pre = self.pre_activations(params, x, h, dot)
        r, z = self.recurrent_activation(pre.r), self.recurrent_activation(pre.z)
        n = self.activation(pre.n + dot(r * h, params["step"]["candidate_kernel"]))
        return Carry((1 - z) * n + z * h, carry.state)
