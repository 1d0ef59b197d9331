"""The minimal gated unit."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid

from lstmjax.cells.base import Carry, Cell, Named, Params
from lstmjax.precision import Dot


class MGU(Cell):
    """Minimal gated unit: a GRU with one gate for both purposes.

    Zhou et al. 2016, "Minimal Gated Unit for Recurrent Neural Networks", arXiv:1603.09420. With
    ``f = σ(x_t W_f + h_{t-1} R + b_f)``::

        n = tanh(x_t W_n + (f ⊙ h_{t-1}) U + b_n)
        h_t = (1 - f) ⊙ h_{t-1} + f ⊙ n

    Parameters: ``kernel (D, 2H)``, ``recurrent_kernel (H, H)``, ``bias (2H,)`` and, in ``step``,
    ``candidate_kernel (H, H)``, which is U.

    Example:
        >>> MGU(8).init(jax.random.key(0), input_size=4)["kernel"].shape
        (4, 16)
    """

    gates = ("f", "n")
    recurrent_gates = ("f",)
    step_params: ClassVar = {"candidate_kernel": (("H", "H"), jax.nn.initializers.orthogonal())}

    def transition(self, params: Params, x: Array, carry: Carry, dot: Dot, **more: Named) -> Carry:
        """The equations above."""
        h = carry.h
        pre = self.pre_activations(params, x, h, dot)
        f = sigmoid(pre.f)
        n = jnp.tanh(pre.n + dot(f * h, params["step"]["candidate_kernel"]))
        return Carry((1 - f) * h + f * n, carry.state)
