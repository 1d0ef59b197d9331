"""What the contract promises beyond numbers: shapes, rows, parameters, noise, messages."""

import copy
import functools
import pickle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lstmjax.cells import (
    GRU,
    LSTM,
    SRU,
    AntisymmetricRNN,
    Carry,
    Cell,
    CfC,
    LayerNormLSTM,
    PeepholeLSTM,
    PhasedLSTM,
    RecurrentDropoutLSTM,
    VariationalLSTM,
    ZoneoutLSTM,
    check_contract,
    dropped,
    kept,
)
from lstmjax.errors import ContractError
from lstmjax.precision import as_precision
from lstmjax.recurrence import (
    CPU,
    Derived,
    PallasGPU,
    PallasTPU,
    Scan,
    Workload,
    length_mask,
    unroll,
)
from lstmjax.recurrence.gpu.plain import plain_kernel
from lstmjax.recurrence.noise import Keys, row_keys
from tests.tolerances import assert_close, recurrence_terms

pytestmark = pytest.mark.sampled(2)

B, T, D, H = 4, 7, 3, 6
ENGINES = {
    "cpu": CPU(),
    "derived": Derived(chunk=3),
    "chunks": Derived(chunk=3, save="chunks"),
    "pallas_tpu": PallasTPU(interpret=True),
    "pallas_gpu": PallasGPU(interpret=plain_kernel),
}
LENGTHS = np.array([7, 3, 0, 5])
RESETS = np.zeros((B, T), bool)
RESETS[[0, 0, 1, 3], [2, 5, 0, 4]] = True
WORK = Workload("tpu", "float32", "float32", steps=T, batch=B, features=D)
FLAGS = {"lengths": jnp.asarray(LENGTHS), "resets": jnp.asarray(RESETS)}


def draw(cell, features=D, dtype=jnp.float32, seed=0):
    """Parameters, none of them zero, and inputs."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = cell.init(keys[0], features, dtype)
    leaves, structure = jax.tree.flatten(params)
    noise = jax.random.split(keys[1], len(leaves))
    leaves = [
        a + 0.3 * jax.random.normal(k, a.shape, dtype) for a, k in zip(leaves, noise, strict=True)
    ]
    x = jax.random.normal(keys[2], (B, T, features), dtype)
    return jax.tree.unflatten(structure, leaves), x


def loss(cell, engine, params, x, inputs=None, **options):
    """A scalar that depends on every output and on the final carry."""
    out = unroll(cell, params, x, engine=engine, inputs=inputs, **options)
    values = jax.tree.leaves(out)
    return sum((jnp.cos(jnp.arange(a.size)).reshape(a.shape) * a**2).sum() for a in values)


def agree(cell, engine, features=D, inputs=None, **options):
    """Value and every gradient of an engine against those of the plain scan."""
    params, x = draw(cell, features)
    how = functools.partial(loss, cell, **options)
    got, wanted = (
        jax.jit(jax.value_and_grad(functools.partial(how, e), (0, 1, 2)))(params, x, inputs or {})
        for e in (engine, Scan())
    )
    assert all(np.any(a) for a in jax.tree.leaves(wanted))
    terms = recurrence_terms(B, T, D, H, len(cell.gates), gradient=True)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: assert_close(a, b, reduction=terms), got, wanted)


# --- A step is traced with the shapes that it was promised ---------------------------------------


class Width(LSTM):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return h / h.shape[-1] ** 0.5, state


class Size(PeepholeLSTM):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return h * (pre.i.shape[-1] + params.p_o.shape[-1]) / h.size**0.5, state


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell", [Width(H), Size(H)], ids=repr)
def test_a_step_may_read_sizes(cell, engine):
    agree(cell, ENGINES[engine], **FLAGS)


@pytest.mark.parametrize("engine", [*ENGINES, "scan"])
def test_a_step_sees_no_shape_but_its_own(engine):
    seen = set()

    class Watched(PeepholeLSTM):
        uses_h = True

        def step(self, pre, state, params, h):
            seen.add((pre.i.shape, state.c.shape, params.p_i.shape, h.shape))
            return super().step(pre, state, params)

    cell = Watched(H)
    params, x = draw(cell)
    jax.grad(functools.partial(loss, cell, ENGINES.get(engine, engine)))(params, x, **FLAGS)
    assert seen == {((B, H), (B, H), (1, H), (B, H))}


# --- Rows ----------------------------------------------------------------------------------------


class Centred(LSTM):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return h - h.mean(0, keepdims=True), state


class Neighbours(LSTM):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return h, self.State(jnp.roll(state.c, 1, axis=0))


class Gram(LSTM):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return jax.nn.softmax(h @ h.T) @ h, state


class ByPlace(LSTM):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return h * jnp.arange(h.shape[0], dtype=h.dtype)[:, None], state


class Sorted(LSTM):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return jnp.sort(h, axis=0), state


class Gathered(LSTM):
    """By an operation that nothing is known of but what it does to numbers."""

    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return h[jnp.argsort(h[:, 0])], state


class Flat(LSTM):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return jnp.cumsum(h.reshape(-1)).reshape(h.shape), state


MIXING = [Centred, Neighbours, Gram, ByPlace, Sorted, Gathered, Flat]


@pytest.mark.parametrize("cell", MIXING)
def test_a_step_that_mixes_rows_is_refused_by_name(cell):
    for call in (lambda: check_contract(cell(H)), lambda: unroll(cell(H), *draw(cell(H)))):
        with pytest.raises(ContractError, match="mixes the rows of a batch") as error:
            call()
        assert cell.__name__ in str(error.value)
        assert "\n" not in str(error.value)
        if cell is not Gathered:
            assert "test_contract.py:" in str(error.value)


class Units(LSTM):
    """Everything that may be done to the units of a row."""

    step_params = {"mix": (("H", "H"), jax.nn.initializers.orthogonal())}

    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        h = h - h.mean(-1, keepdims=True) + 0.1 * jax.nn.softmax(h, axis=-1)
        h = h + 0.1 * jnp.cumsum(h, axis=-1) + 0.1 * h[:, ::-1] + 0.1 * jnp.sort(h, axis=-1)
        halves = h.reshape(len(h), 2, -1)
        h = h + 0.1 * jnp.concatenate([halves[:, 1], halves[:, 0]], axis=-1)
        outer = h[:, :, None] * h[:, None, :]
        h = h + 0.1 * jnp.einsum("bij,bj->bi", outer, h) + 0.1 * h @ params.mix
        return jnp.tanh(h + 0.1 * jax.nn.logsumexp(h, axis=-1, keepdims=True)), state


@pytest.mark.parametrize("engine", ["derived", "chunks"])
def test_a_step_may_mix_the_units_of_a_row(engine):
    agree(Units(H), ENGINES[engine], **FLAGS)


class Looping(LSTM):
    """Operations that have no rule for another layout: it runs as it was traced."""

    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        h = jax.lax.fori_loop(0, 3, lambda _, a: jnp.tanh(1.1 * a), h)
        return h[:, jnp.array([*range(1, h.shape[1]), 0])], state


@pytest.mark.parametrize("engine", ["derived", "chunks"])
def test_a_step_with_a_loop_runs_as_it_was_traced(engine):
    agree(Looping(H), ENGINES[engine], **FLAGS)


# --- Parameters of any shape, prepare -----------------------------------------------------------


class Shapes(LSTM):
    step_params = {
        "scale": ((), 1.5),
        "gain": (("H",), jax.nn.initializers.normal(1.0)),
        "shift": ((1, "H"), 0.5),
    }

    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return jnp.tanh(params.scale) * params.gain[None] * h + params.shift, state


class Tables(PeepholeLSTM):
    step_params = {
        "table": (("H", 3), jax.nn.initializers.normal(1.0)),
        "mix": (("H", "H"), jax.nn.initializers.orthogonal()),
    }

    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return params.table.sum(-1)[None] * h + 0.1 * h @ params.mix, state


@pytest.mark.parametrize("engine", ["derived", "chunks", "pallas_tpu", "pallas_gpu"])
def test_parameters_of_any_shape(engine):
    agree(Shapes(H), ENGINES[engine], **FLAGS)


@pytest.mark.parametrize("engine", ["derived", "chunks", "pallas_tpu"])
def test_tables_and_matrices(engine):
    agree(Tables(H), ENGINES[engine], **FLAGS)


def test_parameters_have_the_shapes_declared():
    shapes = jax.tree.map(jnp.shape, Tables(H).init(jax.random.key(0), D)["step"])
    assert shapes == {"table": (H, 3), "mix": (H, H)}


class Normed(LSTM):
    """Weight normalisation of R (Salimans & Kingma 2016), and ternary input weights."""

    step_params = {"g": (("H",), 1.0)}

    def prepare(self, params, key=None):
        r = params["recurrent_kernel"]
        gain = jnp.tile(params["step"]["g"], len(self.gates))
        r = gain[None] * r / jnp.linalg.norm(r, axis=0, keepdims=True)
        w = params["kernel"]
        w = w + jax.lax.stop_gradient(jnp.round(jnp.clip(w, -1, 1)) - w)
        return {**params, "recurrent_kernel": r, "kernel": w}


class WeightDrop(LSTM):
    """DropConnect on R (Merity et al. 2018)."""

    def prepare(self, params, key=None):
        if key is None:
            return params
        r = params["recurrent_kernel"]
        keep = jax.random.bernoulli(key, 0.5, r.shape)
        return {**params, "recurrent_kernel": jnp.where(keep, 2 * r, 0)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell", [Normed(H), WeightDrop(H)], ids=repr)
def test_prepared_parameters_reach_every_engine(cell, engine):
    if isinstance(cell, Normed):
        params, x = draw(cell)
        how = functools.partial(loss, cell, keys=jax.random.key(3), **FLAGS)
        got, wanted = (
            jax.value_and_grad(functools.partial(how, e))(params, x)
            for e in (ENGINES[engine], "scan")
        )
        terms = recurrence_terms(B, T, D, H, 4, gradient=True)
        jax.tree.map(lambda a, b: assert_close(a, b, reduction=terms), got, wanted)
    else:
        agree(cell, ENGINES[engine], keys=jax.random.key(3), **FLAGS)


# --- Noise ---------------------------------------------------------------------------------------


class Noisy(LSTM):
    noise = {"zone": kept(0.4), "drop": dropped(0.3, "sequence")}

    def step(self, pre, state, params, noise):
        h, (c,) = super().step(pre, state, params)
        return h * noise.drop, self.State(noise.zone * state.c + (1 - noise.zone) * c)


class Variational(LSTM):
    noise = {"h": dropped(0.3, "sequence")}

    def step(self, pre, state, params, noise):
        return super().step(pre, state, params)

    def recur(self, h, noise):
        return h * noise.h


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("engine", ENGINES)
def test_noise_is_the_same_on_every_engine(engine, reverse):
    agree(Noisy(H), ENGINES[engine], keys=jax.random.key(3), reverse=reverse, **FLAGS)


@pytest.mark.parametrize("engine", ["derived", "chunks", "pallas_tpu"])
def test_the_recurrent_product_may_see_noise(engine):
    agree(Variational(H), ENGINES[engine], keys=jax.random.key(3), **FLAGS)


def test_evaluation_uses_the_numbers_declared():
    class Plain(LSTM):
        def step(self, pre, state, params):
            h, (c,) = super().step(pre, state, params)
            return h, self.State(0.4 * state.c + (1 - 0.4) * c)

    params, x = draw(Noisy(H))
    for a, b in zip(unroll(Noisy(H), params, x), unroll(Plain(H), params, x), strict=True):
        jax.tree.map(
            functools.partial(assert_close, reduction=40), jax.tree.leaves(a), jax.tree.leaves(b)
        )


def test_noise_depends_on_a_row_alone():
    """Neither on the other rows, nor on how much padding there is."""
    cell, key = Noisy(H), jax.random.key(3)
    params, x = draw(cell)
    keys = row_keys(key, B)
    whole, _ = unroll(cell, params, x, keys=keys)
    half, _ = unroll(cell, params, x[2:, :5], keys=keys[2:])
    assert_close(whole[2:, :5], half, reduction=40)
    other, _ = unroll(cell, params, x, keys=Keys(keys))
    np.testing.assert_array_equal(whole, other)
    assert not np.allclose(whole, unroll(cell, params, x, keys=row_keys(jax.random.key(4), B))[0])


def test_noise_of_a_sequence_begins_anew_with_it():
    class Masked(Cell):
        gates = ("a",)
        recurrent_gates = ()
        noise = {"m": dropped(0.5, "sequence")}

        def step(self, pre, state, params, noise):
            return noise.m + 0 * pre.a, state

    cell = Masked(64)
    params, x = draw(cell)
    resets = jnp.asarray(RESETS)
    for reverse in (False, True):
        hs, _ = unroll(cell, params, x, keys=jax.random.key(0), resets=resets, reverse=reverse)
        same = np.all(np.asarray(hs[:, 1:]) == np.asarray(hs[:, :-1]), axis=-1)
        np.testing.assert_array_equal(same, ~RESETS[:, 1:])


# --- Inputs of a step ----------------------------------------------------------------------------


class Timed(LSTM):
    step_inputs = {"dt": 1, "gate": "H"}

    def step(self, pre, state, params, inputs):
        h, state = super().step(pre, state, params)
        return h * jnp.exp(-(inputs.dt**2)) * inputs.gate, state


class Highway(Cell):
    """A gate without recurrence, and the input itself (SRU's output, Lei et al. 2018)."""

    gates = ("r", "z")
    recurrent_gates = ("z",)
    step_inputs = {"x": "D"}

    def step(self, pre, state, params, inputs):
        r = jax.nn.sigmoid(pre.r)
        return r * jnp.tanh(pre.z) + (1 - r) * inputs.x, state


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_that_no_product_sees(engine, reverse):
    keys = jax.random.split(jax.random.key(5))
    inputs = {
        "dt": jax.random.normal(keys[0], (B, T)),
        "gate": jax.random.normal(keys[1], (B, T, H)),
    }
    agree(Timed(H), ENGINES[engine], inputs=inputs, reverse=reverse, **FLAGS)
    agree(Highway(H), ENGINES[engine], features=H, reverse=reverse, **FLAGS)


def test_inputs_of_a_step_are_checked():
    params, x = draw(Timed(H))
    with pytest.raises(ContractError, match=r"needs inputs=.*dt"):
        unroll(Timed(H), params, x)
    with pytest.raises(ContractError, match="no step input 'td'; declared are: dt, gate"):
        unroll(Timed(H), params, x, inputs={"dt": x[..., 0], "gate": x, "td": x})
    with pytest.raises(ContractError, match=r"inputs\['gate'\] has 3 numbers a row, not 6"):
        unroll(Timed(H), params, x, inputs={"dt": x[..., 0], "gate": x})
    params, x = draw(SRU(H))
    with pytest.raises(ContractError, match="SRU takes x itself, too, and 6 features of it, not 3"):
        unroll(SRU(H), params, x)
    assert unroll(SRU(H), params, x, inputs={"x": jnp.tile(x, 2)})[0].shape == (B, T, H)


DT = {"dt": jnp.linspace(0.1, 2, B * T).reshape(B, T)}


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("cell", "engine", "inputs"),
    [
        (ZoneoutLSTM(H, zoneout_h=0.3), "pallas_tpu", None),
        (VariationalLSTM(H), "pallas_tpu", None),
        (LayerNormLSTM(H), "pallas_tpu", None),
        (RecurrentDropoutLSTM(H, every="sequence"), "pallas_gpu", None),
        (CfC(H), "pallas_gpu", DT),
        (AntisymmetricRNN(H), "pallas_gpu", None),
        (PhasedLSTM(H), "pallas_gpu", {"t": 5 * DT["dt"]}),
    ],
    ids=lambda a: type(a).__name__ if isinstance(a, Cell) else None,
)
def test_cells_of_papers_on_the_kernels(cell, engine, inputs):
    keys = jax.random.key(3) if cell.noise else None
    agree(cell, ENGINES[engine], inputs=inputs, keys=keys, **FLAGS)


# --- Gates without recurrence or bias ------------------------------------------------------------


class Some(LSTM):
    recurrent_gates = ("f", "g")
    bias_gates = ("f", "o")


class SomeApart(GRU):
    recurrent_gates = ("z", "n")
    bias_gates = ("r",)

    def step(self, pre, state, params, h):
        z = jax.nn.sigmoid(pre.x.z + pre.h.z)
        n = jnp.tanh(pre.x.n + jax.nn.sigmoid(pre.x.r) * pre.h.n)
        return (1 - z) * n + z * h, state


class NoProduct(LSTM):
    recurrent_gates = ()


class Diagonal(LSTM):
    heads: int = H


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "cell", [Some(H), SomeApart(H), Diagonal(H), LSTM(H, use_bias=False)], ids=repr
)
def test_gates_without_recurrence_or_bias(cell, engine):
    agree(cell, ENGINES[engine], **FLAGS)


@pytest.mark.parametrize("engine", ["derived", "chunks"])
def test_a_cell_without_recurrence(engine):
    agree(NoProduct(H), ENGINES[engine], **FLAGS)
    assert "no recurrent product" in PallasTPU(interpret=True).refusal(NoProduct(H), WORK)


def test_parameters_that_are_not_needed_are_not_there():
    shapes = jax.tree.map(jnp.shape, Some(H).init(jax.random.key(0), D))
    assert shapes == {"kernel": (D, 4 * H), "recurrent_kernel": (H, 2 * H), "bias": (2 * H,)}
    shapes = jax.tree.map(jnp.shape, NoProduct(H, use_bias=False).init(jax.random.key(0), D))
    assert shapes == {"kernel": (D, 4 * H)}
    assert "recurrent_bias" not in SomeApart(H).init(jax.random.key(0), D)


def test_a_head_for_each_unit_starts_with_numbers_of_all_sizes():
    r = np.asarray(Diagonal(H).init(jax.random.key(0), D)["recurrent_kernel"])
    assert r.shape == (1, 4 * H)
    assert np.abs(r).max() <= 1
    assert len(np.unique(np.abs(r))) == r.size


# --- Start, states, one step ---------------------------------------------------------------------


class Learned(LSTM):
    """An initial state that is learned, also the one after a reset."""

    step_params = {"h0": (("H",), 0.3), "c0": (("H",), -0.3)}

    def initial_carry(self, batch_size, dtype=jnp.float32, *, params=None, input_size=None):
        h, (c,) = super().initial_carry(batch_size, dtype)
        if params is None:
            return Carry(h, self.State(c))
        own = params["step"]
        return Carry(h + own["h0"][None], self.State(c + own["c0"][None]))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("engine", ["derived", "chunks"])
def test_an_initial_carry_that_is_learned(engine, reverse):
    agree(Learned(H), ENGINES[engine], reverse=reverse, **FLAGS)


@pytest.mark.parametrize("engine", ["pallas_tpu", "pallas_gpu"])
def test_a_kernel_begins_with_what_is_learned_but_does_not_reset_to_it(engine):
    agree(Learned(H), ENGINES[engine], lengths=FLAGS["lengths"])
    with pytest.raises(ValueError, match="resets put learned numbers in place"):
        unroll(Learned(H), *draw(Learned(H)), engine=ENGINES[engine], resets=FLAGS["resets"])


class Remembering(Cell):
    """Carries the input before: its size has to be known when the carry begins."""

    gates = ("a",)

    class State(NamedTuple):
        x: Array

    step_inputs = {"x": "D"}

    def initial_carry(self, batch_size, dtype=jnp.float32, *, params=None, input_size=None):
        h = jnp.zeros((batch_size, self.hidden_size), dtype)
        return Carry(h, self.State(jnp.zeros((batch_size, input_size or 1), dtype)))

    def step(self, pre, state, params, inputs):
        change = (inputs.x - state.x).sum(-1, keepdims=True)
        return jnp.tanh(pre.a + change), self.State(inputs.x)


@pytest.mark.parametrize("engine", ["derived", "chunks"])
def test_a_carry_that_holds_inputs(engine):
    agree(Remembering(H), ENGINES[engine], **FLAGS)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("engine", ["derived", "chunks", "pallas_gpu"])
def test_the_states_of_all_steps(engine, reverse):
    agree(PeepholeLSTM(H), ENGINES[engine], return_states=True, reverse=reverse, **FLAGS)


def test_states_are_those_that_the_carry_had():
    cell = LSTM(H)
    params, x = draw(cell)
    _, final, states = unroll(cell, params, x, return_states=True)
    assert states.c.shape == (B, T, H)
    np.testing.assert_array_equal(states.c[:, -1], final.state.c)
    masked = unroll(cell, params, x, return_states=True, lengths=jnp.asarray(LENGTHS))[2]
    assert not np.any(np.asarray(masked.c)[~np.asarray(length_mask(LENGTHS, T))])


@pytest.mark.parametrize("cell", [LSTM(H), GRU(H), PeepholeLSTM(H)], ids=repr)
def test_one_step_alone_is_that_of_the_plain_scan(cell):
    params, x = draw(cell)
    scan = unroll(cell, params, x, engine="scan")
    carry = cell.initial_carry(B)
    for t in range(T):
        carry = cell(params, x[:, t], carry)
        np.testing.assert_array_equal(carry.h, scan[0][:, t])
    jax.tree.map(np.testing.assert_array_equal, carry, scan[1])


# --- What is masked ------------------------------------------------------------------------------


class Root(LSTM):
    """A root, whose derivative at the start, zeros, is infinite."""

    unit_params = {"p": 0.5}

    def step(self, pre, state, params):
        h, (c,) = super().step(pre, state, params)
        return h + 0.1 * jnp.sqrt(jnp.abs(state.c * params.p)), self.State(c)


class Norm(Root):
    def step(self, pre, state, params):
        h, (c,) = LSTM.step(self, pre, state, params)
        norm = jnp.sqrt(((state.c * params.p) ** 2).sum(-1, keepdims=True))
        return h + 0.1 * norm, self.State(c)


@pytest.mark.parametrize("cell", [Root(H), Norm(H)], ids=repr)
@pytest.mark.parametrize("engine", [*ENGINES, "scan"])
def test_a_masked_step_has_no_infinite_derivative(engine, cell):
    """A row that is masked throughout begins where the step is singular, the others elsewhere."""
    if (engine, type(cell)) == ("pallas_gpu", Norm):
        pytest.skip("the GPU kernel holds no norm")
    params, x = draw(cell)
    start = cell.initial_carry(B)
    size = cell.hidden_size
    offset = Carry(start.h, cell.State(jnp.ones((B, size)).at[2].set(0)))
    mask = jnp.ones((B, T), bool).at[2].set(False).at[1, :2].set(False)

    def weighted(out, rows):
        hs, final = out
        weights = jnp.cos(jnp.arange(B * T * size)).reshape(B, T, size)[rows]
        return (weights * hs**2).sum() + (final.state.c**3).sum()

    def value(params, x):
        out = unroll(cell, params, x, offset, mask=mask, engine=ENGINES.get(engine, engine))
        return weighted(out, np.arange(B)) - (out[1].state.c[2] ** 3).sum()

    gradients = jax.jit(jax.grad(value, (0, 1)))(params, x)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(gradients))
    rows = np.array([0, 1, 3])
    alone = jax.grad(
        lambda p: weighted(
            unroll(
                cell,
                p,
                x[rows],
                jax.tree.map(lambda a: a[rows], offset),
                mask=mask[rows],
                engine="scan",
            ),
            rows,
        )
    )(params)
    terms = recurrence_terms(B, T, D, H, 4, gradient=True)
    jax.tree.map(lambda a, b: assert_close(a, b, reduction=terms), gradients[0], alone)
    assert not np.any(gradients[1][2])


@pytest.mark.usefixtures("no_type_checks")
def test_masks_are_boolean_and_lengths_do_not_overflow():
    cell = LSTM(H)
    params, x = draw(cell)
    with pytest.raises(ValueError, match="mask must be boolean, got int32; pass mask != 0"):
        unroll(cell, params, x, mask=jnp.ones((B, T), jnp.int32), lengths=jnp.asarray(LENGTHS))
    with pytest.raises(ValueError, match="mask must be boolean, got float32"):
        unroll(cell, params, x, mask=jnp.ones((B, T)))
    long = jnp.array([200, 255], jnp.uint8)
    assert length_mask(long, 300).sum(1).tolist() == [200, 255]
    assert length_mask(long, 300, "left").sum(1).tolist() == [200, 255]
    by_list, _ = unroll(cell, params, np.asarray(x), lengths=LENGTHS.tolist())
    by_array, _ = unroll(cell, params, x, lengths=jnp.asarray(LENGTHS))
    np.testing.assert_array_equal(by_list, by_array)


# --- Precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked", [None, "float32", "highest", "float64", jax.lax.Precision.HIGHEST]
)
def test_full_products_by_any_name(asked):
    cell = LSTM(H)
    params, x = draw(cell)
    wanted, _ = unroll(cell, params, x)
    np.testing.assert_array_equal(unroll(cell, params, x, precision=asked)[0], wanted)


@pytest.mark.parametrize("asked", ["high", "default", "fp32", 3, jax.lax.Precision.DEFAULT])
def test_a_precision_that_is_none_is_refused(asked):
    with pytest.raises(ValueError, match=r'must be "float32".*or "bfloat16"'):
        as_precision(asked)
    assert as_precision(jnp.bfloat16) == "bfloat16"


# --- Transformations -----------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["scan", "derived"])
def test_a_gradient_of_what_a_step_closes_over(engine):
    def value(scale, engine):
        class Scaled(LSTM):
            def step(self, pre, state, params):
                h, state = super().step(pre, state, params)
                return scale * h, state

        params, x = draw(LSTM(H))
        return loss(Scaled(H), engine, params, x)

    got = jax.grad(value)(1.5, ENGINES.get(engine, engine))
    assert_close(got, jax.grad(value)(1.5, Scan(recompute=False)), reduction=200)


@pytest.mark.parametrize("engine", [None, "derived"])
def test_explicit_sharding(engine):
    """What `jax.make_mesh` gives: arrays whose types say how they are spread."""
    cell = PeepholeLSTM(H)
    params, x = draw(cell)
    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2])
    how = functools.partial(loss, cell, engine, **FLAGS)
    wanted = jax.value_and_grad(how, (0, 1))(params, x)
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, NamedSharding(mesh, P("rows")))
        got = jax.jit(jax.value_and_grad(how, (0, 1)))(params, spread)
        hs, final = jax.jit(functools.partial(unroll, cell, engine=engine))(params, spread)
    assert jax.typeof(hs).sharding.spec[0] == "rows"
    assert jax.typeof(final.h).sharding.spec[0] == "rows"
    terms = recurrence_terms(B, T, D, H, 4, gradient=True)
    jax.tree.map(lambda a, b: assert_close(a, b, reduction=terms), got, wanted)


def test_export_with_any_batch_and_length():
    cell = LSTM(H)
    params, x = draw(cell)
    (b, t) = jax.export.symbolic_shape("b, t")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)

    @jax.jit
    def run(params, x, lengths):
        return unroll(cell, params, x, lengths=lengths)

    exported = jax.export.export(run)(
        shapes, jax.ShapeDtypeStruct((b, t, D), "float32"), jax.ShapeDtypeStruct((b,), "int32")
    )
    lengths = jnp.asarray(LENGTHS, "int32")
    got, wanted = exported.call(params, x, lengths), run(params, x, lengths)
    jax.tree.map(lambda a, b: assert_close(a, b, reduction=40), got, wanted)


def test_the_second_call_compiles_nothing():
    cell = LSTM(H)
    params, x = draw(cell)
    grad, other = jax.grad(lambda p, x: loss(cell, None, p, x)), x + 1
    unroll(cell, params, x)
    grad(params, x)
    before = counted_compilations()
    unroll(cell, params, other)
    grad(params, other)
    assert counted_compilations() == before


_compilations = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: _compilations.append(name) if "backend_compile" in name else None
)


def counted_compilations():
    return len(_compilations)


def test_padding_of_nan_under_debug_nans():
    cell = LSTM(H)
    params, x = draw(cell)
    x = jnp.where(length_mask(jnp.asarray(LENGTHS), T)[..., None], x, jnp.nan)
    with jax.debug_nans(True):
        hs, _ = unroll(cell, params, x, lengths=jnp.asarray(LENGTHS))
    assert np.all(np.isfinite(hs))


def test_inputs_without_features():
    cell = LSTM(H)
    params = cell.init(jax.random.key(0), 0)
    gradients = jax.grad(lambda p: unroll(cell, p, jnp.zeros((B, T, 0)))[0].sum())(params)
    assert gradients["kernel"].shape == (0, 4 * H)
    assert np.any(gradients["bias"])


def test_a_batch_may_have_no_axis_or_several():
    cell = LSTM(H)
    params, x = draw(cell)
    hs, final = unroll(cell, params, x, lengths=jnp.asarray(LENGTHS))
    one, last = unroll(cell, params, x[1], lengths=jnp.asarray(LENGTHS)[1])
    assert_close(one, hs[1], reduction=40)
    assert last.h.shape == (H,)
    several, ends = unroll(
        cell,
        params,
        x.reshape(2, 2, T, D),
        Carry(*jax.tree.map(lambda a: a.reshape(2, 2, H), tuple(cell.initial_carry(B)))),
        lengths=jnp.asarray(LENGTHS).reshape(2, 2),
        mask=jnp.ones((2, 2, T), bool),
    )
    np.testing.assert_array_equal(several.reshape(B, T, H), hs)
    np.testing.assert_array_equal(ends.state.c.reshape(B, H), final.state.c)
    turned = jnp.moveaxis(x.reshape(2, 2, T, D), 2, 0)
    again, _ = unroll(
        cell, params, turned, lengths=jnp.asarray(LENGTHS).reshape(2, 2), time_major=True
    )
    np.testing.assert_array_equal(jnp.moveaxis(again, 0, 2), several)


def test_double_precision_as_the_default():
    with jax.enable_x64(True):
        for cell in (LSTM(H), GRU(H), PeepholeLSTM(H)):
            check_contract(cell)
            params, x = draw(cell)
            assert unroll(cell, params, x)[0].dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_parameters_of_any_float(dtype):
    for cell in (LSTM(H), GRU(H), PeepholeLSTM(H)):
        params = cell.init(jax.random.key(0), D, dtype)
        assert {a.dtype.name for a in jax.tree.leaves(params)} == {dtype}
        hs, _ = unroll(cell, params, jnp.ones((B, T, D), dtype))
        assert hs.dtype == dtype


def test_an_output_of_ones_own_width_at_no_step():
    class Projected(LSTM):
        step_params = {"p": (("H", 2), jax.nn.initializers.orthogonal())}

        def initial_carry(self, batch_size, dtype=jnp.float32):
            h, state = super().initial_carry(batch_size, dtype)
            return Carry(h[:, :2], state)

        def init(self, key, input_size, dtype=jnp.float32):
            params = super().init(key, input_size, dtype)
            return {**params, "recurrent_kernel": params["recurrent_kernel"][:2]}

        def transition(self, params, x, carry, dot):
            h, state = super().transition(params, x, carry, dot)
            return Carry(dot(h, params["step"]["p"]), state)

    cell = Projected(H)
    params, x = draw(cell)
    assert unroll(cell, params, x)[0].shape == (B, T, 2)
    assert unroll(cell, params, x[:, :0])[0].shape == (B, 0, 2)
    agree(cell, Derived(chunk=3), **FLAGS)


# --- Messages ------------------------------------------------------------------------------------


def broken(**body):
    """A cell like the LSTM but for what is given."""
    return type("Broken", (LSTM,), body)


def forgotten(self, pre, state, params):
    return LSTM.step(self, pre, state, params)[0]


def swapped(self, pre, state, params):
    return LSTM.step(self, pre, state, params)[::-1]


def misshapen(self, pre, state, params):
    h, state = LSTM.step(self, pre, state, params)
    return h, self.State(state.c[:, :2])


def plain_tuple(self, pre, state, params):
    h, state = LSTM.step(self, pre, state, params)
    return h, (state.c,)


def typo(self, pre, state, params):
    return pre.forget, state


def with_numpy(self, pre, state, params):
    return np.tanh(np.asarray(pre.i)), state


def with_if(self, pre, state, params):
    if pre.i.sum() > 0:
        return pre.i, state
    return -pre.i, state


def asserting(self, pre, state, params):
    assert pre.i.shape[-1] == 3
    return pre.i, state


STEPS = {
    forgotten: r"must return \(h, state\), not one array; return h, self.State\(c\)",
    swapped: r"must return \(h, state\), in that order",
    misshapen: r"must return \(h, state\) as .*\[4, 6\].*not.*\[4, 2\]",
    plain_tuple: r"not a tuple of 1; return h, self.State\(c\)",
    typo: r"no gate 'forget'; there are: i, f, g, o",
    with_numpy: r"hands a traced array to NumPy.*use jax.numpy",
    with_if: r"asks whether a traced value is true.*use jnp.where",
    asserting: r"AssertionError",
}


@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
@pytest.mark.usefixtures("no_type_checks")
def test_a_broken_step_is_one_line_with_the_place(step):
    cell = broken(step=step)(H)
    params, x = draw(LSTM(H))
    for call in (
        lambda: unroll(cell, params, x),
        lambda: jax.jit(unroll, static_argnums=0)(cell, params, x),
    ):
        with pytest.raises(ContractError, match=STEPS[step]) as error:
            call()
        message = str(error.value)
        assert "\n" not in message
        assert "PyTreeDef" not in message
        assert "(test_contract.py:" in message


@pytest.mark.usefixtures("no_type_checks")
def test_what_is_given_is_checked():
    cell = LSTM(H)
    params, x = draw(cell)
    zeros = jnp.zeros((B, H))
    carry = cell.initial_carry(B + 1)
    cases = [
        (lambda: unroll(LSTM, params, x), r"LSTM is the class; pass an instance, LSTM\(100\)"),
        (
            lambda: unroll(cell, params, x, (zeros, zeros)),
            r"initial must be Carry\(h, LSTM.State\(c\)\).*got a tuple of 2",
        ),
        (
            lambda: unroll(cell, params, x, carry),
            r"initial must be h float32\[4, 6\].*got h float32\[5, 6\]",
        ),
        (
            lambda: unroll(PeepholeLSTM(H), params, x),
            r"no parameters of Peephole.*lack \['units'\]\['p_f'\]",
        ),
        (lambda: unroll(GRU(H), params, x), r"no parameters of GRU.*"),
        (lambda: unroll(LSTM(5), params, x), r"\['bias'\] has shape \(24,\), not \(20,\)"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (["i", "f"], "must be a tuple of names"),
        ("ifgo", "must be a tuple of names"),
        (("i", "f", "i"), "names a gate twice"),
        (("i", 3), "is no name"),
        (("in", "out"), "is no name"),
        (("_a",), "cannot start with _"),
    ],
)
def test_gates_that_cannot_be(gates, message):
    with pytest.raises(ContractError, match=message):
        type("Broken", (Cell,), {"gates": gates})


def test_a_hyper_parameter_is_hashable():
    with pytest.raises(ContractError, match="must be hashable: make an array a tuple"):
        type("Broken", (LSTM,), {"table": jnp.ones(3), "__annotations__": {"table": Array}})

    class Given(LSTM):
        table: object = None

    with pytest.raises(ContractError, match="hyper-parameter table is not hashable"):
        Given(H, table=jnp.ones(3))


@pytest.mark.parametrize(
    "cell",
    [
        LSTM(H, activation=jax.nn.relu, use_bias=False),
        LSTM(H, activation=jnp.sin, recurrent_activation=jax.nn.hard_sigmoid),
        LSTM(H, kernel_init=jax.nn.initializers.zeros),
        PeepholeLSTM(H),
    ],
    ids=repr,
)
def test_a_cell_can_be_pickled_and_copied(cell):
    for again in (pickle.loads(pickle.dumps(cell)), copy.copy(cell), copy.deepcopy(cell)):
        assert again == cell
        assert hash(again) == hash(cell)
