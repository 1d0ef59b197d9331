"""Random steps out of the operations that the contract allows, as hypothesis strategies.

A step is a formula for each of its results: a nested tuple of names of operations and of operands,
which `Formula` evaluates. So a random cell is a value that prints as what it computes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax import Array

from lstmjax.cells import Carry, Cell, dropped, kept

H = 4

UNARY = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "sin": jnp.sin,
    "square": jnp.square,
    "root": lambda a: jnp.sqrt(a * a + 0.1),
    "half": lambda a: 0.5 * a,
    "clip": lambda a: jnp.clip(a, -0.7, 0.9),
    "through": lambda a: a + jax.lax.stop_gradient(jnp.round(a) - a),
    "width": lambda a: a / a.shape[-1],
    "size": lambda a: a * (2 / a.size**0.5),
}
# Without JAX' maximum, of two or along an axis: in plain JAX its gradient is wrong where XLA rounds
# a number in two ways (`test_derived.py` compares it with differences).
BY_ROW = {
    "centre": lambda a: a - a.mean(-1, keepdims=True),
    "normalise": lambda a: a * jax.lax.rsqrt((a * a).mean(-1, keepdims=True) + 0.1),
    "softmax": lambda a: jax.nn.softmax(a, axis=-1),
    "cumsum": lambda a: 0.3 * jnp.cumsum(a, axis=-1),
    "turn": lambda a: a[:, ::-1],
    "roll": lambda a: jnp.roll(a, 1, axis=-1),
    "halves": lambda a: jnp.concatenate(jnp.split(a, 2, axis=-1)[::-1], axis=-1),
    "heads": lambda a: (a.reshape(len(a), 2, -1) ** 2).mean(1).repeat(2, axis=-1) - a,
    "outer": lambda a: jnp.einsum("bi,bj,bj->bi", a, a, jnp.tanh(a)),
    "sort": lambda a: jnp.sort(a, axis=-1),
}
BINARY = {
    "add": jnp.add,
    "subtract": jnp.subtract,
    "multiply": jnp.multiply,
    "max": lambda a, b: jnp.where(a > b, a, b),
    "where": lambda a, b: jnp.where(a > 0.1, a, b),
    "gate": lambda a, b: jax.nn.sigmoid(a) * b,
    "ratio": lambda a, b: a / (1.5 + jnp.tanh(b)),
}
FUNCTIONS = {**UNARY, **BY_ROW, **BINARY}

Formula = tuple | str


class Random(Cell):
    """A cell that computes three formulas: h, and two arrays of state."""

    formulas: tuple[Formula, Formula, Formula]
    uses_h: bool = False
    parts_apart: bool = False
    heads: int = 1
    with_noise: bool = False
    with_inputs: bool = False
    recurrent_gates: tuple[str, ...] = ("a", "b")

    gates = ("a", "b", "c")
    bias_init = {"a": 0.3}
    unit_params = {"p": 0.4}
    step_params = {"scale": ((), 0.8), "gain": (("H",), 1.1)}

    @property
    def noise(self):
        return {"zone": kept(0.4), "drop": dropped(0.3, "sequence")} if self.with_noise else {}

    @property
    def step_inputs(self):
        return {"dt": 1, "drive": "H"} if self.with_inputs else {}

    class State(NamedTuple):
        s: Array
        n: Array

    def initial_carry(self, batch_size, dtype=jnp.float32):
        one = jnp.ones((batch_size, self.hidden_size), dtype)
        return Carry(0.1 * one, self.State(0.2 * one, -0.3 * one))

    def parameters(self, params, inputs):
        return params.p, params.scale, params.gain[None]

    def step(self, pre, state, params, *h, inputs=None, noise=None):
        known = {"s": state.s, "n": state.n}
        p, scale, gain = self.parameters(params, inputs)
        known |= {"p": p + 0 * state.s, "scale": scale * state.n, "gain": gain * state.s}
        known["h"] = h[0] if self.uses_h else state.s
        for gate in self.gates:
            if self.parts_apart:
                known[gate] = getattr(pre.x, gate)
                if gate in self.recurrent_gates:
                    known[gate] = known[gate] + jnp.tanh(getattr(pre.h, gate))
            else:
                known[gate] = getattr(pre, gate)
        known["zone"] = noise.zone if self.with_noise else state.n
        known["drop"] = noise.drop * state.s if self.with_noise else state.s
        known["dt"] = inputs.dt * state.s if self.with_inputs else state.n
        known["drive"] = inputs.drive if self.with_inputs else state.s
        h, s, n = (evaluate(formula, known) for formula in self.formulas)
        every = sum(known.values())  # so that no gradient is zero throughout
        return jnp.tanh(h + 0.1 * every), self.State(jnp.tanh(s), jnp.tanh(n))


class Probed(Random):
    """The same, with zeros added to its parameters at every step: their gradients are the terms
    that those of the parameters are the sums of."""

    PROBES = ("at_p", "at_scale", "at_gain")

    @property
    def step_inputs(self):
        return super().step_inputs | dict.fromkeys(self.PROBES, "H")

    def parameters(self, params, inputs):
        probes = (getattr(inputs, name) for name in self.PROBES)
        return [
            a + zero for a, zero in zip(super().parameters(params, inputs), probes, strict=True)
        ]


def evaluate(formula: Formula, known: dict[str, Array]) -> Array:
    if isinstance(formula, str):
        return known[formula]
    name, *operands = formula
    return FUNCTIONS[name](*(evaluate(operand, known) for operand in operands))


OPERANDS = ("a", "b", "c", "s", "n", "h", "p", "scale", "gain", "zone", "drop", "dt", "drive")


def formulas(elementwise: bool) -> st.SearchStrategy[Formula]:
    """Nested operations on what a step sees."""
    one = [*UNARY] if elementwise else [*UNARY, *BY_ROW]

    def more(inner):
        return st.tuples(st.sampled_from(one), inner) | st.tuples(
            st.sampled_from([*BINARY]), inner, inner
        )

    return st.recursive(st.sampled_from(OPERANDS), more, max_leaves=6)


@st.composite
def cells(draw: st.DrawFn, elementwise: bool = False) -> Random:
    """A random cell of `H` units."""
    formula = formulas(elementwise)
    return Random(
        H,
        formulas=(draw(formula), draw(formula), draw(formula)),
        uses_h=draw(st.booleans()),
        parts_apart=draw(st.booleans()),
        heads=draw(st.sampled_from([1, 1, 2, 4])),
        with_noise=draw(st.booleans()),
        with_inputs=draw(st.booleans()),
        recurrent_gates=draw(st.sampled_from([("a", "b"), ("a", "b", "c"), ("b",)])),
    )


class Flags(NamedTuple):
    """Which steps of a batch count, and in which direction they run."""

    lengths: bool
    resets: bool
    reverse: bool
    chunk: int
    save: str


flags = st.builds(
    Flags,
    lengths=st.booleans(),
    resets=st.booleans(),
    reverse=st.booleans(),
    chunk=st.integers(1, 4),
    save=st.sampled_from(["steps", "chunks"]),
)
