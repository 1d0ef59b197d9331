"""A trained model as a thing one uses: what a run folder keeps of it, loaded again.

Beside its checkpoints, which are for going on, a run folder holds what the model is::

    model.json            how to build it, and how texts come to it: `ModelConfig`
    params.safetensors    its parameters, by name
    vocabulary.txt        its words, one a line, the first of them with id 4
    cell.py               the file of a user's cell
    tokenizer.py          the file of a user's tokenizer

All but the last two are data. Those are programs, and loading the run runs them, as training did:
load runs of people whose programs you would run.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

import jax
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int, Int32, PyTree

from lstmjax import files
from lstmjax.cells import Cell, CellSpec, load_cell
from lstmjax.data.tokenizers import load_tokenizer
from lstmjax.data.vocabulary import FIRST_WORD, Vocabulary
from lstmjax.errors import StorageError, UserError, first_line, reason
from lstmjax.interop import read_safetensors
from lstmjax.models import Classifier, ClassifierConfig, set_parameters
from lstmjax.precision import Precision
from lstmjax.recurrence import Engine, length_mask
from lstmjax.training.repeat import filled
from lstmjax.training.report import CELL, PARAMS, RunFolder, as_dict

__all__ = [
    "ModelConfig",
    "TrainedModel",
    "load_run",
]

MODEL = "model.json"
VOCABULARY = "vocabulary.txt"
TOKENIZER = "tokenizer.py"
MAX_BYTES = 2**34
Text = str | bytes
"""A text; bytes are read as UTF-8, and what is none becomes U+FFFD."""
_ROWS = 64  # texts a call


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
    """What the labels 0, 1, ... are called."""
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


def describe(run: RunFolder, config: ModelConfig, vocabulary: Vocabulary) -> None:
    """Write into a run's folder what `load_run` needs beside the parameters.

    Raises:
        StorageError: it cannot be written.
    """
    words = vocabulary.words[: config.classifier.top_words - FIRST_WORD]
    cell = CellSpec.parse(config.cell).within(CELL)
    path, _, function = config.tokenizer.rpartition(":")
    if path:
        run.write_bytes(TOKENIZER, pathlib.Path(path).read_bytes())
        config = dataclasses.replace(config, tokenizer=f"{TOKENIZER}:{function}")
    run.write_bytes(VOCABULARY, "\n".join(words).encode("utf-8", "surrogatepass"))
    run.write(MODEL, as_dict(dataclasses.replace(config, cell=cell, words=len(words))))


def load_run(folder: str | pathlib.Path) -> "TrainedModel":
    """The trained model of a run.

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
    config = _read(
        path / MODEL, lambda f: filled(ModelConfig(), files.as_object(files.read_json(f)), path)
    )
    spec = CellSpec.parse(config.cell)
    if spec.path not in ("", CELL):
        raise UserError(f"{path / MODEL} names the cell {config.cell!r}, which is not in {path}")
    words = _read(path / VOCABULARY, _words)
    if len(words) != config.words:
        raise UserError(
            f"{path / VOCABULARY} has {len(words)} words, but the run had {config.words}: put a "
            "copy of it back, or train again"
        )
    cell = load_cell(spec.within(str(path / CELL)), config.classifier.hidden_size)
    module = _read(path / MODEL, lambda _: build(config, cell))
    named = _read(path / PARAMS, read_safetensors)
    _read(path / PARAMS, lambda _: set_parameters(module, named))
    own, _, function = config.tokenizer.rpartition(":")
    if own not in ("", TOKENIZER):
        raise UserError(f"{path / MODEL} names a tokenizer in {own!r}, which is not in {path}")
    tokenizer = load_tokenizer(f"{path / TOKENIZER}:{function}" if own else function)
    return TrainedModel(path, config, module, Vocabulary(words, tokenizer))


def build(config: ModelConfig, cell: Cell, engine: str | Engine | None = None) -> Classifier:
    """The classifier, its parameters mere shapes.

    Raises:
        ValueError: settings that cannot be.
    """
    known = {"padding": ("bucketed", "front"), "precision": ("float32", "bfloat16")}
    for name, values in known.items():
        if getattr(config, name) not in values:
            raise ValueError(f"its {name} is {getattr(config, name)!r}")
    if not 0 < config.max_length <= 2**24:
        raise ValueError(f"its max_length is {config.max_length}")
    if len(config.classes) != max(2, config.num_outputs):
        raise ValueError(f"it has {config.num_outputs} outputs for {len(config.classes)} classes")

    def make() -> Classifier:
        return Classifier(
            cell,
            config.classifier,
            num_outputs=config.num_outputs,
            precision=config.precision,
            engine=engine,
            rngs=nnx.Rngs(0),
        )

    return nnx.eval_shape(make)


def _words(path: pathlib.Path) -> tuple[str, ...]:
    text = files.read_bytes(path, MAX_BYTES).decode("utf-8", "surrogatepass")
    return tuple(text.split("\n")) if text else ()


ReadT = TypeVar("ReadT")


def _read(path: pathlib.Path, read: Callable[[pathlib.Path], ReadT]) -> ReadT:
    """What ``read`` makes of a file of a run; one line says what is wrong with it."""
    try:
        return read(path)
    except FileNotFoundError as error:
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


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
    """A classifier of texts with its vocabulary.

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

    def __repr__(self) -> str:
        config = self.config
        return f"TrainedModel({config.cell}, {config.data}, {', '.join(config.classes)})"

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

        The same for a text whatever others are with it, to rounding.

        Args:
            texts: any number of texts of any length; one alone is as good as a list of one.
        """
        listed = [texts] if isinstance(texts, str | bytes) else list(texts)
        return self.predict_ids([self.encode(text) for text in listed])

    def predict_ids(self, rows: Sequence[np.ndarray]) -> Float[np.ndarray, "N ..."]:
        """As `predict`, of ids, of which the last ``max_length`` count."""
        width = self.config.num_outputs
        found = np.zeros((len(rows), width) if width > 1 else len(rows), np.float32)
        kept = [np.asarray(row, np.int32)[-self.config.max_length :] for row in rows]
        for order, ids, lengths in self.batches(kept):
            found[order] = np.asarray(self._compiled(ids, lengths))[: len(order)]
        return found

    def batches(
        self, rows: Sequence[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, Int32[np.ndarray, "B T"], Int32[np.ndarray, " B"]]]:
        """Rows of similar length together, padded to few shapes, with their numbers and lengths.

        Both sizes are powers of two, up to 64 rows and ``max_length`` steps.
        """
        longest = self.config.max_length
        order = np.argsort([len(row) for row in rows], kind="stable")
        for start in range(0, len(order), _ROWS):
            chosen = order[start : start + _ROWS]
            lengths = [len(rows[n]) for n in chosen]
            steps = min(_power(max(16, *lengths)), longest) if self.masked else longest
            ids = np.zeros((_power(len(chosen)), steps), np.int32)
            for line, n in zip(ids, chosen, strict=False):
                line[slice(len(rows[n])) if self.masked else slice(steps - len(rows[n]), None)] = (
                    rows[n]
                )
            lengths += [0] * (len(ids) - len(chosen))
            yield chosen, ids, np.array(lengths, np.int32)

    @functools.cached_property
    def _compiled(self) -> Callable[[np.ndarray, np.ndarray], Array]:
        graphdef, params = nnx.split(self.module, nnx.Param)
        masked = self.masked

        @jax.jit
        def run(params: PyTree, ids: Array, lengths: Array) -> Array:
            return probabilities(nnx.merge(graphdef, params), ids, lengths if masked else None)

        return lambda ids, lengths: run(params, ids, lengths)


def probabilities(
    module: Classifier, ids: Int[Array, "B T"], lengths: Int[Array, " B"] | None
) -> Float[Array, "..."]:
    """Probability of the second class, ``(B,)``, or of each, ``(B, K)``.

    Args:
        module: the classifier.
        ids: padded behind.
        lengths: of the rows; None shows the padding to the model.
    """
    mask = None if lengths is None else length_mask(lengths, ids.shape[1])
    logits = module(ids, mask)
    return jax.nn.sigmoid(logits) if logits.ndim == 1 else jax.nn.softmax(logits, axis=-1)


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
