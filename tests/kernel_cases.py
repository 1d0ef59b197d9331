"""What the fused kernels are compared on: cells, cases, and the plain scan in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lstmjax.cells import GRU, LSTM, Carry, Cell
from lstmjax.recurrence import Scan, unroll
from tests.tolerances import assert_close, recurrence_terms


class Three(Cell):
    """Three arrays of state, h itself, functions that backends may lack, and a start of its own."""

    gates = ("i", "f", "g", "o")
    unit_params = {"gain": 1.0, "leak": 0.1}
    uses_h = True

    class State(NamedTuple):
        c: jax.Array
        n: jax.Array
        m: jax.Array

    def initial_carry(self, batch_size, dtype=jnp.float32):
        one = jnp.ones((batch_size, self.hidden_size), dtype)
        return Carry(0.5 * one, self.State(0 * one, one, 0 * one))

    def step(self, pre, state, params, h):
        log_f = jax.nn.log_sigmoid(pre.f)
        m = jnp.maximum(log_f + state.m, pre.i)
        i, f = jnp.exp(pre.i - m), jnp.exp(log_f + state.m - m)
        c = f * state.c + i * jnp.sqrt(jax.nn.softplus(pre.g)) * params.gain
        n = f * state.n + i
        return jax.nn.sigmoid(pre.o) * c / n + params.leak * h, self.State(c, n, m)


class Ratio(Cell):
    """Divides by a state that is never zero: rows of zeros for padding would make it 0 / 0."""

    gates = ("z", "f")

    class State(NamedTuple):
        n: jax.Array

    def initial_carry(self, batch_size, dtype=jnp.float32):
        one = jnp.ones((batch_size, self.hidden_size), dtype)
        return Carry(0 * one, self.State(one))

    def step(self, pre, state, params):
        n = (1 + jax.nn.sigmoid(pre.f)) * state.n / (1 + state.n)
        return jnp.tanh(pre.z) * state.n / n, self.State(n)


class LayerNorm(Cell):
    """An LSTM that normalises each gate over the units of its row (Ba et al. 2016)."""

    gates = ("i", "f", "g", "o")
    elementwise = False
    unit_params = {"gain": 1.0}

    class State(NamedTuple):
        c: jax.Array

    def step(self, pre, state, params):
        def norm(a):
            centred = a - a.mean(axis=-1, keepdims=True)
            return params.gain * centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 0.1)

        i, f, g, o = map(norm, pre)
        c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(norm(c)), self.State(c)


class TwoHeads(LSTM):
    """Block-diagonal recurrence."""

    heads = 2


class TwoHeadsApart(TwoHeads):
    """The same with both parts of the pre-activations apart."""

    parts_apart = True

    def step(self, pre, state, params):
        i, f, g, o = (x + jnp.tanh(h) for x, h in zip(pre.x, pre.h, strict=True))
        c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), self.State(c)


class Projected(LSTM):
    """A transition of its own."""

    def transition(self, params, x, carry, dot):
        return super().transition(params, x, carry, dot)


class Rebound(LSTM):
    """What calls its step is its own, and wants more than the step's parameters."""

    def apply_step(self, pre, carry, params):
        return super().apply_step(pre, carry, params | {"bias": params["bias"]})


class Narrow(LSTM):
    """A state that all units of a row share."""

    def initial_carry(self, batch_size, dtype=jnp.float32):
        carry = super().initial_carry(batch_size, dtype)
        return carry._replace(state=self.State(carry.state.c[:, :1]))


class Case(NamedTuple):
    """One comparison; ``flags`` are arguments of `unroll` that say which steps count."""

    cell: Cell
    batch: int = 3
    steps: int = 4
    features: int = 2
    precision: str = "float32"
    flags: tuple[str, ...] = ()
    reverse: bool = False
    initial: bool = True


def draw(case, seed=0):
    """``(params, x, initial, d_hs, d_final)`` and the options of `unroll`."""
    rng = np.random.default_rng(seed)
    batch, steps, cell = case.batch, case.steps, case.cell

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), "float32")

    params = cell.init(jax.random.key(seed), case.features)
    params = jax.tree.map(lambda a: a + _noise(a.shape) * normal(*a.shape), params)
    start = cell.initial_carry(batch)
    initial = jax.tree.map(lambda a: a + 0.3 * normal(*a.shape), start) if case.initial else None
    d_final = jax.tree.map(lambda a: normal(*a.shape), start)
    x, d_hs = normal(batch, steps, case.features), normal(batch, steps, cell.hidden_size)
    kinds = {
        "mask": jnp.asarray(rng.random((batch, steps)) < 0.7),
        "resets": jnp.asarray(rng.random((batch, steps)) < 0.3),
        "lengths": jnp.asarray(np.arange(batch) % (steps + 1), "int32"),
    }
    options = {name: kinds[name] for name in case.flags}
    options |= {"reverse": case.reverse, "precision": case.precision}
    return (params, x, initial, d_hs, d_final), options


def _noise(shape):
    """Products of many terms grow with it: too large, and rounding grows from step to step."""
    return 0.3 if len(shape) < 2 else 0.3 / max(1, shape[0] / 8) ** 0.5


def values_and_gradients(engine, cell, params, x, initial, d_hs, d_final, **options):
    """``((hs, final), (d_params, d_x, d_initial))``."""

    def run(params, x, initial):
        return unroll(cell, params, x, initial, engine=engine, **options)

    out, pull_back = jax.vjp(run, params, x, initial)
    return out, pull_back((d_hs, d_final))


def final_gradients(engine, case):
    """Of the parameters alone, from the final h alone."""
    (params, x, initial, *_), options = draw(case)

    def final(params):
        return (unroll(case.cell, params, x, initial, engine=engine, **options)[1].h ** 2).sum()

    return jax.jit(jax.grad(final))(params)


def second_derivatives(engine, case):
    """Gradients of the sum of all squared gradients."""
    (*inputs, d_hs, d_final), options = draw(case)

    def squares(params, x, initial):
        given = (params, x, initial, d_hs, d_final)
        _, gradients = values_and_gradients(engine, case.cell, *given, **options)
        return sum((g**2).sum() for g in jax.tree.leaves(gradients))

    return jax.jit(jax.grad(squares, (0, 1, 2)))(*inputs)


def compare_vmapped(engine):
    """`jax.vmap` over parameters against one call for each set of them."""
    case = Case(LSTM(5))
    (_, *rest), options = draw(case)
    sets = [draw(case, seed)[0][0] for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *sets)

    def one(params):
        return values_and_gradients(engine, case.cell, params, *rest, **options)

    got = jax.jit(jax.vmap(one))(stacked)
    for k, params in enumerate(sets):
        apart = jax.tree.map(lambda a, k=k: a[k], got)
        compare(case, apart, expected(case, (params, *rest), options))


def compare_final_gradients(engine):
    """Gradients of the parameters alone, from the final carry alone."""
    case = Case(GRU(5), flags=("mask", "resets"))
    got, wanted = (final_gradients(one, case) for one in (engine, "scan"))
    compare(case, ((), got), ((), wanted))


def compare_second_derivatives(engine):
    """Those of an engine against those of the plain scan."""
    case = Case(LSTM(5), flags=("mask", "resets"))
    got, wanted = (second_derivatives(one, case) for one in (engine, "scan"))
    compare(case, (None, got), (None, wanted))


def expected(case, args, options):
    """The plain scan in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, "float64"), args)
        options = options | {"precision": "float32"}
        if "lengths" in options:
            options["lengths"] = options["lengths"].astype("int64")
        scan = Scan(recompute=False)
        return jax.jit(lambda *a: values_and_gradients(scan, case.cell, *a, **options))(*wide)


def compare(case, got, wanted):
    """Every value and every gradient, by the rule of `tolerances`."""
    cell = case.cell
    for k, what in enumerate(("values", "gradients")):
        terms = recurrence_terms(
            case.batch,
            case.steps,
            case.features,
            cell.hidden_size,
            len(cell.gates),
            gradient=bool(k),
        )
        assert jax.tree.structure(got[k]) == jax.tree.structure(wanted[k])
        for (path, one), other in zip(
            jax.tree_util.tree_leaves_with_path(got[k]), jax.tree.leaves(wanted[k]), strict=True
        ):
            name = f"{what}{jax.tree_util.keystr(path)}"
            assert one.dtype == jnp.float32, name
            assert np.any(other), f"the case says nothing about {name}"
            assert_close(one, other, reduction=terms, dtype=case.precision, what=name)
