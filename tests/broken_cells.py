"""Cells with one mistake each, as people make them, and an LSTM written in NumPy."""

import dataclasses
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import sigmoid

from lstmjax import LSTM, Carry, Cell, Noise


class Base(Cell):
    """An LSTM to spoil."""

    gates = ("i", "f", "g", "o")

    class State(NamedTuple):
        c: Array

    def step(self, pre, state, params):
        c = sigmoid(pre.f) * state.c + sigmoid(pre.i) * jnp.tanh(pre.g)
        return sigmoid(pre.o) * jnp.tanh(c), self.State(c)


class Two(Cell):
    """Two arrays of state: a sum and its weight."""

    gates = ("f", "i", "z")

    class State(NamedTuple):
        c: Array
        n: Array

    def new(self, pre, state):
        f, i = sigmoid(pre.f), sigmoid(pre.i)
        return f * state.c + i * jnp.tanh(pre.z), f * state.n + i

    def step(self, pre, state, params):
        c, n = self.new(pre, state)
        return c / n, self.State(c, n)


class ForgottenState(Base):
    def step(self, pre, state, params):
        c = sigmoid(pre.f) + sigmoid(pre.i) * jnp.tanh(pre.g)
        return sigmoid(pre.o) * jnp.tanh(c), self.State(c)


class ReturnedAsGiven(Base):
    def step(self, pre, state, params):
        h, _ = super().step(pre, state, params)
        return h, state


class SwappedStates(Two):
    def step(self, pre, state, params):
        c, n = self.new(pre, state)
        return c / n, self.State(n, c)


class WriteOnlyState(Two):
    def step(self, pre, state, params):
        c, n = self.new(pre, state)
        return jnp.tanh(c), self.State(c, n)


class MixesRows(Base):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return h - h.mean(axis=0, keepdims=True), state


class ReadsBatchSize(Base):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return h / h.shape[0], state


class Detached(Base):
    def step(self, pre, state, params):
        pre = pre._replace(f=jax.lax.stop_gradient(pre.f))
        return super().step(pre, state, params)


@jax.custom_vjp
def hard(x):
    return jnp.clip(0.2 * x + 0.5, 0, 1)


hard.defvjp(lambda x: (hard(x), x), lambda x, d: (0.25 * d,))


class WrongDerivative(Base):
    def step(self, pre, state, params):
        return super().step(pre._replace(o=hard(pre.o)), state, params)


class ZeroByZero(Two):
    """The weight before the step, which is zero at the start."""

    def step(self, pre, state, params):
        c, n = self.new(pre, state)
        return state.c / state.n, self.State(c, n)


class InfiniteSlope(Base):
    def step(self, pre, state, params):
        c = sigmoid(pre.f) * state.c**2 + sigmoid(pre.i) * sigmoid(pre.g)
        return sigmoid(pre.o) * jnp.sqrt(state.c**2), self.State(c)


class Overflow(Base):
    def step(self, pre, state, params):
        i = jnp.exp(pre.i) / (1 + jnp.exp(pre.i))
        c = sigmoid(pre.f) * state.c + i * jnp.tanh(pre.g)
        return sigmoid(pre.o) * jnp.tanh(c), self.State(c)


class Clock(Base):
    def step(self, pre, state, params):
        return super().step(pre._replace(f=pre.f + time.perf_counter() % 1), state, params)


COUNT = [0]


class Counting(Base):
    def step(self, pre, state, params):
        COUNT[0] += 1
        return super().step(pre._replace(f=pre.f * COUNT[0]), state, params)


class NumpyRandom(Base):
    def step(self, pre, state, params):
        noise = np.random.default_rng().normal(size=(1, self.hidden_size)).astype(np.float32)
        return super().step(pre._replace(f=pre.f + noise.astype(pre.f.dtype)), state, params)


KEPT = []


class KeptInPython(Base):
    """Carries something in a global list, which holds what is being traced."""

    def step(self, pre, state, params):
        before = KEPT[-1] if KEPT else 0.0
        KEPT.append(pre.g)
        return super().step(pre._replace(g=pre.g + before), state, params)


class FixedKey(Base):
    def step(self, pre, state, params):
        drop = jax.random.bernoulli(jax.random.key(0), 0.9, (1, self.hidden_size))
        h, state = super().step(pre, state, params)
        return h * drop.astype(h.dtype), state


class FixedKeyByRow(Base):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return h * jax.random.bernoulli(jax.random.key(0), 0.9, h.shape).astype(h.dtype), state


class NumpyOnTraced(Base):
    def step(self, pre, state, params):
        return super().step(pre._replace(g=np.tanh(pre.g)), state, params)


class Half(Base):
    def step(self, pre, state, params):
        g = jnp.tanh(pre.g.astype(jnp.float16)).astype(pre.g.dtype)
        return super().step(pre._replace(g=g), state, params)


class Single(Base):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return h.astype(jnp.float32), state


class UnusedGate(Base):
    gates = ("i", "f", "g", "o", "r")


class UnusedParameter(Base):
    unit_params = {"p": 0.0}


class UnusedNoise(Base):
    noise = {"keep": Noise(jax.random.normal, evaluation=0.0)}

    def step(self, pre, state, params, noise):
        return super().step(pre, state, params)


class UnusedInput(Base):
    step_inputs = {"dt": 1}

    def step(self, pre, state, params, inputs):
        return super().step(pre, state, params)


class Explodes(Base):
    uses_h = True

    def step(self, pre, state, params, h):
        new, state = super().step(pre, state, params)
        return 1.1 * h + new, state


class LosesDigits(Base):
    def step(self, pre, state, params):
        c = sigmoid(pre.f) * state.c + sigmoid(pre.i) * jnp.tanh(pre.g)
        return sigmoid(pre.o) * 2e4 * (jnp.sqrt(1e8 + c) - 1e4), self.State(c)


class UnequalToItself(Base):
    scale: object = dataclasses.field(default_factory=lambda: lambda x: 0.5 * x)

    def step(self, pre, state, params):
        return super().step(pre._replace(g=self.scale(pre.g)), state, params)


class NumpyInit(Base):
    def init(self, key, input_size, dtype=jnp.float32):
        params = super().init(key, input_size, dtype)
        return params | {
            "bias": jnp.asarray(np.random.default_rng().normal(size=params["bias"].shape), dtype)
        }


class OneInit(Base):
    def init(self, key, input_size, dtype=jnp.float32):
        return super().init(jax.random.key(0), input_size, dtype)


class RandomStart(Base):
    def initial_carry(self, batch_size, dtype=jnp.float32):
        c = jnp.asarray(np.random.default_rng().normal(size=(1, self.hidden_size)), dtype)
        zeros = jnp.zeros((batch_size, self.hidden_size), dtype)
        return Carry(zeros, self.State(zeros + c))


class PreparedAgain(Base):
    """Its weights shrink a little more with every call: a step at a time, or all at once."""

    calls = [0]

    def prepare(self, params, key=None):
        self.calls[0] += 1
        return params | {"recurrent_kernel": 0.5 ** self.calls[0] * params["recurrent_kernel"]}


class Callback(Base):
    def step(self, pre, state, params):
        shape = jax.ShapeDtypeStruct((1, 1), pre.f.dtype)
        noise = jax.pure_callback(
            lambda: np.random.default_rng().random((1, 1), shape.dtype), shape
        )
        return super().step(pre._replace(f=pre.f + noise), state, params)


class ForgetsWhenStreaming(Base):
    """Its own way to run one step, for generation, returns the state that it got."""

    def __call__(self, params, x, carry, **more):
        return super().__call__(params, x, carry, **more)._replace(state=carry.state)


class Needy(Base):
    """Not built from a number of units alone."""

    leak: float


def lstm(params, x, h, state):
    """The LSTM in NumPy, its gates in the order of the library's."""
    (c,) = state
    a = x @ params["kernel"] + h @ params["recurrent_kernel"] + params["bias"]
    i, f, g, o = np.split(a, 4, axis=-1)
    c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
    return np.tanh(c) / (1 + np.exp(-o)), (c,)


class OtherOrder(LSTM):
    """Gates in another order than those of `lstm`."""

    gates = ("i", "g", "f", "o")


class RoundGate(Base):
    """Forgets all or nothing."""

    def step(self, pre, state, params):
        c = jnp.round(sigmoid(pre.f)) * state.c + sigmoid(pre.i) * jnp.tanh(pre.g)
        return sigmoid(pre.o) * jnp.tanh(c), self.State(c)


class SteppedPeephole(Base):
    """A parameter that is rounded down before it counts."""

    unit_params = {"p": 0.4}

    def step(self, pre, state, params):
        f = sigmoid(pre.f + jnp.floor(10 * params.p) * state.c)
        c = f * state.c + sigmoid(pre.i) * jnp.tanh(pre.g)
        return sigmoid(pre.o) * jnp.tanh(c), self.State(c)


BROKEN: dict[type[Cell], tuple[str, str]] = {
    MixesRows: ("contract", "mixes the rows of a batch"),
    NumpyOnTraced: ("contract", "hands a traced array to NumPy"),
    FixedKeyByRow: ("contract", "it draws random numbers itself"),
    Clock: ("pure", "two different programs (broken_cells.py"),
    Counting: ("pure", "two different programs (broken_cells.py"),
    NumpyRandom: ("pure", "two different programs"),
    KeptInPython: ("pure", "a global"),
    Callback: ("pure", "called twice, the step gives different numbers"),
    PreparedAgain: ("pure", "called twice, prepare gives different numbers"),
    RandomStart: ("pure", "called twice, initial_carry gives different numbers"),
    FixedKey: ("pure", "draws random numbers itself (broken_cells.py"),
    Half: ("dtype", "computes in float16 (broken_cells.py"),
    Single: ("dtype", "it does not run in float64"),
    NumpyInit: ("init", "the same key draws other numbers for bias"),
    OneInit: ("init", "every key draws the same parameters"),
    ZeroByZero: ("finite", "div (broken_cells.py"),
    InfiniteSlope: ("finite", "the derivative of"),
    UnusedGate: ("used", "nothing depends on gate 'r'"),
    UnusedParameter: ("used", "nothing depends on parameter 'p'"),
    UnusedInput: ("used", "nothing depends on step input 'dt'"),
    UnusedNoise: ("used", "nothing depends on noise keep"),
    ForgottenState: ("state", "state 'c' is carried, but no output depends on it"),
    WriteOnlyState: ("state", "state 'n' is carried, but no output depends on it"),
    ReturnedAsGiven: ("state", "state 'c' never changes"),
    SwappedStates: ("state", "states 'c' and 'n' change places"),
    ReadsBatchSize: ("rows", "row 0 alone is not what it is in a batch"),
    ForgetsWhenStreaming: ("carried", "one step at a time, the carry handed on"),
    Detached: ("gradient", "jax.lax.stop_gradient (broken_cells.py"),
    WrongDerivative: ("gradient", "custom_vjp hard"),
    RoundGate: ("gradient", "no gradient reaches gate 'f'"),
    SteppedPeephole: ("gradient", "no gradient reaches parameter 'p'"),
    LosesDigits: ("float32", "a difference of large numbers"),
    Overflow: ("extremes", "exp (broken_cells.py"),
    Explodes: ("long", "over 2,000 steps"),
    UnequalToItself: ("compiled", "compiles anew: scale"),
}
"""For each, the check that must fail, and what the report must say."""
