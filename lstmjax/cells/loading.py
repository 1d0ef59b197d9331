"""From ``LSTM`` or ``path/to/file.py:MyCell`` to a cell that keeps the contract."""

import hashlib
import importlib
import importlib.util
import inspect
import pathlib
import sys
from types import ModuleType

from lstmjax.cells.base import Cell
from lstmjax.cells.contract import check_contract
from lstmjax.errors import UserError, user_line


def load_cell(spec: str, hidden_size: int) -> Cell:
    """The cell that ``spec`` names, checked against the contract.

    Args:
        spec: a name in `lstmjax.cells` (``LSTM``), or ``path/to/file.py:MyCell``. The file is
            imported; it may import its neighbours.
        hidden_size: number of units H.

    Raises:
        UserError: no such file or class, the file does not run, or the cell breaks the contract.

    Example:
        >>> load_cell("LSTM", hidden_size=100)
        LSTM(hidden_size=100)
    """
    path, _, name = spec.rpartition(":")
    module = run_file(path) if ":" in spec else importlib.import_module("lstmjax.cells")
    classes = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Cell) and value is not Cell
    }
    if name not in classes:
        where = path or "lstmjax.cells"
        have = ", ".join(sorted(classes)) or "none"
        raise UserError(
            f"no cell {name!r} in {where} (cells there: {have}); name one of them, or your own "
            "as path/to/file.py:MyCell"
        )
    try:
        cell = classes[name](hidden_size)
    except Exception as error:
        raise UserError(
            f"cell {spec!r} cannot be built from hidden_size={hidden_size} alone: {_line(error)}; "
            "give its other fields defaults"
        ) from error
    check_contract(cell)
    return cell


def run_file(path: str) -> ModuleType:
    """Import a user's file; it may import its neighbours.

    Raises:
        UserError: there is none, or it does not run.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"no cell file {path!r}; give --cell as path/to/file.py:MyCell")
    module_spec = importlib.util.spec_from_file_location(f"_lstmjax_cell_{file.stem}", file)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"cell file {path!r} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look a class's module up by name
    sys.path.insert(0, str(file.parent.absolute()))
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"cell file {path!r} does not run: {_line(error)}") from error
    finally:
        sys.path.remove(str(file.parent.absolute()))
    return module


def source_digest(spec: str) -> str | None:
    """SHA-256 of the file that ``spec`` names, None for a built-in cell."""
    path, _, _ = spec.rpartition(":")
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() if path else None


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{user_line(error)}"
