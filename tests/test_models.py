"""Models: sizes, summary, and that padding never changes what a model says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lstmjax.cells import GRU, LSTM
from lstmjax.layers import row_keys
from lstmjax.models import Classifier, ClassifierConfig, Tagger, count_parameters, summary
from lstmjax.recurrence import length_mask

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
