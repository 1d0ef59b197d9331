"""Weights from and to PyTorch, Keras and Flax: equal outputs both ways, and clear refusals.

Where a peer is not installed, its published equations stand in for it, written here in NumPy on its
own arrays; where it is, it runs as well. Flax is always there.
"""

import contextlib
import io
import json
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lstmjax import GRU, LSTM, Bidirectional, PeepholeLSTM, Recurrent, ResetFirstGRU, Stack, interop
from lstmjax.interop import WeightsError
from lstmjax.recurrence import unroll
from tests.tolerances import assert_close, recurrence_terms

pytestmark = pytest.mark.sampled(4)

B, T, D, H = 2, 5, 3, 4
CELLS = {"LSTM": LSTM, "GRU": GRU, "ResetFirstGRU": ResetFirstGRU}
FORMS = {"one": (1, False), "deep": (2, False), "both ways": (1, True), "deep both": (2, True)}
forms = pytest.mark.parametrize("form", FORMS)
kinds = pytest.mark.parametrize("kind", ["LSTM", "GRU"])


def draw(kind, layers=1, both=False, dtype="float64", bias=True):
    rng = np.random.default_rng(layers + 2 * both)
    gates = 4 if kind == "LSTM" else 3

    def one(features):
        shapes = {"kernel": (features, gates * H), "recurrent_kernel": (H, gates * H)}
        if kind == "ResetFirstGRU":
            shapes["recurrent_kernel"] = (H, 2 * H)
        if bias:
            shapes["bias"] = (gates * H,)
        if bias and kind == "GRU":
            shapes["recurrent_bias"] = (gates * H,)
        params = {name: rng.normal(0, 0.6, shape).astype(dtype) for name, shape in shapes.items()}
        if kind == "ResetFirstGRU":
            params["step"] = {"candidate_kernel": rng.normal(0, 0.6, (H, H)).astype(dtype)}
        return params

    sizes = [D, *[(1 + both) * H] * (layers - 1)]
    return [(one(n), one(n)) if both else one(n) for n in sizes]


def x_of(dtype="float64"):
    return np.random.default_rng(9).normal(0, 1, (B, T, D)).astype(dtype)


def outputs(kind, weights, dtype="float64", **hyper):
    """What we make of them: outputs of the top layer."""
    cell, x = CELLS[kind](H, **hyper), x_of(dtype)
    with jax.enable_x64(dtype == "float64"):
        for entry in weights:
            ways = entry if isinstance(entry, tuple) else (entry,)
            found = [
                unroll(cell, jax.tree.map(jnp.asarray, p), jnp.asarray(x), reverse=r, engine="scan")
                for p, r in zip(ways, (False, True), strict=False)
            ]
            x = np.concatenate([np.asarray(hs) for hs, _ in found], axis=-1)
    return x


def close(ours, theirs, dtype="float64", layers=1):
    terms = layers * recurrence_terms(B, T, 2 * H, H, 4, gradient=False)
    assert_close(np.asarray(ours), np.asarray(theirs), reduction=terms, dtype=dtype)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def over_time(x, step, reverse):
    """Run ``step(x_t, h, c)``; outputs in the order of time."""
    h = c = np.zeros((B, H))
    out = np.zeros((B, T, H))
    for t in range(T)[::-1] if reverse else range(T):
        h, c = step(x[:, t], h, c)
        out[:, t] = h
    return out


# -- PyTorch --------------------------------------------------------------------------------------


def pytorch_equations(kind, state, x, layers, both):
    """As the documentation of torch.nn.LSTM and torch.nn.GRU has them, on its own names."""

    def lstm(w_ih, w_hh, b_ih, b_hh):
        def step(x, h, c):
            i, f, g, o = np.split(x @ w_ih.T + b_ih + h @ w_hh.T + b_hh, 4, axis=-1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            return sigmoid(o) * np.tanh(c), c

        return step

    def gru(w_ih, w_hh, b_ih, b_hh):
        def step(x, h, c):
            xr, xz, xn = np.split(x @ w_ih.T + b_ih, 3, axis=-1)
            hr, hz, hn = np.split(h @ w_hh.T + b_hh, 3, axis=-1)
            r, z = sigmoid(xr + hr), sigmoid(xz + hz)
            return (1 - z) * np.tanh(xn + r * hn) + z * h, c

        return step

    for layer in range(layers):
        found = []
        for way in ("", "_reverse")[: 1 + both]:
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            arrays = [state[f"{name}_l{layer}{way}"] for name in names]
            found.append(over_time(x, (lstm if kind == "LSTM" else gru)(*arrays), way != ""))
        x = np.concatenate(found, axis=-1)
    return x


@kinds
@forms
def test_pytorchs_equations(kind, form):
    layers, both = FORMS[form]
    weights = draw(kind, layers, both)
    state = interop.to_pytorch(weights, "rnn.")
    assert all(name.startswith("rnn.") for name in state)
    plain = {name.removeprefix("rnn."): a for name, a in state.items()}
    close(outputs(kind, weights), pytorch_equations(kind, plain, x_of(), layers, both))
    same(interop.from_pytorch({**state, "head.weight": np.ones(3)}, "rnn."), weights)
    rng = np.random.default_rng(3)  # weights of theirs, with two biases
    theirs = {name: rng.normal(0, 0.6, a.shape) for name, a in plain.items()}
    expected = pytorch_equations(kind, theirs, x_of(), layers, both)
    close(outputs(kind, interop.from_pytorch(theirs)), expected)


@kinds
@forms
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pytorch_itself(kind, form, dtype):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    layers, both = FORMS[form]
    options = {"batch_first": True, "num_layers": layers, "bidirectional": both}
    layer = getattr(torch.nn, kind)(D, H, dtype=getattr(torch, dtype), **options)
    ours = outputs(kind, interop.from_pytorch(layer.state_dict()), dtype)
    close(ours, layer(torch.tensor(x_of(dtype)))[0].detach().numpy(), dtype, layers)
    weights = draw(kind, layers, both, dtype)
    state = {name: torch.tensor(a) for name, a in interop.to_pytorch(weights).items()}
    layer.load_state_dict(state)
    theirs = layer(torch.tensor(x_of(dtype)))[0].detach().numpy()
    close(outputs(kind, weights, dtype), theirs, dtype, layers)


@kinds
def test_pytorch_without_biases(kind):
    weights = draw(kind, 2, bias=False)
    state = interop.to_pytorch(weights)
    assert set(state) == {f"weight_{w}_l{n}" for w in ("ih", "hh") for n in (0, 1)}
    same(interop.from_pytorch(state), weights)
    assert np.isfinite(outputs(kind, weights, use_bias=False)).all()


def torch_state(**changes):
    state = interop.to_pytorch(draw("LSTM", 2, True), "rnn.")
    for name, value in changes.items():
        if value is None:
            del state[f"rnn.{name}"]
        else:
            state[f"rnn.{name}"] = np.zeros(value)
    return state


TORCH_FAULTS = {
    "missing": ({"bias_hh_l1": None}, r"rnn\.bias_hh_l1 is missing"),
    "a way missing": ({"weight_hh_l0_reverse": None}, r"rnn\.weight_hh_l0_reverse is missing"),
    "shape": ({"weight_hh_l1": (16, 5)}, r"rnn\.weight_hh_l1 is float64\[16, 5\]: neither"),
    "input": ({"weight_ih_l1": (16, 7)}, r"weight_ih_l1 is float64\[16, 7\], it.*\[16, 8\]"),
    "bias": ({"bias_ih_l0": (4,)}, r"rnn\.bias_ih_l0 is float64\[4\], it should be \[16\]"),
    "projection": ({"weight_hr_l0": (2, 4)}, "a projection has no counterpart"),
    "a layer between": ({"weight_hh_l3": (16, 4)}, r"weight_hh_l2 is missing"),
}


@pytest.mark.parametrize("name", TORCH_FAULTS)
def test_what_is_wrong_with_a_state_dict_is_named(name):
    changes, message = TORCH_FAULTS[name]
    with pytest.raises(WeightsError, match=message):
        interop.from_pytorch(torch_state(**changes), "rnn.")


def test_a_forgotten_prefix_is_told():
    with pytest.raises(WeightsError, match=r"weight_ih_l0 is missing; it is under prefix='rnn\.'"):
        interop.from_pytorch(torch_state())


def test_safetensors(tmp_path):
    state = interop.to_pytorch(draw("GRU", 2, True, "float32"))
    interop.write_safetensors(tmp_path / "w.safetensors", state)
    same(interop.read_safetensors(tmp_path / "w.safetensors"), state)
    (tmp_path / "no").write_bytes(b"\xff" * 100)
    with pytest.raises(WeightsError, match=r"no is no \.safetensors file"):
        interop.read_safetensors(tmp_path / "no")


# -- Keras ----------------------------------------------------------------------------------------


def keras_equations(kind, arrays, x, both, reset_after=True):
    """As Keras' own layers compute them: gates i f c o, and z r h."""

    def lstm(kernel, recurrent, bias):
        def step(x, h, c):
            i, f, g, o = np.split(x @ kernel + h @ recurrent + bias, 4, axis=-1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            return sigmoid(o) * np.tanh(c), c

        return step

    def gru(kernel, recurrent, bias):
        def step(x, h, c):
            b, rb = bias if reset_after else (bias, np.zeros(3 * H))
            xz, xr, xh = np.split(x @ kernel + b, 3, axis=-1)
            hz, hr, hh = np.split(h @ recurrent + rb, 3, axis=-1)
            z, r = sigmoid(xz + hz), sigmoid(xr + hr)
            after = r * hh if reset_after else (r * h) @ recurrent[:, 2 * H :]
            return z * h + (1 - z) * np.tanh(xh + after), c

        return step

    each = 3 * (1 + both)
    for start in range(0, len(arrays), each):
        found = [
            over_time(x, (lstm if kind == "LSTM" else gru)(*arrays[start + n : start + n + 3]), n)
            for n in range(0, each, 3)
        ]
        x = np.concatenate(found, axis=-1)
    return x


@pytest.mark.parametrize("kind", CELLS)
@forms
def test_keras_equations(kind, form):
    layers, both = FORMS[form]
    weights = draw(kind, layers, both)
    arrays = interop.to_keras(weights)
    reset_after = kind != "ResetFirstGRU"
    close(outputs(kind, weights), keras_equations(kind, arrays, x_of(), both, reset_after))
    same(interop.from_keras(arrays, bidirectional=both), weights)


# Keras' own: its arrays on JAX do not take all of NumPy's arguments.
keras_warns = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def keras(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    keras = pytest.importorskip("keras", reason="Keras is not installed")
    keras.utils.set_random_seed(0)
    return keras


@contextlib.contextmanager
def lenient_jax(dtype="float32"):
    allowed = jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
    with allowed[0], allowed[1], jax.enable_x64(dtype == "float64"):
        yield


@pytest.mark.parametrize("kind", CELLS)
@forms
@keras_warns
def test_keras_itself(keras, kind, form):
    """In float32: on JAX, Keras' layers are no more exact than that in float64 either."""
    (layers, both), dtype = FORMS[form], "float32"
    options = {"return_sequences": True, "dtype": dtype}
    if kind != "LSTM":
        options["reset_after"] = kind == "GRU"
    with lenient_jax(dtype):
        model = keras.Sequential([keras.Input((T, D), dtype=dtype)])
        for _ in range(layers):
            layer = getattr(keras.layers, "LSTM" if kind == "LSTM" else "GRU")(H, **options)
            model.add(keras.layers.Bidirectional(layer, dtype=dtype) if both else layer)
        for weights in (None, draw(kind, layers, both, dtype)):
            if weights is not None:
                model.set_weights(interop.to_keras(weights))
            theirs = np.asarray(model(x_of(dtype)))
            read = interop.from_keras(model.get_weights(), bidirectional=both)
            close(outputs(kind, read, dtype), theirs, dtype, layers)


def test_what_is_wrong_with_a_list_is_named():
    arrays = interop.to_keras(draw("GRU", 2, True))
    with pytest.raises(WeightsError, match="11 arrays for layers of 6 each: kernel, recurrent"):
        interop.from_keras(arrays[:-1], bidirectional=True)
    with pytest.raises(WeightsError, match=r"array 6 \(kernel\) is float64\[2, 12\], it should be"):
        interop.from_keras([*arrays[:6], np.zeros((2, 12)), *arrays[7:]], bidirectional=True)
    with pytest.raises(WeightsError, match=r"array 1 \(recurrent kernel\).*neither the four"):
        interop.from_keras([arrays[0], np.zeros((4, 9)), arrays[2]])
    with pytest.raises(WeightsError, match=r"array 2 \(bias\) is float64\[3, 12\]"):
        interop.from_keras([*arrays[:2], np.zeros((3, 12))])


# -- .keras files ---------------------------------------------------------------------------------


def keras_file(path, kind="LSTM", both=True, change=None):
    """A file as Keras 3 writes them: Embedding, Dropout, two recurrent layers, Dense."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    weights, rng = draw(kind, 2, both, "float32"), np.random.default_rng(1)
    inner = {
        "units": H,
        "activation": "tanh",
        "recurrent_activation": "sigmoid",
        "go_backwards": False,
        "use_bias": True,
    }
    if kind != "LSTM":
        inner["reset_after"] = kind == "GRU"
    cell = "lstm" if kind == "LSTM" else "gru"

    def recurrent(name, sequences):
        config = {**inner, "return_sequences": sequences, "name": name}
        layer = {"class_name": cell.upper(), "config": config}
        if not both:
            return layer
        config = {"name": name, "layer": layer, "merge_mode": "concat"}
        return {"class_name": "Bidirectional", "config": config}

    def plain(kind, name, **config):
        return {"class_name": kind, "config": {"name": name, **config}}

    layers = [
        plain("InputLayer", "input"),
        plain("Embedding", "words"),
        plain("SpatialDropout1D", "drop"),
        recurrent("first", True),
        recurrent("second", False),
        plain("Dense", "head", activation="sigmoid"),
    ]
    if change is not None:
        change(layers)
    content = io.BytesIO()
    head = rng.normal(0, 1, ((1 + both) * H, 1)).astype("float32"), np.float32([0.3])
    with h5py.File(content, "w") as file:
        file["layers/embedding/vars/0"] = rng.normal(0, 1, (20, D)).astype("float32")
        file["layers/spatial_dropout1d/seed_generator/vars/0"] = np.zeros(2, np.uint32)
        outer = "bidirectional" if both else cell
        for number, entry in enumerate(weights):
            place = f"layers/{outer}_{number}" if number else f"layers/{outer}"
            ways = ("forward_layer/", "backward_layer/") if both else ("",)
            for way, params in zip(ways, entry if both else (entry,), strict=True):
                for n, array in enumerate(interop.to_keras([params])):
                    file[f"{place}/{way}cell/vars/{n}"] = array
        for n, array in enumerate(head):
            file[f"layers/dense/vars/{n}"] = array
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("metadata.json", "{}")
        packed.writestr("config.json", json.dumps({"config": {"layers": layers}}))
        packed.writestr("model.weights.h5", content.getvalue())
    return weights


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("both", [False, True])
def test_a_keras_file_becomes_a_classifier(tmp_path, kind, both):
    weights = keras_file(tmp_path / "m.keras", kind, both)
    layers = {layer.name: layer for layer in interop.read_keras(tmp_path / "m.keras")}
    assert [*layers] == ["input", "words", "drop", "first", "second", "head"]
    assert layers["drop"].arrays == []
    model = interop.classifier_from_keras(tmp_path / "m.keras")
    same(interop.weights_of(model.recurrent), weights)
    np.testing.assert_array_equal(model.embedding.embedding[...], layers["words"].arrays[0])
    np.testing.assert_array_equal(model.head.kernel[...], layers["head"].arrays[0])


def test_a_keras_file_takes_other_weights(tmp_path):
    keras_file(tmp_path / "m.keras")
    first, second = interop.read_keras(tmp_path / "m.keras")[3:5]
    new = [2 * a for a in first.arrays]
    interop.write_keras(tmp_path / "n.keras", tmp_path / "m.keras", {"first": new})
    layers = interop.read_keras(tmp_path / "n.keras")
    same(layers[3].arrays, new)
    same(layers[4].arrays, second.arrays)
    for given, message in (
        ({"none": []}, "no layer 'none' in .*; there are: input, words"),
        ({"first": new[:2]}, "first has 6 arrays, 2 are given"),
        ({"first": [*new[:5], new[0]]}, r"first: .*vars/2 is float32\[3, 16\]"),
    ):
        with pytest.raises(WeightsError, match=message):
            interop.write_keras(tmp_path / "o.keras", tmp_path / "m.keras", given)
    assert not (tmp_path / "o.keras").exists()


def set_config(number, **values):
    def change(layers):
        config = layers[number]["config"]
        (config["layer"]["config"] if "layer" in config else config).update(values)

    return change


KERAS_FAULTS = {
    "another layer": (lambda ls: ls[4].update(class_name="SimpleRNN"), "second is a SimpleRNN"),
    "activation": (set_config(3, activation="relu"), "first has activation='relu'"),
    "backwards": (set_config(3, go_backwards=True), "first has go_backwards=True"),
    "sequences": (set_config(4, return_sequences=True), "second has return_sequences=True"),
    "head": (set_config(5, activation="tanh"), "head has 1 outputs and the activation 'tanh'"),
    "no head": (lambda layers: layers.pop(), "it is: Embedding, LSTM, LSTM"),
    "no config": (lambda layers: layers[3].pop("config"), "no .keras model"),
}


@pytest.mark.parametrize("name", KERAS_FAULTS)
def test_what_a_keras_file_cannot_be_is_told(tmp_path, name):
    change, message = KERAS_FAULTS[name]
    keras_file(tmp_path / "m.keras", both=False, change=change)
    with pytest.raises(WeightsError, match=message) as error:
        interop.classifier_from_keras(tmp_path / "m.keras")
    assert "\n" not in str(error.value)


def test_hostile_keras_files(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    keras_file(tmp_path / "good.keras")
    good = (tmp_path / "good.keras").read_bytes()
    file = tmp_path / "m.keras"

    def refused(content, message):
        file.write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            interop.classifier_from_keras(file)

    with pytest.raises(WeightsError, match="there is no"):
        interop.read_keras(tmp_path / "none.keras")
    for content in (b"", good[:200], good[:-10], b"PK" + bytes(100)):
        refused(content, "is no .keras file")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            packed.writestr(name, bytes(10**7))
    refused(bomb.getvalue(), "it announces more than it holds")
    with zipfile.ZipFile(tmp_path / "good.keras") as packed:
        members = {name: packed.read(name) for name in packed.namelist()}
    for kind in ("link", "chunks", "external"):
        weights = io.BytesIO(members["model.weights.h5"])
        with h5py.File(weights, "r+") as inside:
            del inside["layers/embedding/vars/0"]
            if kind == "link":
                inside["layers/embedding/vars/0"] = h5py.ExternalLink("/tmp/other.h5", "/a")
            elif kind == "chunks":
                huge = {"shape": (10**6, 10**4), "dtype": "float32", "chunks": (100, 100)}
                inside.create_dataset("layers/embedding/vars/0", **huge)
            else:
                place = [("/etc/passwd", 0, 240)]
                inside.create_dataset("layers/embedding/vars/0", (20, 3), "float32", external=place)
        with zipfile.ZipFile(file, "w") as packed:
            for name, content in {**members, "model.weights.h5": weights.getvalue()}.items():
                packed.writestr(name, content)
        with pytest.raises(WeightsError, match="is not stored plainly"):
            interop.read_keras(file)


@keras_warns
def test_keras_reads_what_we_write_and_we_what_it_writes(keras, tmp_path):
    pytest.importorskip("h5py", reason="h5py is not installed")
    layers = keras.layers
    ids = np.random.default_rng(0).integers(0, 20, (4, 7)).astype("int32")
    wide = keras.initializers.RandomNormal(stddev=1.0, seed=0)
    with lenient_jax():
        model = keras.Sequential(
            [
                keras.Input((7,), dtype="int32"),
                layers.Embedding(20, D, embeddings_initializer=wide),
                layers.Dropout(0.2),
                layers.Bidirectional(layers.LSTM(H, return_sequences=True)),
                layers.Bidirectional(layers.LSTM(H)),
                layers.Dense(1, activation="sigmoid"),
            ]
        )
        model.save(tmp_path / "theirs.keras")
        theirs = np.asarray(model(ids))[:, 0]
    ours = interop.classifier_from_keras(tmp_path / "theirs.keras")
    close(jax.nn.sigmoid(ours(ids)), theirs, "float32", 2)
    weights = draw("LSTM", 2, True, "float32")
    new = {
        name: interop.to_keras([entry])
        for name, entry in zip(("bidirectional", "bidirectional_1"), weights, strict=True)
    }
    names = [layer.name for layer in model.layers if "bidirectional" in layer.name]
    new = dict(zip(names, new.values(), strict=True))
    interop.write_keras(tmp_path / "ours.keras", tmp_path / "theirs.keras", new)
    interop.set_weights(ours.recurrent, weights)
    with lenient_jax():
        again = np.asarray(keras.models.load_model(tmp_path / "ours.keras")(ids))[:, 0]
    assert np.abs(again - theirs).max() > 0.01
    close(jax.nn.sigmoid(ours(ids)), again, "float32", 2)


# -- Flax -----------------------------------------------------------------------------------------

LINEN = {"LSTM": nn.LSTMCell, "optimized": nn.OptimizedLSTMCell, "GRU": nn.GRUCell}


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", LINEN)
def test_linen(name, dtype, both):
    kind = "GRU" if name == "GRU" else "LSTM"
    with lenient_jax(dtype):

        def rnn():
            return nn.RNN(LINEN[name](H, param_dtype=dtype))

        layer = nn.Bidirectional(rnn(), rnn()) if both else rnn()
        theirs = layer.init(jax.random.key(1), x_of(dtype))
        theirs = jax.tree.map(lambda a: a + 0.1, theirs)  # biases begin at zero
        close(
            outputs(kind, interop.from_flax(theirs), dtype), layer.apply(theirs, x_of(dtype)), dtype
        )
        weights = draw(kind, 1, both, dtype)
        (params,) = interop.to_linen(weights)
        assert jax.tree.structure(params) == jax.tree.structure(theirs["params"])
        ours = layer.apply({"params": params}, x_of(dtype))
        close(outputs(kind, weights, dtype), ours, dtype)
        close(outputs(kind, interop.from_flax(params), dtype), ours, dtype)


def test_linen_stacks():
    weights = draw("GRU", 2)
    tree = {"params": {f"layers_{n}": p for n, p in enumerate(interop.to_linen(weights))}}
    close(outputs("GRU", interop.from_flax(tree)), outputs("GRU", weights))
    close(outputs("GRU", interop.from_flax(interop.to_linen(weights))), outputs("GRU", weights))


NNX = {"LSTM": nnx.LSTMCell, "optimized": nnx.OptimizedLSTMCell, "GRU": nnx.GRUCell}


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NNX)
def test_nnx(name, dtype, both):
    kind, rngs = "GRU" if name == "GRU" else "LSTM", nnx.Rngs(0)
    with lenient_jax(dtype):

        def rnn():
            return nnx.RNN(NNX[name](D, H, param_dtype=dtype, rngs=rngs), rngs=rngs)

        layer = nnx.Bidirectional(rnn(), rnn(), rngs=rngs) if both else rnn()
        close(outputs(kind, interop.from_flax(layer), dtype), layer(x_of(dtype)), dtype)
        weights = draw(kind, 1, both, dtype)
        for params in jax.tree.leaves(weights, is_leaf=lambda a: isinstance(a, dict)):
            if kind == "GRU":
                params["recurrent_bias"][2 * H :] = 0
        (params,) = interop.to_nnx(weights, optimized=name != "LSTM")
        state = nnx.state(layer, nnx.Param)
        nnx.replace_by_pure_dict(state, params)
        nnx.update(layer, state)
        close(outputs(kind, weights, dtype), layer(x_of(dtype)), dtype)


def without(tree, *path):
    for key in path[:-1]:
        tree = tree[key]
    del tree[path[-1]]


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("LSTM", ("cell", "hf", "bias"), r"\['cell'\]\['hf'\]\['bias'\] is missing"),
        ("LSTM", ("cell", "if"), r"\['cell'\]\['if'\] is missing"),
        ("GRU", ("cell", "hn", "bias"), r"\['cell'\]\['hn'\]\['bias'\] is missing"),
    ],
)
def test_what_flax_lacks_is_named(kind, path, message):
    (tree,) = interop.to_linen(draw(kind))
    without(tree, *path)
    with pytest.raises(WeightsError, match=message):
        interop.from_flax(tree)


def test_what_flax_cannot_hold_is_told():
    with pytest.raises(WeightsError, match="no place for recurrent_bias of the candidate"):
        interop.to_nnx(draw("GRU"))
    with pytest.raises(WeightsError, match="Flax' cells have biases"):
        interop.to_linen(draw("LSTM", bias=False))
    with pytest.raises(WeightsError, match=r"\['forward_rnn'\] is missing"):
        interop.from_flax({"backward_rnn": {}})
    (tree,) = interop.to_linen(draw("LSTM"))
    tree["cell"]["hi"]["kernel"] = np.zeros((4, 5))
    with pytest.raises(WeightsError, match=r"\['cell'\]\['hi'\]\['kernel'\] is float64\[4, 5\]"):
        interop.from_flax(tree)
    with pytest.raises(WeightsError, match=r"\[1\] is a int, no dict"):
        interop.from_flax([interop.to_linen(draw("LSTM"))[0], 3])


# -- layers ---------------------------------------------------------------------------------------


def test_weights_go_into_layers_and_come_out():
    stack = Stack(LSTM(H), D, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0))
    weights = draw("LSTM", 2, True, "float32")
    interop.set_weights(stack, weights)
    same(interop.weights_of(stack), weights)
    close(stack(jnp.asarray(x_of("float32")))[0], outputs("LSTM", weights, "float32"), "float32", 2)
    both = Bidirectional(GRU(H), D, rngs=nnx.Rngs(0))
    interop.set_weights(both, draw("GRU", 1, True))
    assert both.forward.arrays()["kernel"].dtype == jnp.float32
    narrow = Recurrent(LSTM(H), D, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    interop.set_weights(narrow, draw("LSTM"))
    assert narrow.arrays()["kernel"].dtype == jnp.bfloat16


def test_layers_take_all_of_the_weights_or_none():
    stack = Stack(LSTM(H), D, num_layers=2, rngs=nnx.Rngs(0))
    before = interop.weights_of(stack)
    good = draw("LSTM", 2)
    short = {**good[1], "bias": np.zeros(3)}
    for weights, message in (
        (good[:1], "weights of 1 layers for a stack of 2"),
        (draw("LSTM", 2, True), "layer 0: weights of both directions for a Recurrent"),
        ([good[0], short], r"layer 1: bias is \[3\], LSTM\(4\) needs \[16\]"),
        (
            [good[0], {**good[1], "units": 1 * good[1]["bias"]}],
            "layer 1: units is .* needs missing",
        ),
        ([{k: v for k, v in good[0].items() if k != "bias"}, good[1]], "layer 0: bias is missing"),
        (draw("GRU", 2), r"layer 0: bias is \[12\]"),
    ):
        with pytest.raises(WeightsError, match=message):
            interop.set_weights(stack, weights)
    same(interop.weights_of(stack), before)


def test_other_cells_have_no_counterpart():
    weights = interop.weights_of(Recurrent(PeepholeLSTM(H), D, rngs=nnx.Rngs(0)))
    for convert in (interop.to_pytorch, interop.to_keras, interop.to_linen, interop.to_nnx):
        with pytest.raises(WeightsError, match="units has no place there"):
            convert(weights)
    with pytest.raises(WeightsError, match="step has no place there"):
        interop.to_pytorch(draw("ResetFirstGRU"))
