"""Linear recurrences: LRU and RG-LRU."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid, softplus
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from lstmjax.cells.base import Carry, Cell, Named, NoState, Params, UnitParams
from lstmjax.precision import Dot


class LRU(Cell):
    """Linear recurrent unit: a diagonal complex state, read out by a product.

    Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences",
    arXiv:2303.06349::

        λ = exp(-exp(ν) + i exp(θ))
        s_t = λ ⊙ s_{t-1} + exp(γ) ⊙ x_t B        complex
        h_t = Re(s_t C) + x_t D

    Moduli of λ start uniform on a ring between ``r_min`` and ``r_max``, phases up to ``max_phase``,
    and γ at log √(1 - |λ|²).

    Parameters: ``kernel (D, 3H)`` (real and imaginary part of B, and D), ``units``: ``nu``,
    ``theta``, ``gamma``, each ``(H,)``, and, in ``step``, ``c_re``, ``c_im (H, H)``.

    Example:
        >>> LRU(8).initial_carry(2).state._fields
        ('re', 'im')
    """

    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 6.28
    gates = ("re", "im", "d")
    recurrent_gates = ()
    bias_gates = ()
    step_params: ClassVar = dict.fromkeys(
        ("c_re", "c_im"), (("H", "H"), jax.nn.initializers.lecun_normal())
    )

    class State(NamedTuple):
        """Real and imaginary part, each ``(B, H)``."""

        re: Array
        im: Array

    @property
    def unit_params(self) -> UnitParams:
        """ν, θ and γ; `init` has the last follow the first."""

        def nu(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            u = jax.random.uniform(key, shape, dtype, 1e-6)
            squared = u * (self.r_max**2 - self.r_min**2) + self.r_min**2
            return jnp.log(-0.5 * jnp.log(squared))

        def theta(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            return jnp.log(self.max_phase * jax.random.uniform(key, shape, dtype, 1e-6))

        return {"nu": nu, "theta": theta, "gamma": 0.0}

    def init(
        self, key: PRNGKeyArray, input_size: int, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> Params:
        """As every cell's, and γ."""
        params = super().init(key, input_size, dtype)
        squared = jnp.exp(-2 * jnp.exp(params["units"]["nu"]))
        gamma = 0.5 * jnp.log1p(-squared)
        return {**params, "units": {**params["units"], "gamma": gamma}}

    def transition(self, params: Params, x: Array, carry: Carry, dot: Dot, **more: Named) -> Carry:
        """The equations above."""
        own, read = self.seen(params), params["step"]
        re, im = carry.state
        pre = self.pre_activations(params, x, carry.h, dot)
        modulus, phase = jnp.exp(-jnp.exp(own.nu)), jnp.exp(own.theta)
        a, b, gain = modulus * jnp.cos(phase), modulus * jnp.sin(phase), jnp.exp(own.gamma)
        re, im = a * re - b * im + gain * pre.re, a * im + b * re + gain * pre.im
        h = dot(re, read["c_re"]) - dot(im, read["c_im"]) + pre.d
        return Carry(h, self.State(re, im))


class RGLRU(Cell):
    """Real-gated linear recurrent unit, the recurrence of Griffin and RecurrentGemma.

    De et al. 2024, arXiv:2402.19427. With ``(r, i) = x_t W + b``, in the logarithm::

        log a = -8 softplus(Λ) ⊙ σ(r)
        h_t = a ⊙ h_{t-1} + √(1 - a²) ⊙ σ(i) ⊙ x_t

    (Λ is the paper's with the other sign.) There must be as many features as units; the paper's W
    is block-diagonal. It starts with a^8 between 0.9 and 0.999 where r = 1.

    Parameters: ``kernel (H, 2H)``, ``bias (2H,)``, ``units``: ``Λ (H,)``.

    Example:
        >>> RGLRU(8).init(jax.random.key(0), input_size=8)["units"]["Λ"].shape
        (8,)
    """

    gates = ("r", "i")
    recurrent_gates = ()
    uses_h = True
    step_inputs = {"x": "H"}

    @property
    def unit_params(self) -> UnitParams:
        """How fast a unit forgets at most."""

        def draw(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            squared = jax.random.uniform(key, shape, dtype, 0.9**2, 0.999**2)
            return jnp.log(jnp.expm1(-jnp.log(squared) / 16))

        return {"Λ": draw}

    def step(
        self, pre: Named, state: NoState, params: Named, h: Array, inputs: Named
    ) -> tuple[Array, NoState]:
        """The equations above; the root is bounded from below, for the sake of its derivative."""
        log_a = -8 * softplus(params.Λ) * sigmoid(pre.r)
        rest = jnp.maximum(-jnp.expm1(2 * log_a), 1e-7)
        return jnp.exp(log_a) * h + jnp.sqrt(rest) * sigmoid(pre.i) * inputs.x, state
