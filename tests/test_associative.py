"""The associative engine: which steps it recognises, and that it is the plain scan."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from lstmjax.cells import LSTM, Carry, Cell, dropped
from lstmjax.cells.contract import shapes_of
from lstmjax.recurrence import Associative, Workload, choose_engine, unroll
from tests.test_contract import FLAGS, B, D, H, agree, draw
from tests.tolerances import assert_close

pytestmark = pytest.mark.sampled(2)

ENGINE = Associative()


class Leaky(Cell):
    """The minimal GRU (Feng et al. 2024): h itself is carried."""

    gates = ("a", "f")
    recurrent_gates = ()
    uses_h = True
    noise = {"drop": dropped(0.2)}

    def step(self, pre, state, params, h, noise):
        f = jax.nn.sigmoid(pre.f)
        return f * h + (1 - f) * jnp.tanh(pre.a) * noise.drop, state


class Rotation(Cell):
    """A complex number a unit, that is two arrays that depend on each other."""

    gates = ("a", "b", "r", "o")
    recurrent_gates = ()
    unit_params = {"angle": 0.3}

    class State(NamedTuple):
        re: Array
        im: Array

    def step(self, pre, state, params):
        decay = jax.nn.sigmoid(pre.r + 1)
        cos, sin = decay * jnp.cos(params.angle), decay * jnp.sin(params.angle)
        re = cos * state.re - sin * state.im + pre.a
        im = sin * state.re + cos * state.im + pre.b
        return jnp.tanh(re * pre.o) + im**2, self.State(re, im)


class Stabilised(Cell):
    """A matrix memory with exponential gates and their running maximum (Beck et al. 2024)."""

    gates = ("i", "f", "k", "v")
    recurrent_gates = ()

    class State(NamedTuple):
        m: Array
        n: Array
        memory: Array

    def initial_carry(self, batch_size, dtype=jnp.float32):
        h = jnp.zeros((batch_size, self.hidden_size), dtype)
        memory = jnp.zeros((batch_size, self.hidden_size, self.hidden_size), dtype)
        return Carry(h, self.State(h, h, memory))

    def step(self, pre, state, params):
        log_f = jax.nn.log_sigmoid(pre.f)
        m = jnp.maximum(log_f + state.m, pre.i)
        i, f = jnp.exp(pre.i - m), jnp.exp(log_f + state.m - m)
        n = f * state.n + i * pre.k
        outer = (i * pre.v)[:, :, None] * pre.k[:, None, :]
        memory = f[:, :, None] * state.memory + outer
        h = jnp.einsum("bij,bj->bi", memory, pre.k) / jnp.maximum(jnp.abs(n), 1)
        return h, self.State(m, n, memory)


CELLS = [Leaky(H), Rotation(H), Stabilised(H)]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS, ids=repr)
def test_it_is_the_plain_scan(cell, reverse):
    options = {"keys": jax.random.key(3)} if cell.noise else {}
    agree(cell, ENGINE, reverse=reverse, **FLAGS, **options)


@pytest.mark.parametrize("flags", [{}, {"resets": FLAGS["resets"]}, {"lengths": FLAGS["lengths"]}])
def test_states_and_flags_one_by_one(flags):
    agree(Rotation(H), ENGINE, return_states=True, **flags)
    agree(Leaky(H), ENGINE, initial=Leaky(H).initial_carry(B)._replace(h=jnp.ones((B, H))), **flags)


def test_long_sequences_are_those_of_the_loop():
    cell = Leaky(8)
    params = cell.init(jax.random.key(0), D)
    x = jax.random.normal(jax.random.key(1), (2, 16_384, D))
    got, wanted = (
        jax.jit(lambda e=e: unroll(cell, params, x, engine=e))() for e in (ENGINE, "scan")
    )
    jax.tree.map(lambda a, b: assert_close(a, b, reduction=16_384), got, wanted)


class Squared(Leaky):
    def step(self, pre, state, params, h, noise):
        return 0.5 * h * h + pre.a, state


class Shifted(Leaky):
    def step(self, pre, state, params, h, noise):
        return 0.5 * jnp.roll(h, 1, axis=-1) + pre.a, state


class Gated(Leaky):
    def step(self, pre, state, params, h, noise):
        return jax.nn.sigmoid(pre.f + h) * h + pre.a, state


class Branching(Leaky):
    def step(self, pre, state, params, h, noise):
        return jnp.where(h > 0, 0.5 * h, 0.25 * h) + pre.a, state


class Twice(Rotation):
    def step(self, pre, state, params):
        return pre.a, self.State(state.re * state.im + pre.a, 0.5 * state.im + 0.1 * state.re)


@pytest.mark.parametrize("cell", [Squared, Shifted, Gated, Branching, Twice, LSTM])
def test_other_steps_are_refused_by_name(cell):
    work = Workload("cpu", "float32", "float32", steps=7, batch=B, features=D)
    assert ENGINE.refusal(cell(H), work).startswith("its step is not affine in ")
    with pytest.raises(ValueError, match=r"'associative' cannot run .* not affine in"):
        unroll(cell(H), *draw(cell(H)), engine="associative")


def test_who_gets_it_without_asking():
    def chosen(**sizes):
        work = Workload("tpu", "float32", "float32", steps=4096, batch=4, features=D)
        return choose_engine(Rotation(H), work._replace(**sizes))[0]

    assert chosen() == ENGINE
    for other in ({"platform": "cpu"}, {"steps": 100}, {"batch": 2**17}):
        assert chosen(**other) != ENGINE
    work = Workload("tpu", "float32", "float32", steps=4096, batch=4, features=D)
    assert "associative" not in choose_engine(LSTM(H), work)[1]


def test_what_it_reads_from_a_step_is_found_not_declared():
    cell = Stabilised(H)
    assert ENGINE.refusal(cell, Workload("cpu", "float32", "float32", 7, B, D)) is None
    leaves = jax.tree.leaves(shapes_of(cell, B, D).carry)
    assert [a.shape for a in leaves] == [(B, H)] * 3 + [(B, H, H)]
    assert np.all(np.isfinite(unroll(cell, *draw(cell), engine=ENGINE)[0]))
