"""The LSTM with layer normalisation."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.nn import sigmoid

from lstmjax.cells.base import Cell, Named, Parts


class LayerNormLSTM(Cell):
    """LSTM with layer normalisation.

    Ba, Kiros & Hinton 2016, arXiv:1607.06450, equations 20 to 22: the products are normalised
    apart, each over all units of all gates together, and the cell state over its units::

        (i, f, g, o) = LN(x_t W; α_x) + LN(h_{t-1} R; α_h) + b
        c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ tanh(g)
        h_t = σ(o) ⊙ tanh(LN(c_t; α_c) + β_c)
        LN(z; α) = α ⊙ (z - mean z) / √(var z + ε)

    The paper adds three biases up in the first line; here they are one.

    Parameters: ``kernel (D, 4H)``, ``recurrent_kernel (H, 4H)`` and, in ``step``, the gains
    ``gain_x (4, H)``, ``gain_h (4, H)``, ``bias (4, H)`` (i, f, g, o), ``gain_c (1, H)`` and
    ``bias_c (1, H)``; gains start at 1, biases at 0.

    Example:
        >>> sorted(LayerNormLSTM(8).init(jax.random.key(0), input_size=4))
        ['kernel', 'recurrent_kernel', 'step']
    """

    epsilon: float = 1e-5
    gates = ("i", "f", "g", "o")
    parts_apart = True
    bias_gates = ()
    step_params: ClassVar = {
        "gain_x": ((4, "H"), 1.0),
        "gain_h": ((4, "H"), 1.0),
        "bias": ((4, "H"), 0.0),
        "gain_c": ((1, "H"), 1.0),
        "bias_c": ((1, "H"), 0.0),
    }

    class State(NamedTuple):
        """Cell state ``c (B, H)``."""

        c: Array

    def step(self, pre: Parts[Named], state: State, params: Named) -> tuple[Array, State]:
        """The equations above."""
        from_x = self._normalised(tuple(pre.x), params.gain_x)
        from_h = self._normalised(tuple(pre.h), params.gain_h)
        b = jnp.split(params.bias, 4)
        i, f, g, o = (x + h + one for x, h, one in zip(from_x, from_h, b, strict=True))
        c = sigmoid(f) * state.c + sigmoid(i) * jnp.tanh(g)
        (seen,) = self._normalised([c], params.gain_c)
        return sigmoid(o) * jnp.tanh(seen + params.bias_c), self.State(c)

    def _normalised(self, blocks: Sequence[Array], gain: Array) -> list[Array]:
        """Blocks ``(B, H)`` by mean and variance of all of them, times a row of the gain each."""
        gains = jnp.split(gain, len(blocks))
        mean = sum(z.mean(-1, keepdims=True) for z in blocks) / len(blocks)
        centred = [z - mean for z in blocks]
        variance = sum((z**2).mean(-1, keepdims=True) for z in centred) / len(blocks)
        scale = lax.rsqrt(variance + self.epsilon)
        return [a * z * scale for a, z in zip(gains, centred, strict=True)]
