"""Layers: dropout by rows, pooling, the convolutional front end, directions, stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lstmjax.cells import GRU, LSTM, Carry
from lstmjax.layers import (
    Bidirectional,
    ConvPool,
    Recurrent,
    Stack,
    dropout,
    embedding,
    fold_keys,
    pool,
    row_keys,
)
from lstmjax.recurrence import length_mask, unroll


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_dropout_keeps_the_mean_and_scales():
    x = jnp.full((4, 50, 20), 3.0)
    out = dropout(x, 0.3, row_keys(jax.random.key(0), 4))
    values = np.unique(np.asarray(out))
    np.testing.assert_allclose(values, [0.0, 3.0 / 0.7], rtol=1e-6)
    # 4,000 draws: six standard errors of the share kept are 0.044.
    assert abs(float((out != 0).mean()) - 0.7) < 0.044


def test_dropout_of_a_row_does_not_depend_on_the_other_rows():
    x, key = jnp.ones((6, 9)), jax.random.key(1)
    whole = dropout(x, 0.5, row_keys(key, 6))
    part = dropout(x[2:4], 0.5, row_keys(key, 6)[2:4])
    np.testing.assert_array_equal(whole[2:4], part)
    assert len(np.unique(np.asarray(whole), axis=0)) == 6


def test_dropout_without_keys_is_the_identity():
    x = normal(0, 3, 4)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, row_keys(jax.random.key(0), 3)) is x
    assert fold_keys(None, 3) == (None, None, None)


def test_layers_hold_nothing_but_parameters():
    layer = Stack(LSTM(5), 3, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0))
    leaves = jax.tree.leaves(nnx.state(layer), is_leaf=lambda v: isinstance(v, nnx.Variable))
    assert leaves
    assert all(type(leaf) is nnx.Param for leaf in leaves)


def test_recurrent_is_unroll_of_its_parameters():
    layer = Recurrent(GRU(5), 3, reverse=True, rngs=nnx.Rngs(0))
    x, initial = normal(0, 2, 7, 3), Carry(normal(1, 2, 5), GRU.State())
    lengths = jnp.array([7, 3])
    hs, final = layer(x, initial, lengths=lengths)
    want, want_final = unroll(layer.cell, layer.arrays(), x, initial, lengths=lengths, reverse=True)
    np.testing.assert_array_equal(hs, want)
    np.testing.assert_array_equal(final.h, want_final.h)


def test_bidirectional_joins_both_directions():
    layer = Bidirectional(LSTM(5), 3, rngs=nnx.Rngs(0))
    x, mask = normal(0, 2, 7, 3), length_mask(jnp.array([7, 4]), 7)
    hs, (last, first) = layer(x, mask=mask)
    forward, _ = unroll(LSTM(5), layer.forward.arrays(), x, mask=mask)
    flipped, final = unroll(LSTM(5), layer.backward.arrays(), x[:, ::-1], mask=mask[:, ::-1])
    np.testing.assert_allclose(hs, jnp.concatenate([forward, flipped[:, ::-1]], -1), rtol=1e-6)
    np.testing.assert_allclose(first.h, final.h, rtol=1e-6)
    np.testing.assert_allclose(last.h[1], forward[1, 3], rtol=1e-6)
    assert not np.allclose(forward, flipped[:, ::-1])


def test_stack_feeds_each_layer_with_the_one_below():
    stack = Stack(LSTM(5), 3, num_layers=3, rngs=nnx.Rngs(0))
    x = normal(0, 2, 7, 3)
    hs, finals = stack(x)
    want = x
    for layer, final in zip(stack.layers, finals, strict=True):
        want, want_final = layer(want)
        np.testing.assert_array_equal(final.state.c, want_final.state.c)
    np.testing.assert_array_equal(hs, want)
    continued, _ = stack(x, finals)
    assert not np.allclose(continued, hs)


def test_stack_drops_between_layers_only_with_keys():
    stack = Stack(LSTM(5), 3, num_layers=2, dropout_rate=0.5, rngs=nnx.Rngs(0))
    x, keys = normal(0, 2, 7, 3), row_keys(jax.random.key(0), 2)
    plain, dropped = stack(x)[0], stack(x, keys=keys)[0]
    assert not np.allclose(plain, dropped)
    np.testing.assert_array_equal(dropped, stack(x, keys=keys)[0])


def conv_pool_reference(x, kernel, bias, window):
    """Loops over every position: zero padding on both sides, ReLU, max over windows."""
    steps = x.shape[1]
    width = kernel.shape[0]
    before = (width - 1) // 2
    padded = np.pad(x, [(0, 0), (before, width - 1 - before), (0, 0)])
    out = np.stack(
        [
            np.maximum(np.einsum("bkd,kdf->bf", padded[:, t : t + width], kernel) + bias, 0)
            for t in range(steps)
        ],
        axis=1,
    )
    starts = range(0, steps, window)
    return np.stack([out[:, s : s + window].max(axis=1) for s in starts], axis=1)


@pytest.mark.parametrize(("width", "window", "steps"), [(3, 2, 7), (4, 3, 6), (1, 1, 5)])
def test_conv_pool_against_loops(width, window, steps):
    layer = ConvPool(3, 5, width=width, pool=window, rngs=nnx.Rngs(0))
    layer.conv.bias[...] = normal(5, 5)
    x = normal(0, 2, steps, 3)
    got, mask = layer(x)
    want = conv_pool_reference(
        np.asarray(x), np.asarray(layer.conv.kernel[...]), np.asarray(layer.conv.bias[...]), window
    )
    assert mask is None
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_conv_pool_of_padded_rows_equals_that_of_the_rows_alone():
    layer = ConvPool(3, 5, width=3, pool=2, rngs=nnx.Rngs(0))
    layer.conv.bias[...] = normal(5, 5)
    x, lengths = normal(0, 3, 8, 3), [8, 5, 0]
    out, mask = layer(x, length_mask(jnp.array(lengths), 8))
    assert mask.sum(axis=1).tolist() == [4, 3, 0]
    for row, length in enumerate(lengths[:2]):
        alone, _ = layer(x[row : row + 1, :length])
        np.testing.assert_allclose(out[row, : alone.shape[1]], alone[0], rtol=1e-6)


def test_pool_over_valid_steps():
    hs, lengths = normal(0, 3, 4, 2), [4, 2, 0]
    mask = length_mask(jnp.array(lengths), 4)
    final = Carry(normal(1, 3, 2), LSTM.State(normal(2, 3, 2)))
    out = np.asarray(pool(hs, final, mask, ("max", "last", "mean")))
    for row, length in enumerate(lengths):
        valid = np.asarray(hs[row, :length])
        top = valid.max(axis=0) if length else np.zeros(2)
        mean = valid.mean(axis=0) if length else np.zeros(2)
        want = np.concatenate([top, np.asarray(final.h[row]), mean])
        np.testing.assert_allclose(out[row], want, rtol=1e-6)


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_pool_of_an_empty_row_has_finite_gradients(kind):
    mask = length_mask(jnp.array([3, 0]), 3)
    gradient = jax.grad(lambda hs: pool(hs, None, mask, (kind,)).sum())(normal(0, 2, 3, 2))
    assert bool(jnp.isfinite(gradient).all())
    assert float(jnp.abs(gradient[1]).max()) == 0.0
    assert float(jnp.abs(gradient[0]).max()) > 0.0


def test_pool_names_an_unknown_kind():
    with pytest.raises((ValueError, TypeError), match="median"):
        pool(normal(0, 1, 2, 3), None, None, ("median",))


def test_embedding_is_uniform_as_in_keras():
    table = embedding(2000, 8, rngs=nnx.Rngs(0)).embedding[...]
    assert float(jnp.abs(table).max()) <= 0.05
    np.testing.assert_allclose(float(table.std()), 0.05 / np.sqrt(3), rtol=0.03)
