"""The commands of ``lstmjax``, one module each, and what finds the one asked for.

A module has ``run``, which parses ``sys.argv`` and does the work. The files in ``experiments/``
call the same. Nothing slow is imported before the command is known.
"""

import difflib
import importlib
import sys

from lstmjax import stopping
from lstmjax.errors import UserError

COMMANDS = {
    "train": "train a cell on a task: adding, copying, parity, digits, your own texts ...",
    "compare": "cells on tasks, paired by seed: is it better, or just lucky?",
    "check": "does my cell do what I think it does? twenty checks",
    "predict": "what a trained model says of texts",
    "inspect": "look inside a trained model: gates, states, each word's contribution",
    "export": "a trained model as programs that run without this library",
    "imdb": "sentiment of movie reviews, on IMDB or on a built-in corpus",
    "cumsum": "the cumulative sum, in seconds",
    "odyssey": 'the ablations of "LSTM: A Search Space Odyssey"',
    "aot": "compile a cell for a TPU or GPU that need not be there",
}
"""Each command, and what it is for."""


def main() -> None:
    """``lstmjax COMMAND ...``; without a command, what there is."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv = [f"lstmjax {name}", *sys.argv[2:]]
        run(name)
    elif name in ("-h", "--help"):
        print("usage: lstmjax COMMAND ...\n")
        for command, purpose in COMMANDS.items():
            print(f"  {command:<8}  {purpose}")
        print("\nlstmjax COMMAND --help lists its flags; lstmjax --version")
    elif name == "--version":
        from lstmjax import __version__

        print(__version__)
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        other = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
        _refuse(UserError(f"no command {name!r}: {other}"))


def run(name: str) -> None:
    """Import the command of this name, and run it with the flags in ``sys.argv``.

    From the first line on, a signal ends the process as it should, while importing, too.
    """
    stopping.exit_on_signals()
    try:
        command = importlib.import_module(f"lstmjax.commands.{name}")
    except UserError as error:
        _refuse(error)
    command.run()


def _refuse(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr)
    stopping.leave(error.status)
