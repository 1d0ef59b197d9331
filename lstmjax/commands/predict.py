"""What a trained model says of texts, or of sequences.

    lstmjax predict --run runs/x "I loved it." "A waste of time."
    lstmjax predict --run runs/x --file reviews.txt      # one text a line
    lstmjax predict --run runs/x --json < reviews.txt > answers.jsonl
    lstmjax predict --run runs/y --file mine.npz         # sequences: x and, if need be, lengths

One line a text, in their order: the probability of the class that the model takes, the class, the
text. With --json one object a line, with the probability of every class and the whole text. Of a
sequence the line has its number in place of the text; a model that answers at every step says all
of them. Models of numbers say the number.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike

from lstmjax.errors import StorageError, UserError, extra, printable, reason
from lstmjax.files import Json
from lstmjax.tasks.rows import read_arrays, read_sequences
from lstmjax.trained import (
    ModelConfig,
    SequenceModelConfig,
    Text,
    TrainedModel,
    TrainedSequences,
    load_run,
    read_texts,
)
from lstmjax.training.command import run_command
from lstmjax.workbench.rows import finite

with extra("train"):
    import tyro

TOGETHER = 512
SHOWN = 60


@dataclasses.dataclass(frozen=True)
class Config:
    """What to predict, and with which model."""

    run: pathlib.Path | None = None
    """Folder of a run; a cell.py in it is run."""
    file: pathlib.Path | None = None
    """File of texts, one a line; without it and without texts, standard input. Of sequences, a .npz
    file as for training."""
    json: bool = False
    """One JSON object a text."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The texts themselves."""


def main(config: Config) -> None:
    """Load the model and answer on standard output."""
    write(answers(config), sys.stdout)


def write(lines: Iterable[str], to: Any) -> None:
    """Write the answers as they come, until a reader that is gone wants no more of them.

    Args:
        lines: one an answer.
        to: standard output, or what has taken its place; None: it is closed.

    Raises:
        StorageError: they cannot be written.
    """
    if to is None:
        raise StorageError("cannot write the answers: standard output is closed")
    for line in lines:
        try:
            print(line, file=to, flush=True)
        except BrokenPipeError:
            return
        except OSError as error:
            raise StorageError(f"cannot write the answers: {reason(error)}") from error


def answers(config: Config) -> Iterator[str]:
    """A line a row."""
    if config.run is None:
        raise UserError("which model? Name the folder of its run: --run runs/<name>")
    model = load_run(config.run)
    if isinstance(model, TrainedSequences):
        yield from of_sequences(model, config)
    else:
        yield from of_texts(model, config)


def of_sequences(model: TrainedSequences, config: Config) -> Iterator[str]:
    """A line a sequence of the file."""
    if config.file is None or config.texts:
        raise UserError("this is a model of sequences: name a file of them, --file mine.npz")
    rows = read_sequences(config.file, read_arrays(config.file, ("x",)))
    try:
        found = model.predict(rows)
    except ValueError as error:
        raise UserError(f"{config.file}: {error}") from error
    for number, answer in enumerate(found):
        yield told(model.config, {"row": number}, f"row {number}", answer, config.json)


def of_texts(model: TrainedModel, config: Config) -> Iterator[str]:
    """A line a text, as they come."""
    texts = texts_of(config)
    while some := list(itertools.islice(texts, TOGETHER)):
        for text, answer in zip(some, model.predict(some), strict=True):
            known = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
            yield told(model.config, {"text": known}, shortened(known), answer, config.json)


def texts_of(config: Config) -> Iterator[Text]:
    """The texts, as they come."""
    if config.texts and config.file:
        raise UserError("texts and --file are given: leave out one of them")
    if config.texts:
        yield from config.texts
        return
    if config.file is None and sys.stdin is None:
        raise UserError("nothing to predict: give texts or --file, standard input is closed")
    try:
        opened = config.file.open("rb") if config.file else contextlib.nullcontext(sys.stdin.buffer)
        with opened as lines:
            yield from read_texts(lines.readline)
    except OSError as error:
        name = config.file or "standard input"
        raise StorageError(f"cannot read {name}: {reason(error)}") from error


def told(
    config: ModelConfig | SequenceModelConfig,
    what: Mapping[str, Json],
    name: str,
    answer: ArrayLike,
    as_json: bool,
) -> str:
    """One line of output: what the model says of a row.

    Args:
        config: that of the model.
        what: the row, for JSON.
        name: likewise, for people.
        answer: what `predict` gave; of every step, if the model answers at every step.
        as_json: whether to say it as JSON.
    """
    found = np.asarray(answer)
    if not config.classes:
        if as_json:
            return json.dumps(finite({**what, "number": found.tolist()}))
        return f"{' '.join(f'{value:.6g}' for value in found.ravel())}  {name}"
    of_each = np.stack([1 - found, found], -1) if config.num_outputs == 1 else found
    steps = of_each.reshape(-1, len(config.classes))
    if as_json:
        named = [dict(zip(config.classes, row.tolist(), strict=True)) for row in steps]
        shares = named if of_each.ndim > 1 else named[0]
        return json.dumps(finite({**what, "probabilities": shares}))
    best = [(row.max(), printable(config.classes[row.argmax()])) for row in steps]
    return f"{' '.join(f'{share:.4f}  {known:<9}' for share, known in best)} {name}"


def shortened(text: str) -> str:
    """The start of a text on one line.

    >>> shortened("a  b" + "c" * 99)
    'a bccccccccccccccccccccccccccccccccccccccccccccccccccccccccc...'
    """
    start = " ".join(text[: 4 * SHOWN].split())
    whole = len(start) <= SHOWN and len(text) <= 4 * SHOWN
    return printable(start if whole else f"{start[:SHOWN]}...")


def run() -> None:
    """Parse the command line and answer; `run_command` lets output fail, but here it is all."""
    output = sys.stdout
    run_command(
        {"default": Config()}, lambda config: write(answers(config), output), description=__doc__
    )
