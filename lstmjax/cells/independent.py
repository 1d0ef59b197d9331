"""Recurrent networks whose units do not see each other: IndRNN, SRU, QRNN."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import relu, sigmoid

from lstmjax.cells.base import Activation, Carry, Cell, Named, NoState, Params, StepParams
from lstmjax.precision import Dot
from lstmjax.traced import Size


class IndRNN(Cell):
    """Independently recurrent network: each unit sees itself alone of the step before.

    Li et al. 2018, arXiv:1803.04831::

        h_t = relu(x_t W + u ⊙ h_{t-1} + b)

    Parameters: ``kernel (D, H)``, ``bias (H,)``, ``units``: ``u (H,)``, uniform in 0 to 1.

    Example:
        >>> sorted(IndRNN(8).init(jax.random.key(0), input_size=4))
        ['bias', 'kernel', 'units']
    """

    activation: Activation = relu
    gates = ("a",)
    recurrent_gates = ()
    unit_params = {"u": jax.nn.initializers.uniform(1.0)}
    uses_h = True

    def step(self, pre: Named, state: NoState, params: Named, h: Array) -> tuple[Array, NoState]:
        """The equation above."""
        return self.activation(pre.a + params.u * h), state


class SRU(Cell):
    """Simple recurrent unit, with its highway around the recurrence.

    Lei et al. 2018, arXiv:1709.02755. With ``(u, f, r) = x_t W + b``, b being zero for u::

        f = σ(f + v_f ⊙ c_{t-1} + b_f)
        c_t = f ⊙ c_{t-1} + (1 - f) ⊙ u
        r = σ(r + v_r ⊙ c_{t-1} + b_r)
        h_t = r ⊙ c_t + (1 - r) ⊙ α x_t

    ``highway_bias`` is what b_r starts with, and α = √(1 + 2 exp(highway_bias)) keeps the variance
    of x. There must be as many features as units.

    Parameters: ``kernel (H, 3H)``, ``bias (2H,)`` (f, r), ``units``: ``v_f``, ``v_r``, ``(H,)``.

    Example:
        >>> SRU(8).init(jax.random.key(0), input_size=8)["kernel"].shape
        (8, 24)
    """

    highway_bias: float = 0.0
    gates = ("u", "f", "r")
    recurrent_gates = ()
    bias_gates = ("f", "r")
    unit_params = dict.fromkeys(("v_f", "v_r"), jax.nn.initializers.normal(0.1))
    step_inputs = {"x": "H"}

    class State(NamedTuple):
        """Cell state ``c (B, H)``."""

        c: Array

    @property
    def bias_init(self) -> Mapping[str, float]:
        """That of the highway."""
        return {"r": self.highway_bias}

    def step(self, pre: Named, state: State, params: Named, inputs: Named) -> tuple[Array, State]:
        """The equations above."""
        f = sigmoid(pre.f + params.v_f * state.c)
        r = sigmoid(pre.r + params.v_r * state.c)
        c = f * state.c + (1 - f) * pre.u
        alpha = (1 + 2 * jnp.exp(self.highway_bias)) ** 0.5
        return r * c + (1 - r) * alpha * inputs.x, self.State(c)


class QRNN(Cell):
    """Quasi-recurrent network: gates from the input and the one before, then pooling.

    Bradbury et al. 2017, arXiv:1611.01576, with a convolution of width 2. With
    ``(z, f, o, i) = x_{t-1} V + x_t W + b``, as many of them as the pooling has::

        f:    c_t = σ(f) ⊙ c_{t-1} + (1 - σ(f)) ⊙ tanh(z),  h_t = c_t
        fo:   c_t = σ(f) ⊙ c_{t-1} + (1 - σ(f)) ⊙ tanh(z),  h_t = σ(o) ⊙ c_t
        ifo:  c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ tanh(z),        h_t = σ(o) ⊙ c_t

    The paper has no b: ``use_bias=False``. x_{t-1} is the last valid input, zeros at the beginning
    of a sequence; it is part of the carry.

    Parameters: ``kernel (D, GH)``, ``bias (GH,)`` and, in ``step``, ``kernel_before (D, G, H)``,
    which is V; G is 2, 3 or 4.

    Example:
        >>> QRNN(8, pooling="ifo").initial_carry(2, input_size=4).state.x.shape
        (2, 4)
    """

    pooling: Literal["f", "fo", "ifo"] = "fo"
    recurrent_gates = ()

    class State(NamedTuple):
        """Cell state ``c (B, H)``, and the input before, ``x (B, D)``."""

        c: Array
        x: Array

    @property
    def gates(self) -> tuple[str, ...]:
        """Those of the pooling."""
        return {"f": ("z", "f"), "fo": ("z", "f", "o"), "ifo": ("z", "f", "o", "i")}[self.pooling]

    @property
    def step_params(self) -> StepParams:
        """The kernel of the input before."""
        shape = ("D", len(self.gates), "H")
        glorot = jax.nn.initializers.glorot_uniform(in_axis=0, out_axis=(1, 2))
        return {"kernel_before": (shape, glorot)}

    def initial_carry(
        self,
        batch_size: Size,
        dtype: jax.typing.DTypeLike = jnp.float32,
        *,
        params: Params | None = None,
        input_size: int | None = None,
    ) -> Carry:
        """Zeros."""
        zeros = jnp.zeros((batch_size, self.hidden_size), dtype)
        x = jnp.zeros((batch_size, self.hidden_size if input_size is None else input_size), dtype)
        return Carry(zeros, self.State(zeros, x))

    def transition(self, params: Params, x: Array, carry: Carry, dot: Dot, **more: Named) -> Carry:
        """The equations above."""
        c, before = carry.state
        kernel = params["step"]["kernel_before"].reshape(x.shape[1], -1)
        both = (
            self.pre_activations(params, x, carry.h, dot),
            jnp.split(dot(before, kernel), len(self.gates), -1),
        )
        pre = self.named([a + b for a, b in zip(*both, strict=True)])
        f = sigmoid(pre.f)
        i = sigmoid(pre.i) if "i" in self.gates else 1 - f
        c = f * c + i * jnp.tanh(pre.z)
        h = sigmoid(pre.o) * c if "o" in self.gates else c
        return Carry(h, self.State(c, x))
