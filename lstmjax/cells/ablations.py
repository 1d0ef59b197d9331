"""The ablations of "LSTM: A Search Space Odyssey": each changes one thing of the vanilla LSTM.

Greff et al. 2017, arXiv:1503.04069. Vanilla there is `lstmjax.cells.PeepholeLSTM`, whose equations
and parameters hold but for what a class says. NP, no peepholes, is `lstmjax.cells.LSTM`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid

from lstmjax.cells.base import Carry, Cell, Named, Params
from lstmjax.cells.lstm import LSTM
from lstmjax.cells.peephole import PeepholeLSTM
from lstmjax.precision import Dot


class _Ablation(Cell):
    class State(NamedTuple):
        """Cell state ``c (B, H)``."""

        c: Array


class NIG(_Ablation):
    """No input gate: ``c_t = σ(f + p_f ⊙ c_{t-1}) ⊙ c_{t-1} + tanh(g)`` (arXiv:1503.04069).

    Parameters: three gates (f, g, o) in place of four, ``p_f`` and ``p_o``.

    Example:
        >>> NIG(8).init(jax.random.key(0), input_size=4)["kernel"].shape
        (4, 24)
    """

    gates = ("f", "g", "o")
    bias_init = {"f": 1.0}
    unit_params = {"p_f": 0.0, "p_o": 0.0}

    def step(
        self, pre: Named, state: _Ablation.State, params: Named
    ) -> tuple[Array, _Ablation.State]:
        """The equation above."""
        c = sigmoid(pre.f + params.p_f * state.c) * state.c + jnp.tanh(pre.g)
        return sigmoid(pre.o + params.p_o * c) * jnp.tanh(c), self.State(c)


class NFG(_Ablation):
    """No forget gate: ``c_t = c_{t-1} + σ(i + p_i ⊙ c_{t-1}) ⊙ tanh(g)`` (arXiv:1503.04069).

    Parameters: three gates (i, g, o) in place of four, ``p_i`` and ``p_o``.

    Example:
        >>> sorted(NFG(8).init(jax.random.key(0), input_size=4)["units"])
        ['p_i', 'p_o']
    """

    gates = ("i", "g", "o")
    unit_params = {"p_i": 0.0, "p_o": 0.0}

    def step(
        self, pre: Named, state: _Ablation.State, params: Named
    ) -> tuple[Array, _Ablation.State]:
        """The equation above."""
        c = state.c + sigmoid(pre.i + params.p_i * state.c) * jnp.tanh(pre.g)
        return sigmoid(pre.o + params.p_o * c) * jnp.tanh(c), self.State(c)


class NOG(_Ablation):
    """No output gate: ``h_t = tanh(c_t)`` (arXiv:1503.04069).

    Parameters: three gates (i, f, g) in place of four, ``p_i`` and ``p_f``.

    Example:
        >>> NOG(8).init(jax.random.key(0), input_size=4)["bias"].shape
        (24,)
    """

    gates = ("i", "f", "g")
    bias_init = {"f": 1.0}
    unit_params = {"p_i": 0.0, "p_f": 0.0}

    def step(
        self, pre: Named, state: _Ablation.State, params: Named
    ) -> tuple[Array, _Ablation.State]:
        """The equation above."""
        i = sigmoid(pre.i + params.p_i * state.c)
        f = sigmoid(pre.f + params.p_f * state.c)
        c = f * state.c + i * jnp.tanh(pre.g)
        return jnp.tanh(c), self.State(c)


class NIAF(PeepholeLSTM):
    """No input activation function: ``g`` in place of ``tanh(g)`` (arXiv:1503.04069).

    Parameters: the vanilla LSTM's.

    Example:
        >>> NIAF(8).init(jax.random.key(0), input_size=4)["kernel"].shape
        (4, 32)
    """

    def step(
        self, pre: Named, state: PeepholeLSTM.State, params: Named
    ) -> tuple[Array, PeepholeLSTM.State]:
        """The equation above."""
        i = sigmoid(pre.i + params.p_i * state.c)
        f = sigmoid(pre.f + params.p_f * state.c)
        c = f * state.c + i * pre.g
        return sigmoid(pre.o + params.p_o * c) * jnp.tanh(c), self.State(c)


class NOAF(PeepholeLSTM):
    """No output activation function: ``h_t = σ(o + p_o ⊙ c_t) ⊙ c_t`` (arXiv:1503.04069).

    Parameters: the vanilla LSTM's.

    Example:
        >>> NOAF(8).init(jax.random.key(0), input_size=4)["kernel"].shape
        (4, 32)
    """

    def step(
        self, pre: Named, state: PeepholeLSTM.State, params: Named
    ) -> tuple[Array, PeepholeLSTM.State]:
        """The equation above."""
        i = sigmoid(pre.i + params.p_i * state.c)
        f = sigmoid(pre.f + params.p_f * state.c)
        c = f * state.c + i * jnp.tanh(pre.g)
        return sigmoid(pre.o + params.p_o * c) * c, self.State(c)


class NP(LSTM):
    """No peepholes: the plain LSTM by its name in arXiv:1503.04069.

    Parameters: the LSTM's.

    Example:
        >>> sorted(NP(8).init(jax.random.key(0), input_size=4))
        ['bias', 'kernel', 'recurrent_kernel']
    """


class CIFG(_Ablation):
    """Coupled input and forget gate: ``f = 1 - σ(i + p_i ⊙ c_{t-1})`` (arXiv:1503.04069).

    Parameters: three gates (i, g, o) in place of four, ``p_i`` and ``p_o``; the bias of the input
    gate starts at -1. `lstmjax.cells.CoupledLSTM` is the same without peepholes.

    Example:
        >>> CIFG(8).init(jax.random.key(0), input_size=4)["kernel"].shape
        (4, 24)
    """

    gates = ("i", "g", "o")
    bias_init = {"i": -1.0}
    unit_params = {"p_i": 0.0, "p_o": 0.0}

    def step(
        self, pre: Named, state: _Ablation.State, params: Named
    ) -> tuple[Array, _Ablation.State]:
        """The equation above."""
        i = sigmoid(pre.i + params.p_i * state.c)
        c = (1 - i) * state.c + i * jnp.tanh(pre.g)
        return sigmoid(pre.o + params.p_o * c) * jnp.tanh(c), self.State(c)


class FGR(PeepholeLSTM):
    """Full gate recurrence: all three gates see all three gates of the step before.

    Hochreiter & Schmidhuber 1997; arXiv:1503.04069::

        (i, f, o) += (i_{t-1}, f_{t-1}, o_{t-1}) G         what σ is taken of

    Parameters: the vanilla LSTM's and, in ``step``, ``gate_kernel (3, H, 3, H)``, which is G: from
    a gate's unit, to a gate's unit.

    Example:
        >>> FGR(8).initial_carry(2).state._fields
        ('c', 'i', 'f', 'o')
    """

    class State(NamedTuple):
        """Cell state and gates, each ``(B, H)``."""

        c: Array
        i: Array
        f: Array
        o: Array

    step_params = {
        "gate_kernel": (
            (3, "H", 3, "H"),
            jax.nn.initializers.glorot_uniform(in_axis=(0, 1), out_axis=(2, 3)),
        )
    }

    def transition(self, params: Params, x: Array, carry: Carry, dot: Dot, **more: Named) -> Carry:
        """The equation above."""
        c, own, units = carry.state.c, self.seen(params), 3 * self.hidden_size
        pre = self.pre_activations(params, x, carry.h, dot)
        before = jnp.concatenate(carry.state[1:], axis=-1)
        i, f, o = jnp.split(dot(before, own.gate_kernel.reshape(units, units)), 3, axis=-1)
        i = sigmoid(pre.i + i + own.p_i * c)
        f = sigmoid(pre.f + f + own.p_f * c)
        c = f * c + i * jnp.tanh(pre.g)
        o = sigmoid(pre.o + o + own.p_o * c)
        return Carry(o * jnp.tanh(c), self.State(c, i, f, o))
