"""Weights of LSTM and GRU layers from and to PyTorch, Keras and Flax.

None of them needs to be installed: weights are arrays by name (PyTorch), in a list (Keras) or in a
nested dict (Flax). Files: ``.safetensors`` by `read_safetensors`, ``.keras`` by `read_keras`, which
needs ``h5py``.

Here the weights of a layer are what `Cell.init` draws, a dict of arrays; those of a layer in both
directions a pair of them, forward and backward; those of a stack a list, an entry a layer. The
conversions copy, transpose, reorder and, where the other side has one bias in place of two, add:
the outputs are equal to rounding.

| | gates in their order | differs from here |
|---|---|---|
| PyTorch | LSTM i f g o, GRU r z n | kernels transposed; the LSTM has two biases |
| Keras | LSTM i f c o, GRU z r h | GRU: z before r; both biases as the rows of one array |
| Flax linen | one array a gate | GRU: of the recurrent biases that of n alone |
| Flax NNX | the same, or i f g o | GRU: r z n, no recurrent bias |

Example::

    state = interop.read_safetensors("model.safetensors")
    stack = Stack(LSTM(100), 32, num_layers=2, rngs=nnx.Rngs(0))
    interop.set_weights(stack, interop.from_pytorch(state, prefix="lstm."))
"""

import io
import pathlib
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from lstmjax import files
from lstmjax.cells import GRU, LSTM, Cell, Params, ResetFirstGRU
from lstmjax.errors import UserError, extra, first_line
from lstmjax.layers import Bidirectional, Layer, Recurrent, Stack
from lstmjax.models import Classifier, ClassifierConfig, named_parameters, set_parameters

__all__ = [
    "Entry",
    "KerasLayer",
    "Weights",
    "WeightsError",
    "classifier_from_keras",
    "from_flax",
    "from_keras",
    "from_pytorch",
    "read_keras",
    "read_safetensors",
    "set_weights",
    "to_keras",
    "to_linen",
    "to_nnx",
    "to_pytorch",
    "weights_of",
    "write_keras",
    "write_safetensors",
]

Entry: TypeAlias = Params | tuple[Params, Params]
"""Of one layer, or of both its directions, forward and backward."""
Weights: TypeAlias = list[Entry]
"""An entry a layer."""
MAX_BYTES = 2**34
_GATES = {4: ("i", "f", "g", "o"), 3: ("r", "z", "n")}


class WeightsError(UserError, ValueError):
    """Weights that are missing, of another shape, or without a counterpart on the other side."""


# --- In and out of layers ------------------------------------------------------------------------


def weights_of(layer: Layer) -> Weights:
    """The weights of a `Recurrent`, a `Bidirectional` or a `Stack`.

    Example:
        >>> layer = Recurrent(LSTM(5), 3, rngs=nnx.Rngs(0))
        >>> {name: a.shape for name, a in weights_of(layer)[0].items()}
        {'bias': (20,), 'kernel': (3, 20), 'recurrent_kernel': (5, 20)}
    """
    if isinstance(layer, Stack):
        return [entry for one in layer.layers for entry in weights_of(one)]
    if isinstance(layer, Bidirectional):
        return [(_arrays(layer.forward), _arrays(layer.backward))]
    assert isinstance(layer, Recurrent)
    return [_arrays(layer)]


def set_weights(layer: Layer, weights: Weights) -> None:
    """Put weights into a `Recurrent`, a `Bidirectional` or a `Stack`, in place.

    They become of the layer's dtype.

    Raises:
        WeightsError: an array is missing or has another shape, or the layers are others.

    Example:
        >>> one, other = (Recurrent(GRU(5), 3, rngs=nnx.Rngs(seed)) for seed in (0, 1))
        >>> set_weights(other, weights_of(one))
        >>> bool((other.arrays()["kernel"] == one.arrays()["kernel"]).all())
        True
    """
    layers: list[Layer] = [*layer.layers] if isinstance(layer, Stack) else [layer]
    if len(layers) != len(weights):
        raise WeightsError(f"weights of {len(weights)} layers for a stack of {len(layers)}")
    jobs: list[tuple[str, Recurrent, Params]] = []
    for number, (one, entry) in enumerate(zip(layers, weights, strict=True)):
        if isinstance(one, Bidirectional) is not isinstance(entry, tuple):
            has = "both directions" if isinstance(entry, tuple) else "one direction"
            raise WeightsError(f"layer {number}: weights of {has} for a {type(one).__name__}")
        if isinstance(entry, tuple):
            for way, params in zip(("forward", "backward"), entry, strict=True):
                jobs.append((f"layer {number}, {way}", getattr(one, way), params))
        else:
            assert isinstance(one, Recurrent)
            jobs.append((f"layer {number}", one, entry))
    new = [_fitting(where, one, params) for where, one, params in jobs]
    for (_, one, _), params in zip(jobs, new, strict=True):  # all of them, or none
        one.params = nnx.data(jax.tree.map(nnx.Param, params))


def _arrays(layer: Recurrent) -> Params:
    return jax.tree.map(np.asarray, layer.arrays())


def _fitting(where: str, layer: Recurrent, params: Params) -> Params:
    wanted, given = (
        {_path(p): a for p, a in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (layer.arrays(), params)
    )
    for name in (*wanted, *given):
        there, here = (
            str([*tree[name].shape]) if name in tree else "missing" for tree in (given, wanted)
        )
        if there != here:
            raise WeightsError(f"{where}: {name} is {there}, {layer.cell} needs {here}")
    return jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), layer.arrays(), params)


def _path(path: KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


# --- What all conversions share ------------------------------------------------------------------


class _Plain(NamedTuple):
    """An LSTM or GRU, its gates in our order.

    Attributes:
        kernel, recurrent: ``(D, G*H)`` and ``(H, G*H)``.
        bias, recurrent_bias: ``(G*H,)``, None where there is none; the LSTM has no second one.
    """

    kernel: np.ndarray
    recurrent: np.ndarray
    bias: np.ndarray | None
    recurrent_bias: np.ndarray | None = None

    @property
    def gates(self) -> tuple[str, ...]:
        return _GATES[self.recurrent.shape[1] // self.recurrent.shape[0]]


def _plain(params: Params) -> _Plain:
    """Of our weights; `WeightsError` where they are of another cell."""
    known = {"kernel", "recurrent_kernel", "bias", "recurrent_bias"}
    unknown = sorted(set(params) - known)
    if unknown or not {"kernel", "recurrent_kernel"} <= set(params):
        what = f"{unknown[0]} has no place there" if unknown else "these lack a kernel"
        raise WeightsError(f"only LSTM and GRU have a counterpart in other libraries: {what}")
    arrays = {name: np.asarray(a) for name, a in params.items()}
    plain = _Plain(
        arrays["kernel"],
        arrays["recurrent_kernel"],
        arrays.get("bias"),
        arrays.get("recurrent_bias"),
    )
    units, columns = plain.recurrent.shape
    if columns not in (3 * units, 4 * units):
        raise WeightsError(
            "only LSTM and GRU have a counterpart in other libraries: recurrent_kernel is "
            f"{[units, columns]}"
        )
    return plain


def _params(plain: _Plain) -> Params:
    """Our weights."""
    params = {"kernel": plain.kernel, "recurrent_kernel": plain.recurrent}
    if plain.bias is not None:
        params["bias"] = plain.bias
        if len(plain.gates) == 3:
            second = plain.recurrent_bias
            params["recurrent_bias"] = np.zeros_like(plain.bias) if second is None else second
        elif plain.recurrent_bias is not None:
            params["bias"] = plain.bias + plain.recurrent_bias
    return cast(Params, params)  # NumPy's, as wide as they came


def _split(array: np.ndarray, gates: Sequence[str]) -> dict[str, np.ndarray]:
    return dict(zip(gates, np.split(array, len(gates), axis=-1), strict=True))


def _reordered(array: np.ndarray, there: Sequence[str], here: Sequence[str]) -> np.ndarray:
    blocks = _split(array, there)
    return np.concatenate([blocks[gate] for gate in here], axis=-1)


def _shaped(name: str, given: object, shape: Sequence[int | None]) -> np.ndarray:
    """The array, if its shape is this one; None is any size."""
    array = np.asarray(given)
    fits = len(array.shape) == len(shape) and all(
        want in (None, size) for want, size in zip(shape, array.shape, strict=True)
    )
    if not fits:
        told = ", ".join("any" if size is None else str(size) for size in shape)
        raise WeightsError(f"{name} is {array.dtype}{[*array.shape]}, it should be [{told}]")
    return array


def _units(name: str, array: np.ndarray, axis: int) -> int:
    """H of a recurrent kernel whose ``axis`` has those of all gates; `WeightsError` if none."""
    units = array.shape[1 - axis]
    if array.shape[axis] not in (3 * units, 4 * units):
        raise WeightsError(
            f"{name} is {array.dtype}{[*array.shape]}: neither the four gates of an LSTM nor the "
            "three of a GRU"
        )
    return units


# --- PyTorch -------------------------------------------------------------------------------------

_TORCH = re.compile(r"(weight|bias)_(ih|hh|hr)_l(\d+)(_reverse)?")


def from_pytorch(state: Mapping[str, object], prefix: str = "") -> Weights:
    """Weights of a `torch.nn.LSTM` or `torch.nn.GRU`, of any depth, in one or both directions.

    Args:
        state: arrays or tensors by name: ``layer.state_dict()``, or a file's content.
        prefix: of the names of this layer in ``state``, ``"lstm."`` say; others are passed over.

    Raises:
        WeightsError: one is missing or has another shape; it is named.
    """
    own = {n[len(prefix) :]: a for n, a in state.items() if n.startswith(prefix)}
    found = {n: a for n, a in own.items() if _TORCH.fullmatch(n)}
    if "weight_ih_l0" not in found:
        others = sorted({n[: m.start()] for n in state if (m := re.search("weight_ih_l0$", n))})
        hint = f"; it is under prefix={others[0]!r}" if others else ""
        raise WeightsError(f"{prefix}weight_ih_l0 is missing{hint}")
    if projected := [name for name in found if "_hr_" in name]:
        raise WeightsError(f"{prefix}{projected[0]}: a projection has no counterpart here")
    numbers = {int(_TORCH.fullmatch(name)[3]) for name in found}  # type: ignore[index]
    ways = ("", "_reverse") if any(name.endswith("_reverse") for name in found) else ("",)
    weights: Weights = []
    features: int | None = None
    for number in range(max(numbers) + 1):
        both = [_from_pytorch(found, prefix, f"_l{number}{way}", features) for way in ways]
        features = len(ways) * both[0].recurrent.shape[0]
        entry = [_params(plain) for plain in both]
        weights.append((entry[0], entry[1]) if len(entry) == 2 else entry[0])
    return weights


def _from_pytorch(
    found: Mapping[str, object], prefix: str, suffix: str, features: int | None
) -> _Plain:
    def take(name: str, shape: Sequence[int | None]) -> np.ndarray:
        if name + suffix not in found:
            raise WeightsError(f"{prefix}{name}{suffix} is missing")
        return _shaped(f"{prefix}{name}{suffix}", found[name + suffix], shape)

    recurrent = take("weight_hh", (None, None))
    units = _units(f"{prefix}weight_hh{suffix}", recurrent, axis=0)
    rows = recurrent.shape[0]
    kernel = take("weight_ih", (rows, features))
    recurrent = take("weight_hh", (rows, units))
    biased = any(name + suffix in found for name in ("bias_ih", "bias_hh"))
    biases = [take(name, (rows,)) if biased else None for name in ("bias_ih", "bias_hh")]
    return _Plain(kernel.T, recurrent.T, *biases)


def to_pytorch(weights: Weights, prefix: str = "") -> dict[str, np.ndarray]:
    """What ``load_state_dict`` of a `torch.nn.LSTM` or `torch.nn.GRU` takes, as NumPy arrays.

    Args:
        weights: of layers of one kind, all in one or all in both directions.
        prefix: put before each name.

    Raises:
        WeightsError: the cell is neither LSTM nor GRU.

    Example:
        >>> layer = Recurrent(LSTM(5), 3, rngs=nnx.Rngs(0))
        >>> {name: a.shape for name, a in to_pytorch(weights_of(layer)).items()}["bias_hh_l0"]
        (20,)
    """
    state: dict[str, np.ndarray] = {}
    for number, entry in enumerate(weights):
        for params, way in zip(_ways(entry), ("", "_reverse"), strict=False):
            plain = _plain(params)
            suffix = f"_l{number}{way}"
            state[f"{prefix}weight_ih{suffix}"] = np.ascontiguousarray(plain.kernel.T)
            state[f"{prefix}weight_hh{suffix}"] = np.ascontiguousarray(plain.recurrent.T)
            if plain.bias is not None:
                second = plain.recurrent_bias
                state[f"{prefix}bias_ih{suffix}"] = plain.bias
                state[f"{prefix}bias_hh{suffix}"] = (
                    np.zeros_like(plain.bias) if second is None else second
                )
    return state


def _ways(entry: Entry) -> tuple[Params, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


# --- Keras ---------------------------------------------------------------------------------------

_KERAS_GRU = ("z", "r", "n")


def from_keras(
    arrays: Sequence[object], *, bidirectional: bool = False, use_bias: bool = True
) -> Weights:
    """Weights of Keras layers `LSTM` or `GRU`, as ``layer.get_weights()`` lists them.

    Those of several layers follow each other, as ``model.get_weights()`` has them. A GRU with
    ``reset_after=False`` becomes the weights of a `ResetFirstGRU`.

    Args:
        arrays: kernel, recurrent kernel and bias of each layer and direction.
        bidirectional: the layers are wrapped in `Bidirectional`.
        use_bias: False where they have none.

    Raises:
        WeightsError: one is missing or has another shape.
    """
    each = 3 if use_bias else 2
    per_layer = each * (2 if bidirectional else 1)
    if not arrays or len(arrays) % per_layer:
        raise WeightsError(
            f"{len(arrays)} arrays for layers of {per_layer} each: kernel, recurrent kernel"
            + (", bias" if use_bias else "")
            + (", of both directions" if bidirectional else "")
        )
    weights: Weights = []
    features: int | None = None
    for start in range(0, len(arrays), per_layer):
        starts = range(start, start + per_layer, each)
        entry = [_from_keras(arrays[s : s + each], s, features) for s in starts]
        features = len(entry) * entry[0]["recurrent_kernel"].shape[0]
        weights.append((entry[0], entry[1]) if bidirectional else entry[0])
    return weights


def _from_keras(arrays: Sequence[object], first: int, features: int | None) -> Params:
    whats = ("kernel", "recurrent kernel", "bias")
    names = [f"array {first + n} ({what})" for n, what in enumerate(whats)]
    recurrent = _shaped(names[1], arrays[1], (None, None))
    units = _units(names[1], recurrent, axis=1)
    columns = recurrent.shape[1]
    kernel = _shaped(names[0], arrays[0], (features, columns))
    bias = np.asarray(arrays[2]) if len(arrays) == 3 else None
    if columns == 4 * units:
        bias = None if bias is None else _shaped(names[2], bias, (columns,))
        return _params(_Plain(kernel, recurrent, bias))
    reset_first = bias is not None and bias.ndim == 1
    if bias is not None:
        bias = _shaped(names[2], bias, (columns,) if reset_first else (2, columns))
    gates = _GATES[3]
    kernel, recurrent = (_reordered(a, _KERAS_GRU, gates) for a in (kernel, recurrent))
    bias = None if bias is None else _reordered(bias, _KERAS_GRU, gates)
    if reset_first:
        r_and_z, candidate = np.split(recurrent, [2 * units], axis=1)
        found = {
            "kernel": kernel,
            "recurrent_kernel": r_and_z,
            "bias": bias,
            "step": {"candidate_kernel": candidate},
        }
        return cast(Params, found)
    biases = (None, None) if bias is None else (bias[0], bias[1])
    return _params(_Plain(kernel, recurrent, *biases))


def to_keras(weights: Weights) -> list[np.ndarray]:
    """What ``set_weights`` of Keras layers takes, one layer after the other.

    Weights of a `ResetFirstGRU` are for a `GRU` with ``reset_after=False``, all others for the
    layers as they come, or with ``use_bias=False``.

    Raises:
        WeightsError: the cell is none of these.

    Example:
        >>> layer = Recurrent(GRU(5), 3, rngs=nnx.Rngs(0))
        >>> [a.shape for a in to_keras(weights_of(layer))]
        [(3, 15), (5, 15), (2, 15)]
    """
    return [a for entry in weights for params in _ways(entry) for a in _to_keras(params)]


def _to_keras(params: Params) -> Iterator[np.ndarray]:
    gates, step = _GATES[3], params.get("step")
    if isinstance(step, Mapping) and set(step) == {"candidate_kernel"}:
        whole = np.concatenate([params["recurrent_kernel"], step["candidate_kernel"]], axis=1)
        arrays = [np.asarray(params["kernel"]), whole]
        arrays += [np.asarray(params["bias"])] if "bias" in params else []
        yield from (_reordered(a, gates, _KERAS_GRU) for a in arrays)
        return
    plain = _plain(params)
    arrays = [plain.kernel, plain.recurrent]
    if plain.bias is not None:
        second = plain.recurrent_bias
        arrays.append(plain.bias if second is None else np.stack([plain.bias, second]))
    if len(plain.gates) == 3:
        arrays = [_reordered(a, gates, _KERAS_GRU) for a in arrays]
    yield from arrays


class KerasLayer(NamedTuple):
    """A layer of a ``.keras`` file.

    Attributes:
        name: of the layer.
        kind: of its class, ``"LSTM"``.
        config: what Keras would make it from.
        arrays: its weights, as ``layer.get_weights()`` lists them.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    arrays: list[np.ndarray]


def read_keras(path: str | pathlib.Path) -> list[KerasLayer]:
    """The layers of a Sequential or functional model in a ``.keras`` file, in their order.

    Keras is not needed, ``h5py`` is. Nothing in the file is run.

    Raises:
        WeightsError: it cannot be read, or is no such file.
    """
    with _opened_keras(path) as (members, weights):
        try:
            layers = []
            for layer, group in _groups(members["config.json"]):
                arrays = [_dataset(weights, name) for name in _datasets(weights, group)]
                layers.append(
                    KerasLayer(
                        str(layer["config"].get("name", group)),
                        str(layer["class_name"]),
                        layer["config"],
                        arrays,
                    )
                )
            return layers
        except WeightsError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError) as error:
            raise WeightsError(f"{path} is no .keras model: {first_line(error)[:200]}") from error


def write_keras(
    path: str | pathlib.Path, model: str | pathlib.Path, arrays: Mapping[str, Sequence[object]]
) -> None:
    """A copy of a ``.keras`` file with other weights in it.

    Args:
        path: to be written; it may be ``model`` itself.
        model: file of a model of the same form, saved by Keras.
        arrays: weights by the name of the layer, as `to_keras` lists them.

    Raises:
        WeightsError: there is no such layer, or an array has another shape.
        OSError: it cannot be written.
    """
    with extra("interop"):
        import h5py

    known = {layer.name: layer for layer in read_keras(model)}
    with _opened_keras(model) as (members, weights):
        content = io.BytesIO(members["model.weights.h5"])
        placed = _groups(members["config.json"])
        groups = {layer["config"].get("name"): group for layer, group in placed}
        with h5py.File(content, "r+") as new:
            for name, given in arrays.items():
                if name not in known:
                    have = ", ".join(known)
                    raise WeightsError(f"no layer {name!r} in {model}; there are: {have}")
                places = _datasets(weights, groups[name])
                if len(places) != len(given):
                    raise WeightsError(f"{name} has {len(places)} arrays, {len(given)} are given")
                for place, array in zip(places, given, strict=True):
                    new[place][...] = _shaped(f"{name}: {place}", array, new[place].shape)
        members["model.weights.h5"] = content.getvalue()
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for member, data in members.items():
                archive.writestr(member, data)
    files.publish(pathlib.Path(path), packed.getvalue())


class _opened_keras:
    """The members of a ``.keras`` file, and its open HDF5 file."""

    def __init__(self, path: str | pathlib.Path) -> None:
        self._path = pathlib.Path(path)

    def __enter__(self) -> tuple[dict[str, bytes], Any]:
        with extra("interop"):
            import h5py
        try:
            content = files.read_bytes(self._path, MAX_BYTES)
            with zipfile.ZipFile(io.BytesIO(content)) as packed:
                wanted = ("metadata.json", "config.json", "model.weights.h5")
                inside = [packed.getinfo(name) for name in wanted]
                if sum(member.file_size for member in inside) > 100 * len(content):
                    raise ValueError("it announces more than it holds")
                members = {member.filename: packed.read(member) for member in inside}
            self._file = h5py.File(io.BytesIO(members["model.weights.h5"]), "r")
        except FileNotFoundError as error:
            raise WeightsError(f"there is no {self._path}") from error
        except Exception as error:  # whatever a damaged file makes the readers stumble over
            raise WeightsError(f"{self._path} is no .keras file: {first_line(error)}") from error
        return members, self._file

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _groups(model: bytes) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Each layer's config with its place in the HDF5 file: classes are numbered as they come."""
    config: Any = files.parse_json(model)
    seen: Counter[str] = Counter()
    for layer in config["config"]["layers"]:
        snake = _snake(layer["class_name"])
        number, seen[snake] = seen[snake], seen[snake] + 1
        yield layer, f"layers/{snake}_{number}" if number else f"layers/{snake}"


def _snake(name: str) -> str:
    """``MaxPooling1D`` to ``max_pooling1d``."""
    apart = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", apart).lower()


def _datasets(weights: Any, group: str) -> list[str]:
    """Names of the arrays of a layer, in the order of ``get_weights()``."""
    found = []
    for part in ("", "forward_layer/", "backward_layer/"):
        for inner in ("vars", "cell/vars"):
            place = f"{group}/{part}{inner}"
            if place in weights:
                found += [f"{place}/{n}" for n in sorted(weights[place], key=int)]
    return found


def _dataset(weights: Any, name: str) -> np.ndarray:
    """A plain array of the file; `WeightsError` for one that is elsewhere or larger than told."""
    import h5py

    parts = name.split("/")
    places = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    linked = not all(isinstance(weights.get(p, getlink=True), h5py.HardLink) for p in places)
    if linked or (found := weights[name]).external or found.is_virtual or found.chunks:
        raise WeightsError(f"{name} is not stored plainly")
    return np.asarray(found[()])


def classifier_from_keras(path: str | pathlib.Path) -> Classifier:
    """A `Classifier` with the weights of a Keras model of its form.

    That is: Embedding, then LSTM or GRU layers, each as it comes or in `Bidirectional`, of which
    the last gives its last output alone, then Dense; Dropout anywhere. Reviews padded in front are
    given without a mask, as Keras saw them; where the embedding has ``mask_zero``, with
    ``mask=ids != 0``.

    Raises:
        WeightsError: the model has another form; the layer is named.

    Example::

        model = interop.classifier_from_keras("notebook.keras")
        positive = jax.nn.sigmoid(model(ids))  # (B, 500), zeros in front
    """
    skipped = ("InputLayer", "Dropout", "SpatialDropout1D")
    layers = [layer for layer in read_keras(path) if layer.kind not in skipped]
    if len(layers) < 3 or layers[0].kind != "Embedding" or layers[-1].kind != "Dense":
        kinds = ", ".join(layer.kind for layer in layers)
        raise WeightsError(f"{path} is no Embedding, LSTM or GRU, Dense; it is: {kinds}")
    first, *middle, last = layers
    found = [_keras_cell(layer, top=layer is middle[-1]) for layer in middle]
    if len({(cell, both) for cell, both, _ in found}) > 1:
        raise WeightsError(f"{path} has recurrent layers of different kinds or sizes")
    cell, both, _ = found[0]
    table = _shaped(f"{first.name}: embeddings", first.arrays[0], (None, None))
    kernel = _shaped(f"{last.name}: kernel", last.arrays[0], (None, None))
    bias = last.arrays[1] if len(last.arrays) > 1 else np.zeros(kernel.shape[1], kernel.dtype)
    outputs = kernel.shape[1]
    activation = last.config.get("activation")
    if activation not in ("linear", "sigmoid" if outputs == 1 else "softmax"):
        raise WeightsError(f"{last.name} has {outputs} outputs and the activation {activation!r}")
    config = ClassifierConfig(
        top_words=table.shape[0],
        embedding_size=table.shape[1],
        hidden_size=cell.hidden_size,
        num_layers=len(middle),
        bidirectional=both,
    )
    model = Classifier(cell, config, num_outputs=outputs, rngs=nnx.Rngs(0))
    set_weights(model.recurrent, [entry for *_, entry in found])
    arrays: dict[str, Array | np.ndarray] = {
        **named_parameters(model),
        "embedding.embedding": jnp.asarray(table, jnp.float32),
        "head.kernel": jnp.asarray(kernel, jnp.float32),
        "head.bias": jnp.asarray(bias, jnp.float32),
    }
    try:
        set_parameters(model, arrays)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    return model


def _keras_cell(layer: KerasLayer, top: bool) -> tuple[Cell, bool, Entry]:
    """The cell, whether it runs in both directions, and its weights."""
    kind, config = layer.kind, layer.config
    both = kind == "Bidirectional"
    if both:
        inner = config["layer"]
        kind, config = inner["class_name"], inner["config"]
        if layer.config.get("merge_mode") != "concat":
            raise WeightsError(f"{layer.name} merges by {layer.config.get('merge_mode')!r}")
    if kind not in ("LSTM", "GRU"):
        raise WeightsError(f"{layer.name} is a {kind}; known are LSTM and GRU, Dropout between")
    wanted = {
        "activation": "tanh",
        "recurrent_activation": "sigmoid",
        "go_backwards": False,
        "return_sequences": not top,
    }
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise WeightsError(f"{layer.name} has {name}={config[name]!r}, known is {value!r}")
    use_bias = bool(config.get("use_bias", True))
    reset_first = kind == "GRU" and not config.get("reset_after", True)
    if reset_first and not use_bias:
        raise WeightsError(f"{layer.name} has reset_after=False and use_bias=False: not known")
    (entry,) = from_keras(layer.arrays, bidirectional=both, use_bias=use_bias)
    kinds: dict[str, type[Cell]] = {"LSTM": LSTM, "GRU": ResetFirstGRU if reset_first else GRU}
    return kinds[kind](int(config["units"]), use_bias=use_bias), both, entry


# --- Flax ----------------------------------------------------------------------------------------


def from_flax(params: PyTree) -> Weights:
    """Weights of Flax cells, `LSTMCell`, `OptimizedLSTMCell` or `GRUCell`, of linen or of NNX.

    Args:
        params: linen's parameters, or an NNX module or its state: of a cell, of an `RNN`, of a
            `Bidirectional`, of a `Sequential` of linen's, or a list of such, a layer each.

    Raises:
        WeightsError: one is missing or has another shape; it is named by its path.
    """
    if isinstance(params, nnx.Module):
        params = nnx.state(params, nnx.Param)
    if isinstance(params, nnx.State):
        params = nnx.to_pure_dict(params)
    return _from_flax(params, "")


def _from_flax(tree: PyTree, path: str) -> Weights:
    if isinstance(tree, list | tuple):
        return [e for n, one in enumerate(tree) for e in _from_flax(one, f"{path}[{n}]")]
    if isinstance(tree, nnx.Module | nnx.State):
        return from_flax(tree)
    if not isinstance(tree, Mapping):
        raise WeightsError(f"{path or 'params'} is a {type(tree).__name__}, no dict of weights")
    for outer in ("params", "cell"):
        if outer in tree:
            return _from_flax(tree[outer], f"{path}[{outer!r}]")
    if "forward_rnn" in tree or "backward_rnn" in tree:
        both = []
        for way in ("forward_rnn", "backward_rnn"):
            if way not in tree:
                raise WeightsError(f"{path}[{way!r}] is missing")
            both += _from_flax(tree[way], f"{path}[{way!r}]")
        return [(both[0], both[1])]  # type: ignore[list-item]
    numbered = sorted((n for n in tree if re.fullmatch(r"layers_\d+", str(n))), key=_number)
    if numbered:
        return [e for name in numbered for e in _from_flax(tree[name], f"{path}[{name!r}]")]
    return [_params(_from_fused(tree, path) if "dense_i" in tree else _from_gates(tree, path))]


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def _taken(tree: PyTree, path: str, *names: str) -> PyTree:
    for name in names:
        path = f"{path}[{name!r}]"
        if not isinstance(tree, Mapping) or name not in tree:
            raise WeightsError(f"{path} is missing")
        tree = tree[name]
    return tree


def _from_gates(tree: Mapping[str, PyTree], path: str) -> _Plain:
    """Linen's cells, and `nnx.LSTMCell`: a kernel a gate."""
    gates = _GATES[3] if "ir" in tree or "hr" in tree else _GATES[4]
    recurrent_names = [f"h{gate}" for gate in gates]
    input_names = ["if_" if gate == "f" and "if_" in tree else f"i{gate}" for gate in gates]
    units = np.shape(_taken(tree, path, recurrent_names[0], "kernel"))[0]

    def joined(names: Sequence[str], what: str, shape: Sequence[int | None]) -> np.ndarray:
        parts = [
            _shaped(f"{path}[{name!r}][{what!r}]", _taken(tree, path, name, what), shape)
            for name in names
        ]
        return np.concatenate(parts, axis=-1)

    features = np.shape(_taken(tree, path, input_names[0], "kernel"))[0]
    kernel = joined(input_names, "kernel", (features, units))
    recurrent = joined(recurrent_names, "kernel", (units, units))
    if len(gates) == 4:
        return _Plain(kernel, recurrent, joined(recurrent_names, "bias", (units,)))
    bias, last = joined(input_names, "bias", (units,)), joined(["hn"], "bias", (units,))
    return _Plain(kernel, recurrent, bias, np.concatenate([0 * bias[: 2 * units], last]))


def _from_fused(tree: Mapping[str, PyTree], path: str) -> _Plain:
    """`nnx.OptimizedLSTMCell`, with a bias of h, and `nnx.GRUCell`, with one of x."""
    recurrent_name = f"{path}['dense_h']['kernel']"
    recurrent = _shaped(recurrent_name, _taken(tree, path, "dense_h", "kernel"), (None, None))
    units = _units(recurrent_name, recurrent, axis=1)
    columns = recurrent.shape[1]
    kernel_name = f"{path}['dense_i']['kernel']"
    kernel = _shaped(kernel_name, _taken(tree, path, "dense_i", "kernel"), (None, columns))
    where = "dense_h" if columns == 4 * units else "dense_i"
    bias = _taken(tree, path, where, "bias")
    return _Plain(kernel, recurrent, _shaped(f"{path}[{where!r}]['bias']", bias, (columns,)))


def to_linen(weights: Weights) -> list[dict[str, PyTree]]:
    """Parameters of a linen `RNN`, or of a `Bidirectional` of two, a dict a layer.

    ``{"params": to_linen(weights)[0]}`` is what ``nn.RNN(nn.OptimizedLSTMCell(H)).apply`` takes.

    Raises:
        WeightsError: the cell is neither LSTM nor GRU, or has no bias.

    Example:
        >>> layer = Recurrent(LSTM(5), 3, rngs=nnx.Rngs(0))
        >>> to_linen(weights_of(layer))[0]["cell"]["hf"]["bias"].tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    return [_nested(entry, _to_gates, "") for entry in weights]


def to_nnx(weights: Weights, *, optimized: bool = True) -> list[dict[str, PyTree]]:
    """Parameters of an NNX `RNN`, or of a `Bidirectional` of two, a dict a layer.

    `nnx.replace_by_pure_dict` puts them into ``nnx.state(rnn, nnx.Param)``.

    Args:
        weights: of LSTM or GRU layers.
        optimized: for `nnx.OptimizedLSTMCell`; else for `nnx.LSTMCell`.

    Raises:
        WeightsError: the cell is neither LSTM nor GRU, has no bias, or is a GRU whose candidate
            has a recurrent bias, for which `nnx.GRUCell` has no place.

    Example:
        >>> layer = Recurrent(LSTM(5), 3, rngs=nnx.Rngs(0))
        >>> rnn = nnx.RNN(nnx.OptimizedLSTMCell(3, 5, rngs=nnx.Rngs(1)))
        >>> state = nnx.state(rnn, nnx.Param)
        >>> nnx.replace_by_pure_dict(state, to_nnx(weights_of(layer))[0])
        >>> nnx.update(rnn, state)
        >>> x = jnp.ones((2, 4, 3))
        >>> bool(jnp.allclose(rnn(x), layer(x)[0], atol=1e-5))
        True
    """
    return [_nested(entry, _to_fused if optimized else _to_gates, "_") for entry in weights]


def _nested(
    entry: Entry, convert: Callable[[_Plain, str], dict[str, PyTree]], underscore: str
) -> dict[str, PyTree]:
    found = [{"cell": convert(_with_bias(params), underscore)} for params in _ways(entry)]
    return dict(zip(("forward_rnn", "backward_rnn"), found, strict=True)) if found[1:] else found[0]


def _with_bias(params: Params) -> _Plain:
    plain = _plain(params)
    if plain.bias is None:
        raise WeightsError("Flax' cells have biases, these weights have none: give zeros")
    return plain


def _to_gates(plain: _Plain, underscore: str) -> dict[str, PyTree]:
    if underscore and len(plain.gates) == 3:  # `nnx.GRUCell` has but one form
        return _to_fused(plain, underscore)
    kernels, recurrents = _split(plain.kernel, plain.gates), _split(plain.recurrent, plain.gates)
    assert plain.bias is not None
    biases = _split(plain.bias, plain.gates)
    tree: dict[str, PyTree] = {}
    for gate in plain.gates:
        name = "if" + underscore if gate == "f" else f"i{gate}"
        tree[name] = {"kernel": kernels[gate]}
        tree[f"h{gate}"] = {"kernel": recurrents[gate]}
    if len(plain.gates) == 4:
        for gate, bias in biases.items():
            tree[f"h{gate}"]["bias"] = bias
        return tree
    seconds = _split(_second(plain), plain.gates)
    for gate, bias in biases.items():
        tree[f"i{gate}"]["bias"] = bias if gate == "n" else bias + seconds[gate]
    tree["hn"]["bias"] = seconds["n"]
    return tree


def _to_fused(plain: _Plain, _: str) -> dict[str, PyTree]:
    dense_i: dict[str, np.ndarray] = {"kernel": plain.kernel}
    dense_h: dict[str, np.ndarray | None] = {"kernel": plain.recurrent}
    if len(plain.gates) == 4:
        dense_h["bias"] = plain.bias
    else:
        second = _second(plain)
        if np.any(_split(second, plain.gates)["n"]):
            raise WeightsError("nnx.GRUCell has no place for recurrent_bias of the candidate n")
        dense_i["bias"] = plain.bias + second
    return {"dense_i": dense_i, "dense_h": dense_h}


def _second(plain: _Plain) -> np.ndarray:
    assert plain.bias is not None
    return np.zeros_like(plain.bias) if plain.recurrent_bias is None else plain.recurrent_bias


# --- Files ---------------------------------------------------------------------------------------


def read_safetensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a ``.safetensors`` file, by name.

    Raises:
        OSError: it cannot be read.
        WeightsError: it is no such file.
    """
    with extra("interop"):
        import safetensors
        import safetensors.numpy

    content = files.read_bytes(pathlib.Path(path), MAX_BYTES)
    try:
        return safetensors.numpy.load(content)
    except (safetensors.SafetensorError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(
            f"{path} is no .safetensors file that NumPy can hold: {first_line(error)[:200]}"
        ) from error


def write_safetensors(
    path: str | pathlib.Path,
    arrays: Mapping[str, object],
    publish: Callable[[pathlib.Path, bytes], None] = files.publish,
) -> None:
    """Write arrays by name to a ``.safetensors`` file, as a whole or not at all.

    Args:
        path: the file.
        arrays: by name.
        publish: what writes the file.

    Raises:
        OSError: it cannot be written.
    """
    with extra("interop"):
        import safetensors.numpy

    whole = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    publish(pathlib.Path(path), safetensors.numpy.save(whole))
