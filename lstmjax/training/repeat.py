"""Running again what a run folder holds, and telling whether the numbers are the same."""

import dataclasses
import pathlib
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lstmjax import files
from lstmjax.cells import CellSpec
from lstmjax.cells.loading import digest_of, files_of
from lstmjax.errors import UserError, first_line
from lstmjax.files import Json
from lstmjax.training.report import CELL, CONFIG, DataclassInstance, RunFolder, differences

ConfigT = TypeVar("ConfigT", bound=DataclassInstance)
_MOST_CHOICES = 100


class Differs(UserError):
    """A repeated run has other numbers."""

    status = 1


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What a ``config.json`` says beside the config."""

    cell_source: str | None = None
    """SHA-256 of the files of a user's cell."""
    data_sha256: tuple[str, ...] = ()
    """Of the data."""


def config_of(folder: pathlib.Path, like: ConfigT, here_only: Collection[str]) -> ConfigT:
    """What the run in ``folder`` was asked for, in the place of the fields of ``like``.

    A user's cell is the copy in the folder.

    Args:
        folder: of the run.
        like: what this one is asked for.
        here_only: what is that of ``like`` whatever the folder says, as `without` has it: where to
            run and to write, say.

    Raises:
        UserError: there is no run, or one of another version or program, or it is damaged.
    """
    try:
        values = RunFolder(folder).config()
    except UserError as error:
        raise UserError(
            f"nothing to repeat in {folder}: no readable {CONFIG}; name the folder of a run"
        ) from error
    about = {field.name for field in dataclasses.fields(_Facts)}
    asked = without(values, about)
    try:
        facts = filled(_Facts(), {name: values[name] for name in about & values.keys()})
        filled(like, asked)  # what is not taken is checked, too
        asked = without(asked, here_only)
        if isinstance(cell := asked.get("cell"), str):
            asked["cell"] = CellSpec.parse(cell).within(str(folder / CELL))
        found = filled(like, asked)
    except ValueError as error:
        raise UserError(
            f"{folder / CONFIG} is damaged or of another version: {first_line(error)}; put a copy "
            "of it back, or name another run"
        ) from error
    _require_cell(folder / CELL, facts)
    return found


def _require_cell(path: pathlib.Path, facts: _Facts) -> None:
    """Raise `UserError` where the folder's copy of a user's cell is not what the run was of."""
    if facts.cell_source is None or not path.exists():
        return
    if digest_of(files_of(path)) != facts.cell_source:
        raise UserError(
            f"{path} is damaged or was changed, or a file beside it that it imports: its SHA-256 "
            f"is not that in {CONFIG}; put a copy of it back"
        )


def without(settings: Mapping[str, Json], names: Iterable[str]) -> dict[str, Json]:
    """The settings but for some.

    >>> without({"seed": 0, "log": [], "data": {"data": "imdb", "archive": None}},
    ...         ["log", "data.archive"])
    {'seed': 0, 'data': {'data': 'imdb'}}
    """
    left = dict(settings)
    for name in names:
        first, _, inside = name.partition(".")
        nested = left.get(first)
        if not inside:
            left.pop(first, None)
        elif isinstance(nested, dict):
            left[first] = without(nested, [inside])
    return left


def filled(like: ConfigT, values: Mapping[str, Json], within: str = "") -> ConfigT:
    """The config dataclass with the values of a JSON object in it, each of its field's type.

    Args:
        like: what has the values that are not given.
        values: by the names of the fields; those of a nested dataclass are an object.
        within: what a message says before a name.

    Raises:
        ValueError: there is no such field, or it cannot have such a value.
    """
    kinds = get_type_hints(type(like))
    changed: dict[str, object] = {}
    for name, value in values.items():
        before = getattr(like, name, None) if name in kinds else None
        if dataclasses.is_dataclass(before) and isinstance(value, dict):
            assert not isinstance(before, type)
            changed[name] = filled(before, value, f"{within}{name}.")
            continue
        try:
            if name not in kinds:
                raise ValueError("left out, as there is no such setting")
            changed[name] = _of_kind(kinds[name], value)
        except ValueError as error:
            told = reprlib.repr(value)
            raise ValueError(f"its {within}{name} is {told}: {name} must be {error}") from error
    return dataclasses.replace(like, **changed)


_KINDS: Mapping[object, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda a: type(a) is bool),
    int: ("a whole number of 64 bits", lambda a: type(a) is int and -(2**63) <= a < 2**63),
    float: (
        "a finite number",
        lambda a: type(a) in (int, float) and abs(a) <= sys.float_info.max,
    ),
    str: ("a text", lambda a: type(a) is str),
    pathlib.Path: ("a path", lambda a: type(a) is str and "\0" not in a),
}


def _of_kind(kind: Any, value: Json) -> object:
    """The JSON value as one of an annotation: plain, of a few choices, or a tuple; or None.

    Raises:
        ValueError: it is none; the message says what it must be.
    """
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):  # with None
        (kind,) = {*inside} - {NoneType}
        return None if value is None else _of_kind(kind, value)
    if origin is Literal:
        if value not in inside:
            raise ValueError(" or ".join(inside))
        return value
    if origin is tuple:
        of_choices = get_origin(inside[0]) is Literal
        if not isinstance(value, list) or (of_choices and len(value) > _MOST_CHOICES):
            most = f" of at most {_MOST_CHOICES}" if of_choices else ""
            raise ValueError(f"a list{most}")
        try:
            return tuple(_of_kind(inside[0], one) for one in value)
        except ValueError as error:
            raise ValueError(f"a list, each of it {error}") from error
    told, fits = _KINDS.get(kind, ("an object", lambda a: False))
    if not fits(value):
        raise ValueError(told)
    return kind(value)


def compare(before: RunFolder, now: RunFolder) -> str:
    """A line that says that both runs have the same numbers.

    Raises:
        Differs: they do not; it names the numbers, and what else is different.
        UserError: the run before has no result.
    """
    there, here = (_numbers(run.path) for run in (before, now))
    differing = differences(there, here)
    if not differing:
        return f"repeated {before.path}: the same numbers, bit for bit"
    around = differences(before.environment(), now.environment())
    data = [run.config().get("data_sha256") for run in (before, now)]
    around += ["the data"] if data[0] != data[1] else []
    raise Differs(
        f"{before.path} is not repeated: {'; '.join(differing[:5])}. Different are: "
        f"{'; '.join(around) or 'neither versions nor devices nor data'}"
    )


def _numbers(folder: pathlib.Path) -> dict[str, Json]:
    """All that a run measured, times aside."""
    try:
        result = files.as_object(files.read_json(folder / "result.json"))
        found, epochs = _measured(result), result.get("epochs", [])
        if not isinstance(epochs, list):
            raise ValueError("its epochs are no list")
        for record in map(files.as_object, epochs):
            named = _measured(record).items()
            found |= {f"{key} of epoch {record['epoch']}": value for key, value in named}
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"nothing to compare with in {folder}: {first_line(error)}; name a run that has ended"
        ) from error


def _measured(record: Mapping[str, Json]) -> dict[str, Json]:
    return {k: value for k, value in record.items() if k.endswith(("_loss", "_accuracy"))}
