"""A trained model as programs for any device, which run without this library: `jax.export`.

What `save_exported` writes to a folder::

    classify.jax      (ids (B, T), lengths (B,)) -> probabilities; without lengths where the model
                      was trained with zeros in front
    start.jax         ids (B,) -> carry, a tuple of arrays; of the ids only their number counts
    step.jax          (carry, ids (B,)) -> (carry, probabilities after so many words)
    vocabulary.txt    words, one a line, the first of them with id 4
    signature.json    shapes, platforms, classes, and how ids are made

The parameters are part of the programs, which are data: `jax.export.deserialize` runs nothing.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.export import Exported
from jaxtyping import Int, PyTree

from lstmjax import files
from lstmjax.data.vocabulary import FIRST_WORD, START, UNKNOWN
from lstmjax.errors import StorageError, UserError, extra, first_line, reason
from lstmjax.layers import Recurrent
from lstmjax.models import Classifier
from lstmjax.recurrence import length_mask
from lstmjax.trained import VOCABULARY, TrainedModel, TrainedSequences, build, of_texts, shares

__all__ = [
    "PLATFORMS",
    "Program",
    "export_classifier",
    "export_stream",
    "save_exported",
]

PLATFORMS = ("cpu", "cuda", "tpu")
"""What a program can be exported for; all of them by default."""


class Program(NamedTuple):
    """An exported function.

    Attributes:
        exported: what `jax.export` made.
        shapes: of its inputs, ``"(b, t)"``, names for sizes that are open.
    """

    exported: Exported
    shapes: str


def export_classifier(
    model: TrainedModel | TrainedSequences, platforms: Sequence[str] = PLATFORMS
) -> Program:
    """The classifier of whole texts, for any number of texts of any length.

    Where a cell needs to know how many rows there are, there is one.

    Args:
        model: what `lstmjax.load_run` gave, of texts.
        platforms: devices, by JAX's names.

    Raises:
        UserError: it cannot be exported for these platforms.
    """
    model = of_texts(model)
    module, masked = _portable(model), model.masked

    def classify(ids: Array, *lengths: Array) -> Array:
        mask = length_mask(lengths[0], ids.shape[1]) if lengths else None
        return shares(module(ids, mask), model.config)

    def wanted(dims: str) -> list[PyTree]:
        b, t = jax.export.symbolic_shape(dims)
        shapes = [jax.ShapeDtypeStruct((b, t), jnp.int32), jax.ShapeDtypeStruct((b,), jnp.int32)]
        return shapes if masked else shapes[:1]

    return _exported(classify, ("b, t", "1, t"), wanted, platforms)


def export_stream(
    model: TrainedModel | TrainedSequences, platforms: Sequence[str] = PLATFORMS
) -> tuple[Program, Program]:
    """The model word by word: what makes the first carry, and the step.

    After each word the probabilities are those of the text so far.

    Args:
        model: what `lstmjax.load_run` gave, of texts.
        platforms: devices, by JAX's names.

    Raises:
        UserError: the model needs more than the words so far, or it cannot be exported.
    """
    model = of_texts(model)
    module = _portable(model)
    if problem := _no_stream(model):
        raise UserError(f"{model.path} cannot go word by word: {problem}")
    treedef = jax.tree.structure(_first(module, jnp.zeros((1,), jnp.int32)))

    def begin(ids: Array) -> tuple[Array, ...]:
        return tuple(jax.tree.leaves(_first(module, ids)))

    def step(carry: tuple[Array, ...], ids: Array) -> tuple[tuple[Array, ...], Array]:
        after, logits = _next(module, jax.tree.unflatten(treedef, carry), ids)
        return tuple(jax.tree.leaves(after)), shares(logits, model.config)

    def of_begin(dims: str) -> list[PyTree]:
        return [jax.ShapeDtypeStruct(jax.export.symbolic_shape(dims), jnp.int32)]

    def of_step(dims: str) -> list[PyTree]:
        ids = of_begin(dims)
        return [jax.eval_shape(begin, *ids), *ids]

    return (
        _exported(begin, ("b", "1"), of_begin, platforms),
        _exported(step, ("b", "1"), of_step, platforms),
    )


def save_exported(
    model: TrainedModel | TrainedSequences,
    folder: str | pathlib.Path,
    platforms: Sequence[str] = PLATFORMS,
) -> dict[str, Any]:
    """Write the programs of a model, and what one needs to call them, to a folder.

    Args:
        model: what `lstmjax.load_run` gave, of texts.
        folder: made if it is missing; files of the same names in it are replaced.
        platforms: devices, by JAX's names.

    Returns:
        The content of ``signature.json``.

    Raises:
        UserError: it cannot be exported.
        StorageError: it cannot be written.
    """
    with extra("train"):
        import flatbuffers  # noqa: F401  # JAX writes with it

    model = of_texts(model)
    path, config = pathlib.Path(folder), model.config
    programs = {"classify": export_classifier(model, platforms)}
    no_stream = _no_stream(model)
    if no_stream is None:
        programs["start"], programs["step"] = export_stream(model, platforms)
    signature = {
        "platforms": [*platforms],
        "jax": jax.__version__,
        "shapes": {name: f"({program.shapes})" for name, program in programs.items()},
        "stream": no_stream or True,
        "classes": [*config.classes],
        "probabilities": (
            ("of the second class" if config.num_outputs == 1 else "of each class")
            if config.classes
            else "none: numbers"
        ),
        "max_length": config.max_length,
        "padding": "zeros behind; lengths tell" if model.masked else "zeros in front",
        "tokenizer": config.tokenizer.rpartition(":")[2],
        "ids": {"start": START, "unknown": UNKNOWN, "first_word": FIRST_WORD},
        "trained_on": config.data,
    }
    try:
        files.make_folder(path)
        for name, program in programs.items():
            files.publish(path / f"{name}.jax", bytes(program.exported.serialize()))
        words = "\n".join(model.vocabulary.words)
        files.publish(path / VOCABULARY, words.encode("utf-8", "surrogatepass"))
        files.publish(path / "signature.json", (json.dumps(signature, indent=2) + "\n").encode())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {reason(error)}") from error
    return signature


def _portable(model: TrainedModel) -> Classifier:
    """The model on the plain scan, the engine that is the same everywhere and for open sizes."""
    module = build(model.config, _layers(model.module)[0].cell, "scan")
    nnx.update(module, nnx.state(model.module, nnx.Param))
    return module


def _layers(module: Classifier) -> list[Recurrent]:
    """The layers, of both directions each as one."""
    nested = [getattr(layer, "forward", layer) for layer in module.recurrent.layers]
    return [layer for layer in nested if isinstance(layer, Recurrent)]


def _exported(
    function: Callable[..., PyTree],
    dims: Sequence[str],
    shapes_of: Callable[[str], list[PyTree]],
    platforms: Sequence[str],
) -> Program:
    """The function for the first of the shapes that it can be exported for."""
    for platform in platforms:
        if platform not in PLATFORMS:
            raise UserError(f"no platform {platform!r}; there are: {', '.join(PLATFORMS)}")
    problem: Exception | None = None
    for said in dims:
        try:
            make = jax.export.export(jax.jit(function), platforms=tuple(platforms))
            return Program(make(*shapes_of(said)), said)
        except Exception as error:  # whatever a user's step makes of a size that is open
            problem = problem or error
    assert problem is not None
    raise UserError(
        f"cannot export for {', '.join(platforms)}: {type(problem).__name__}: "
        f"{first_line(problem)[:300]}"
    ) from problem


# --- Word by word --------------------------------------------------------------------------------


class _Carry(NamedTuple):
    """What passes from word to word.

    Attributes:
        layers: a `lstmjax.cells.Carry` a layer.
        words: so far, ``(B,)``.
        total, top: sum and maximum of the top layer's outputs so far, ``(B, F)``.
    """

    layers: PyTree
    words: Array
    total: Array
    top: Array


def _no_stream(model: TrainedModel) -> str | None:
    """Why a model needs more than the words so far; None: it does not."""
    config = model.config.classifier
    if config.bidirectional:
        return "it reads from the end, too (bidirectional)"
    if config.conv_filters:
        return "its convolution sees words to come"
    if not model.masked:
        return "it was trained with zeros in front, whose number is that of the words to come"
    return None


def _first(module: Classifier, ids: Int[Array, " B"]) -> _Carry:
    rows = ids.shape[0]
    layers = [layer.initial_carry(rows) for layer in _layers(module)]
    h = layers[-1].h
    low = jnp.full_like(h, jnp.finfo(h.dtype).min)
    return _Carry(layers, jnp.zeros((rows,), h.dtype), jnp.zeros_like(h), low)


def _next(module: Classifier, carry: _Carry, ids: Int[Array, " B"]) -> tuple[_Carry, Array]:
    """The carry after one word more, and the logits."""
    x = module.embedding(ids)
    layers = []
    for layer, before in zip(_layers(module), carry.layers, strict=True):
        after = layer.cell(layer.arrays(), x, before, precision=layer.precision)
        layers.append(after)
        x = after.h
    words, total = carry.words + 1, carry.total + x
    top = jnp.maximum(carry.top, x)
    pooled = {"last": x, "mean": total / words[:, None], "max": top}
    kinds = module.config.pooling
    logits = module.head(jnp.concatenate([pooled[kind] for kind in kinds], axis=-1))
    logits = logits[:, 0] if module.num_outputs == 1 else logits
    return _Carry(layers, words, total, top), logits
