"""Models: sizes, summary, and that padding never changes what a model says."""

import copy
import pickle
import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lstmjax.cells import GRU, LSTM, Noise
from lstmjax.layers import Recurrent, Stack, row_keys
from lstmjax.models import Classifier, ClassifierConfig, Tagger, count_parameters, summary
from lstmjax.recurrence import length_mask
from lstmjax.recurrence.noise import Keys
from lstmjax.training import counting_compilations
from tests.tolerances import assert_close, recurrence_terms

pytestmark = pytest.mark.sampled(2)

SMALL = {"top_words": 30, "embedding_size": 4, "hidden_size": 5}
CONFIGS = [
    ClassifierConfig(**SMALL),
    ClassifierConfig(**SMALL, bidirectional=True, pooling=("last", "mean", "max")),
    ClassifierConfig(**SMALL, num_layers=2, pooling=("mean",)),
    ClassifierConfig(**SMALL, conv_filters=6, pooling=("max", "last")),
    ClassifierConfig(
        **SMALL,
        num_layers=2,
        bidirectional=True,
        conv_filters=6,
        pooling=("max",),
        dropout_words=0.2,
        dropout_before=0.2,
        dropout_between=0.3,
        dropout_after=0.4,
    ),
]


def build(config, cell=None):
    return Classifier(cell or LSTM(config.hidden_size), config, rngs=nnx.Rngs(0))


def test_the_notebook_model_has_its_parameters():
    model = build(ClassifierConfig())
    parts = (model.embedding, model.recurrent, model.head)
    assert [count_parameters(part) for part in parts] == [160_000, 53_200, 101]
    assert count_parameters(model) == 213_301


def test_summary_lists_every_layer():
    table = summary(build(ClassifierConfig()), jax.ShapeDtypeStruct((64, 500), jnp.int32))
    rows = [line.split() for line in table.splitlines()]
    assert ["recurrent_1", "(64,", "500,", "100)", "53,200"] in rows
    assert ["total", "213,301"] in rows


@pytest.mark.parametrize("config", CONFIGS)
def test_summary_adds_up(config):
    model = build(config)
    lines = summary(model, jax.ShapeDtypeStruct((2, 9), jnp.int32)).splitlines()
    counts = [int(line.split()[-1].replace(",", "")) for line in lines if line[-1].isdigit()]
    assert sum(counts[:-1]) == counts[-1] == count_parameters(model)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_neither_logits_nor_gradients(config, padding):
    # Pooling windows are counted from the left: behind a left padding of odd length they differ.
    lengths = [8, 4, 8] if padding == "left" and config.conv_filters else [8, 3, 8]
    model = build(config)
    ids = jax.random.randint(jax.random.key(1), (3, 8), 1, 30)
    mask = length_mask(jnp.array(lengths), 8, padding)
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    @jax.value_and_grad
    def of_row_1(params, ids, mask):
        return jnp.sin(nnx.merge(graphdef, params)(ids, mask)[min(1, len(ids) - 1)])

    alone = ids[1:2, : lengths[1]] if padding == "right" else ids[1:2, -lengths[1] :]
    got = of_row_1(params, jnp.where(mask, ids, 0), mask)
    want = of_row_1(params, alone, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("config", CONFIGS)
def test_an_empty_row_is_finite(config):
    model = build(config)
    graphdef, params = nnx.split(model, nnx.Param)
    mask = length_mask(jnp.array([4, 0]), 4)
    ids = jnp.array([[5, 6, 7, 8], [0, 0, 0, 0]])
    keys = row_keys(jax.random.key(0), 2)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda p: (nnx.merge(graphdef, p)(ids, mask, keys) ** 2).sum())
    )(params)
    assert bool(jnp.isfinite(value))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


def test_dropout_acts_in_training_only():
    model = build(CONFIGS[-1])
    ids = jax.random.randint(jax.random.key(1), (3, 8), 1, 30)
    keys = row_keys(jax.random.key(0), 3)
    np.testing.assert_array_equal(model(ids), model(ids))
    assert not np.allclose(model(ids), model(ids, None, keys))
    np.testing.assert_array_equal(model(ids, None, keys), model(ids, None, keys))


def test_bfloat16_is_close_and_keeps_float32_outside_the_products():
    config = CONFIGS[1]
    ids = jax.random.randint(jax.random.key(1), (3, 8), 1, 30)
    wide = Classifier(LSTM(5), config, rngs=nnx.Rngs(0))(ids)
    fast = Classifier(LSTM(5), config, precision="bfloat16", rngs=nnx.Rngs(0))(ids)
    assert fast.dtype == jnp.float32
    assert 0 < float(jnp.abs(wide - fast).max()) < 2.0**-8 * float(jnp.abs(wide).max()) * 4


def test_tagger_speaks_at_every_step():
    model = Tagger(GRU(5), 2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (3, 7, 2))
    logits = model(x)
    assert logits.shape == (3, 7)
    np.testing.assert_allclose(logits[:, :4], model(x[:, :4]), rtol=1e-6)


class Noisy(LSTM):
    """An LSTM whose output is disturbed in training, by a time gap and by noise."""

    noise = {"n": Noise(jax.random.normal, 0.0)}
    step_inputs = {"dt": 1}

    def step(self, pre, state, params, inputs, noise):
        h, state = super().step(pre, state, params)
        return h + inputs.dt * noise.n, state


IDS = jax.random.randint(jax.random.key(1), (3, 8), 0, 30)


def test_keys_and_step_inputs_reach_the_cell_of_a_classifier():
    config = ClassifierConfig(**SMALL, num_layers=2, pooling=("mean",))
    model = Classifier(Noisy(5), config, engine="scan", rngs=nnx.Rngs(0))
    mask = length_mask(jnp.array([8, 3, 0]), 8)
    gaps, key = {"dt": jnp.ones((3, 8))}, jax.random.key(0)
    still = model(IDS, mask, inputs=gaps)
    noisy = model(IDS, mask, row_keys(key, 3), inputs=gaps)
    assert not np.any(np.isclose(noisy[:2], still[:2]))
    assert noisy[2] == still[2]
    np.testing.assert_array_equal(noisy, model(IDS, mask, key, inputs=gaps))
    np.testing.assert_array_equal(noisy, model(IDS, mask, Keys(row_keys(key, 3)), inputs=gaps))
    np.testing.assert_array_equal(still, model(IDS, mask, key, inputs=gaps, deterministic=True))
    np.testing.assert_array_equal(noisy, model(IDS, mask, rngs=key, inputs=gaps))
    calm = model(IDS, mask, key, inputs={"dt": jnp.zeros((3, 8))})
    np.testing.assert_array_equal(calm, still)


def test_keys_and_step_inputs_reach_the_cell_of_a_tagger():
    model, x = (
        Tagger(Noisy(5), 2, rngs=nnx.Rngs(0)),
        jax.random.normal(jax.random.key(0), (3, 7, 2)),
    )
    gaps, key = {"dt": jnp.ones((3, 7, 1))}, jax.random.key(0)
    still, noisy = model(x, inputs=gaps), model(x, keys=key, inputs=gaps)
    assert not np.any(np.isclose(noisy, still))
    np.testing.assert_array_equal(noisy, model(x, rngs=key, inputs=gaps))
    np.testing.assert_array_equal(still, model(x, keys=key, inputs=gaps, deterministic=True))


def test_several_outputs():
    config = CONFIGS[1]
    model = Classifier(LSTM(5), config, num_outputs=3, rngs=nnx.Rngs(0))
    assert model(IDS).shape == (3, 3)
    assert count_parameters(model.head) == 3 * (count_parameters(build(config).head))
    tagger = Tagger(GRU(5), 2, num_outputs=4, rngs=nnx.Rngs(0))
    assert tagger(jnp.ones((3, 7, 2))).shape == (3, 7, 4)
    lines = summary(model, jax.ShapeDtypeStruct((3, 8), jnp.int32)).splitlines()
    assert lines[-3].split()[:3] == ["dense", "(3,", "3)"]
    with pytest.raises(ValueError, match="num_outputs must be at least 1, got 0"):
        Tagger(GRU(5), 2, num_outputs=0, rngs=nnx.Rngs(0))


MODELS = {
    "classifier": lambda: build(CONFIGS[-1]),
    "bfloat16": lambda: Classifier(LSTM(5), CONFIGS[1], precision="bfloat16", rngs=nnx.Rngs(0)),
    "tagger": lambda: Tagger(GRU(5), 8, rngs=nnx.Rngs(0)),
    "stack": lambda: Stack(
        LSTM(5), 8, num_layers=2, layer_norm="pre", return_carry=False, rngs=nnx.Rngs(0)
    ),
}


def an_input(name):
    return IDS if name in ("classifier", "bfloat16") else jnp.ones((3, 7, 8))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_models_can_be_pickled_and_copied(name, again):
    model = MODELS[name]()
    other = again(model)
    graphdef, params = nnx.split(model)
    other_graphdef, other_params = nnx.split(other)
    assert graphdef == other_graphdef == nnx.split(MODELS[name]())[0]  # nothing compiles twice
    jax.tree.map(np.testing.assert_array_equal, params, other_params)


@pytest.mark.parametrize("name", MODELS)
def test_flax_tables_of_models(name):
    table = nnx.tabulate(MODELS[name](), an_input(name), console_kwargs={"width": 200})
    assert f"{count_parameters(MODELS[name]()):,}" in table


class Own(nnx.Module):
    """A model as a user writes one, with a layer used twice and one in a list."""

    def __init__(self, rngs):
        self.first = Recurrent(LSTM(4), 4, rngs=rngs)
        self.more = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])

    def __call__(self, x, mask=None):
        hs, _ = self.first(x, mask=mask)
        hs, _ = self.first(self.more[0](hs), mask=mask)
        return self.more[1](hs)


def test_summary_of_ones_own_model():
    model, x = Own(nnx.Rngs(0)), jax.ShapeDtypeStruct((2, 7, 4), jnp.float32)
    rows = [line.split() for line in summary(model, x).splitlines()]
    parts = [(row[0], row[-1]) for row in rows[2:-2]]
    assert parts == [("first", "144"), ("more.0", "20"), ("first", "0"), ("more.1", "10")]
    assert rows[-1] == ["total", "174"]
    assert type(model.first) is Recurrent
    lone = summary(Recurrent(LSTM(4), 4, rngs=nnx.Rngs(0)), x).splitlines()
    assert lone[2].split() == ["Recurrent", "(2,", "7,", "4)", "144"]
    inner = nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.relu)
    assert summary(inner, x).splitlines()[2].split()[0] == "layers.0"


def test_calls_without_jit_compile_once_and_keep_no_memory():
    model = build(ClassifierConfig(**SMALL, num_layers=2, dropout_between=0.3))
    graphdef, params = nnx.split(model, nnx.Param)
    mask, keys = length_mask(jnp.array([8, 3, 0]), 8), row_keys(jax.random.key(0), 3)

    def work():
        model(IDS, mask)
        jax.grad(lambda p: nnx.merge(graphdef, p)(IDS, mask, keys).sum())(params)

    def mebibytes():
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size / 2 ** (20 if sys.platform == "darwin" else 10)

    work()
    work()
    before = mebibytes()
    with counting_compilations() as made:
        for _ in range(6):
            work()
    assert sum(made.programs.values()) == 0, made
    assert (mebibytes() - before) / 6 < 0.5


@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[3]])
@pytest.mark.usefixtures("no_type_checks")
def test_export_with_any_batch_and_length(config):
    model = build(config)
    graphdef, params = nnx.split(model)
    b, t = jax.export.symbolic_shape("b, t")

    @jax.jit
    def run(params, ids, mask):
        return nnx.merge(graphdef, params)(ids, mask)

    exported = jax.export.export(run)(
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params),
        jax.ShapeDtypeStruct((b, t), jnp.int32),
        jax.ShapeDtypeStruct((b, t), bool),
    )
    for shape in [(3, 8), (1, 7)]:
        mask = length_mask(jnp.array([8, 3, 0][: shape[0]]), shape[1])
        ids = IDS[: shape[0], : shape[1]]
        terms = recurrence_terms(*shape, 6, 5, 4, gradient=False)
        assert_close(exported.call(params, ids, mask), run(params, ids, mask), reduction=terms)


@pytest.mark.parametrize(("wrong", "row", "step"), [(30, 1, 4), (-1, 2, 0)])
def test_ids_without_an_embedding_are_named(wrong, row, step):
    message = rf"row {row} has the id {wrong} at step {step}; .* less than top_words=30"
    with pytest.raises(ValueError, match=message):
        build(CONFIGS[0])(IDS.at[row, step].set(wrong))
    with pytest.raises(ValueError, match=message):
        build(CONFIGS[0])(np.asarray(IDS.at[row, step].set(wrong)))


@pytest.mark.usefixtures("no_type_checks")
def test_a_classifier_that_contradicts_itself_is_refused():
    def build_with(**changes):
        return build(ClassifierConfig(**SMALL | changes), LSTM(5))

    with pytest.raises(ValueError, match=r"has 5 units, but config\.hidden_size is 512"):
        build_with(hidden_size=512)
    for name in ("words", "before", "between", "after"):
        with pytest.raises(ValueError, match=f"dropout_{name} must be a number, at least 0"):
            build_with(**{f"dropout_{name}": 1.0})
    for kinds, message in [("median", "'median'"), ((), "at least one")]:
        with pytest.raises(ValueError, match=message):
            build_with(pooling=kinds)
    want = build_with(pooling=("mean",))
    np.testing.assert_array_equal(build_with(pooling="mean")(IDS), want(IDS))


def test_a_classifier_in_narrow_numbers():
    wide = build(CONFIGS[3])(IDS)
    narrow = Classifier(LSTM(5), CONFIGS[3], dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    stored = Classifier(LSTM(5), CONFIGS[3], param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {a.dtype for a in jax.tree.leaves(nnx.state(narrow))} == {jnp.dtype("float32")}
    assert {a.dtype for a in jax.tree.leaves(nnx.state(stored))} == {jnp.dtype("bfloat16")}
    assert narrow(IDS).dtype == stored(IDS).dtype == jnp.bfloat16
    assert bool(jnp.isfinite(stored(IDS)).all())
    terms = 16 * recurrence_terms(3, 8, 6, 5, 4, gradient=False)
    assert_close(narrow(IDS).astype(jnp.float32), wide, reduction=terms, dtype="bfloat16")
