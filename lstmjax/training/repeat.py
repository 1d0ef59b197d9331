"""Running again what a run folder holds, and telling whether the numbers are the same."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

from lstmjax import files
from lstmjax.cells import CellSpec
from lstmjax.errors import UserError, first_line
from lstmjax.training.report import CELL, RunFolder, differences

ConfigT = TypeVar("ConfigT")


class Differs(UserError):
    """A repeated run has other numbers."""

    status = 1


def config_of(folder: pathlib.Path, like: ConfigT) -> ConfigT:
    """What the run in ``folder`` was asked for, in the place of the fields of ``like``.

    What says where to run and to write is that of ``like``; a user's cell is the copy in the
    folder.

    Raises:
        UserError: there is no run, or it is of another version of the program.
    """
    values = RunFolder(folder).config()
    cell = values.get("cell")
    if isinstance(cell, str):
        values["cell"] = CellSpec.parse(cell).within(str(folder / CELL))
    return filled(like, values, folder)


def filled(like: ConfigT, values: Mapping[str, Any], folder: pathlib.Path) -> ConfigT:
    """The config dataclass with the values of a JSON object in it.

    Raises:
        UserError: a value is of another kind than that in ``like``.
    """
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(like):  # type: ignore[arg-type]
        before, value = getattr(like, field.name), values.get(field.name)
        if dataclasses.is_dataclass(before) and isinstance(value, dict):
            changed[field.name] = filled(before, value, folder)
        elif field.name in values:
            value = tuple(value) if isinstance(value, list) else value
            value = float(value) if isinstance(before, float) and type(value) is int else value
            if before is not None and type(value) is not type(before):
                raise UserError(
                    f"{folder} was run by another version: its {field.name} is {value!r}"
                )
            changed[field.name] = value
    return dataclasses.replace(like, **changed)  # type: ignore[type-var]


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


def _numbers(folder: pathlib.Path) -> dict[str, Any]:
    """All that a run measured, times aside."""
    try:
        result = files.read_json(folder / "result.json")
        found = _measured(result)
        for record in result.get("epochs", []):
            named = _measured(record).items()
            found |= {f"{key} of epoch {record['epoch']}": value for key, value in named}
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"nothing to compare with in {folder}: {first_line(error)}; name a run that has ended"
        ) from error


def _measured(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: value for k, value in record.items() if k.endswith(("_loss", "_accuracy"))}
