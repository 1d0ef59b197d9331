"""What a trained model says of texts.

    lstmjax predict --run runs/x "I loved it." "A waste of time."
    lstmjax predict --run runs/x --file reviews.txt      # one text a line
    lstmjax predict --run runs/x --json < reviews.txt > answers.jsonl

One line a text, in their order: the probability of the class that the model takes, the class, the
text. With --json one object a line, with the probability of every class and the whole text.
"""

import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated

import numpy as np

from lstmjax.errors import StorageError, UserError, extra, printable, reason
from lstmjax.trained import Text, TrainedModel, load_run, read_texts
from lstmjax.training.command import run_command

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
    """File of texts, one a line; without it and without texts, standard input."""
    json: bool = False
    """One JSON object a text."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The texts themselves."""


def main(config: Config) -> None:
    """Load the model and answer."""
    if config.run is None:
        raise UserError("which model? Name the folder of its run: --run runs/<name>")
    model = load_run(config.run)
    told = texts_of(config)
    while some := list(itertools.islice(told, TOGETHER)):
        for text, row in zip(some, model.predict(some), strict=True):
            print(answer(model, text, row, config.json))


def texts_of(config: Config) -> Iterator[Text]:
    """The texts, as they come."""
    if config.texts and config.file:
        raise UserError("texts and --file are given: leave out one of them")
    if config.texts:
        yield from config.texts
        return
    if config.file is None:
        yield from read_texts(sys.stdin.buffer.readline)
        return
    try:
        with config.file.open("rb") as lines:
            yield from read_texts(lines.readline)
    except OSError as error:
        raise StorageError(f"cannot read {config.file}: {reason(error)}") from error


def answer(model: TrainedModel, text: Text, row: np.ndarray | np.generic, as_json: bool) -> str:
    """One line of output; ``row`` is what the model said."""
    shares = [1 - float(row), float(row)] if row.ndim == 0 else row.tolist()
    known = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    if as_json:
        named: Iterable[tuple[str, float]] = zip(model.config.classes, shares, strict=True)
        return json.dumps({"text": known, "probabilities": dict(named)})
    best = int(np.argmax(shares))
    start = " ".join(known[: 4 * SHOWN].split())
    short = start if len(start) <= SHOWN and len(known) <= 4 * SHOWN else f"{start[:SHOWN]}..."
    return f"{shares[best]:.4f}  {model.config.classes[best]:<9} {printable(short)}"


def run() -> None:
    """Parse the command line and run `main`."""
    run_command({"default": Config()}, main, description=__doc__)
