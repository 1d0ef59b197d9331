"""From ``adding``, ``adding(length=400)`` or ``path/to/file.py:MyTask`` to a task."""

import ast
import dataclasses
import inspect
import pathlib
import typing

from lstmjax.cells.loading import run_file
from lstmjax.errors import UserError, first_line
from lstmjax.tasks.adding import Adding
from lstmjax.tasks.base import Task
from lstmjax.tasks.characters import Characters
from lstmjax.tasks.copying import CopyMemory, SelectiveCopy
from lstmjax.tasks.cumsum import Cumsum
from lstmjax.tasks.recall import AssociativeRecall
from lstmjax.tasks.rows import Digits, Mnist1d, SequenceFile
from lstmjax.tasks.state_tracking import S5, Parity
from lstmjax.tasks.text import Demo, Imdb, TextFile

TASKS: dict[str, type[Task]] = {
    "adding": Adding,
    "characters": Characters,
    "copy": CopyMemory,
    "cumsum": Cumsum,
    "demo": Demo,
    "digits": Digits,
    "imdb": Imdb,
    "mnist1d": Mnist1d,
    "parity": Parity,
    "recall": AssociativeRecall,
    "s5": S5,
    "selective-copy": SelectiveCopy,
    "sequences": SequenceFile,
    "text": TextFile,
}
"""What the command line calls them."""


def load_task(spec: str) -> Task:
    """The task that ``spec`` names.

    Args:
        spec: a name of `TASKS`, or ``path/to/file.py:MyTask``; its fields may follow in brackets.

    Raises:
        UserError: no such task, or fields that it does not have.

    Example:
        >>> load_task("adding(length=400)").length
        400
    """
    name, bracket, _ = spec.partition("(")
    kind = _task_class(name.strip())
    fields = _fields(spec) if bracket else {}
    for field in dataclasses.fields(kind):
        value = fields.get(field.name)
        if isinstance(value, str) and pathlib.Path in (field.type, *typing.get_args(field.type)):
            fields[field.name] = pathlib.Path(value)
    try:
        return kind(**fields)
    except TypeError as error:
        raise UserError(f"task {spec!r}: {first_line(error)}") from error


def _task_class(name: str) -> type[Task]:
    if name in TASKS:
        return TASKS[name]
    path, _, class_name = name.rpartition(":")
    if not path:
        raise UserError(
            f"no task {name!r}; there are {', '.join(TASKS)}, or your own as path/to/file.py:MyTask"
        )
    found = {
        key: value
        for key, value in vars(run_file(path)).items()
        if inspect.isclass(value) and issubclass(value, Task) and not inspect.isabstract(value)
    }
    if class_name not in found:
        have = ", ".join(sorted(found)) or "none"
        raise UserError(f"no task {class_name!r} in {path} (tasks there: {have})")
    return found[class_name]


def _fields(spec: str) -> dict[str, object]:
    """The keywords of a call, whose values are literals."""
    try:
        call = ast.parse(f"task({spec.partition('(')[2]}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("give fields by name")
        return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise UserError(
            f"cannot read {spec!r} ({_told(error)}): write it like adding(length=400) or "
            "text(file='reviews.csv')"
        ) from error


def _told(error: BaseException) -> str:
    """What is wrong; Python's own words for what is no literal name an address."""
    return "a value is no literal" if "malformed node" in str(error) else first_line(error)
