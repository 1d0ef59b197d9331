"""Texts with labels: IMDB, the demo corpus, and a user's own CSV or JSONL file."""

import csv
import dataclasses
import functools
import io
import math
import pathlib
import sys
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from flax import nnx

from lstmjax import files
from lstmjax.cells.base import Cell
from lstmjax.data.batches import Batches, Source, bucket_boundaries, hold_out
from lstmjax.data.demo import load_demo
from lstmjax.data.imdb import load_imdb
from lstmjax.data.tokenizers import load_tokenizer
from lstmjax.data.vocabulary import (
    FIRST_WORD,
    UNKNOWN,
    Dataset,
    Vocabulary,
    check_limits,
)
from lstmjax.errors import UserError, extra, first_line, reason
from lstmjax.files import Json
from lstmjax.models import Classifier, ClassifierConfig
from lstmjax.tasks.base import Divided, Recipe, Split, read_once
from lstmjax.tasks.metric import ACCURACY, MEAN_SQUARED_ERROR, Metric
from lstmjax.tasks.rows import describe, split_rows
from lstmjax.training.objective import CrossEntropy, Objective, SquaredError
from lstmjax.training.step import OptimizerConfig

with extra("train"):
    import tyro

MAX_BYTES = 2**31
LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class TextConfig(ClassifierConfig):
    """Sizes of the classifier of a text task, which has ``top_words`` itself."""

    top_words: Annotated[int, tyro.conf.Suppress] = 0
    pooling: tuple[Literal["last", "mean", "max"], ...] = ("max", "mean")
    """What the head sees: the last state, or mean/max over valid steps, side by side."""


@dataclasses.dataclass(frozen=True)
class Text(Divided):
    """Texts as ids of words, with a label each."""

    top_words: int = 20_000
    """Ids below this have an embedding of their own; the rest is one unknown word."""
    max_length: int = 500
    """Ids kept of a text, the last ones."""
    buckets: int = 10
    """Most lengths that batches may have; each is compiled once."""
    validation_share: float = 0.1
    """Share of the training texts that settings are chosen by."""
    embeddings: pathlib.Path | None = None
    """Pretrained vectors of words, a text file: a word and its numbers a line, as GloVe has it."""
    freeze_embeddings: bool = False
    """Do not train the vectors of words."""

    masked: ClassVar[bool] = True

    def parts(self) -> dict[Split, Dataset]:
        """Ids and labels of each part; the vocabulary is made of the training part alone."""
        raise NotImplementedError

    @property
    def recipe(self) -> Recipe:
        """The default recipe of experiments/imdb.py."""
        sizes = TextConfig(
            embedding_size=64,
            conv_filters=128,
            dropout_words=0.4,
            dropout_before=0.5,
            dropout_after=0.5,
        )
        return Recipe(epochs=3, model=sizes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers; none: labels are numbers."""
        return ("negative", "positive")

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0: labels are numbers."""
        return len(self.class_names)

    @property
    def num_outputs(self) -> int:
        """One a class; 1 for two classes, and for numbers."""
        return 1 if self.num_classes <= 2 else self.num_classes

    @property
    def chance(self) -> float:
        """The most frequent class, or the variance of the numbers, of the test part."""
        labels = np.asarray(_parts(self)["test"].labels)
        if labels.dtype.kind == "f":
            return float(labels.var())
        return float(np.bincount(labels).max() / len(labels))

    @property
    def frozen(self) -> tuple[str, ...]:
        """The vectors of words, if asked for."""
        if self.freeze_embeddings and self.embeddings is None:
            raise UserError(
                "--freeze-embeddings without --embeddings leaves random vectors: give both, or none"
            )
        return ("embedding",) if self.freeze_embeddings else ()

    def pretrained(self, model: Any) -> None:
        """Set the vectors of the words that the file has."""
        if self.embeddings is None:
            return
        table = model.embedding.embedding
        ids, vectors = _vectors(self, table.shape[-1])
        table[...] = table[...].at[..., ids, :].set(vectors)

    def facts(self) -> Mapping[str, Json]:
        """Rows, lengths and classes of each part; how many words have pretrained vectors."""
        facts: dict[str, Json] = {
            name: describe([len(row) for row in part.sequences], np.asarray(part.labels))
            for name, part in _parts(self).items()
        }
        words = min(len(self.vocabulary), self.top_words - FIRST_WORD)
        known = f"{words:,} of {len(self.vocabulary):,}"
        if self.embeddings is not None:
            known += f", {len(_vectors(self)[0]):,} of them with pretrained vectors"
        return facts | {"words": known}

    @property
    def tokenizer_name(self) -> str:
        """How texts are split into words, as `lstmjax.data.tokenizers` names it."""
        return "keras"

    @property
    def vocabulary(self) -> Vocabulary:
        """The words of the training part."""
        return _parts(self)["train"].vocabulary

    def sizes_of(self, config: TextConfig) -> ClassifierConfig:
        """The sizes of a classifier for this task."""
        own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return ClassifierConfig(**{**own, "top_words": self.top_words})

    def make_model(self, cell: Cell, config: TextConfig, **settings: Any) -> nnx.Module:
        """A classifier."""
        return Classifier(cell, self.sizes_of(config), num_outputs=self.num_outputs, **settings)

    def part(self, split: Split, batch_size: int) -> Source:
        """Batches of similar length."""
        parts = _parts(self)
        lengths = [len(row) for row in parts["train"].sequences]
        boundaries = bucket_boundaries(np.minimum(lengths, self.max_length), count=self.buckets)
        if split != "train":  # a few steps more of padding cost less than compiling every length
            boundaries = boundaries[::-2][::-1]
        classes = self.num_classes or None
        return Batches(parts[split], batch_size, boundaries=boundaries, num_classes=classes)


@read_once
def _vectors(task: Text, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Ids and vectors of the words that both the vocabulary and the file have."""
    assert task.embeddings is not None
    vocabulary = task.vocabulary
    ids, vectors = [], []
    try:
        with task.embeddings.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                word, _, rest = line.rstrip().partition(" ")
                place = vocabulary.id(word)
                if place == UNKNOWN or place >= task.top_words:
                    continue
                vector = np.array(rest.split(" "), np.float32)
                if len(vector) != (size or len(vector)) or not np.isfinite(vector).all():
                    raise UserError(
                        f"{task.embeddings}: line {number} has {len(vector)} numbers for {word!r}: "
                        f"the file needs --embedding-size finite ones, here {size}"
                    )
                ids.append(place)
                vectors.append(vector)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read {task.embeddings}: {first_line(error)}") from error
    if not ids:
        raise UserError(f"{task.embeddings} has none of the words of the training texts")
    return np.array(ids), np.stack(vectors)


@read_once
def _parts(task: Text) -> dict[Split, Dataset]:
    check_limits(task.top_words, task.max_length)
    return task.parts()


@dataclasses.dataclass(frozen=True)
class Imdb(Text):
    """Is a film review positive or negative?

    Maas et al.'s 25,000 training reviews, a share of them held out for validation, and 25,000 test
    reviews, read by TFDS.

    Example:
        >>> Imdb(top_words=5000).metric.name
        'accuracy'
    """

    data_dir: pathlib.Path | None = None
    """TFDS folder to read, or to prepare into; without it TFDS_DATA_DIR, else TFDS' own."""
    archive: pathlib.Path | None = None
    """Local aclImdb tar.gz to prepare from instead of downloading."""

    source: ClassVar[str] = "Maas et al. 2011"
    reported: ClassVar[str] = "500 words of the 5,000 to 30,000 most frequent, 100 to 512 units"

    def parts(self) -> dict[Split, Dataset]:
        """The reviews."""
        load = functools.partial(
            load_imdb,
            top_words=self.top_words,
            max_length=self.max_length,
            data_dir=self.data_dir,
            archive=self.archive,
        )
        train, test = load("train"), load("test")
        train, validation = hold_out(train, self.validation_share)
        return {"train": train, "validation": validation, "test": test}


@dataclasses.dataclass(frozen=True)
class Demo(Text):
    """Does a made-up report of a journey by night train say good or bad of it? (Not IMDB.)

    Example:
        >>> next(Demo(size=100).train(8).epoch(0, 0)).labels.shape
        (8,)
    """

    top_words: int = 1000
    """Ids below this have an embedding of their own; the rest is one unknown word."""
    size: int = 8000
    """Reports to train on, those held out for validation included."""

    source: ClassVar[str] = "made up by this project: lstmjax.data.load_demo"
    reported: ClassVar[str] = "8,000 reports of about 120 words"

    @property
    def recipe(self) -> Recipe:
        """Small."""
        sizes = TextConfig(embedding_size=32, hidden_size=32, dropout_before=0.2, dropout_after=0.2)
        rate = OptimizerConfig(learning_rate=1e-2, schedule="one-cycle", clip_norm=1.0)
        return Recipe(epochs=3, model=sizes, optimizer=rate)

    def parts(self) -> dict[Split, Dataset]:
        """The reports."""
        limits = {"top_words": self.top_words, "max_length": self.max_length}
        train, validation = hold_out(
            load_demo("train", size=self.size, **limits), self.validation_share
        )
        return {"train": train, "validation": validation, "test": load_demo("test", **limits)}


@dataclasses.dataclass(frozen=True)
class TextFile(Text):
    """Your own texts and labels, from a CSV or JSONL file in UTF-8.

    Identical texts stay in one part. Labels that are all numbers, not all of them whole, or more
    than 20 different ones, are predicted as numbers; else they are classes, in the order of their
    names.
    """

    file: pathlib.Path = pathlib.Path("texts.csv")
    """A ``.csv`` or ``.tsv`` file with a line of column names, or ``.jsonl``, an object a line."""
    text_column: str = "text"
    """Column of the texts."""
    label_column: str = "label"
    """Column of the labels."""
    labels: Literal["auto", "classes", "numbers"] = "auto"
    """What the labels are."""
    tokenizer: str = "words"
    """words: of any language that separates them; keras: as IMDB's are; or a function of your own,
    path/to/file.py:function, from a text to a list of words."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: errors of a class weigh as much as it is rare in the training part."""
    test_share: float = 0.2
    """Share of the texts to test on."""

    source: ClassVar[str] = "your own file"

    @property
    def recipe(self) -> Recipe:
        """Small, some epochs."""
        sizes = TextConfig(embedding_size=64, hidden_size=64, dropout_before=0.3, dropout_after=0.3)
        return Recipe(epochs=5, batch_size=32, model=sizes)

    @property
    def metric(self) -> Metric:  # type: ignore[override]
        """Accuracy, or the mean squared error."""
        return ACCURACY if self.num_classes else MEAN_SQUARED_ERROR

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers; none: labels are numbers."""
        return _table(self).classes

    @property
    def tokenizer_name(self) -> str:
        """As the user says."""
        return self.tokenizer

    @property
    def objective(self) -> Objective:
        """Cross-entropy, of classes weighted if asked for, or the squared error."""
        if not self.num_classes:
            if self.class_weights != "none":
                raise UserError(
                    "--class-weights is for classes, and the labels are numbers: leave it out, or "
                    "say --labels classes"
                )
            return SquaredError()
        if self.class_weights == "none":
            return CrossEntropy()
        labels = np.asarray(_parts(self)["train"].labels)
        count = np.maximum(np.bincount(labels, minlength=self.num_classes), 1)
        return CrossEntropy(tuple((len(labels) / (self.num_classes * count)).tolist()))

    def parts(self) -> dict[Split, Dataset]:
        """The texts as ids."""
        table = _table(self)
        chosen = split_rows(table.texts, self.validation_share, self.test_share)
        training = [table.texts[n] for n in np.flatnonzero(chosen["train"])]
        vocabulary = Vocabulary.from_texts(training, load_tokenizer(self.tokenizer))

        def part(rows: np.ndarray) -> Dataset:
            numbers = np.flatnonzero(rows)
            limits = (self.top_words, self.max_length)
            sequences = [vocabulary.encode(table.texts[n], *limits) for n in numbers]
            return Dataset(sequences, table.labels[numbers], vocabulary)

        return {name: part(rows) for name, rows in chosen.items()}


@dataclasses.dataclass(frozen=True)
class _Table:
    """Texts, labels as numbers, and the names of the classes, none where labels are numbers."""

    texts: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]


@read_once
def _table(task: TextFile) -> _Table:
    texts, labels = read_texts(task.file, task.text_column, task.label_column)
    if task.labels != "classes" and (numbers := _as_numbers(task, labels)) is not None:
        whole = bool((numbers == np.round(numbers)).all()) and len(np.unique(numbers)) <= 20
        if task.labels == "numbers" or not whole:
            return _Table(texts, numbers.astype(np.float32), ())
    classes = sorted(set(labels), key=_place)
    if len(classes) < 2:
        raise UserError(f"{task.file}: all rows have the label {classes[0]!r}: nothing to learn")
    number = {name: n for n, name in enumerate(classes)}
    return _Table(texts, np.array([number[label] for label in labels], np.int32), tuple(classes))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _place(label: str) -> tuple[bool, float, str]:
    """Where a class stands among the others: numbers first, by size, then names."""
    number = _number(label)
    if number is None or not math.isfinite(number):
        return True, 0.0, label
    return False, number, label


def _as_numbers(task: TextFile, labels: tuple[str, ...]) -> np.ndarray | None:
    """The labels as numbers; None: there are others among them.

    Raises:
        UserError: one is infinite, NaN, or too large; or none, although all have to be numbers.
    """
    found = [_number(label) for label in labels]
    for row, (label, number) in enumerate(zip(labels, found, strict=True), 1):
        where = f"{task.file}: row {row} has the label {label[:60]!r}"
        if number is None and task.labels == "numbers":
            raise UserError(f"{where}, not a number")
        if number is not None and not abs(number) <= LARGEST:
            raise UserError(
                f"{where}, a number that is not finite in float32: give another one, or, if it is "
                "the name of a class, --labels classes"
            )
    return None if None in found else np.array(found, np.float64)


def read_texts(
    file: pathlib.Path, text_column: str, label_column: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Texts and labels of a CSV, TSV or JSONL file.

    Line ends of any kind; a byte order mark is passed over. Rows are counted from 1, without the
    line of column names.

    Raises:
        UserError: it cannot be read, has no such column, or a row lacks one; naming the row.
    """
    try:
        content = files.read_bytes(file, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{file} is not UTF-8 in line {line}: convert it, with iconv -f latin1 -t utf-8, say"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {reason(error)}") from error
    if file.suffix in (".csv", ".tsv"):
        rows = _csv_rows(file, content)
    elif file.suffix in (".jsonl", ".ndjson"):
        rows = _json_rows(file, content)
    else:
        raise UserError(f"{file}: give a .csv, .tsv or .jsonl file")
    texts: list[str] = []
    labels: list[str] = []
    for number, row in enumerate(rows, 1):
        for column, values in ((text_column, texts), (label_column, labels)):
            if column not in row:
                have = ", ".join(map(repr, row)) or "none"
                raise UserError(f"{file}: row {number} has no column {column!r} (it has: {have})")
            value = row[column]
            if value is None or isinstance(value, dict | list) or not str(value).strip():
                raise UserError(f"{file}: row {number} has no {column!r}: fill or delete it")
            values.append(str(value).strip() if values is labels else str(value))
    if not texts:
        raise UserError(f"{file} has no rows")
    return tuple(texts), tuple(labels)


def _csv_rows(file: pathlib.Path, content: str) -> list[dict[str, Json]]:
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if file.suffix == ".tsv" else ","
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    found: list[dict[str, Json]] = []
    try:
        names = next(reader, [])
        for values in reader:
            if not values:
                continue
            if len(values) != len(names):
                raise UserError(
                    f"{file}: row {len(found) + 1} (line {reader.line_num}) has {len(values)} "
                    f"fields, the line of column names has {len(names)}: quote commas in texts"
                )
            found.append(dict(zip(names, values, strict=True)))
    except csv.Error as error:
        raise UserError(
            f"{file}: row {len(found) + 1} (line {reader.line_num}): {error}"
        ) from error
    return found


def _json_rows(file: pathlib.Path, content: str) -> list[dict[str, Json]]:
    found = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = files.parse_json(line)
        except ValueError as error:
            raise UserError(f"{file}: line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}: line {number} is no JSON object")
        found.append(row)
    return found
