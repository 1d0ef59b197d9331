"""From ``LSTM`` or ``path/to/file.py:MyCell`` to a cell that keeps the contract."""

import importlib
import importlib.util
import inspect
import pathlib
from types import ModuleType

import jax
import jax.numpy as jnp

from lstmjax.cells.base import Carry, Cell
from lstmjax.errors import UserError
from lstmjax.precision import make_dot


def load_cell(spec: str, hidden_size: int) -> Cell:
    """The cell that ``spec`` names, checked against the contract.

    Args:
        spec: a name in `lstmjax.cells` (``LSTM``), or ``path/to/file.py:MyCell``. The file is
            run, as ``python path/to/file.py`` would.
        hidden_size: number of units H.

    Raises:
        UserError: no such file or class, the file does not run, or the cell breaks the contract.

    Example:
        >>> load_cell("LSTM", hidden_size=100)
        LSTM(hidden_size=100)
    """
    path, _, name = spec.rpartition(":")
    module = _run_file(path) if path else importlib.import_module("lstmjax.cells")
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
    except (TypeError, ValueError) as error:
        raise UserError(
            f"cell {spec!r} cannot be built from hidden_size={hidden_size} alone: {_line(error)}; "
            "give its other fields defaults"
        ) from error
    check_contract(cell)
    return cell


def _run_file(path: str) -> ModuleType:
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"no cell file {path!r}; give --cell as path/to/file.py:MyCell")
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"cell file {path!r} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"cell file {path!r} does not run: {_line(error)}") from error
    return module


def check_contract(cell: Cell) -> None:
    """Raise `UserError` if one step of ``cell`` does not fit the contract.

    Only shapes and dtypes are computed, so this costs milliseconds. The carry that a step
    returns must have the structure, shapes and dtypes of `Cell.initial_carry`.
    """
    name = type(cell).__name__
    if not cell.gates and type(cell).transition is Cell.transition:
        raise UserError(f'cell {name} declares no gates; write e.g. gates = ("i", "f", "g", "o")')
    rows, features = 2, 3

    def one_step() -> tuple[Carry, Carry]:
        params = cell.init(jax.random.key(0), features)
        before = cell.initial_carry(rows)
        x = jnp.zeros((rows, features))
        return before, cell.transition(params, x, before, make_dot("float32"))

    try:
        before, after = jax.eval_shape(one_step)
    except Exception as error:
        raise UserError(f"cell {name} breaks the contract: {_line(error)}") from error
    want, got = _layout(before), _layout(after)
    if want != got:
        raise UserError(
            f"cell {name} breaks the contract: its step must return (h, state) as {want}, not {got}"
        )


def _layout(carry: Carry) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(carry)
    return ", ".join(
        f"{jax.tree_util.keystr(path).lstrip('.')} {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    )


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
