"""Running again what a run folder holds, and telling whether the numbers are the same."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TypeVar

from lstmjax import files
from lstmjax.errors import UserError, first_line
from lstmjax.files import Json
from lstmjax.training.report import CELL, DataclassInstance, RunFolder, differences

ConfigT = TypeVar("ConfigT", bound=DataclassInstance)


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
    if isinstance(cell, str) and ":" in cell:
        values["cell"] = f"{folder / CELL}:{cell.rpartition(':')[2]}"
    return _filled(like, values, folder)


def _filled(like: ConfigT, values: Mapping[str, Json], folder: pathlib.Path) -> ConfigT:
    changed: dict[str, object] = {}
    for field in dataclasses.fields(like):
        before, value = getattr(like, field.name), values.get(field.name)
        nested = dataclasses.is_dataclass(before) and not isinstance(before, type)
        if nested and isinstance(value, dict):
            changed[field.name] = _filled(before, value, folder)
        elif field.name in values:
            value = tuple(value) if isinstance(value, list) else value
            value = float(value) if isinstance(before, float) and type(value) is int else value
            if before is not None and type(value) is not type(before):
                raise UserError(
                    f"{folder} was run by another version: its {field.name} is {value!r}"
                )
            changed[field.name] = value
    return dataclasses.replace(like, **changed)


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
