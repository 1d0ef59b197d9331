"""A trained model as a thing one uses: what a run folder keeps of it, loaded again.

Beside its checkpoints, which are for going on, a run folder holds what the model is::

    model.json            how to build it, and how texts come to it: `ModelConfig`
    params.safetensors    its parameters, by name
    vocabulary.txt        of texts its words, one a line, the first of them with id 4
    cell.py               the file of a user's cell
    tokenizer.py          the file of a user's tokenizer
    sums.json             SHA-256 of these, but for that of the cell: loading checks them

All but the Python files are data. Those are programs, and loading the run runs them, as training
did: load runs of people whose programs you would run.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypedDict, TypeVar

import jax
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32, PyTree
from numpy.typing import ArrayLike

from lstmjax import files
from lstmjax.cells import Cell, CellSpec, load_cell
from lstmjax.data.tokenizers import load_tokenizer
from lstmjax.data.vocabulary import FIRST_WORD, Vocabulary
from lstmjax.errors import StorageError, UserError, first_line, printable, reason
from lstmjax.interop import read_safetensors
from lstmjax.models import (
    Classifier,
    ClassifierConfig,
    SequenceConfig,
    SequenceModel,
    set_parameters,
)
from lstmjax.precision import Precision
from lstmjax.recurrence import Engine, length_mask
from lstmjax.training import sums
from lstmjax.training.repeat import filled
from lstmjax.training.report import CELL, PARAMS, RunFolder, as_dict

__all__ = [
    "ModelConfig",
    "SequenceModelConfig",
    "TrainedModel",
    "TrainedSequences",
    "load_run",
]

MODEL = "model.json"
VOCABULARY = "vocabulary.txt"
TOKENIZER = "tokenizer.py"
MAX_BYTES = 2**34
Text = str | bytes
"""A text; bytes are read as UTF-8, and what is none becomes U+FFFD."""
Answer = Callable[[np.ndarray, np.ndarray], np.ndarray]
_Padded = tuple[np.ndarray, np.ndarray, Int32[np.ndarray, " B"]]
_ROWS = 64  # a call


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """How to build a run's classifier again, and how texts come to it."""

    cell: str = "LSTM"
    """A built-in cell, or ``cell.py:MyCell``, with hyper-parameters, if any."""
    classifier: ClassifierConfig = dataclasses.field(default_factory=ClassifierConfig)
    """Sizes."""
    num_outputs: int = 1
    """Logits a text: 1, or one a class."""
    classes: tuple[str, ...] = ("negative", "positive")
    """What the labels 0, 1, ... are called; none: the answers are numbers."""
    precision: Precision = "float32"
    """Of the products."""
    max_length: int = 500
    """Ids kept of a text, the last ones."""
    padding: Literal["bucketed", "front"] = "bucketed"
    """bucketed: padded behind, and masked; front: zeros in front up to ``max_length``, seen."""
    data: str = ""
    """What it was trained on."""
    words: int = 0
    """In the vocabulary."""
    tokenizer: str = "keras"
    """How texts are split into words: keras, words, or ``tokenizer.py:function``."""


@dataclasses.dataclass(frozen=True)
class SequenceModelConfig:
    """How to build a run's model of sequences again."""

    cell: str = "LSTM"
    """A built-in cell, or ``cell.py:MyCell``, with hyper-parameters, if any."""
    sequence: SequenceConfig = dataclasses.field(default_factory=SequenceConfig)
    """Sizes."""
    tokens: int = 0
    """How many ids there are; 0: it sees features."""
    features: int = 1
    """Features of a step, if there are no ids."""
    per_step: bool = False
    """Answers at every step, or one a sequence."""
    num_outputs: int = 1
    """Outputs of an answer: 1, or one a class."""
    classes: tuple[str, ...] = ()
    """What the labels 0, 1, ... are called; none: the answers are numbers."""
    precision: Precision = "float32"
    """Of the products."""
    data: str = ""
    """What it was trained on."""


def describe_texts(run: RunFolder, config: ModelConfig, vocabulary: Vocabulary) -> None:
    """Write into a run's folder what `load_run` needs of texts beside the parameters.

    Raises:
        StorageError: it cannot be written.
    """
    words = vocabulary.words[: config.classifier.top_words - FIRST_WORD]
    path, _, function = config.tokenizer.rpartition(":")
    if path:
        run.write_bytes(TOKENIZER, pathlib.Path(path).read_bytes())
        config = dataclasses.replace(config, tokenizer=f"{TOKENIZER}:{function}")
    run.write_bytes(VOCABULARY, "\n".join(words).encode("utf-8", "surrogatepass"))
    describe(run, dataclasses.replace(config, words=len(words)))


def describe(run: RunFolder, config: ModelConfig | SequenceModelConfig) -> None:
    """Write into a run's folder how its model is built.

    Raises:
        StorageError: it cannot be written.
    """
    cell = CellSpec.parse(config.cell).within(CELL)
    described = as_dict(dataclasses.replace(config, cell=cell))
    run.write_bytes(MODEL, f"{json.dumps(described, indent=2)}\n".encode())


def load_run(folder: str | pathlib.Path) -> "TrainedModel | TrainedSequences":
    """The trained model of a run: of texts, or of sequences.

    Args:
        folder: the run folder, ``runs/<name>``. If it holds ``cell.py``, that is run.

    Raises:
        UserError: the folder holds no trained model, or one that is damaged.

    Example::

        import lstmjax
        model = lstmjax.load_run("runs/imdb-default-imdb-LSTM-seed0")
        print(model.predict(["I loved every minute of it.", "A waste of time."]))
    """
    path = pathlib.Path(folder)
    with sums.checked(path, (MODEL, PARAMS, VOCABULARY, TOKENIZER)):
        return _loaded(path)


def _loaded(path: pathlib.Path) -> "TrainedModel | TrainedSequences":
    found = _read(path / MODEL, lambda f: files.as_object(files.read_json(f)))
    if "sequence" not in found:
        return _texts(path, _read(path / MODEL, lambda _: filled(ModelConfig(), found)))
    config = _read(path / MODEL, lambda _: filled(SequenceModelConfig(), found))
    cell = _cell(path, config.cell, config.sequence.hidden_size)
    module = _with_parameters(path, config.sequence, lambda: build_sequences(config, cell))
    return TrainedSequences(path, config, module)


def of_texts(model: "TrainedModel | TrainedSequences") -> "TrainedModel":
    """The model, where nothing but a model of texts will do.

    Raises:
        UserError: it is a model of sequences.
    """
    if isinstance(model, TrainedModel):
        return model
    raise UserError(f"{model.path} holds a model of sequences; this is for models of texts")


def _texts(path: pathlib.Path, config: ModelConfig) -> "TrainedModel":
    words = _read(path / VOCABULARY, _words)
    if len(words) != config.words:
        raise UserError(
            f"{path / VOCABULARY} has {len(words)} words, but the run had {config.words}: put a "
            "copy of it back, or train again"
        )
    cell = _cell(path, config.cell, config.classifier.hidden_size)
    module = _with_parameters(path, config.classifier, lambda: build(config, cell))
    own, _, function = config.tokenizer.rpartition(":")
    if own not in ("", TOKENIZER):
        raise UserError(f"{path / MODEL} names a tokenizer in {own!r}, which is not in {path}")
    tokenizer = load_tokenizer(f"{path / TOKENIZER}:{function}" if own else function)
    return TrainedModel(path, config, module, Vocabulary(words, tokenizer))


def _cell(path: pathlib.Path, name: str, hidden_size: int) -> Cell:
    """The cell of a run: a built-in one, or that of the run's own file."""
    spec = CellSpec.parse(name)
    if spec.path not in ("", CELL):
        raise UserError(f"{path / MODEL} names the cell {name!r}, which is not in {path}")
    return load_cell(spec.within(str(path / CELL)), hidden_size)


ModuleT = TypeVar("ModuleT", bound=nnx.Module)


def _with_parameters(
    path: pathlib.Path, sizes: ClassifierConfig | SequenceConfig, make: Callable[[], ModuleT]
) -> ModuleT:
    """The module of a run, with the parameters of the run."""
    named = _read(path / PARAMS, read_safetensors)
    if sizes.num_layers > len(named):  # not worth building
        raise UserError(f"{path / MODEL} is damaged: its num_layers is {sizes.num_layers}")
    module = _read(path / MODEL, lambda _: make())
    _read(path / PARAMS, lambda _: set_parameters(module, named))
    return module


def build(config: ModelConfig, cell: Cell, engine: str | Engine | None = None) -> Classifier:
    """The classifier of texts, its parameters mere shapes.

    Raises:
        ValueError: settings that cannot be.
    """
    if not 0 < config.max_length <= 2**24:
        raise ValueError(f"its max_length is {config.max_length}")
    settings = _settings(config, engine)
    return nnx.eval_shape(lambda: Classifier(cell, config.classifier, **settings, rngs=nnx.Rngs(0)))


def build_sequences(config: SequenceModelConfig, cell: Cell) -> SequenceModel:
    """The model of sequences, its parameters mere shapes.

    Raises:
        ValueError: settings that cannot be.
    """
    for name in ("tokens", "features"):
        if not 0 <= getattr(config, name) <= 2**31:
            raise ValueError(f"its {name} is {getattr(config, name)}")
    sizes = {name: getattr(config, name) for name in ("tokens", "features", "per_step")}
    settings = _settings(config, None)
    return nnx.eval_shape(
        lambda: SequenceModel(cell, config.sequence, **sizes, **settings, rngs=nnx.Rngs(0))
    )


class _Settings(TypedDict):
    num_outputs: int
    precision: Precision
    engine: str | Engine | None


def _settings(config: ModelConfig | SequenceModelConfig, engine: str | Engine | None) -> _Settings:
    """What models of both kinds have, checked."""
    outputs, classes = config.num_outputs, len(config.classes)
    if classes not in (0, max(2, outputs)):
        raise ValueError(f"it has {outputs} outputs for {classes} classes")
    return {"num_outputs": outputs, "precision": config.precision, "engine": engine}


def _words(path: pathlib.Path) -> tuple[str, ...]:
    text = files.read_bytes(path, MAX_BYTES).decode("utf-8", "surrogatepass")
    return tuple(text.split("\n")) if text else ()


ReadT = TypeVar("ReadT")


def _read(path: pathlib.Path, read: Callable[[pathlib.Path], ReadT]) -> ReadT:
    """What ``read`` makes of a file of a run; one line says what is wrong with it."""
    try:
        return read(path)
    except FileNotFoundError as error:
        several = sorted(map(str, (p.parent for p in path.parent.glob(f"*/{PARAMS}"))))
        if several:
            raise UserError(
                f"{path.parent} holds several runs, name one of them: {', '.join(several[:8])}"
                f"{', ...' if len(several) > 8 else ''}"
            ) from error
        raise UserError(
            f"no trained model in {path.parent}: it has no {path.name}; name the folder of a run "
            "of which at least one epoch has ended"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {reason(error)}") from error
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise UserError(
            f"{path} does not fit or is damaged: {first_line(error)[:200]}; put a copy of it back, "
            "or train again"
        ) from error


def _what_it_says(self: "TrainedModel | TrainedSequences") -> str:
    config = self.config
    few = len(config.classes) <= 8
    answers = ", ".join(config.classes) or "numbers" if few else f"{len(config.classes)} classes"
    return printable(f"{type(self).__name__}({config.cell}, {config.data}, {answers})")


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model of texts with its vocabulary.

    Attributes:
        path: the run folder.
        config: how it is built.
        module: the Flax (NNX) module, its parameters those of the run.
        vocabulary: of the training texts.
    """

    path: pathlib.Path
    config: ModelConfig
    module: Classifier
    vocabulary: Vocabulary

    __repr__ = _what_it_says

    @property
    def masked(self) -> bool:
        """Whether the model is kept from seeing the padding."""
        return self.config.padding == "bucketed"

    def encode(self, text: Text) -> Int32[np.ndarray, " steps"]:
        """The ids that the model sees of a text: the start and at most ``max_length`` of them.

        >>> Vocabulary(("a", "film")).encode("A film!").tolist()
        [1, 4, 5]
        """
        found = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        config = self.config
        return self.vocabulary.encode(found, config.classifier.top_words, config.max_length)

    def predict(
        self, texts: Text | Iterable[Text]
    ) -> Float[np.ndarray, " N"] | Float[np.ndarray, "N K"]:
        """Probability of the second class (``"positive"``), ``(N,)``; of K classes, ``(N, K)``.

        Of a model of numbers, the numbers. The same for a text whatever others are with it, to
        rounding.

        Args:
            texts: any number of texts of any length; one alone is as good as a list of one.
        """
        listed = [texts] if isinstance(texts, str | bytes) else list(texts)
        return self.predict_ids([self.encode(text) for text in listed])

    def predict_ids(self, rows: Sequence[np.ndarray]) -> Float[np.ndarray, "N ..."]:
        """As `predict`, of ids, of which the last ``max_length`` count."""
        kept = [np.asarray(row, np.int32)[-self.config.max_length :] for row in rows]
        return _together(_in_order(len(kept), self.batches(kept), self._answer), self.config)

    def batches(self, rows: Sequence[np.ndarray]) -> Iterator[_Padded]:
        """Rows of similar length together, padded to few shapes, with their numbers and lengths.

        Both sizes are powers of two, up to 64 rows and ``max_length`` steps.
        """
        longest = self.config.max_length
        for chosen, ids, lengths in padded_rows(rows):
            if self.masked:
                yield chosen, ids[:, :longest], lengths
                continue
            whole = np.zeros((len(ids), longest), np.int32)
            for line, row, length in zip(whole, ids, lengths, strict=True):
                line[longest - length :] = row[:length]
            yield chosen, whole, lengths

    @functools.cached_property
    def _answer(self) -> Answer:
        masked = self.masked

        def answer(module: Classifier, ids: Array, lengths: Array) -> Array:
            mask = length_mask(lengths, ids.shape[1]) if masked else None
            return shares(module(ids, mask), self.config)

        return _compiled(self.module, answer)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedSequences:
    """A model of sequences.

    Attributes:
        path: the run folder.
        config: how it is built.
        module: the Flax (NNX) module, its parameters those of the run.
    """

    path: pathlib.Path
    config: SequenceModelConfig
    module: SequenceModel

    __repr__ = _what_it_says

    def predict(self, rows: Iterable[ArrayLike]) -> np.ndarray | list[np.ndarray]:
        """Probability of the second class, ``(N,)``; of K classes, ``(N, K)``; or the numbers.

        Of a model that answers at every step a list, an array ``(T,)`` or ``(T, K)`` a row. The
        same for a row whatever others are with it, to rounding.

        Args:
            rows: sequences of any length, each of features ``(T, D)``, with one feature or for ids
                ``(T,)``.

        Raises:
            ValueError: a row is of another shape, or holds an id that there is none of.
        """
        known = [self._checked(number, row) for number, row in enumerate(rows)]
        found = _in_order(len(known), padded_rows(known), self._answer)
        if self.config.per_step:
            return [answer[: len(row)] for answer, row in zip(found, known, strict=True)]
        return _together(found, self.config)

    def _checked(self, number: int, given: ArrayLike) -> np.ndarray:
        config, row = self.config, np.asarray(given)
        if not config.tokens and row.ndim == 1 and config.features == 1:
            row = row[:, None]
        of_a_step = () if config.tokens else (config.features,)
        if row.shape != (len(row) if row.ndim else 0, *of_a_step) or not len(row):
            wanted = "ids (T,)" if config.tokens else f"(T, {config.features})"
            raise ValueError(f"row {number} is {row.dtype}{[*row.shape]}; this model sees {wanted}")
        if not config.tokens:
            return row.astype(np.float32)
        if row.dtype.kind not in "iu" or row.min() < 0 or row.max() >= config.tokens:
            raise ValueError(f"row {number} must hold ids from 0 to {config.tokens - 1}")
        return row.astype(np.int32)

    @functools.cached_property
    def _answer(self) -> Answer:
        def answer(module: SequenceModel, x: Array, lengths: Array) -> Array:
            return shares(module(x, length_mask(lengths, x.shape[1])), self.config)

        return _compiled(self.module, answer)


def _compiled(module: nnx.Module, answer: Callable[[Any, Array, Array], Array]) -> Answer:
    graphdef, params = nnx.split(module, nnx.Param)

    @jax.jit
    def run(params: PyTree, x: Array, lengths: Array) -> Array:
        return answer(nnx.merge(graphdef, params), x, lengths)

    return lambda x, lengths: np.asarray(run(params, x, lengths))


def shares(
    outputs: Float[Array, "..."], config: ModelConfig | SequenceModelConfig
) -> Float[Array, "..."]:
    """What a model's outputs say: probability of the second class, or of each of K, or numbers.

    >>> shares(jax.numpy.zeros(2), ModelConfig()).tolist()
    [0.5, 0.5]
    """
    if not config.classes:
        return outputs
    return jax.nn.sigmoid(outputs) if config.num_outputs == 1 else jax.nn.softmax(outputs, axis=-1)


def padded_rows(rows: Sequence[np.ndarray]) -> Iterator[_Padded]:
    """Rows of similar length together, padded behind, with their numbers and lengths.

    Both sizes are powers of two, up to 64 rows, so that there are few shapes to compile.
    """
    order = np.argsort([len(row) for row in rows], kind="stable")
    for start in range(0, len(order), _ROWS):
        chosen = order[start : start + _ROWS]
        lengths = np.zeros(_power(len(chosen)), np.int32)
        lengths[: len(chosen)] = [len(rows[n]) for n in chosen]
        shape = (len(lengths), _power(max(16, int(lengths.max()))), *rows[chosen[0]].shape[1:])
        padded = np.zeros(shape, rows[chosen[0]].dtype)
        for line, n in zip(padded, chosen, strict=False):
            line[: len(rows[n])] = rows[n]
        yield chosen, padded, lengths


def _in_order(count: int, batches: Iterable[_Padded], answer: Answer) -> list[np.ndarray]:
    """The answers to ``count`` rows that come in batches, each in its place."""
    found = [np.zeros(())] * count
    for chosen, padded, lengths in batches:
        for n, one in zip(chosen, answer(padded, lengths), strict=False):
            found[n] = np.asarray(one)
    return found


def _together(
    found: Sequence[np.ndarray], config: ModelConfig | SequenceModelConfig
) -> Float[np.ndarray, "N ..."]:
    """Answers to rows as one array, also of none."""
    width = config.num_outputs
    return np.array(found, np.float32).reshape(len(found), *([width] if width > 1 else []))


def _power(size: int) -> int:
    """The first power of two that is not smaller."""
    return 1 << (size - 1).bit_length()


def read_texts(readline: Callable[[int], bytes], longest: int = 2**26) -> Iterator[bytes]:
    """One text a line; an empty line is an empty text.

    Args:
        readline: that of a file: the next line, but at most so many bytes of it.
        longest: bytes of a line.

    Raises:
        UserError: a line is longer than ``longest`` bytes.
    """
    lines = iter(lambda: readline(longest + 1), b"")
    for number, line in enumerate(lines, 1):
        if len(line) > longest:
            raise UserError(f"line {number} has more than {longest:,} bytes: split it")
        yield line.rstrip(b"\r\n")
