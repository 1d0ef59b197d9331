"""Layers: dropout by rows, pooling, the convolutional front end, directions, stacks."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lstmjax import cells
from lstmjax.cells import GRU, LSTM, Carry, Cell, Noise, PeepholeLSTM
from lstmjax.layers import (
    Bidirectional,
    ConvPool,
    Recurrent,
    Stack,
    bidirectional,
    dense,
    dropout,
    embedding,
    fold_keys,
    last_valid,
    pool,
    row_keys,
)
from lstmjax.recurrence import length_mask, unroll
from lstmjax.recurrence.noise import Keys, as_keys
from tests.tolerances import assert_close, recurrence_terms

pytestmark = pytest.mark.sampled(2)


class Echo(Cell):
    """Its output is its noise."""

    gates = ("a",)
    noise = {"n": Noise(jax.random.normal, 0.25)}

    def step(self, pre, state, params, noise):
        return 0 * pre.a + noise.n, state


class Shared(Cell):
    """Its output is what the key for the whole batch draws; without one 0.5."""

    gates = ("a",)

    def prepare(self, params, key=None):
        drawn = jnp.full_like(params["bias"], 0.5)
        return params | {"bias": drawn if key is None else jax.random.normal(key, drawn.shape)}

    def step(self, pre, state, params):
        return pre.a, state

    def init(self, key, input_size, dtype=jnp.float32):
        params = super().init(key, input_size, dtype)
        return jax.tree.map(jnp.zeros_like, params)


class Learned(LSTM):
    """Begins with what it has learned."""

    step_params = {"h": (("H",), jax.nn.initializers.normal(1.0))}

    def initial_carry(self, batch_size, dtype=jnp.float32, *, params=None):
        carry = super().initial_carry(batch_size, dtype)
        return carry if params is None else carry._replace(h=carry.h + params["step"]["h"][None])


class Timed(LSTM):
    """Forgets more the more time has passed."""

    step_inputs = {"dt": 1}

    def step(self, pre, state, params, inputs):
        h, state = super().step(pre, state, params)
        return h * jnp.exp(-inputs.dt), state


class Acting(Cell):
    """A plain cell whose activation may be chosen."""

    gates = ("a",)
    activation: object = jnp.tanh

    def step(self, pre, state, params):
        return self.activation(pre.a), state


def doubled(forward, backward):
    return 2 * forward + backward


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


@pytest.mark.parametrize("noise", [cells.kept(0.4), cells.dropped(0.3)])
def test_what_is_drawn_is_the_same_with_64_bit_numbers(noise):
    key, found = jax.random.key(0), {}
    for bits in (32, 64):
        with jax.enable_x64(bits == 64):
            x = jnp.ones((1, 200), f"float{bits}")
            found[bits] = dropout(x, 0.25, key), noise.draw(key, (200,), x.dtype)
    for a, b in zip(found[32], found[64], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


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


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_both_directions_at_once_are_those_one_by_one(given, time_major, monkeypatch):
    """As on a GPU: values, states and all gradients."""
    layer = Bidirectional(PeepholeLSTM(5), 3, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 7, 3)), "float32")
    x = x.swapaxes(0, 1) if time_major else x
    draw = lambda a: jnp.asarray(rng.normal(size=a.shape), "float32")  # noqa: E731
    initial = jax.tree.map(draw, layer.initial_carry(4)) if given else None
    mask = jnp.asarray(rng.random(x.shape[:2]) < 0.7)
    graph, params = nnx.split(layer)
    options = {"mask": mask, "lengths": jnp.array([7, 3, 0, 5]), "time_major": time_major}

    def run(params, x, initial):
        return nnx.merge(graph, params)(x, initial, return_states=True, **options)

    def loss(*args):
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(run(*args)))

    results = []
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(bidirectional, "platform", lambda platform=platform: platform)
        results.append((run(params, x, initial), jax.grad(loss, (0, 1))(params, x, initial)))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(other, one, reduction=7 * (3 + 5) * 5)


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


@pytest.mark.parametrize("width", [1, 2, 3, 6])
def test_conv_pools_convolution_is_that_of_xla(width):
    """Values and gradients, of one kernel and of several at once, inside a loop and outside."""
    layer = ConvPool(3, 5, width=width, rngs=nnx.Rngs(0))
    x, kernels, seen = normal(0, 2, 4, 7, 3), normal(1, 2, width, 3, 5), normal(2, 4, 7, 5)

    def ours(x, kernel):
        return layer.conv.conv_general_dilated(x, kernel)

    def xlas(x, kernel):
        layout = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=layout, precision="highest"
        )

    def with_gradients(convolve):
        def one(x, kernel):
            return jax.value_and_grad(
                lambda *a: ((out := convolve(*a)) * seen).sum() + (out**2).sum(), (0, 1)
            )(x, kernel)

        return one

    wanted = [with_gradients(xlas)(*a) for a in zip(x, kernels, strict=True)]
    wanted = jax.tree.map(lambda *a: jnp.stack(a), *wanted)
    both = (
        jax.vmap(with_gradients(ours)),
        lambda *a: jax.lax.map(lambda b: with_gradients(ours)(*b), a),
    )
    for mapped in both:
        for got, want in zip(
            jax.tree.leaves(mapped(x, kernels)), jax.tree.leaves(wanted), strict=True
        ):
            assert_close(got, want, reduction=4 * 7 * width, dtype="float32")


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


# --- Keys ----------------------------------------------------------------------------------------


LAYERS = {
    "one": lambda cell: Recurrent(cell, 3, **quick()),
    "both": lambda cell: Bidirectional(cell, 3, **quick()),
    "stack": lambda cell: Stack(cell, 3, num_layers=2, bidirectional=True, **quick()),
}
NEAR = functools.partial(assert_close, reduction=recurrence_terms(4, 12, 10, 5, 4, gradient=False))


def built_in_cells():
    found = {name: getattr(cells, name) for name in cells.__all__}
    kinds = {name: c for name, c in found.items() if isinstance(c, type) and issubclass(c, Cell)}
    return {name: kind for name, kind in kinds.items() if kind is not Cell}


def quick():
    """Quick to compile: what is examined is the layer, not the engine."""
    return {"engine": "scan", "rngs": nnx.Rngs(0)}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cell", [Echo(5), Shared(5)], ids=repr)
def test_keys_may_be_one_or_flax_own(name, cell):
    layer, x, key = LAYERS[name](cell), normal(0, 4, 6, 3), jax.random.key(7)
    want, _ = layer(x, keys=as_keys(key, 4))
    np.testing.assert_array_equal(layer(x, keys=key)[0], want)
    np.testing.assert_array_equal(layer(x, rngs=key)[0], want)
    drawn = nnx.Rngs(dropout=3).dropout()
    np.testing.assert_array_equal(layer(x, rngs=nnx.Rngs(dropout=3))[0], layer(x, keys=drawn)[0])
    stream = nnx.Rngs(dropout=3).dropout
    np.testing.assert_array_equal(layer(x, rngs=stream)[0], layer(x, keys=drawn)[0])
    still, _ = layer(x)
    assert not np.allclose(still, want)
    np.testing.assert_array_equal(layer(x, keys=key, deterministic=True)[0], still)
    np.testing.assert_array_equal(layer(x, keys=key, deterministic=False)[0], want)


def test_keys_that_contradict_each_other_are_refused():
    layer, x = LAYERS["one"](Echo(5)), normal(0, 4, 6, 3)
    with pytest.raises(ValueError, match="leave out one"):
        layer(x, keys=jax.random.key(0), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="deterministic=False needs keys="):
        layer(x, deterministic=False)
    with pytest.raises(ValueError, match=r"one a row, \(4,\); got shape \(3,\)"):
        layer(x, keys=row_keys(jax.random.key(0), 3))


def test_each_direction_and_each_layer_draws_for_itself():
    x, keys = normal(0, 4, 6, 3), row_keys(jax.random.key(0), 4)
    hs, _ = LAYERS["both"](Echo(5))(x, keys=keys)
    _, finals = LAYERS["stack"](Echo(5))(x, keys=keys)
    drawn = [hs[:, -1, :5], hs[:, -1, 5:], *(carry.h for pair in finals for carry in pair)]
    assert len(np.unique(np.stack(drawn).reshape(-1))) == 6 * 4 * 5
    shared = Keys(keys, jax.random.key(1))
    _, finals = LAYERS["stack"](Shared(5))(x, keys=shared)
    rows = np.stack([carry.h for pair in finals for carry in pair])
    assert len(np.unique(rows)) == 4 * 5
    assert (rows == rows[:, :1]).all()
    _, finals = LAYERS["stack"](Shared(5))(x, keys=keys)
    assert all((carry.h == 0.5).all() for pair in finals for carry in pair)


def test_noise_of_a_row_does_not_depend_on_the_other_rows():
    stack = Stack([Echo(5), Echo(5)], 3, dropout_rate=0.5, **quick())
    x, keys = normal(0, 6, 7, 3), row_keys(jax.random.key(1), 6)
    whole, part = stack(x, keys=keys)[0], stack(x[2:4], keys=keys[2:4])[0]
    np.testing.assert_array_equal(whole[2:4], part)


def test_a_layer_with_noise_is_unroll_with_the_same_keys():
    layer, x, keys = (
        LAYERS["one"](Echo(5)),
        normal(0, 4, 6, 3),
        Keys(row_keys(jax.random.key(0), 4)),
    )
    np.testing.assert_array_equal(
        layer(x, keys=keys)[0], unroll(layer.cell, layer.arrays(), x, keys=keys)[0]
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("steps", [7, 4])
def test_dropout_between_layers_is_by_row_whatever_the_layout(steps):
    stack = Stack(LSTM(5), 3, num_layers=2, dropout_rate=0.5, **quick())
    x, keys = normal(0, 4, steps, 3), row_keys(jax.random.key(0), 4)
    want, _ = stack(x, keys=keys)
    got, _ = stack(x.swapaxes(0, 1), time_major=True, keys=keys)
    NEAR(got.swapaxes(0, 1), want)
    folded, _ = stack(x.reshape(2, 2, steps, 3), keys=keys.reshape(2, 2))
    NEAR(folded.reshape(4, steps, 5), want)
    alone, _ = stack(x[1], keys=keys[1:2])
    NEAR(alone, want[1])


@pytest.mark.parametrize("rate", [1.5, -0.5, 1.0, np.nan, "0.5", jnp.array(0.5)])
@pytest.mark.usefixtures("no_type_checks")
def test_a_rate_that_is_no_share_is_refused(rate):
    message = "rate must be a number, at least 0 and less than 1"
    with pytest.raises(ValueError, match=message):
        dropout(jnp.ones((2, 3)), rate, jax.random.key(0))
    with pytest.raises(ValueError, match=f"dropout_{message}"):
        Stack(LSTM(5), 3, num_layers=2, dropout_rate=rate, **quick())


# --- Carries, states, step inputs ----------------------------------------------------------------


@pytest.mark.parametrize("cell", [LSTM(5), Learned(5)], ids=repr)
@pytest.mark.parametrize("name", LAYERS)
def test_the_initial_carry_is_what_a_layer_begins_with(name, cell):
    layer, x = LAYERS[name](cell), normal(0, 4, 6, 3)
    begun = layer.initial_carry(4)
    want, finals = layer(x)
    np.testing.assert_array_equal(layer(x, begun)[0], want)
    assert jax.tree.map(jnp.shape, begun) == jax.tree.map(jnp.shape, finals)
    NEAR(layer(x[0], layer.initial_carry())[0], want[0])
    folded, _ = layer(x.reshape(2, 2, 6, 3), layer.initial_carry(2, 2))
    NEAR(folded.reshape(want.shape), want)


def test_a_learned_start_has_a_gradient_in_every_layer():
    graphdef, params = nnx.split(LAYERS["stack"](Learned(5)), nnx.Param)
    gradient = jax.grad(lambda p: nnx.merge(graphdef, p)(normal(0, 4, 6, 3))[0].sum())(params)
    starts = [a for path, a in jax.tree_util.tree_leaves_with_path(gradient) if "'h'" in str(path)]
    assert len(starts) == 4
    assert all(float(jnp.abs(a).min()) > 0 for a in starts)


def test_none_in_a_nested_carry_is_the_cells_own_start():
    stack, x = LAYERS["stack"](LSTM(5)), normal(0, 4, 6, 3)
    _, finals = stack(x)
    zeros = stack.initial_carry(4)
    want, _ = stack(x, [zeros[0], (zeros[1][0], finals[1][1])])
    np.testing.assert_array_equal(stack(x, [None, (None, finals[1][1])])[0], want)
    assert not np.allclose(stack(x)[0], want)


@pytest.mark.usefixtures("no_type_checks")
def test_surplus_and_missing_carries_are_refused():
    stack, x = LAYERS["stack"](LSTM(5)), normal(0, 4, 6, 3)
    begun = stack.initial_carry(4)
    message = "initial must be a list of 2, one a layer, each a carry or None; got a "
    for wrong, kind in [([*begun, begun[0]], "list of 3"), (begun[:1], "list of 1")]:
        with pytest.raises(ValueError, match=message + kind):
            stack(x, wrong)
    with pytest.raises(ValueError, match=r"initial must be a pair: .*; got a Carry"):
        stack(x, [begun[0][0], None])


@pytest.mark.parametrize("name", LAYERS)
def test_states_are_nested_as_the_carries(name):
    layer, x = LAYERS[name](LSTM(5)), normal(0, 4, 6, 3)
    hs, finals, states = layer(x, return_states=True)
    np.testing.assert_array_equal(hs, layer(x)[0])
    carries = jax.tree.leaves(finals, is_leaf=lambda t: isinstance(t, Carry))
    every = jax.tree.leaves(states, is_leaf=lambda t: isinstance(t, LSTM.State))
    for number, (final, state) in enumerate(zip(carries, every, strict=True)):
        assert state.c.shape == (4, 6, 5)
        end = 0 if number % 2 else -1
        np.testing.assert_array_equal(state.c[:, end], final.state.c)


@pytest.mark.parametrize("name", LAYERS)
def test_step_inputs_reach_every_cell(name):
    layer, plain = LAYERS[name](Timed(5)), LAYERS[name](LSTM(5))
    x, dt = normal(0, 4, 6, 3), jnp.abs(normal(1, 4, 6))
    lengths = jnp.array([6, 3, 0, 1])
    hs, _ = layer(x, inputs={"dt": dt}, lengths=lengths)
    assert not np.allclose(hs, plain(x, lengths=lengths)[0])
    still, _ = layer(x, inputs={"dt": 0 * dt}, lengths=lengths)
    NEAR(still, plain(x, lengths=lengths)[0])
    with pytest.raises(ValueError, match=r"needs inputs=\{'dt': ...\}"):
        layer(x)
    with pytest.raises(ValueError, match="no cell has a step input 'gap'; declared are: dt"):
        layer(x, inputs={"dt": dt, "gap": dt})
    with pytest.raises(ValueError, match="declared are: none"):
        plain(x, inputs={"dt": dt})


def test_step_inputs_go_to_the_cells_that_declare_them():
    stack = Stack([LSTM(5), Timed(5)], 3, **quick())
    x, dt = normal(0, 4, 6, 3), jnp.abs(normal(1, 4, 6))
    below, _ = stack.layers[0](x)
    want, _ = stack.layers[1](below, inputs={"dt": dt})
    np.testing.assert_array_equal(stack(x, inputs={"dt": dt})[0], want)


# --- Stacks and directions -----------------------------------------------------------------------


def test_a_stack_of_different_cells():
    stack = Stack([LSTM(5), GRU(7)], 3, **quick())
    hs, (first, second) = stack(normal(0, 4, 6, 3))
    assert (hs.shape, first.h.shape, second.h.shape) == ((4, 6, 7), (4, 5), (4, 7))
    assert stack.output_size == 7
    both = Stack([(LSTM(5), GRU(4)), GRU(7)], 3, bidirectional=True, **quick())
    assert both(normal(0, 4, 6, 3))[0].shape == (4, 6, 14)


def layer_norm(x, scale, bias):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6) * scale + bias


@pytest.mark.parametrize("norm", [None, "pre", "post"])
@pytest.mark.parametrize("residual", [False, True])
def test_residuals_and_layer_norms_by_hand(residual, norm):
    stack = Stack(LSTM(5), 3, num_layers=3, residual=residual, layer_norm=norm, **quick())
    for number, one in enumerate(stack.norms if norm else ()):
        one.scale[...] = 1 + 0.1 * normal(number, *one.scale.shape)
        one.bias[...] = 0.1 * normal(number + 9, *one.bias.shape)
    x = np.asarray(normal(0, 2, 7, 3))
    hs, _ = stack(jnp.asarray(x))
    for number, layer in enumerate(stack.layers):
        below = x
        one = stack.norms[number] if norm else None
        weights = (np.asarray(one.scale[...]), np.asarray(one.bias[...])) if norm else ()
        seen = layer_norm(x, *weights) if norm == "pre" else x
        x = np.asarray(layer(jnp.asarray(seen))[0])
        x = x + below if residual and number else x
        x = layer_norm(x, *weights) if norm == "post" else x
    assert_close(hs, x, reduction=recurrence_terms(2, 21, 5, 5, 4, gradient=False))


@pytest.mark.parametrize(("norm", "time_major"), [(None, True), ("pre", False), ("post", True)])
def test_padding_has_no_part_in_residuals_and_norms(norm, time_major):
    stack = Stack(LSTM(3), 3, num_layers=2, residual=True, layer_norm=norm, **quick())
    graphdef, params = nnx.split(stack, nnx.Param)
    x, lengths = normal(0, 3, 8, 3), jnp.array([8, 3, 0])
    mask = length_mask(lengths, 8)

    def loss(params, x, **options):
        hs, _ = nnx.merge(graphdef, params)(x, time_major=time_major, **options)
        hs = hs.swapaxes(0, 1) if time_major else hs
        return jnp.sin(hs[1, :3]).sum(), hs

    def run(x, **options):
        x = x.swapaxes(0, 1) if time_major else x
        return jax.value_and_grad(loss, has_aux=True)(params, x, **options)

    (value, hs), gradient = run(jnp.where(mask[..., None], x, jnp.nan), lengths=lengths)
    assert float(jnp.abs(jnp.where(mask[..., None], 0, hs)).max()) == 0
    (want, _), want_gradient = run(x[:2, :3])
    terms = recurrence_terms(3, 16, 3, 3, 4, gradient=True)
    assert_close(value, want, reduction=terms)
    jax.tree.map(lambda a, b: assert_close(a, b, reduction=terms), gradient, want_gradient)


def test_masks_that_do_not_fit_are_refused_by_stacks_with_residuals():
    stack = Stack(LSTM(3), 3, residual=True, **quick())
    with pytest.raises(ValueError, match=r"lengths must have shape \(4,\), got \(3,\)"):
        stack(normal(0, 4, 6, 3), lengths=jnp.array([1, 2, 3]))
    with pytest.raises(ValueError, match=r"mask must have shape \(4, 6\), got \(4, 5\)"):
        stack(normal(0, 4, 6, 3), mask=jnp.ones((4, 5), bool))


@pytest.mark.parametrize("merge", ["concat", "sum", "mean", doubled])
def test_directions_may_differ_and_merge_in_any_way(merge):
    layer = Bidirectional((LSTM(5), GRU(5)), 3, merge=merge, **quick())
    x, lengths = normal(0, 4, 6, 3), jnp.array([6, 3, 0, 1])
    hs, (last, first) = layer(x, lengths=lengths)
    forward, want_last = layer.forward(x, lengths=lengths)
    backward, want_first = layer.backward(x, lengths=lengths)
    want = {
        "concat": np.concatenate([forward, backward], axis=-1),
        "sum": forward + backward,
        "mean": (forward + backward) / 2,
        doubled: 2 * forward + backward,
    }[merge]
    NEAR(hs, want)
    np.testing.assert_array_equal(last.state.c, want_last.state.c)
    np.testing.assert_array_equal(first.h, want_first.h)
    assert layer.output_size == hs.shape[-1]
    stack = Stack(LSTM(5), 3, num_layers=2, bidirectional=True, merge=merge, **quick())
    assert stack(x)[0].shape == hs.shape


WRONG = {
    "reverse": (lambda **s: Bidirectional(LSTM(5), 3, reverse=True, **s), "leave out reverse"),
    "merge": (lambda **s: Bidirectional(LSTM(5), 3, merge="max", **s), "'max'"),
    "sizes": (
        lambda **s: Bidirectional((LSTM(5), GRU(7)), 3, merge="sum", **s),
        "these are 5 and 7; merge=",
    ),
    "count": (lambda **s: Stack([LSTM(5)], 3, num_layers=2, **s), "num_layers is 2, but 1 cells"),
    "none": (lambda **s: Stack([], 3, **s), "at least one layer"),
    "pair": (lambda **s: Stack((LSTM(5), GRU(5)), 3, **s), "needs bidirectional=True"),
    "residual": (
        lambda **s: Stack(LSTM(5), 3, residual=True, **s),
        r"no layer whose input and output have one size: \[3, 5\]",
    ),
    "norm": (lambda **s: Stack(LSTM(5), 3, layer_norm="before", **s), '"pre", "post" or None'),
    "activation": (
        lambda **s: Recurrent(Echo(5), 3, activation=jnp.tanh, **s),
        "Echo has no hyper-parameter 'activation'; it has: hidden_size, use_bias",
    ),
    "precision": (lambda **s: Stack(LSTM(5), 3, precision="high", **s), "'high'"),
    "dense": (lambda **s: dense(3, 5, precision="high", **s), "'high'"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.usefixtures("no_type_checks")
def test_settings_that_cannot_be_are_one_line(name):
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as error:
        make(rngs=nnx.Rngs(0))
    assert "\n" not in str(error.value)


def test_reverse_is_a_setting_not_an_option():
    with pytest.raises(TypeError, match="reverse"):
        LAYERS["one"](LSTM(5))(normal(0, 4, 6, 3), reverse=True)
    x = normal(0, 4, 6, 3)
    stack = Stack(LSTM(5), 3, num_layers=2, reverse=True, **quick())
    assert all(layer.reverse for layer in stack.layers)
    assert float(jnp.abs(stack(x)[0][:, 0] - stack(x[:, 1:])[0][:, 0]).min()) > 0


@pytest.mark.usefixtures("no_type_checks")
def test_an_array_as_hyper_parameter_is_told():
    class Scaled(LSTM):
        scale: object = 1.0

    for scale in (jnp.ones(5), np.ones(5), [1.0]):
        with pytest.raises(ValueError, match="Scaled: hyper-parameter scale is not hashable"):
            Recurrent(Scaled(5, scale=scale), 3, **quick())


# --- Settings of the cells -----------------------------------------------------------------------


def test_hyper_parameters_may_be_given_to_the_layer():
    ones, twos = nnx.initializers.constant(1.0), nnx.initializers.constant(2.0)
    changes = {"use_bias": False, "kernel_init": ones, "recurrent_init": twos}
    stack = Stack(
        Acting(5),
        3,
        num_layers=2,
        bidirectional=True,
        activation=jnp.sin,
        **changes,
        **quick(),
    )
    for layer in stack.layers:
        for one in (layer.forward, layer.backward):
            arrays = one.arrays()
            assert set(arrays) == {"kernel", "recurrent_kernel"}
            assert (arrays["kernel"] == 1).all()
            assert (arrays["recurrent_kernel"] == 2).all()
            assert one.cell == Acting(5, activation=jnp.sin, **changes)
    assert Recurrent(LSTM(5), 3, **quick()).cell == LSTM(5)
    built_in = Recurrent(LSTM(5), 3, activation=jnp.sin, **quick())
    assert built_in.cell == LSTM(5, activation=jnp.sin)


@pytest.mark.parametrize("name", ["bfloat16"])
def test_types_of_parameters_and_of_the_computation(name):
    x, settings = normal(0, 4, 6, 3), {"num_layers": 2, "bidirectional": True, "layer_norm": "pre"}
    wide = Stack(LSTM(5), 3, **settings, **quick())
    cast = jax.numpy_dtype_promotion("standard")  # Flax' norms are not strict
    narrow = Stack(LSTM(5), 3, **settings, dtype=name, **quick())
    stored = Stack(LSTM(5), 3, **settings, param_dtype=name, **quick())
    kinds = [{a.dtype for a in jax.tree.leaves(nnx.state(m))} for m in (narrow, stored)]
    assert kinds == [{jnp.dtype("float32")}, {jnp.dtype(name)}]
    with cast:
        want, _ = wide(x)
        hs, finals = narrow(x, wide.initial_carry(4))
        near, _ = stored(x.astype(name))
    assert {a.dtype for a in jax.tree.leaves((hs, finals))} == {jnp.dtype(name)}
    assert {a.dtype for a in jax.tree.leaves(narrow.initial_carry(4))} == {jnp.dtype(name)}
    assert near.dtype == name
    # Everything is rounded, not operands alone: the rule's bfloat16, with room for states.
    terms = 16 * recurrence_terms(4, 12, 10, 5, 4, gradient=False)
    assert_close(hs.astype("float32"), want, reduction=terms, dtype="bfloat16")
    assert_close(near.astype("float32"), want, reduction=terms, dtype="bfloat16")
    plain = Recurrent(LSTM(5), 3, param_dtype=name, **quick())
    with pytest.raises(ValueError, match=f"x is float32, the cell's kernel {name}"):
        plain(x)


def test_outputs_alone_have_a_place_in_sequential():
    model = nnx.Sequential(
        Recurrent(Echo(5), 3, return_carry=False, **quick()),
        Bidirectional(LSTM(5), 5, return_carry=False, rngs=nnx.Rngs(1)),
        Stack(LSTM(4), 10, num_layers=2, dropout_rate=0.5, return_carry=False, rngs=nnx.Rngs(2)),
        nnx.Linear(4, 2, rngs=nnx.Rngs(3)),
    )
    x = normal(0, 4, 6, 3)
    assert model(x).shape == (4, 6, 2)
    noisy = model(x, rngs=nnx.Rngs(dropout=0))
    assert not np.allclose(noisy, model(x))
    np.testing.assert_array_equal(noisy, model(x, rngs=nnx.Rngs(dropout=0)))
    hs, states = Recurrent(LSTM(5), 3, return_carry=False, **quick())(x, return_states=True)
    assert hs.shape == states.c.shape == (4, 6, 5)


# --- Outputs of padded rows ----------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_last_valid_output_is_that_of_the_carry(padding):
    layer, x, lengths = LAYERS["one"](LSTM(5)), normal(0, 4, 6, 3), [6, 3, 0, 1]
    hs, final = layer(x, lengths=lengths, padding=padding)
    got = last_valid(hs, lengths, padding=padding)
    np.testing.assert_array_equal(got, final.h)
    mask = length_mask(jnp.array(lengths), 6, padding)
    np.testing.assert_array_equal(last_valid(hs, mask=mask), final.h)
    np.testing.assert_array_equal(last_valid(hs[1], mask=mask[1]), final.h[1])
    folded = last_valid(hs.reshape(2, 2, 6, 5), np.reshape(lengths, (2, 2)), padding=padding)
    np.testing.assert_array_equal(folded.reshape(4, 5), final.h)
    np.testing.assert_array_equal(last_valid(hs), hs[:, -1])


def test_the_last_state_of_a_stack_is_that_of_its_top_layer():
    stack = Stack(LSTM(5), 3, num_layers=2, bidirectional=True, **quick())
    hs, finals = stack(normal(0, 4, 6, 3))
    want = jnp.concatenate([carry.h for carry in finals[1]], axis=-1)
    np.testing.assert_array_equal(pool(hs, finals, None, ("last",)), want)
    np.testing.assert_array_equal(pool(hs, finals, None, "last"), want)
    np.testing.assert_array_equal(pool(hs, finals, None, "max"), hs.max(axis=1))
    with pytest.raises(ValueError, match="at least one"):
        pool(hs, finals, None, ())


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", sorted(built_in_cells()))
def test_every_cell_as_a_layer(name):
    layer, x = Recurrent(built_in_cells()[name](4), 4, **quick()), normal(0, 2, 5, 4)
    graphdef, _ = nnx.split(layer)
    assert pickle.loads(pickle.dumps(graphdef)) == graphdef
    inputs = {n: jnp.ones((2, 5, 1)) for n in layer.cell.step_inputs if n != "x"}
    hs, final = jax.eval_shape(lambda: layer(x, keys=jax.random.key(0), inputs=inputs))
    assert hs.shape == (2, 5, layer.output_size)
    assert jax.tree.map(jnp.shape, layer.initial_carry(2)) == jax.tree.map(jnp.shape, final)
