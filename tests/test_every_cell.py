"""Every cell, values and all gradients, against the float64 NumPy reference.

`Outsider` is a cell that the library has never seen, written here as a user would write it. It goes
through every test that the library's own cells go through. Unless a test says otherwise it runs the
derived engine, with chunks of three of the seven steps, so that the last one is not full.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstmjax.cells import GRU, LSTM, Carry, Cell, PeepholeLSTM
from lstmjax.cells.base import start
from lstmjax.recurrence import Derived, Scan, unroll
from lstmjax.recurrence.noise import as_keys, noises
from tests import numpy_reference as reference
from tests.references import PAPERS
from tests.tolerances import OPTIMIZED, assert_close, recurrence_terms

B, T, D, H = 3, 7, 2, 5


# --- A cell of one's own -------------------------------------------------------------------------


class Outsider(Cell):
    """Coupled gates, one peephole, a leaky output: a hyper-parameter, a unit parameter and h_{t-1}.

    f = σ(a_f),   c_t = f c_{t-1} + (1 - f) tanh(a_g)
    h_t = (1 - leak) σ(a_o + p_o c_t) tanh(c_t) + leak h_{t-1}
    """

    gates = ("f", "g", "o")
    unit_params = {"p_o": 0.0}
    uses_h = True
    leak: float = 0.25

    class State(NamedTuple):
        c: jax.Array

    def step(self, pre, state, params, h):
        f = jax.nn.sigmoid(pre.f)
        c = f * state.c + (1 - f) * jnp.tanh(pre.g)
        o = jax.nn.sigmoid(pre.o + params.p_o * c)
        return (1 - self.leak) * o * jnp.tanh(c) + self.leak * h, self.State(c)


LEAK = 0.375


def outsider_step(params, x, h_prev, state):
    (c_prev,) = state
    a = x @ params["kernel"] + h_prev @ params["recurrent_kernel"] + params["bias"]
    a_f, a_g, a_o = np.split(a, 3, axis=-1)
    f = reference.sigmoid(a_f)
    c = f * c_prev + (1 - f) * np.tanh(a_g)
    o = reference.sigmoid(a_o + params["units"]["p_o"] * c)
    return (1 - LEAK) * o * np.tanh(c) + LEAK * h_prev, (c,), {}


REFERENCES = {
    **reference.REFERENCES,
    "Outsider": reference.Reference(outsider_step, None, gates=3, states=1, units=("p_o",)),
}
CELLS = {
    "LSTM": LSTM(H),
    "PeepholeLSTM": PeepholeLSTM(H),
    "GRU": GRU(H),
    "Outsider": Outsider(H, leak=LEAK),
}
every_cell = pytest.mark.parametrize("name", CELLS)
ENGINES = {
    "scan": Scan(),
    "plain": Scan(recompute=False),
    "derived": Derived(chunk=3),
    "chunks": Derived(chunk=3, save="chunks"),
    "one chunk": Derived(chunk=7),
}
every_engine = pytest.mark.parametrize("engine", ENGINES)
both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


# --- Cases ---------------------------------------------------------------------------------------

# Row 1 has a reset on a masked step, row 2 one on the first step.
MASK = np.array([[1, 1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 1, 1], [1, 0, 1, 0, 1, 1, 1]], bool)
RESETS = np.array([[0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1, 0]], bool)
LENGTHS = np.array([4, 7, 1])
WITH_AN_EMPTY_ROW = np.array([7, 0, 2])

CASES = {
    "plain": {},
    "initial": {"initial": True},
    "right": {"initial": True, "lengths": LENGTHS},
    "left": {"initial": True, "lengths": LENGTHS, "padding": "left"},
    "zero length": {"initial": True, "lengths": WITH_AN_EMPTY_ROW},
    "mask": {"initial": True, "mask": MASK},
    "resets": {"resets": RESETS},
    "mask and resets": {"initial": True, "mask": MASK, "resets": RESETS},
    "reverse": {"initial": True, "reverse": True},
    "reverse, lengths and resets": {
        "initial": True,
        "reverse": True,
        "lengths": LENGTHS,
        "resets": RESETS,
    },
    "reverse, mask and resets": {"initial": True, "reverse": True, "mask": MASK, "resets": RESETS},
    "time major": {
        "initial": True,
        "time_major": True,
        "reverse": True,
        "lengths": LENGTHS,
        "mask": MASK,
        "resets": RESETS,
    },
    "one step": {"initial": True, "time": 1},
    "one row": {"initial": True, "batch": 1, "mask": MASK[1:2], "resets": RESETS[1:2]},
}
every_case = pytest.mark.parametrize("case", CASES)


class Problem(NamedTuple):
    """One comparison in float64 NumPy: inputs, cotangents and the options of `unroll`."""

    params: dict
    x: np.ndarray
    initial: Carry | None
    d_hs: np.ndarray
    d_final: Carry
    options: dict

    @property
    def states(self):
        return len(self.d_final.state)


def make_problem(name, *, batch=B, time=T, initial=False, dtype="float32", seed=0, **options):
    """Draw a problem whose numbers are all representable in `dtype`."""
    cell = REFERENCES[name]
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(0, 1, shape).astype(dtype).astype(np.float64)

    def draw_carry():
        return Carry(draw(batch, H), tuple(draw(batch, H) for _ in range(cell.states)))

    params = reference.random_params(cell, rng, D, H)
    params = reference.tree_map(lambda p: p.astype(dtype).astype(np.float64), params)
    return Problem(
        params,
        draw(batch, time, D),
        draw_carry() if initial else None,
        draw(batch, time, H),
        draw_carry(),
        options,
    )


def complex_step_gradients(cell, p, h0, state0, how):
    """Im L(p + iε) / ε = ∂L/∂p + O(ε²), with no difference taken, so exact at ε = 1e-30."""
    leaves = {"x": p.x, "h": h0, "state": {str(k): s for k, s in enumerate(state0)}} | {
        "params": p.params
    }
    leaves = reference.tree_map(lambda a: a.astype(complex), leaves)

    def loss():
        state = tuple(leaves["state"].values())
        out = reference.forward(cell, leaves["params"], leaves["x"], leaves["h"], state, **how)
        return (
            np.sum(p.d_hs * out.hs)
            + np.sum(p.d_final.h * out.h)
            + sum(np.sum(d * s) for d, s in zip(p.d_final.state, out.state, strict=True))
        )

    def derivative(array):
        gradient = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            kept = array[index]
            array[index] = kept + 1e-30j
            gradient[index] = loss().imag / 1e-30
            array[index] = kept
        return gradient

    g = reference.tree_map(derivative, leaves)
    return reference.Gradients(g["x"], g["h"], tuple(g["state"].values()), g["params"])


def whole_mask(p):
    """What mask and lengths of a problem come to, together."""
    batch, time, _ = p.x.shape
    mask = p.options.get("mask", np.ones((batch, time), bool))
    if "lengths" in p.options:
        padding = p.options.get("padding", "right")
        mask = mask & reference.mask_from_lengths(p.options["lengths"], time, padding)
    return mask


def spelt_out(p):
    """The same problem with an initial carry, a mask and resets given, also where they do nothing.

    Problems of one shape and direction are then one compilation.
    """
    batch, time, _ = p.x.shape
    zeros = np.zeros((batch, H))
    options = {key: p.options[key] for key in ("reverse", "time_major") if key in p.options}
    options["mask"] = whole_mask(p)
    options["resets"] = p.options.get("resets", np.zeros((batch, time), bool))
    initial = p.initial or Carry(zeros, (zeros,) * p.states)
    return p._replace(initial=initial, options=options)


def solve(name, p):
    """The reference's outputs and gradients."""
    cell = REFERENCES[name]
    batch = len(p.x)
    how = {key: p.options.get(key) for key in ("resets", "reverse")} | {"mask": whole_mask(p)}
    zeros = np.zeros((batch, H))
    h0, state0 = p.initial or Carry(zeros, (zeros,) * cell.states)
    out = reference.forward(cell, p.params, p.x, h0, state0, **how)
    if cell.step_backward is None:
        return out, complex_step_gradients(cell, p, h0, state0, how)
    gradients = reference.backward(
        cell, p.params, p.x, out, p.d_hs, p.d_final.h, p.d_final.state, **how
    )
    return out, gradients


# --- The library on a problem --------------------------------------------------------------------

STATIC = ("padding", "reverse", "time_major", "precision", "engine")


def values_and_gradients(
    cell, params, x, initial, d_hs, d_final, engine=ENGINES["derived"], **options
):
    """((hs, final), (d_params, d_x, d_initial)); d_initial is None where no carry was given."""

    def run(params, x, initial):
        return unroll(cell, params, x, initial, engine=engine, **options)

    out, pull_back = jax.vjp(run, params, x, initial)
    return out, pull_back((d_hs, d_final))


jit = functools.partial(jax.jit, static_argnums=0, static_argnames=STATIC)
jitted = jit(values_and_gradients, compiler_options=OPTIMIZED)
just_values = jit(functools.partial(unroll, engine=ENGINES["derived"]), compiler_options=OPTIMIZED)
jitted_float64 = jit(values_and_gradients)


def as_jax(cell, p, dtype):
    """The problem's arrays as the library takes them: positional arguments and options."""
    time_major = p.options.get("time_major", False)

    def swap(a):
        return np.swapaxes(a, 0, 1) if time_major else a

    def cast(a):
        return jnp.asarray(a, dtype)

    def cast_carry(carry):
        return Carry(cast(carry.h), cell.State(*map(cast, carry.state)))

    args = (
        jax.tree.map(cast, p.params),
        cast(swap(p.x)),
        None if p.initial is None else cast_carry(p.initial),
        cast(swap(p.d_hs)),
        cast_carry(p.d_final),
    )
    options = {
        key: jnp.asarray(swap(value) if key in ("mask", "resets") else value)
        if isinstance(value, np.ndarray)
        else value
        for key, value in p.options.items()
    }
    return args, options


def compare(name, p, dtype, *, rule=None, run=jitted, **further):
    """Compare every output and every gradient of the library with the reference."""
    cell = CELLS[name]
    args, options = as_jax(cell, p, dtype)
    (hs, final), (d_params, d_x, d_initial) = run(cell, *args, **options, **further)
    if p.options.get("time_major"):
        hs, d_x = np.swapaxes(hs, 0, 1), np.swapaxes(d_x, 0, 1)
    out, gradients = solve(name, p)
    batch, time, _ = p.x.shape

    def close(what, actual, expected, gradient):
        terms = recurrence_terms(batch, time, D, H, len(cell.gates), gradient=gradient)
        assert actual.dtype == jnp.dtype(dtype), what
        assert_close(actual, expected, reduction=terms, dtype=rule or dtype, what=what)

    close("hs", hs, out.hs, False)
    close("final h", final.h, out.h, False)
    for field, actual, expected in zip(cell.State._fields, final.state, out.state, strict=True):
        close(f"final {field}", actual, expected, False)
    close("d x", d_x, gradients.x, True)
    if p.initial is not None:
        close("d initial h", d_initial.h, gradients.h, True)
        for field, actual, expected in zip(
            cell.State._fields, d_initial.state, gradients.state, strict=True
        ):
            close(f"d initial {field}", actual, expected, True)
    d_params, expected_params = dict(d_params), dict(gradients.params)
    units, expected_units = d_params.pop("units", {}), expected_params.pop("units", {})
    for actuals, expecteds in ((d_params, expected_params), (units, expected_units)):
        assert actuals.keys() == expecteds.keys()
        for key, expected in expecteds.items():
            assert np.any(expected), f"the case says nothing about d {key}"
            close(f"d {key}", actuals[key], expected, True)


@pytest.mark.sampled(12)
@every_case
@every_cell
@pytest.mark.parametrize("engine", ["scan", "derived"])
def test_float64_agrees_with_the_reference(engine, name, case):
    with jax.enable_x64(True):
        p = make_problem(name, dtype="float64", **CASES[case])
        compare(name, p, "float64", run=jitted_float64, engine=ENGINES[engine])


@every_cell
@pytest.mark.parametrize("engine", ["plain", "chunks", "one chunk"])
def test_other_settings_of_the_engines_agree_with_the_reference(engine, name):
    with jax.enable_x64(True):
        p = make_problem(name, dtype="float64", **CASES["reverse, mask and resets"])
        compare(name, p, "float64", run=jitted_float64, engine=ENGINES[engine])


@every_case
@every_cell
def test_float32_agrees_with_the_reference(name, case):
    compare(name, spelt_out(make_problem(name, **CASES[case])), "float32")


@every_cell
@every_engine
def test_every_engine_agrees_with_the_reference_in_float32(engine, name):
    p = make_problem(name, **CASES["mask and resets"])
    compare(name, p, "float32", engine=ENGINES[engine])


@every_cell
@pytest.mark.parametrize("engine", ["scan", "derived"])
def test_bfloat16_products_agree_with_the_reference(engine, name):
    p = make_problem(name, **CASES["mask and resets"])
    compare(name, p, "float32", rule="bfloat16", precision="bfloat16", engine=ENGINES[engine])


@every_cell
def test_without_jit_agrees_with_the_reference(name):
    with jax.enable_x64(True):
        p = make_problem(name, dtype="float64", **CASES["reverse, mask and resets"])
        compare(name, p, "float64", run=values_and_gradients)


@every_cell
def test_init_draws_the_layout_of_the_reference(name):
    params = jax.eval_shape(lambda: CELLS[name].init(jax.random.key(0), D))
    drawn = reference.random_params(REFERENCES[name], np.random.default_rng(0), D, H)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, drawn)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_the_hyper_parameter_is_no_constant():
    """The leak reaches the outputs, through a jitted function that has seen another value."""
    args, _ = as_jax(CELLS["Outsider"], make_problem("Outsider"), "float32")
    one, _ = just_values(Outsider(H, leak=0.0), *args[:3])
    other, _ = just_values(Outsider(H, leak=0.5), *args[:3])
    assert not np.allclose(one, other)


# --- Transformations -----------------------------------------------------------------------------


@every_cell
def test_vmap_over_parameters_is_the_loop(name):
    with jax.enable_x64(True):
        cell = CELLS[name]
        case = CASES["mask and resets"]
        problems = [make_problem(name, dtype="float64", seed=seed, **case) for seed in range(3)]
        sets = [as_jax(cell, p, "float64")[0][0] for p in problems]
        (_, *rest), options = as_jax(cell, problems[0], "float64")
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *sets)

        @jax.jit
        @jax.vmap
        def together(params):
            return values_and_gradients(cell, params, *rest, **options)

        got = together(stacked)
        terms = recurrence_terms(B, T, D, H, len(cell.gates), gradient=True)
        for k, params in enumerate(sets):
            apart = jitted_float64(cell, params, *rest, **options)
            one = jax.tree.map(lambda a, k=k: a[k], got)
            assert jax.tree.structure(one) == jax.tree.structure(apart)
            jax.tree.map(lambda a, b: assert_close(a, b, reduction=terms), one, apart)


# --- Masks and lengths ---------------------------------------------------------------------------


def assert_same(got, expected):
    """Bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30], ids=str)
@both_directions
@every_cell
def test_what_is_masked_has_no_influence(name, reverse, garbage):
    """Garbage on masked steps, a row of nothing else included: all finite, and the same bits."""
    cell = CELLS[name]
    mask = MASK.copy()
    mask[1] = False
    p = make_problem(name, initial=True, mask=mask, resets=RESETS, reverse=reverse)
    clean, options = as_jax(cell, p, "float32")
    spoilt, _ = as_jax(cell, p._replace(x=np.where(mask[..., None], p.x, garbage)), "float32")
    expected = jitted(cell, *clean, **options)
    got = jitted(cell, *spoilt, **options)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got))
    assert_same(got, expected)
    (hs, _), (_, d_x, _) = got
    assert not np.any(np.asarray(hs)[~mask])
    assert not np.any(np.asarray(d_x)[~mask])
    assert np.all(np.any(np.asarray(d_x)[mask], axis=-1))


@both_directions
@every_cell
def test_a_row_without_a_valid_step_keeps_its_initial_carry(name, reverse):
    cell = CELLS[name]
    nothing = np.zeros((B, T), bool)
    p = make_problem(name, initial=True, mask=nothing, resets=nothing, reverse=reverse)
    args, options = as_jax(cell, p, "float32")
    (hs, final), (d_params, d_x, d_initial) = jitted(cell, *args, **options)
    assert_same(final, args[2])
    assert_same(d_initial, args[4])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((hs, d_params, d_x)))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("padding", ["right", "left"])
@both_directions
@every_cell
def test_lengths_are_their_mask(name, reverse, padding):
    cell = CELLS[name]
    args, _ = as_jax(cell, make_problem(name, initial=True), "float32")
    mask = jnp.asarray(reference.mask_from_lengths(WITH_AN_EMPTY_ROW, T, padding))
    lengths = jnp.asarray(WITH_AN_EMPTY_ROW)
    by_mask = just_values(cell, *args[:3], mask=mask, reverse=reverse)
    by_lengths = just_values(cell, *args[:3], lengths=lengths, padding=padding, reverse=reverse)
    assert_same(by_lengths, by_mask)


@pytest.mark.sampled(3)
@both_directions
@every_cell
def test_padding_changes_nothing_on_either_side(name, reverse):
    """A batch padded on the right, the same padded on the left, and the batch itself."""
    with jax.enable_x64(True):
        cell = CELLS[name]
        length = 4
        p = make_problem(name, dtype="float64", time=length, initial=True)
        (params, x, initial, _, _), _ = as_jax(cell, p, "float64")
        hs, final = just_values(cell, params, x, initial, reverse=reverse)
        junk = np.full((B, T - length, D), np.nan)
        lengths = jnp.full((B,), length)
        for padding in ("right", "left"):
            both = (x, junk) if padding == "right" else (junk, x)
            padded = jnp.asarray(np.concatenate(both, axis=1))
            padded_hs, padded_final = just_values(
                cell, params, padded, initial, lengths=lengths, padding=padding, reverse=reverse
            )
            valid = slice(0, length) if padding == "right" else slice(T - length, T)
            assert_close(np.asarray(padded_hs)[:, valid], hs, what="hs")
            jax.tree.map(lambda a, b: assert_close(a, b, what="final"), padded_final, final)


# --- Resets --------------------------------------------------------------------------------------


@pytest.mark.sampled(4)
@both_directions
@every_cell
def test_sequences_packed_by_resets_run_apart(name, reverse):
    """Two sequences behind one another in each row: values, and the gradients of both."""
    with jax.enable_x64(True):
        cell = CELLS[name]
        resets = np.zeros((B, 2 * T), bool)
        resets[:, T] = True
        p = make_problem(name, dtype="float64", time=2 * T, resets=resets, reverse=reverse)
        args, options = as_jax(cell, p, "float64")
        (hs, final), (d_params, d_x, _) = jitted_float64(cell, *args, **options)
        hs, d_x = np.asarray(hs), np.asarray(d_x)
        zero = Carry(np.zeros((B, H)), (np.zeros((B, H)),) * p.states)
        last = 0 if reverse else 1  # the part that is processed last leaves the final carry
        sums = jax.tree.map(np.zeros_like, d_params)
        for k, part in enumerate((slice(0, T), slice(T, 2 * T))):
            one = p._replace(
                x=p.x[:, part],
                d_hs=p.d_hs[:, part],
                d_final=p.d_final if k == last else zero,
                options={"reverse": reverse},
            )
            args, options = as_jax(cell, one, "float64")
            (one_hs, one_final), (one_d_params, one_d_x, _) = jitted_float64(cell, *args, **options)
            assert_close(hs[:, part], one_hs, what="hs")
            assert_close(d_x[:, part], one_d_x, what="d x")
            sums = jax.tree.map(np.add, sums, one_d_params)
            if k == last:
                jax.tree.map(lambda a, b: assert_close(a, b, what="final"), final, one_final)
        jax.tree.map(lambda a, b: assert_close(a, b, what="d params"), d_params, sums)


@every_cell
def test_a_reset_on_the_first_step_discards_the_initial_carry(name):
    cell = CELLS[name]
    resets = np.zeros((B, T), bool)
    from_zero = spelt_out(make_problem(name, resets=resets))
    resets = resets.copy()
    resets[:, 0] = True
    discarded = spelt_out(make_problem(name, initial=True, resets=resets))
    discarded = from_zero._replace(initial=discarded.initial, options=discarded.options)
    args, options = as_jax(cell, from_zero, "float32")
    expected, (d_params, d_x, _) = jitted(cell, *args, **options)
    args, options = as_jax(cell, discarded, "float32")
    got, (got_d_params, got_d_x, d_initial) = jitted(cell, *args, **options)
    assert_same((got, got_d_params, got_d_x), (expected, d_params, d_x))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(d_initial))


# --- Nothing to do -------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "time"), [(0, T), (B, 0)], ids=["no rows", "no steps"])
@every_cell
def test_an_empty_batch_or_sequence(name, batch, time):
    cell = CELLS[name]
    p = make_problem(name, batch=batch, time=time, initial=True)
    args, options = as_jax(cell, p, "float32")
    (hs, final), (d_params, d_x, d_initial) = jitted(cell, *args, **options)
    assert hs.shape == (batch, time, H)
    assert_same(final, args[2])
    assert_same(d_initial, args[4])
    assert d_x.shape == (batch, time, D)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(d_params))


# --- The cells of papers -------------------------------------------------------------------------
#
# One shape and few compilations a cell: what does not depend on the cell is tested above.

every_paper = pytest.mark.parametrize("name", PAPERS)
KEY = 7
CLOSE = {"float64": {}, "float32": {"dtype": "bfloat16"}}


class Given(NamedTuple):
    """A problem in float64 NumPy: what may have a gradient, and what has none."""

    moving: dict  # params, x, inputs, h, state
    over_time: dict  # noise, and what `prepare` multiplies with
    d_outs: list  # cotangents of hs, of the final h, of the final state


def given(name, dtype, keys, resets, seed=0):
    """Numbers that `dtype` can represent, none of them zero."""
    cell, _, features, positive = PAPERS[name]
    rng = np.random.default_rng(seed)

    def draw(path, a):
        numbers = rng.normal(0, 0.6, a.shape).astype(dtype).astype(np.float64)
        named = any(part in jax.tree_util.keystr(path) for part in (f"'{n}'" for n in positive))
        return 0.5 + np.abs(numbers) if named else numbers

    shapes = jax.eval_shape(lambda: cell.init(jax.random.key(0), features, dtype))
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    h, state = start(cell, params, B, features, dtype)
    state = {field: draw([jax.tree_util.DictKey(field)], a) for field, a in state._asdict().items()}
    moving = {
        "params": params,
        "x": draw((), np.zeros((B, T, features))),
        "inputs": {
            n: draw((), np.zeros((B, T, width)))
            for n, width in cell.step_inputs.items()
            if n != "x"
        },
        "h": draw((), h),
        "state": state,
    }
    drawn = {}
    if keys is not None:
        every = as_keys(keys, B)
        numbers = noises(every.rows, T, jnp.asarray(resets.T)).draw(cell, jnp.dtype(dtype), 0, T)
        drawn = {f"d_{n}": np.asarray(a, np.float64).swapaxes(0, 1) for n, a in numbers.items()}
        if type(cell).prepare is not Cell.prepare and "WeightDrop" in name:
            ones = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes)
            keep = np.asarray(cell.prepare(ones, every.shared)["recurrent_kernel"], np.float64)
            drawn["keep"] = np.broadcast_to(keep.reshape(-1), (B, T, keep.size))
    outs = [np.zeros((B, T, h.shape[1])), h, *state.values()]
    return Given(moving, drawn, [draw((), a) for a in outs])


def by_the_paper(name, g, *, gradient=True, **how):
    """Outputs, and gradients by a complex step: Im L(p + iε) / ε, exact at ε = 1e-30."""
    step = reference.Reference(PAPERS[name].step, None, gates=0, states=0)

    def outputs(m):
        over_time = {**g.over_time, **m["inputs"]}
        state = tuple(m["state"][field] for field in PAPERS[name].cell.State._fields)
        out = reference.forward(
            step, m["params"], m["x"], m["h"], state, over_time=over_time, **how
        )
        return [out.hs, out.h, *out.state]

    if not gradient:
        return outputs(g.moving), None
    moving = jax.tree.map(lambda a: a.astype(complex), g.moving)

    def derivative(array):
        gradient = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            kept = array[index]
            array[index] = kept + 1e-30j
            loss = sum(np.sum(d * a) for d, a in zip(g.d_outs, outputs(moving), strict=True))
            gradient[index] = loss.imag / 1e-30
            array[index] = kept
        return gradient

    return outputs(g.moving), jax.tree.map(derivative, moving)


def by_the_library(cell, moving, d_outs, keys, engine, **options):
    """The same by `unroll`."""

    def outputs(m):
        initial = Carry(m["h"], cell.State(**m["state"]))
        hs, final = unroll(
            cell,
            m["params"],
            m["x"],
            initial,
            inputs=m["inputs"],
            keys=keys,
            engine=engine,
            **options,
        )
        return [hs, final.h, *final.state]

    outs, pull_back = jax.vjp(outputs, moving)
    return outs, pull_back(d_outs)[0]


def needs_keys(cell):
    return jax.random.key(KEY) if cell.noise or type(cell).prepare is not Cell.prepare else None


def compare_with_the_paper(name, got, wanted, dtype="float64"):
    cell, _, features, _ = PAPERS[name]
    for k, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        pairs = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True)
        terms = recurrence_terms(
            B, T, features, cell.hidden_size, len(cell.gates), gradient=bool(k)
        )
        for (path, a), b in pairs:
            what = f"{('value', 'gradient')[k]} {jax.tree_util.keystr(path)}"
            unused = what == "gradient ['h']" and not np.any(b)  # the cell has its own state
            assert np.any(b) or unused, f"the case says nothing about {what}"
            assert_close(a, b, reduction=terms, what=what, **CLOSE[dtype])


@pytest.mark.sampled(26)
@pytest.mark.parametrize(
    ("engine", "reverse"), [("scan", False), ("derived", True)], ids=["scan", "derived, reverse"]
)
@every_paper
def test_a_paper_cell_agrees_with_its_paper(name, engine, reverse):
    with jax.enable_x64(True):
        cell = PAPERS[name].cell
        keys = needs_keys(cell)
        how = {"mask": MASK, "resets": RESETS, "reverse": reverse}
        g = given(name, "float64", keys, RESETS)
        run = jax.jit(functools.partial(by_the_library, cell, engine=ENGINES[engine], **how))
        compare_with_the_paper(name, run(g.moving, g.d_outs, keys), by_the_paper(name, g, **how))


@pytest.mark.sampled(8)
@every_paper
def test_a_paper_cell_is_mapped_over_its_parameters(name):
    """By the setting of the derived engine that keeps a carry a chunk only."""
    with jax.enable_x64(True):
        cell = PAPERS[name].cell
        keys = needs_keys(cell)
        problems = [given(name, "float64", keys, RESETS, seed) for seed in range(2)]
        stacked = jax.tree.map(lambda *a: np.stack(a), *(g.moving["params"] for g in problems))
        rest = problems[0].moving
        how = {"mask": MASK, "resets": RESETS}
        run = functools.partial(by_the_library, cell, engine=ENGINES["chunks"], **how)

        @jax.jit
        @jax.vmap
        def together(params):
            return run({**rest, "params": params}, problems[0].d_outs, keys)

        outs, gradients = together(stacked)
        for k, g in enumerate(problems):
            one = jax.tree.map(lambda a, k=k: a[k], (outs, gradients))
            g = problems[0]._replace(moving={**rest, "params": g.moving["params"]})
            compare_with_the_paper(name, one, by_the_paper(name, g, **how))


@pytest.mark.sampled(8)
@every_paper
def test_a_paper_cell_in_bfloat16_and_at_extremes(name):
    cell = PAPERS[name].cell
    keys = needs_keys(cell)
    how = {"mask": MASK, "resets": RESETS}
    g = given(name, "float32", keys, RESETS)
    options = {"engine": ENGINES["derived"], "precision": "bfloat16", **how}
    run = jax.jit(functools.partial(by_the_library, cell, **options), compiler_options=OPTIMIZED)
    moving, d_outs = jax.tree.map(jnp.float32, (g.moving, g.d_outs))
    got = run(moving, d_outs, keys)
    compare_with_the_paper(name, got, by_the_paper(name, g, **how), "float32")
    moving["x"] = 100 * jnp.sign(moving["x"])
    for path, a in jax.tree_util.tree_leaves_with_path(run(moving, d_outs, keys)):
        assert np.all(np.isfinite(a)), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "name", [name for name in PAPERS if needs_keys(PAPERS[name].cell) is not None]
)
def test_a_paper_cell_evaluates_without_noise(name):
    cell = PAPERS[name].cell
    g = given(name, "float32", None, RESETS)
    noise = {f"d_{n}": np.full((B, T, H), a.evaluation) for n, a in cell.noise.items()}
    keep = {"keep": np.ones((B, T, 4 * H * H))} if name == "WeightDropLSTM" else {}
    g = g._replace(over_time=noise | keep)
    hs, _ = unroll(cell, jax.tree.map(jnp.float32, g.moving["params"]), jnp.float32(g.moving["x"]))
    zeros = jax.tree.map(np.zeros_like, (g.moving["h"], g.moving["state"]))
    g = g._replace(moving={**g.moving, "h": zeros[0], "state": zeros[1]})
    assert_close(hs, by_the_paper(name, g, gradient=False)[0][0], reduction=100)
