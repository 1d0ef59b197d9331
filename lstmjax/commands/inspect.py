"""Look inside a trained model: why does it say what it says of a text?

    lstmjax inspect --run runs/x "I loved it, though the end was weak."

Prints the probability and the text, each word coloured by its contribution, and writes look.html
and look.png: contributions above gates, states and output of a layer, over the words. Its file in
``experiments/`` is ``look.py``: ``inspect.py`` would take the place of Python's own module of that
name in every other program there.
"""

import dataclasses
import os
import pathlib
import sys
from typing import Annotated, Literal

from lstmjax.cells import CellSpec
from lstmjax.errors import UserError, extra
from lstmjax.inspection import in_color, in_words, look, write
from lstmjax.trained import load_run
from lstmjax.training.command import run_command

with extra("train"):
    import tyro


@dataclasses.dataclass(frozen=True)
class Config:
    """What to look at."""

    run: pathlib.Path | None = None
    """Folder of a run; a cell.py in it is run."""
    layer: int = 0
    """Recurrent layer whose gates are drawn, from 0."""
    backward: bool = False
    """Of a bidirectional layer the direction from the end."""
    color: Literal["auto", "always", "never"] = "auto"
    """Whether to colour; auto does in a terminal, unless NO_COLOR is set."""
    to: pathlib.Path = pathlib.Path("look")
    """Folder for look.html and look.png."""
    text: Annotated[str | None, tyro.conf.Positional] = None
    """The text."""


def main(config: Config) -> None:
    """Look, tell, write."""
    if config.run is None or config.text is None:
        raise UserError('which model, and what text? --run runs/<name> "text"')
    model = load_run(config.run)
    found = look(model, config.text, layer=config.layer, backward=config.backward)
    print(found.verdict)
    print(in_color(found) if colored(config.color) else in_words(found))
    cell = CellSpec.parse(model.config.cell).name
    title = f"{found.verdict} · {cell}, {found.layer} · trained on {model.config.data}"
    page, picture = write(found, config.to, title)
    print(f"{page}, {picture}")


def colored(said: str) -> bool:
    """Whether to use colours."""
    if said == "auto":
        return bool(sys.stdout.isatty()) and not os.environ.get("NO_COLOR")
    return said == "always"


def run() -> None:
    """Parse the command line and run `main`."""
    run_command({"default": Config()}, main, description=__doc__)
