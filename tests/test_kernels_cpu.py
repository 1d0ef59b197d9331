"""The CPU engine: its kernels against the plain scan, and in every place where JAX may put them.

`test_cpu_products.py`, `test_cpu_emission.py` and `test_cpu_rows.py` look at what they are made of.
"""

import concurrent.futures
import ctypes
import dataclasses
import functools
import json
import mmap
import os
import pathlib
import re
import subprocess
import sys
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("llvmlite")

from benchmarks.cells import every_cell
from lstmjax import cells
from lstmjax.cells import GRU, LSTM, SLSTM, Carry, Cell, MinGRU, PeepholeLSTM, VariationalLSTM
from lstmjax.recurrence import CPU, Derived, Scan, Workload, choose_engine, unroll
from lstmjax.recurrence.cpu import calls as cpu_calls
from lstmjax.recurrence.cpu import engine as cpu_engine
from lstmjax.recurrence.cpu.calls import Kernel
from lstmjax.recurrence.cpu.machine import Machine, compile_text, load_object
from lstmjax.recurrence.cpu.plan import Job, Layout
from lstmjax.recurrence.engine import overridden
from lstmjax.recurrence.step import step_of
from tests import random_steps
from tests.kernel_cases import LayerNorm, Narrow, Projected, Ratio, Rebound, Three, TwoHeadsApart
from tests.test_random_steps import compare as compare_random
from tests.test_random_steps import problem as random_problem
from tests.test_random_steps import run as run_random
from tests.tolerances import assert_close, recurrence_terms

ROOT = pathlib.Path(__file__).parent.parent
WORK = Workload("cpu", "float32", "float32", steps=7, batch=3, features=2)


# --- Cells that are not in the library -----------------------------------------------------------


class Learned(LSTM):
    """Starts, and starts anew, from parameters."""

    step_params = {"h_0": (("H",), 0.3), "c_0": (("H",), -0.2)}

    def initial_carry(self, batch_size, dtype=jnp.float32, *, params=None):
        if params is None:
            return super().initial_carry(batch_size, dtype)
        own = params["step"]
        h, c = (jnp.broadcast_to(own[k][None], (batch_size, self.hidden_size)) for k in own)
        return Carry(h, self.State(c))


class Everything(Cell):
    """Inputs of a step one a row and one a unit, parameters of any shape, another h, two states."""

    gates = ("a", "b", "c")
    recurrent_gates = ("b", "c")
    bias_gates = ("c",)
    parts_apart = True
    uses_h = True
    unit_params = {"p": 0.4}
    step_params = {"scale": ((), 0.8), "gain": (("H",), 1.1), "unread": ((2, 3), 1.0)}
    step_inputs = {"drive": "H", "dt": 1}

    class State(NamedTuple):
        s: jax.Array
        n: jax.Array

    noise = {"seen": cells.dropped(0.3), "kept": cells.kept(0.5, "sequence")}

    def recur(self, h, noise):
        return jnp.tanh(2 * h) * noise.seen

    def step(self, pre, state, params, h, *, inputs, noise):
        f = jax.nn.sigmoid(pre.x.b + params.scale * jnp.tanh(pre.h.b))
        s = f * state.s + (1 - f) * jnp.tanh(pre.x.a) * inputs.dt + params.p * inputs.drive
        n = jnp.tanh(state.n + params.gain[None] * s)
        return jnp.tanh(pre.x.c * pre.h.c + n + (0.3 + noise.kept) * h), self.State(s, n)


class Squashed(LSTM):
    """Its product sees another h, with no noise in it."""

    def recur(self, h, noise):
        return jnp.tanh(2 * h)


class Plain(Cell):
    """Neither recurrence nor bias."""

    gates = ("a",)
    recurrent_gates = ()
    bias_gates = ()
    uses_h = True

    def step(self, pre, state, params, h):
        return 0.5 * h + jnp.tanh(pre.a), state


class Root(LSTM):
    """Has no derivative where a step input is zero, as masked ones are."""

    step_inputs = {"dt": 1, "drive": "H"}

    def step(self, pre, state, params, *, inputs):
        h, state = super().step(pre, state, params)
        return h * jnp.sqrt(inputs.dt) + jnp.log(inputs.drive) / (1 + inputs.drive), state


class Unread(LSTM):
    """Declares an input of a step, three numbers a row, and does without it."""

    step_inputs = {"a": 3}

    def step(self, pre, state, params, *, inputs):
        return super().step(pre, state, params)


class Pair(Cell):
    """Two arrays in one field of the state."""

    gates = ("a", "b")

    class State(NamedTuple):
        pair: tuple[jax.Array, jax.Array]

    def initial_carry(self, batch_size, dtype=jnp.float32):
        zero = jnp.zeros((batch_size, self.hidden_size), dtype)
        return Carry(zero, self.State((zero, zero + 1)))

    def step(self, pre, state, params):
        c, n = state.pair
        c = jax.nn.sigmoid(pre.a) * c + jnp.tanh(pre.b)
        return jnp.tanh(c) * n, self.State((c, 0.9 * n))


class Special(LSTM):
    """Uses what nobody has written down for vectors."""

    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return jax.lax.digamma(1 + h**2), state


# --- Comparing -----------------------------------------------------------------------------------


class Case(NamedTuple):
    """One comparison; ``flags`` are arguments of `unroll` that say which steps count."""

    cell: Cell
    batch: int = 3
    steps: int = 7
    features: int = 2
    flags: tuple[str, ...] = ()
    reverse: bool = False
    states: bool = False
    initial: bool = True
    dtype: str = "float32"


def draw(case, seed=0):
    """``(params, x, initial, inputs)``, none of them zero, and the options of `unroll`."""
    cell, rng = case.cell, np.random.default_rng(seed)
    batch, steps, features, dtype = case.batch, case.steps, case.features, case.dtype

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def near(a):
        scale = 0.2 if a.ndim < 2 else 0.3 / max(1, a.shape[0] / 4) ** 0.5
        return a + scale * normal(*a.shape)

    params = jax.tree.map(near, cell.init(jax.random.key(seed), features, dtype))
    begun = cell.initial_carry(batch, dtype)  # some cells divide by what they carry
    begun = jax.tree.map(lambda a: a + 0.3 + 0.3 * abs(normal(*a.shape)), begun)
    initial = begun if case.initial else None
    inputs = {
        name: 0.5 + abs(normal(batch, steps, cell.width(width, features)))
        for name, width in cell.step_inputs.items()
        if name != "x"
    }
    mask = rng.random((batch, steps)) < 0.7
    kinds = {
        "mask": mask,
        "resets": rng.random((batch, steps)) < 0.3,
        "lengths": np.linspace(steps, 0, batch).round().astype("int32"),
        "empty": mask & (np.arange(batch) % 3 > 0)[:, None],
        "nothing": mask & False,
        "one block": mask & (np.arange(batch) // 44 == 1)[:, None],  # of 130 rows, the second
    }
    options = {"reverse": case.reverse, "return_states": case.states}
    for name in case.flags:
        if name == "left":
            options["padding"] = "left"
        else:
            options[name if name in ("resets", "lengths") else "mask"] = jnp.asarray(kinds[name])
    if cell.noise or type(cell).prepare is not Cell.prepare:
        options["keys"] = jax.random.key(seed + 1)
    return (params, normal(batch, steps, features), initial, inputs), options


def waves(tree):
    """In place of each number another one, whatever shard or row it is in."""
    return jax.tree.map(lambda a: jnp.cos(2 * a + 0.4), tree)


def outcome(engine, cell, given, options):
    """All outputs, and the gradients of all arguments."""

    def outputs(params, x, initial, inputs):
        return unroll(cell, params, x, initial, inputs=inputs, engine=engine, **options)

    outs, back = jax.vjp(outputs, *given)
    return outs, back(waves(outs))


def solve(engine, case, seed=0):
    given, options = draw(case, seed)
    return jax.jit(lambda *given: outcome(engine, case.cell, given, options))(*given)


def expected(case, seed=0):
    """The plain scan, in float64 but where keys are drawn from: these draw other numbers then."""
    given, options = draw(case, seed)
    wide = "keys" not in options or case.dtype == "float64"
    with jax.enable_x64(wide):
        if wide:
            given = jax.tree.map(lambda a: jnp.asarray(a, "float64"), given)
        scan = Scan(recompute=False)
        return jax.jit(lambda *given: outcome(scan, case.cell, given, options))(*given)


def compare(case, got, wanted, dull=()):
    """Every value and every gradient, by the rule of `tolerances`; some may be zero throughout."""
    cell = case.cell
    for k, what in enumerate(("value", "gradient")):
        terms = recurrence_terms(
            case.batch, case.steps, case.features, cell.hidden_size, len(cell.gates),
            gradient=bool(k),
        )  # fmt: skip
        assert jax.tree.structure(got[k]) == jax.tree.structure(wanted[k])
        leaves = jax.tree_util.tree_leaves_with_path(wanted[k])
        for (path, other), one in zip(leaves, jax.tree.leaves(got[k]), strict=True):
            name = f"{what}{jax.tree_util.keystr(path)}"
            assert one.dtype == case.dtype, name
            silent = not other.size or any(part in name for part in dull)
            assert np.any(other) or silent, f"the case says nothing about {name}"
            assert_close(one, other, reduction=terms, what=name)


# --- Cells, layouts, flags -----------------------------------------------------------------------

LONG = bool(os.environ.get("LSTMJAX_TEST_LONG"))
NAMES = [type(cell).__name__ for cell in every_cell(8) if overridden(cell) is None]
NAMES = NAMES if LONG else NAMES[::3]
FLAGS = (("mask", "resets"), ("lengths",), ("resets",), ("lengths", "left", "resets"), ())
DULL = ("unread",)
OWN_STATE = ("gradient[2].h",)  # of a cell that reads no h


def case_of(name):
    """A case for a cell of the library; those of neighbours differ in all respects."""
    number = NAMES.index(name)

    def pick(*values):
        return values[number % len(values)]

    cell = getattr(cells, name)(pick(5, 33, 13, 16, 20, 7, 31))
    features = cell.hidden_size if cell.step_inputs.get("x") == "H" else pick(3, 1, 17, 2)
    return Case(
        cell,
        *(pick(7, 3, 65), pick(7, 5, 3, 4), features, pick(*FLAGS)),
        reverse=pick(False, True),
        states=pick(True, True, False, False),
        initial=pick(True, True, False),
        # In float32 the time within a period has too few digits for a comparison.
        dtype="float64" if name == "PhasedLSTM" else pick("float32", "float64", "float32"),
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_a_cell_of_the_library(name):
    case = case_of(name)
    with jax.enable_x64(case.dtype == "float64"):
        work = Workload("cpu", case.dtype, "float32", *case[2:0:-1], case.features)
        work = work._replace(steps=case.steps, training=bool(case.cell.noise))
        assert CPU().refusal(case.cell, work) is None
        dull = DULL if case.cell.recurrent or case.cell.uses_h else (*DULL, *OWN_STATE)
        compare(case, solve("cpu", case), expected(case), dull)


CASES = {
    "one of all": Case(LSTM(1), batch=1, steps=1, features=1),
    "a step of whole vectors": Case(LSTM(16), batch=64, steps=1, features=15),
    "no features": Case(GRU(5), features=0, flags=("lengths",)),
    "two blocks of rows, many units": Case(PeepholeLSTM(100), batch=65, steps=3, features=33),
    "three blocks, one with something to do": Case(GRU(13), batch=130, flags=("one block",)),
    "all masked": Case(LSTM(13), flags=("nothing",)),
    "all masked, resets, reverse": Case(Learned(5), flags=("nothing", "resets"), reverse=True),
    "rows without a step": Case(LSTM(17), batch=67, flags=("empty", "resets"), reverse=True),
    "many chunks": Case(GRU(6), batch=64, steps=40, flags=("mask",)),
    "long sums": Case(LSTM(5), batch=3, steps=3, features=700),
    "heads in one vector": Case(SLSTM(12, heads=3), flags=("resets",)),
    "heads of a vector": Case(SLSTM(48, heads=3), steps=4, flags=("mask", "resets"), states=True),
    "heads of half a vector": Case(SLSTM(64, heads=8), steps=4, features=17),
    "heads of many vectors": Case(SLSTM(256, heads=4), steps=2, batch=9, flags=("lengths",)),
    "heads, float64": Case(SLSTM(64, heads=4), steps=3, dtype="float64", flags=("mask",)),
    "heads, parts apart": Case(TwoHeadsApart(32), steps=3, flags=("mask",)),
    "no head for the last units": Case(SLSTM(40, heads=5), steps=3, flags=("mask",)),
    "learned start": Case(Learned(5), flags=("resets",), initial=False),
    "learned start, masked, reverse": Case(Learned(20), flags=("mask", "resets"), reverse=True),
    "everything": Case(Everything(17), flags=("mask", "resets"), states=True),
    "everything, reverse, one unit": Case(
        Everything(1), flags=("lengths",), reverse=True, dtype="float64"
    ),
    "everything, float64": Case(Everything(9), flags=("mask", "resets"), dtype="float64"),
    "another h": Case(Squashed(13), flags=("mask", "resets"), reverse=True),
    "another h by noise": Case(VariationalLSTM(13), flags=("mask", "resets"), reverse=True),
    "no biases": Case(LSTM(13, use_bias=False), flags=("lengths",)),
    "no biases, parts apart": Case(GRU(13, use_bias=False), flags=("lengths",)),
    "neither recurrence nor bias": Case(Plain(13), flags=("mask", "resets")),
    "no recurrence": Case(MinGRU(33), batch=65, flags=("mask", "resets"), reverse=True),
    "start of ones": Case(Ratio(6), flags=("resets", "lengths"), initial=False),
    "rows mixed": Case(LayerNorm(13), flags=("mask", "resets")),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
def test_values_and_all_gradients(name):
    case = CASES[name]
    with jax.enable_x64(case.dtype == "float64"):
        dull = ("value", "gradient") if "nothing" in case.flags else DULL
        compare(case, solve("cpu", case), expected(case), dull)


def test_heads_are_multiplied_apart_where_they_fill_vectors():
    machine = dataclasses.replace(Machine.host(), bits=512)
    dense = {cell: Layout(job(cell), machine).dense for cell in (SLSTM(48, heads=3), SLSTM(12))}
    assert list(dense.values()) == [False, True]


def job(cell, case=None, **changes):
    """What a kernel is made for."""
    case = case or Case(cell)
    work = Workload("cpu", case.dtype, "float32", case.steps, case.batch, case.features)
    work = work._replace(training=bool(cell.noise))
    return Job(
        cell,
        step_of(cell, work),
        case.features,
        case.dtype,
        reverse=case.reverse,
        masked=bool({"mask", "lengths", "empty", "nothing"} & set(case.flags)),
        resets="resets" in case.flags,
        states=case.states,
    )._replace(**changes)


# --- Other machines ------------------------------------------------------------------------------

TILES = {"128": (128, 3, 3), "256": (256, 4, 3), "128, large": (128, 6, 4), "one": (256, 1, 1)}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", ["everything", "heads of a vector", "no features"])
def test_the_layouts_of_other_machines(name, tile, monkeypatch):
    bits, rows, vectors = TILES[tile]
    host = dataclasses.replace(Machine.host(), bits=bits, rows=rows, vectors=vectors)
    seen = []
    monkeypatch.setattr(Machine, "host", classmethod(lambda cls: seen.append(1) or host))
    # A batch of its own: what was compiled for another machine is not used again.
    case = CASES[name]._replace(batch=10 + list(TILES).index(tile))
    compare(case, solve("cpu", case), expected(case), DULL)
    assert seen


TARGETS = {
    "neoverse-v2": Machine(128, 6, 4, "neoverse-v2", "", "aarch64-unknown-linux-gnu"),
    "apple-m1": Machine(128, 6, 4, "apple-m1", "", "arm64-apple-darwin"),
    "sapphirerapids": Machine(512, 6, 4, "sapphirerapids", "", "x86_64-unknown-linux-gnu"),
    "x86-64": Machine(128, 3, 3, "x86-64", "", "x86_64-unknown-linux-gnu"),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_code_for_machines_that_are_not_here(target, back):
    made = job(Everything(17), CASES["everything"], saving=True)
    if back:
        made = made._replace(wanted=("start", "x"), d_outs=(True, False, True))
    kernel = Kernel(made, back, TARGETS[target])
    code = compile_text(kernel.emitted()[0], kernel.machine)
    assert code[:4] in (b"\x7fELF", b"\xcf\xfa\xed\xfe")
    assert len(code) > 5000


# --- What is masked ------------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize("garbage", [np.nan, -np.inf], ids=str)
def test_what_is_masked_has_no_influence(garbage):
    """Also where a step has no derivative at zero, as which a masked input is seen."""
    case = Case(Root(13), flags=("empty", "resets"))
    (params, x, initial, inputs), options = draw(case)
    spoilt = jax.tree.map(
        lambda a: jnp.where(options["mask"][..., None], a, jnp.float32(garbage)), (x, inputs)
    )
    run = jax.jit(lambda *given: outcome("cpu", case.cell, given, options))
    clean, dirty = run(params, x, initial, inputs), run(params, spoilt[0], initial, spoilt[1])
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(dirty))
    (hs, _), (_, d_x, _, d_inputs) = dirty
    for a in (hs, d_x, *jax.tree.leaves(d_inputs)):
        assert not np.any(a[~options["mask"]])
    compare(case, clean, expected(case))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("reverse", [False, True])
def test_without_a_step_the_carry_stays(reverse):
    case = Case(GRU(13), batch=5, flags=("nothing",), reverse=reverse)
    given, options = draw(case)
    (hs, final), (d_params, d_x, d_initial, _) = outcome("cpu", case.cell, given, options)
    jax.tree.map(np.testing.assert_array_equal, (final, d_initial), (given[2], waves(final)))
    assert not any(np.any(a) for a in jax.tree.leaves((hs, d_params, d_x)))


@pytest.mark.parametrize(("batch", "steps"), [(0, 7), (3, 0)], ids=["no rows", "no steps"])
def test_an_empty_batch_or_sequence(batch, steps):
    case = Case(LSTM(5), batch=batch, steps=steps)
    given, options = draw(case)
    (hs, final), (d_params, _, d_initial, _) = outcome("cpu", case.cell, given, options)
    assert hs.shape == (batch, steps, 5)
    jax.tree.map(np.testing.assert_array_equal, (final, d_initial), (given[2], waves(final)))
    assert not any(np.any(a) for a in jax.tree.leaves(d_params))


def test_only_what_is_asked_for():
    """Gradients of one argument, from one output."""
    case = Case(Root(5), flags=("mask", "resets"))
    given, options = draw(case)

    def some(engine, which, out):
        def value(*given):
            hs, final = unroll(case.cell, *given[:3], inputs=given[3], engine=engine, **options)[:2]
            return ((hs, final.h, final.state.c)[out] ** 2).sum()

        return jax.jit(jax.grad(value, which))(*given)

    for which, out in ((0, 2), (3, 0)):
        got, wanted = (some(engine, which, out) for engine in ("cpu", "scan"))
        terms = recurrence_terms(*case[1:4], 5, 4, gradient=True)
        jax.tree.map(lambda a, b, n=terms: assert_close(a, b, reduction=n), got, wanted)


def test_a_state_of_several_arrays_in_one_field():
    """Refused, or run; nothing else."""
    case = Case(Pair(5), flags=("mask", "resets"))
    work = WORK._replace(resets=True)
    if CPU().refusal(case.cell, work) is None:
        compare(case, solve("cpu", case), expected(case))
    compare(case, solve(None, case), expected(case))


# --- Under the transformations of JAX ------------------------------------------------------------

TINY = LSTM(3)


def tiny(engine):
    """``(params, x)`` and a number that depends on them."""
    params, x = TINY.init(jax.random.key(0), 2), jax.random.normal(jax.random.key(1), (3, 4, 2))
    lengths = jnp.array([4, 2, 0], "int32")

    def value(params, x):
        hs, final = unroll(TINY, params, x, lengths=lengths, engine=engine)
        return (hs**2).sum() + (final.h * jnp.sin(final.state.c)).sum()

    return params, x, value


def squares(f):
    """The sum of all squared gradients."""

    def value(*args):
        return sum((g**2).sum() for g in jax.tree.leaves(jax.grad(f, (0, 1))(*args)))

    return value


def both(a):
    return jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), a)


def descended(f, p, x):
    def step(_, p):
        return jax.tree.map(lambda a, g: a - 0.1 * g, p, jax.grad(f)(p, x))

    return jax.lax.fori_loop(0, 3, step, p)


def over_time(f, p, x):
    def total(p):
        return jax.lax.scan(lambda c, x: (c + f(p, x), None), jnp.float32(0), both(x))[0]

    return jax.grad(total)(p)


grad = functools.partial(jax.grad, argnums=(0, 1))
TRANSFORMED = {
    "jvp": lambda f, p, x: jax.jvp(f, (p, x), (p, x)),
    "grad of grad": lambda f, p, x: grad(squares(f))(p, x),
    "jvp of grad": lambda f, p, x: jax.jvp(grad(f), (p, x), (p, x)),
    "hessian": lambda f, p, x: jax.hessian(lambda b: f({**p, "bias": b}, x))(p["bias"]),
    "reverse over reverse": lambda f, p, x: jax.jacrev(jax.jacrev(f, 1), 1)(p, x),
    "vmap, rows": lambda f, p, x: jax.vmap(f, (None, 0))(p, both(x)),
    "vmap, parameters": lambda f, p, x: jax.vmap(f, (0, None))(both(p), x),
    "vmap, both": lambda f, p, x: jax.vmap(f)(both(p), both(x)),
    "vmap of grad, rows": lambda f, p, x: jax.vmap(grad(f), (None, 0))(p, both(x)),
    "vmap of grad, parameters": lambda f, p, x: jax.vmap(grad(f), (0, None))(both(p), x),
    "vmap of grad, both": lambda f, p, x: jax.vmap(grad(f))(both(p), both(x)),
    "grad of vmap": lambda f, p, x: grad(lambda p, x: jax.vmap(f, (None, 0))(p, x).sum())(
        p, both(x)
    ),
    "nested vmap of grad": lambda f, p, x: jax.vmap(jax.vmap(grad(f), (None, 0)), (0, None))(
        both(p), both(x)
    ),
    "vmap of grad of grad": lambda f, p, x: jax.vmap(grad(squares(f)), (None, 0))(p, both(x)),
    "vmap of jvp": lambda f, p, x: jax.vmap(lambda x: jax.jvp(f, (p, x), (p, x)))(both(x)),
    "checkpoint": lambda f, p, x: grad(jax.checkpoint(f))(p, x),
    "linearize": lambda f, p, x: jax.linearize(f, p, x)[1](p, x),
    "scan": over_time,
    "fori_loop": descended,
    "cond": lambda f, p, x: jax.grad(
        lambda p: jax.lax.cond(x.sum() > 0, lambda: f(p, x), lambda: 2 * f(p, x))
    )(p),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformed(name):
    def run(engine):
        params, x, value = tiny(engine)
        return jax.jit(lambda p, x: TRANSFORMED[name](value, p, x))(params, x)

    got, wanted = run("cpu"), run("scan")
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert any(np.any(a) for a in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: assert_close(a, b, reduction=500), got, wanted)


@pytest.mark.parametrize("disabled", [False, True], ids=["eager", "disable_jit"])
def test_without_jit(disabled):
    params, x, value = tiny("cpu")
    wanted = jax.jit(jax.value_and_grad(value, (0, 1)))(params, x)
    with jax.disable_jit(disabled):
        got = jax.value_and_grad(value, (0, 1))(params, x)
        mapped = jax.vmap(value, (None, 0))(params, both(x))
    jax.tree.map(lambda a, b: assert_close(a, b, reduction=50), got, wanted)
    assert_close(mapped[0], wanted[0], reduction=50)


@pytest.mark.parametrize("engine", ["scan", "cpu"])
def test_mapped_over_nothing(engine):
    params, x, value = tiny(engine)
    assert jax.vmap(value, (None, 0))(params, jnp.zeros((0, *x.shape))).shape == (0,)


def test_not_a_number_is_looked_for_in_results_only():
    """Not in memory that nobody has written to."""
    case = Case(PeepholeLSTM(33), steps=9, flags=("lengths",))
    given, options = draw(case)

    def spoil():
        for size in (200, 500, 1000, 2000, 4000, 8000, 20_000) * 4:
            jnp.full((size,), jnp.nan).block_until_ready()

    for _ in range(5):
        spoil()
        with jax.debug_nans(True):
            outcome("cpu", case.cell, given, options)


def test_the_same_bits_each_time():
    case = Case(GRU(33), batch=70, flags=("mask", "resets"))
    given, options = draw(case)
    run = jax.jit(lambda *given: outcome("cpu", case.cell, given, options))
    first = jax.device_get(run(*given))
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, run(*given), first)


def test_several_threads():
    """They compile, and run, the same and different kernels."""
    every = [kind(7) for kind in (LSTM, MinGRU)]

    def gradient(cell):
        case = Case(cell, batch=5)
        given, options = draw(case)
        return case, outcome("cpu", cell, given, options)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(gradient, every * 4))
    for (case, got), (_, first) in zip(found, found[:2] * 4, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, first)
        if got is first:
            compare(case, got, expected(case))


SHARED = {
    "masked": Case(GRU(33), batch=70, flags=("mask", "resets"), reverse=True, states=True),
    "heads": Case(SLSTM(32, heads=2), batch=37, flags=("lengths",)),
    "by row": Case(LayerNorm(20), batch=33, flags=("empty",)),
    "noise and inputs": Case(Everything(17), batch=34),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SHARED)
def test_threads_share_the_rows(name, monkeypatch):
    """Values bit by bit as of one thread; sums over rows have another order."""
    case = SHARED[name]
    alone = solve("cpu", case)
    monkeypatch.setattr(cpu_calls, "_LEAST", 1)
    monkeypatch.setattr(cpu_calls, "usable_cores", lambda: 3 * jax.local_device_count())
    made = Kernel(job(case.cell, case), False, Machine.host())
    assert made.workers([jax.ShapeDtypeStruct((7, case.batch, 2), "float32")]) == min(
        3, case.batch // 16
    )
    together = solve("cpu", case)
    jax.tree.map(np.testing.assert_array_equal, together[0], alone[0])
    compare(case, together, alone, DULL)
    jax.tree.map(np.testing.assert_array_equal, solve("cpu", case), together)


@pytest.mark.parametrize(
    ("cores", "steps", "batch", "workers"),
    [(16, 500, 64, 4), (2, 500, 64, 2), (1, 500, 64, 1), (16, 500, 31, 1), (16, 1, 64, 1)],
)
def test_as_many_workers_as_there_are_cores_and_rows(cores, steps, batch, workers, monkeypatch):
    monkeypatch.setattr(cpu_calls, "usable_cores", lambda: cores * jax.local_device_count())
    case = Case(LSTM(100), features=32)
    made = Kernel(job(case.cell, case), False, Machine.host())
    assert made.workers([jax.ShapeDtypeStruct((steps, batch, 32), "float32")]) == workers


# --- Spread over devices -------------------------------------------------------------------------

SPREAD = Case(PeepholeLSTM(5), batch=4, steps=6, flags=("mask", "resets"))
MOVES = ("all-gather", "all-to-all", "collective-permute", "collective-broadcast")


def spread():
    """``(params, x, initial, inputs, flags)`` and the outcome as a function of them."""
    given, options = draw(SPREAD)
    flags = {name: options.pop(name) for name in SPREAD.flags}

    def run(*args):
        return outcome("cpu", SPREAD.cell, args[:4], options | args[4])

    return (*given, flags), run


def mesh_of(kind, shape=(2,)):
    devices = jax.devices()[: int(np.prod(shape))]
    axis_types = (kind,) * len(shape)
    return jax.make_mesh(shape, ("rows", "more")[: len(shape)], axis_types, devices=devices)


def placed(args, mesh):
    shardings = [NamedSharding(mesh, P()), *[NamedSharding(mesh, P("rows"))] * 4]
    return tuple(jax.device_put(a, s) for a, s in zip(args, shardings, strict=True))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=["all axes", "one axis of two"])
def test_under_shard_map(shape, check_vma):
    args, run = spread()

    def local(*args):
        out, (d_params, *rest) = run(*args)
        if not check_vma:  # else the transpose of spreading the parameters has summed them already
            d_params = jax.lax.psum(d_params, "rows")
        return out, (d_params, *rest)

    rows = P("rows")
    mesh = mesh_of(AxisType.Auto, shape)
    spec = {"in_specs": (P(), *[rows] * 4), "out_specs": (rows, (P(), rows, rows, rows))}
    shards = jax.shard_map(local, mesh=mesh, **spec, check_vma=check_vma, axis_names={"rows"})
    compare(SPREAD, jax.jit(shards)(*args), expected(SPREAD))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_rows_over_devices_stay_where_they_are(kind):
    args, run = spread()
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        args = placed(args, mesh)
        compiled = jax.jit(run).lower(*args).compile()
        got = compiled(*args)
    compare(SPREAD, got, expected(SPREAD))
    text = compiled.as_text()
    assert not [move for move in MOVES if move in text]
    assert "all-reduce" in text
    (hs, final), (_, d_x, d_initial, _) = got
    for a in jax.tree.leaves((hs, final, d_x, d_initial)):
        assert a.sharding.is_equivalent_to(NamedSharding(mesh, P("rows")), a.ndim)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [P(None, "rows"), P(("rows", "more")), P("more", "rows")], ids=str)
def test_spread_in_other_ways(rows):
    """Over time, over two axes of a mesh, over both."""
    (params, x, initial, inputs, flags), run = spread()
    mesh = mesh_of(AxisType.Auto, (2, 2))
    x = jax.device_put(x, NamedSharding(mesh, rows))
    columns = NamedSharding(mesh, P(None, "more"))
    params = params | {"kernel": jax.device_put(params["kernel"], columns)}
    compare(SPREAD, jax.jit(run)(params, x, initial, inputs, flags), expected(SPREAD))


def test_a_mapped_axis_that_is_spread_is_not_brought_together():
    """Several batches, or sets of parameters, one a device."""
    params, x, value = tiny("cpu")
    mesh = mesh_of(AxisType.Auto)
    args = [jax.device_put(both(a), NamedSharding(mesh, P("rows"))) for a in (params, x)]
    run = jax.jit(jax.vmap(grad(value)), out_shardings=NamedSharding(mesh, P("rows")))
    assert "all-gather" not in run.lower(*args).compile().as_text()


# --- Leaving the process -------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2])
def test_an_exported_program_calls_nothing_of_this_process(devices):
    args, run = spread()
    leaves, structure = jax.tree.flatten(args)

    def flat(*leaves):
        return jax.tree.leaves(run(*jax.tree.unflatten(structure, leaves)))

    how = {}
    if devices > 1:
        mesh = mesh_of(AxisType.Auto)
        shardings = [NamedSharding(mesh, P())] * len(jax.tree.leaves(args[0]))
        rest = [NamedSharding(mesh, P("rows"))] * (len(leaves) - len(shardings))
        how["in_shardings"] = (*shardings, *rest)
    export = jax.export.export(jax.jit(flat, **how), platforms=["cpu", "tpu"])
    if devices > 1:  # how it is spread is said by Python, which no other process has
        with pytest.raises(NotImplementedError, match="host_callbacks"):
            export(*leaves)
        return
    exported = export(*leaves)
    assert "custom_call" not in str(exported.mlir_module())
    again = jax.export.deserialize(exported.serialize())
    got = jax.jit(again.call, **how)(*leaves)
    wanted = expected(SPREAD)
    compare(SPREAD, jax.tree.unflatten(jax.tree.structure(wanted), got), wanted)


PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from lstmjax.cells import CfC
from lstmjax.recurrence import unroll

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append("cache_hits" in event))
cell, spread = CfC(5), json.loads(sys.argv[1])
mesh = jax.make_mesh((2,), ("rows",), (AxisType.Auto,))
params, x = cell.init(jax.random.key(0), 3), jnp.sin(jnp.arange(72.0)).reshape(4, 6, 3)
x = jax.device_put(x, NamedSharding(mesh, P("rows"))) if spread else x
params = jax.device_put(params, NamedSharding(mesh, P())) if spread else params

def value(params, x, dt):
    return (unroll(cell, params, x, inputs={"dt": dt}, engine="cpu")[0] ** 2).sum()

run = jax.jit(jax.grad(value, (0, 1, 2))).lower(params, x, x[..., 0] ** 2)
hits.clear()
found = jax.tree.leaves(run.compile()(params, x, x[..., 0] ** 2))
print(json.dumps({"hit": any(hits), "found": [a.tolist() for a in found]}))
"""


@pytest.mark.sampled(1)
@pytest.mark.parametrize("spread", [False, True], ids=["one device", "two"])
def test_a_compiled_program_is_kept_for_the_next_process(spread, tmp_path):
    own = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "LSTMJAX_CACHE_DIR": str(tmp_path / "own"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(spread)]
    found = []
    for seed_ in "12":  # sets are in another order then
        own["PYTHONHASHSEED"] = seed_
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert [each["hit"] for each in found] == [False, not spread]  # likewise
    assert found[0]["found"] == found[1]["found"]
    assert all(np.any(a) for a in found[0]["found"])
    assert len(list((tmp_path / "own" / "kernels").iterdir())) == 2  # forward and backward


# --- Memory --------------------------------------------------------------------------------------


class Buffer(ctypes.Structure):
    """XLA_FFI_Buffer."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    ]


class Buffers(ctypes.Structure):
    """XLA_FFI_Args, XLA_FFI_Rets."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("list", ctypes.POINTER(ctypes.POINTER(Buffer))),
    ]


class Frame(ctypes.Structure):
    """XLA_FFI_CallFrame."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("api", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int32),
        ("arguments", Buffers),
        ("results", Buffers),
    ]


def buffers(arrays):
    """For a call frame; it does not keep the arrays alive."""
    numbers = {"bool": 1, "int32": 4, "int64": 5, "float32": 11, "float64": 12}
    made = []
    for a in arrays:
        dims = (ctypes.c_int64 * max(a.ndim, 1))(*a.shape)
        kind = numbers[str(a.dtype)]
        made.append(Buffer(ctypes.sizeof(Buffer), None, kind, a.ctypes.data, a.ndim, dims))
    pointers = (ctypes.POINTER(Buffer) * len(made))(*map(ctypes.pointer, made))
    return Buffers(ctypes.sizeof(Buffers), None, len(made), None, pointers)


libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(a, front):
    """A copy, at the front or the end of a room whose neighbourhood may not be touched."""
    page = mmap.PAGESIZE
    room = mmap.mmap(-1, -(-a.nbytes // page) * page + 2 * page)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(room))
    for edge in (begin, begin + len(room) - page):
        assert libc.mprotect(edge, page, 0) == 0
    place = page if front else len(room) - page - a.nbytes
    copy = np.frombuffer(room, a.dtype, a.size, place).reshape(a.shape)
    copy[...] = a
    return copy


class Schedule(ctypes.Structure):
    """XLA_FFI_ThreadPool_Schedule_Args."""

    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        *((name, ctypes.c_void_p) for name in ("extension", "context", "task", "data")),
    ]


class Threads:
    """XLA's interface, as far as threads go.

    Attributes:
        come: when: ``"now"`` in a thread of their own, ``"here"`` in that which asks for them,
            ``"late"`` after the function has returned, or ``"never"``, which is an error.
        asked: how many were asked for.
    """

    def __init__(self, come):
        self.come, self.asked, self.threads, self.errors = come, 0, [], []
        functions = {64: self.destroy, 136: self.schedule}
        kind = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
        self.made = {at: kind(f) for at, f in functions.items()}
        self.api = (ctypes.c_void_p * 24)()
        for at, made in self.made.items():
            self.api[at // 8] = ctypes.cast(made, ctypes.c_void_p).value

    def schedule(self, place):
        args = Schedule.from_address(place)
        assert (args.struct_size, args.context) == (ctypes.sizeof(Schedule), 7)
        self.asked += 1
        if self.come == "never":
            return 11
        run = functools.partial(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(args.task), args.data)
        if self.come == "here":
            run()
        else:
            self.threads.append(threading.Thread(target=run))
            if self.come == "now":
                self.threads[-1].start()

    def destroy(self, place):
        self.errors.append((ctypes.c_size_t * 3).from_address(place)[2])

    def end(self):
        for thread in self.threads:
            if self.come == "late":
                thread.start()
            thread.join()
        assert self.errors == [11] * (self.asked if self.come == "never" else 0)


def call_guarded(kernel, steps, batch, rng, workers=1, come="now"):
    """Call machine code: arguments stay as they were, results are numbers; gives the results."""
    front, dtype = bool(rng.integers(2)), kernel.job.dtype

    def argument(operand):
        shape = operand.sizes(steps, batch)
        if operand.kind == "flags":
            return rng.random(shape) < 0.6
        return (0.3 * rng.normal(size=shape)).astype(dtype).view(operand.dtype(dtype))

    given = [argument(a) for a in kernel.arguments]
    arguments = [guarded(a, front) for a in given]
    text, memory = kernel.emitted()
    results = [
        guarded(np.full(a.sizes(steps, batch), np.nan, dtype).view(a.dtype(dtype)), front)
        for a in kernel.results
    ]
    results.append(guarded(np.full((workers, memory), np.nan, dtype), front))
    code = load_object(compile_text(text, kernel.machine), ["kernel"])["kernel"]
    sides = buffers(arguments), buffers(results)
    threads = Threads(come)
    frame = Frame(ctypes.sizeof(Frame), None, ctypes.addressof(threads.api), 7, 3, *sides)
    assert ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(code)(ctypes.addressof(frame)) is None
    threads.end()
    assert threads.asked == workers - 1
    for a, b, operand in zip(arguments, given, kernel.arguments, strict=True):
        np.testing.assert_array_equal(a, b, operand.name)
    for a, operand in zip(results[:-1], kernel.results, strict=True):
        if operand.name not in ("rows", "kept", "pre"):
            assert np.all(np.isfinite(a)), operand.name
    return [np.array(a) for a in results[:-1]]


HIDDEN, FEATURES, BATCHES = (1, 2, 5, 13, 16, 17, 33, 64), (0, 1, 15, 16, 33), (1, 7, 63, 65, 130)


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="no such memory")
@pytest.mark.sampled(3)
@pytest.mark.parametrize("number", range(60 if LONG else 18))
def test_nothing_beside_the_operands_is_touched(number):
    rng = np.random.default_rng(number)

    def pick(values):
        return values[int(rng.integers(len(values)))]

    hidden = pick(HIDDEN)
    kind = pick((LSTM, GRU, MinGRU, Everything, Learned, Three, LayerNorm, SLSTM))
    cell = SLSTM(128, heads=2) if kind is SLSTM and hidden % 2 else kind(hidden)
    machine, tile = Machine.host(), pick((None, *TILES.values()))
    if tile is not None:
        bits, rows, vectors = tile
        machine = dataclasses.replace(machine, bits=bits, rows=rows, vectors=vectors)
    flags = tuple(name for name in ("mask", "resets") if rng.integers(2))
    case = Case(
        cell,
        *(pick(BATCHES), pick((1, 2, 5)), pick(FEATURES), flags),
        *(bool(n) for n in rng.integers(2, size=2)),
        dtype=pick(("float32", "float32", "float64")),
    )
    with jax.enable_x64(case.dtype == "float64"):
        made = job(cell, case)
        names = {"x"} | {f"input {name}" for name in cell.step_inputs}
        wanted = tuple(sorted(names | {"start"} if made.resets else names))
        d_outs = tuple(bool(n) for n in rng.integers(2, size=1 + len(cell.State._fields)))
        back = {"wanted": wanted, "d_outs": d_outs if case.states else d_outs[:1], "saving": True}
        for kernel in (
            Kernel(made, False, machine),
            Kernel(made._replace(saving=True), False, machine),
            Kernel(made._replace(**back), True, machine),
        ):
            workers, come = int(rng.integers(1, 5)), pick(("now", "here", "late", "never"))
            call_guarded(kernel, case.steps, case.batch, rng, workers, come)


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="no such memory")
@pytest.mark.parametrize("back", [False, True])
def test_workers_find_the_same_whoever_they_are(back):
    """Bit by bit where threads come now, late or never; one alone sums weights otherwise."""
    case = Case(GRU(20), flags=("mask", "resets"))
    made = job(case.cell, case, saving=True)
    kernel = Kernel(made._replace(wanted=("start", "x")) if back else made, back, Machine.host())
    found = {}
    ways = [(1, "never"), *((3, come) for come in ("now", "here", "late", "never"))]
    for workers, come in ways:
        rng = np.random.default_rng(3)
        found[workers, come] = call_guarded(kernel, 5, 37, rng, workers, come)
    first = found[3, "never"]
    for way, others in found.items():
        for a, b, operand in zip(others, first, kernel.results, strict=True):
            if operand.kind == "bits":  # parts are never written
                continue
            if way[0] == 3 or operand.rows:
                np.testing.assert_array_equal(a, b, f"{way} {operand.name}")
            else:
                terms = recurrence_terms(37, 5, 4, 5, 2, gradient=True)
                assert_close(a, b, reduction=terms, what=f"{way} {operand.name}")


UNREAD = """
import numpy as np
import tests.test_kernels_cpu as t

case = t.Case(t.Unread(33))
back = {"saving": True, "wanted": ("input a",), "d_outs": (True,)}
for more in ({}, back):
    kernel = t.Kernel(t.job(case.cell, case, **more), bool(more), t.Machine.host())
    for seed in range(4):  # at the front of a page, and at its end
        t.call_guarded(kernel, case.steps, case.batch, np.random.default_rng(seed))
"""


def in_a_process_of_its_own(program, *arguments):
    own = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    return done.stdout


def test_an_input_that_no_step_reads():
    """Nor may its gradient be written beside it."""
    if CPU().refusal(Unread(33), WORK) is None:
        in_a_process_of_its_own(UNREAD)
    case = Case(Unread(33))
    compare(case, solve(None, case), expected(case), dull=("'a'",))


def called(kernel, arguments, results):
    """A kernel as anyone may call it who knows its name."""
    return jax.block_until_ready(jax.ffi.ffi_call(kernel.target.name, results)(*arguments))


def operands(kernel, steps, batch, workers=1):
    """What a kernel takes, and the shapes of what it gives."""
    dtype = kernel.job.dtype
    arguments = [jnp.zeros(a.sizes(steps, batch), a.dtype(dtype)) for a in kernel.arguments]
    results = [jax.ShapeDtypeStruct(a.sizes(steps, batch), a.dtype(dtype)) for a in kernel.results]
    return arguments, [*results, jax.ShapeDtypeStruct((workers, kernel.emitted()[1]), dtype)]


def some_kernel(back):
    case = Case(Root(5), flags=("mask", "resets"))
    made = job(case.cell, case, saving=True)
    if back:
        made = made._replace(wanted=("input dt", "start", "x"), d_outs=(True,))
    return Kernel(made, back, Machine.host())


@pytest.mark.parametrize("back", [False, True])
def test_operands_that_do_not_fit_are_refused_by_name(back):
    kernel = some_kernel(back)
    arguments, results = operands(kernel, 5, 4)
    called(kernel, arguments, results)
    message = "lstmjax's CPU kernel was called with {}"

    def refused(arguments, results, what):
        with pytest.raises(jax.errors.JaxRuntimeError, match=message.format(what)):
            called(kernel, arguments, results)

    def changed(values, n, value):
        return [*values[:n], value, *values[n + 1 :]]

    for n, (a, operand) in enumerate(zip(arguments, kernel.arguments, strict=True)):
        for bad in (a.astype("int16"), a[None]):
            refused(changed(arguments, n, bad), results, f"{operand.name} of another type or rank")
        longer = jnp.concatenate([a, a], -1)
        refused(changed(arguments, n, longer), results, ".* of another shape")
    names = [*(a.name for a in kernel.results), "memory"]
    for n, (a, name) in enumerate(zip(results, names, strict=True)):
        *more, last = a.shape
        for shape, what in (((*a.shape, 1), "type or rank"), ((*more, last + 1), "shape")):
            bad = jax.ShapeDtypeStruct(shape, a.dtype)
            refused(arguments, changed(results, n, bad), f"{name} of another {what}")
    for wrong in (arguments[:-1], [*arguments, arguments[0]], []):
        refused(wrong, results, "another number of operands")
    refused(arguments, results[:-1], "another number of operands")


EMPTY = """
import tests.test_kernels_cpu as t

for back in (False, True):
    kernel = t.some_kernel(back)
    t.called(kernel, *t.operands(kernel, 5, 0))
    t.called(kernel, *t.operands(kernel, 0, 4))
"""


def test_no_rows_end_no_process():
    in_a_process_of_its_own(EMPTY)


# --- What it refuses -----------------------------------------------------------------------------


class Wide(LSTM):
    """Carries another type than it computes with."""

    def initial_carry(self, batch_size, dtype=jnp.float32):
        carry = super().initial_carry(batch_size, dtype)
        return carry._replace(state=self.State(carry.state.c.astype("bfloat16")))


SYMBOLIC = dict(zip(("steps", "batch"), jax.export.symbolic_shape("t, b"), strict=True))


@pytest.mark.parametrize(
    ("cell", "change", "reason"),
    [
        (LSTM(5), {"platform": "gpu"}, "it runs on CPUs, not on gpu"),
        (LSTM(5), {"dtype": "float16"}, "it computes in float32 and float64, the inputs are float"),
        (LSTM(5), {"dtype": "bfloat16"}, "it computes in float32 and float64, the inputs are bf"),
        (LSTM(5), {"precision": "bfloat16"}, "its products are in full precision, not in bfloat16"),
        (LSTM(5), {"batch": SYMBOLIC["batch"]}, "the length or the batch is not known"),
        (LSTM(5), {"steps": SYMBOLIC["steps"]}, "the length or the batch is not known"),
        (Projected(5), {}, "Projected overrides transition"),
        (Rebound(5), {}, "Rebound overrides apply_step"),
        (Narrow(5), {}, "Narrow carries a (B, 1) float32, not (B, H) float32"),
        (Wide(5), {}, "Wide carries a (B, 5) bfloat16, not (B, H) float32"),
        (Special(5), {}, "its step uses digamma"),
    ],
    ids=lambda a: type(a).__name__ if isinstance(a, Cell) else None,
)
def test_refusals_name_the_reason(cell, change, reason):
    work = WORK._replace(**change)
    refusal = CPU().refusal(cell, work)
    assert refusal is not None
    assert reason.removesuffix("bf") in refusal
    with pytest.raises(ValueError, match="'cpu' cannot run"):
        choose_engine(cell, work, "cpu")
    if work.platform == "cpu":
        engine, why = choose_engine(cell, work)
        assert engine in (Derived(), Scan())
        assert why.partition("; ")[0] == f"no cpu: {refusal}"


def test_it_is_the_first_choice_on_a_cpu():
    assert choose_engine(LSTM(5), WORK) == (CPU(), "the first choice")
    assert not CPU().offers(LSTM(5), WORK._replace(platform="tpu"))


def test_what_it_refuses_runs_all_the_same():
    case = Case(Special(5), flags=("mask", "resets"))
    with pytest.raises(ValueError, match="its step uses digamma"):
        solve("cpu", case)
    jax.tree.map(np.testing.assert_array_equal, solve(None, case), solve("derived", case))


def refuse(*_, **__):
    raise OSError("no executable memory")


@pytest.mark.parametrize("missing", ["llvmlite", "memory", "interface"])
def test_where_no_function_can_be_made_another_engine_runs(missing, monkeypatch):
    if missing == "llvmlite":
        monkeypatch.setitem(sys.modules, "lstmjax.recurrence.cpu.calls", None)
        reason = 'llvmlite is not installed (pip install "lstmjax[cpu]")'
    elif missing == "memory":
        monkeypatch.setattr(cpu_calls, "load_object", refuse)
        reason = "this system does not let it make functions: no executable memory"
    else:
        other = functools.partial(cpu_calls.check_calls, (1, 0))
        monkeypatch.setattr(cpu_calls, "check_calls", other)
        reason = "this system does not let it make functions: .*API version.*1.*"
    cpu_engine._missing.cache_clear()
    try:
        engine, why = choose_engine(LSTM(5), WORK)
        assert engine == Derived()
        pattern = reason if missing == "interface" else re.escape(reason)
        assert re.fullmatch(f"no cpu: {pattern}", why, re.DOTALL), why
        case = Case(LSTM(11 + len(missing)), flags=("mask",))  # of a size that was not traced yet
        with pytest.raises(ValueError, match="'cpu' cannot run"):
            solve("cpu", case)
        compare(case, solve(None, case), expected(case))
    finally:
        cpu_engine._missing.cache_clear()


def test_what_the_compiler_fails_at_is_tried_again(monkeypatch):
    case = Case(LSTM(14), flags=("mask",))  # of a size that nothing else has
    assert choose_engine(case.cell, WORK)[0] == CPU()
    monkeypatch.setattr(cpu_calls, "compile_text", refuse)
    with pytest.raises(OSError, match="no executable memory"):
        solve("cpu", case)
    monkeypatch.undo()
    compare(case, solve("cpu", case), expected(case))


def test_a_kernel_is_compiled_beside_what_is_traced_and_only_where_it_is_needed(monkeypatch):
    threads, compile_text = [], cpu_calls.compile_text

    def seen(text, machine):
        threads.append(threading.current_thread().name)
        return compile_text(text, machine)

    monkeypatch.setattr(cpu_calls, "compile_text", seen)
    cell = LSTM(22)
    params, x = cell.init(jax.random.key(0), 3), jnp.sin(jnp.arange(24.0)).reshape(2, 4, 3)

    def value(params, x):
        return (unroll(cell, params, x, engine="cpu")[0] ** 2).sum()

    for function, kernels in ((jax.grad(value, (0, 1)), 2), (value, 3)):  # value: keeps nothing
        jax.jit(function)(params, x)
        assert len(threads) == kernels
    assert all(name.startswith("lstmjax_cpu") for name in threads)


def test_the_library_imports_without_llvmlite():
    program = "import sys; sys.modules['llvmlite'] = None; import lstmjax.recurrence as r; " + (
        "from lstmjax.cells import LSTM; "
        "w = r.Workload('cpu', 'float32', 'float32', 4, 3, 2); print(r.choose_engine(LSTM(5), w))"
    )
    said = in_a_process_of_its_own(program)
    assert "Derived(" in said
    assert "llvmlite is not installed" in said
