"""The same weights in PyTorch, Keras and Flax give the same values and gradients, in float32.

A test whose peer is not installed is skipped, by the peer's name. What is compared each time: the
outputs, the final state, and the gradients of the inputs, the initial state and all weights, for
random cotangents of outputs and final state. Both sides compute in float32 and each may err by the
rule of `tests/tolerances.py`.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lstmjax.cells import GRU, LSTM, Carry
from lstmjax.recurrence import unroll
from tests import numpy_reference as reference
from tests.tolerances import OPTIMIZED, assert_close, recurrence_terms

B, T, D, H = 3, 7, 2, 5
LENGTHS = [7, 4, 1]
CELLS = {"LSTM": LSTM(H), "GRU": GRU(H)}
both_cells = pytest.mark.parametrize("name", CELLS)


class Problem:
    """Weights, inputs and cotangents in float32 NumPy, and what `lstmjax` makes of them."""

    def __init__(self, name, seed=5):
        rng = np.random.default_rng(seed)

        def draw(*shape):
            return rng.normal(0, 1, shape).astype("float32")

        self.cell = CELLS[name]
        states = len(self.cell.State._fields)
        params = reference.random_params(reference.REFERENCES[name], rng, D, H)
        self.params = reference.tree_map(lambda p: p.astype("float32"), params)
        self.x, self.d_hs = draw(B, T, D), draw(B, T, H)
        self.initial = Carry(draw(B, H), self.cell.State(*(draw(B, H) for _ in range(states))))
        self.d_final = Carry(draw(B, H), self.cell.State(*(draw(B, H) for _ in range(states))))

    def solve(self, **options):
        """The library's (hs, final, d_params, d_x, d_initial)."""

        @functools.partial(jax.jit, compiler_options=OPTIMIZED)
        def run(params, x, initial, cotangents):
            out, pull_back = jax.vjp(
                lambda *args: unroll(self.cell, *args, **options), params, x, initial
            )
            return out, pull_back(cotangents)

        inputs = jax.tree.map(jnp.asarray, (self.params, self.x, self.initial))
        (hs, final), gradients = run(*inputs, jax.tree.map(jnp.asarray, (self.d_hs, self.d_final)))
        return hs, final, *gradients

    def loss(self, hs, final):
        """The scalar whose gradients a peer is asked for: Σ cotangent * output, without JAX."""
        pairs = zip(jax.tree.leaves(self.d_final), jax.tree.leaves(final), strict=True)
        return (hs * self.d_hs).sum() + sum((value * d).sum() for d, value in pairs)

    def close(self, what, ours, theirs, *, gradient):
        """Two float32 results, each within the rule of the truth."""
        terms = recurrence_terms(B, T, D, H, len(self.cell.gates), gradient=gradient)
        assert_close(ours, theirs, reduction=terms, dtype="float32", what=what)

    def compare(self, theirs, **options):
        """All results against a peer's, which come in the layout of `solve`."""
        ours = self.solve(**options)
        names = ("hs", "final", "d params", "d x", "d initial")
        for name, mine, peer in zip(names, ours, theirs, strict=True):
            assert jax.tree.structure(mine) == jax.tree.structure(peer), name
            mine = dict(jax.tree_util.tree_leaves_with_path(mine))
            for path, value in jax.tree_util.tree_leaves_with_path(peer):
                what = name + jax.tree_util.keystr(path)
                self.close(what, mine[path], value, gradient=name.startswith("d "))


def reorder(array, order):
    """The blocks of the last axis in another order."""
    blocks = np.split(np.asarray(array), len(order), axis=-1)
    return np.concatenate([blocks[k] for k in order], axis=-1)


# --- PyTorch -------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


def torch_layer(torch, problem, **options):
    """`torch.nn.LSTM` (blocks i, f, g, o) or `torch.nn.GRU` (blocks r, z, n) with our weights.

    Both have a bias for either product. The LSTM's two are only ever added, so ours is split
    between them at random, and the gradient of either is the gradient of the sum.
    """
    params = problem.params
    if "recurrent_bias" in params:
        bias, recurrent_bias = params["bias"], params["recurrent_bias"]
        layer = torch.nn.GRU(D, H, batch_first=True, **options)
    else:
        bias = np.random.default_rng(6).normal(0, 1, params["bias"].shape).astype("float32")
        recurrent_bias = params["bias"] - bias
        layer = torch.nn.LSTM(D, H, batch_first=True, **options)
    weights = {
        "weight_ih_l0": params["kernel"].T,
        "weight_hh_l0": params["recurrent_kernel"].T,
        "bias_ih_l0": bias,
        "bias_hh_l0": recurrent_bias,
    }
    with torch.no_grad():
        for name, value in weights.items():
            getattr(layer, name).copy_(torch.tensor(value))
            if options.get("bidirectional"):
                getattr(layer, name + "_reverse").copy_(torch.tensor(value))
    return layer


@both_cells
def test_pytorch(torch, name):
    problem = Problem(name)
    layer = torch_layer(torch, problem)
    x = torch.tensor(problem.x, requires_grad=True)
    leaves = [torch.tensor(a, requires_grad=True) for a in jax.tree.leaves(problem.initial)]
    carried = tuple(a[None] for a in leaves)
    hs, final = layer(x, carried if name == "LSTM" else carried[0])
    final = final if name == "LSTM" else (final,)
    loss = (hs * torch.tensor(problem.d_hs)).sum()
    for d, value in zip(jax.tree.leaves(problem.d_final), final, strict=True):
        loss = loss + (value[0] * torch.tensor(d)).sum()
    loss.backward()

    d_params = {
        "kernel": layer.weight_ih_l0.grad.T.numpy(),
        "recurrent_kernel": layer.weight_hh_l0.grad.T.numpy(),
        "bias": layer.bias_ih_l0.grad.numpy(),
    }
    if name == "GRU":
        d_params["recurrent_bias"] = layer.bias_hh_l0.grad.numpy()
    like = jax.tree.structure(problem.initial)
    problem.compare(
        (
            hs.detach().numpy(),
            jax.tree.unflatten(like, [a[0].detach().numpy() for a in final]),
            d_params,
            x.grad.numpy(),
            jax.tree.unflatten(like, [a.grad.numpy() for a in leaves]),
        )
    )


@both_cells
def test_pytorch_with_lengths_in_both_directions(torch, name):
    """A packed, padded batch through PyTorch's bidirectional layer, both directions one weight."""
    problem = Problem(name)
    layer = torch_layer(torch, problem, bidirectional=True)
    pack, unpack = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence
    carried = tuple(torch.tensor(np.stack([a, a])) for a in jax.tree.leaves(problem.initial))
    packed = pack(torch.tensor(problem.x), torch.tensor(LENGTHS), batch_first=True)
    with torch.no_grad():
        hs, final = layer(packed, carried if name == "LSTM" else carried[0])
    hs, _ = unpack(hs, batch_first=True, total_length=T)
    final = final if name == "LSTM" else (final,)
    for direction, reverse in enumerate((False, True)):
        ours, our_final, *_ = problem.solve(lengths=jnp.asarray(LENGTHS), reverse=reverse)
        theirs = np.split(hs.numpy(), 2, axis=-1)[direction]
        problem.close("hs", ours, theirs, gradient=False)
        for mine, peer in zip(jax.tree.leaves(our_final), final, strict=True):
            problem.close("final", mine, peer[direction].numpy(), gradient=False)


# --- Keras ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def lenient_jax():
    """JAX as it comes: the peers rely on promotions that these tests otherwise forbid."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def keras(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    keras = pytest.importorskip("keras", reason="Keras is not installed")
    assert keras.backend.backend() == "jax"
    return keras


# Keras has the blocks i, f, c, o, which are ours, and z, r, h for our r, z, n. Swapping the first
# two blocks is its own inverse.
KERAS_ORDER = {"LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2)}


@both_cells
def test_keras(keras, name):
    problem = Problem(name)
    order = KERAS_ORDER[name]
    params = {key: reorder(value, order) for key, value in problem.params.items()}
    bias = params["bias"]
    if name == "GRU":
        bias = np.stack([bias, params["recurrent_bias"]])
    options = {"return_sequences": True, "return_state": True}
    with lenient_jax():
        if name == "GRU":
            layer = keras.layers.GRU(H, reset_after=True, **options)
        else:
            layer = keras.layers.LSTM(H, **options)
        layer.build((B, T, D))
        weights = [params["kernel"], params["recurrent_kernel"], bias]
        paths = [variable.path.rsplit("/", 1)[-1] for variable in layer.trainable_variables]
        assert paths == ["kernel", "recurrent_kernel", "bias"]
        fixed = [variable.value for variable in layer.non_trainable_variables]

        def run(weights, x, initial):
            (hs, *final), _ = layer.stateless_call(
                weights, fixed, x, initial_state=list(initial), training=False
            )
            return problem.loss(hs, final), (hs, final)

        carried = jax.tree.leaves(problem.initial)
        inputs = jax.tree.map(jnp.asarray, (weights, problem.x, carried))
        differentiate = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))
        (d_weights, d_x, d_carried), (hs, final) = differentiate(*inputs)

    d_params = {
        "kernel": reorder(d_weights[0], order),
        "recurrent_kernel": reorder(d_weights[1], order),
    }
    d_bias = reorder(d_weights[2], order)
    if name == "GRU":
        d_params["bias"], d_params["recurrent_bias"] = d_bias
    else:
        d_params["bias"] = d_bias
    like = jax.tree.structure(problem.initial)
    problem.compare(
        (hs, jax.tree.unflatten(like, final), d_params, d_x, jax.tree.unflatten(like, d_carried))
    )


# --- Flax ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_flax(reverse):
    """`nnx.OptimizedLSTMCell`: blocks i, f, g, o, its only bias on the recurrent product."""
    problem = Problem("LSTM")
    params = jax.tree.map(jnp.asarray, problem.params)
    with lenient_jax():
        rngs = nnx.Rngs(0)
        cell = nnx.OptimizedLSTMCell(in_features=D, hidden_features=H, rngs=rngs)
        cell.dense_i.kernel[...] = params["kernel"]
        cell.dense_h.kernel[...] = params["recurrent_kernel"]
        cell.dense_h.bias[...] = params["bias"]
        rnn = nnx.RNN(cell, return_carry=True, reverse=reverse, keep_order=True, rngs=rngs)
        graph, weights, rest = nnx.split(rnn, nnx.Param, ...)

        def run(weights, x, h, c):
            layer = nnx.merge(graph, weights, rest)
            (final_c, final_h), hs = layer(x, initial_carry=(c, h))
            final = Carry(final_h, LSTM.State(final_c))
            return problem.loss(hs, final), (hs, final)

        differentiate = jax.jit(jax.grad(run, argnums=(0, 1, 2, 3), has_aux=True))
        inputs = jax.tree.map(jnp.asarray, (problem.x, *jax.tree.leaves(problem.initial)))
        (d_weights, d_x, d_h, d_c), (hs, final) = differentiate(weights, *inputs)

    d_cell = nnx.to_pure_dict(d_weights)["cell"]
    d_params = {
        "kernel": d_cell["dense_i"]["kernel"],
        "recurrent_kernel": d_cell["dense_h"]["kernel"],
        "bias": d_cell["dense_h"]["bias"],
    }
    problem.compare((hs, final, d_params, d_x, Carry(d_h, LSTM.State(d_c))), reverse=reverse)
