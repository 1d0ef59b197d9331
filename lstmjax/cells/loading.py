"""From ``LSTM`` or ``path/to/file.py:MyCell(leak=0.1)`` to a cell that keeps the contract."""

import ast
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple

from lstmjax.cells.base import Cell
from lstmjax.cells.contract import check_contract
from lstmjax.errors import ContractError, UserError, user_line
from lstmjax.files import MAX_JSON_BYTES, read_bytes

CELL = "cell.py"
"""What a run folder calls its copy of the file of a user's cell."""

_LOADED: dict[str, str] = {}
"""SHA-256, by name, of the modules that a user's file has imported from beside it."""


class CellSpec(NamedTuple):
    """What ``--cell`` says.

    Attributes:
        path: of the user's file, "" for a built-in cell.
        name: of the class.
        call: name and hyper-parameters as they were written, ``"MyCell(leak=0.1)"``.
    """

    path: str
    name: str
    call: str

    @classmethod
    def parse(cls, spec: str) -> "CellSpec":
        """Take a text apart; what cannot be meant is a cell of that odd name, which nobody has.

        >>> CellSpec.parse("cells/my_cell.py:MyCell(leak=0.1)")
        CellSpec(path='cells/my_cell.py', name='MyCell', call='MyCell(leak=0.1)')
        >>> CellSpec.parse("LSTM")
        CellSpec(path='', name='LSTM', call='LSTM')
        """
        # A path may hold brackets and a hyper-parameter a colon: the first reading that is Python.
        for found in re.finditer(r"(?:^|:)(?=([^\W\d]\w*)(\(.*\)|)$)", spec, re.DOTALL):
            if not found[2] or _is_call(found[1] + found[2]):
                return cls(spec[: found.start()], found[1], found[1] + found[2])
        path, _, name = spec.rpartition(":")
        return cls(path, name, name)

    def within(self, path: str) -> str:
        """The same cell, of the file ``path``; of a built-in cell its name."""
        return f"{path}:{self.call}" if self.path else self.call

    def hyper_parameters(self) -> dict[str, object]:
        """What stands in the brackets; literals only, and nothing is run.

        Raises:
            UserError: it is no list of ``name=literal``.
        """
        call = ast.parse(self.call, mode="eval").body if self.name != self.call else None
        if not isinstance(call, ast.Call):
            return {}
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise UserError(
                f"--cell {self.call}: give each hyper-parameter by name, as {self.name}(leak=0.1)"
            )
        found: dict[str, object] = {}
        for keyword in call.keywords:
            text = ast.unparse(keyword.value)
            try:
                found[str(keyword.arg)] = ast.literal_eval(keyword.value)
            except (ValueError, TypeError, MemoryError, RecursionError):
                raise UserError(
                    f"--cell {self.name}: {keyword.arg}={text[:60]} is no literal (number, text, "
                    "True, None or a tuple of such); set anything else in a subclass of your own"
                ) from None
        return found


def _is_call(text: str) -> bool:
    try:
        return isinstance(ast.parse(text, mode="eval").body, ast.Call)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def load_cell(spec: str, hidden_size: int) -> Cell:
    """The cell that ``spec`` names, checked against the contract.

    Args and errors are those of `find_cell`; `UserError` also if the cell breaks the contract.

    Example:
        >>> load_cell("LSTM", hidden_size=100)
        LSTM(100)
        >>> load_cell("PhasedLSTM(leak=0.01)", hidden_size=100)
        PhasedLSTM(100, leak=0.01)
    """
    cell = find_cell(spec, hidden_size)
    check_contract(cell)
    return cell


def find_cell(spec: str, hidden_size: int) -> Cell:
    """The cell that ``spec`` names, whether it keeps the contract or not.

    Args:
        spec: a name in `lstmjax.cells` (``LSTM``), or ``path/to/file.py:MyCell``; after either,
            hyper-parameters, ``MyCell(leak=0.1)``, whose values are literals. The file is imported;
            it may import its neighbours.
        hidden_size: number of units H.

    Raises:
        UserError: no such file or class, the file does not run, the cell has no such
            hyper-parameter, or it cannot be built.
    """
    path, name, _ = parsed = CellSpec.parse(spec)
    module = run_file(path) if path else importlib.import_module("lstmjax.cells")
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
    hyper = _checked(classes[name], parsed.hyper_parameters())
    try:
        cell = classes[name](hidden_size, **hyper)  # type: ignore[arg-type]
    except ContractError:
        raise
    except Exception as error:
        given = "".join(f", {key}={value!r}" for key, value in hyper.items())
        remedy = "mend those" if hyper else "give its other fields defaults, or give them in --cell"
        raise UserError(
            f"cell {spec!r} cannot be built from hidden_size={hidden_size}{given or ' alone'}: "
            f"{_line(error)}; {remedy}"
        ) from error
    return cell


def _checked(kind: type[Cell], given: dict[str, object]) -> dict[str, object]:
    """The hyper-parameters given, if the cell has them, and of the kind of their defaults."""
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    del fields["hidden_size"]  # said by --hidden-size
    checked: dict[str, object] = {}
    for name, value in given.items():
        if name not in fields:
            raise UserError(
                f"{kind.__name__} has no hyper-parameter {name!r} to give in --cell; it has: "
                + ", ".join(fields)
            )
        default = fields[name].default
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        plain = isinstance(default, bool | int | float | str | tuple)
        if callable(default) or (plain and type(value) is not type(default)):
            what = f"{type(default).__name__} ({getattr(default, '__name__', repr(default))})"
            raise UserError(
                f"--cell {kind.__name__}: {name} is a {what} by default, got {value!r}; "
                + ("set it in a subclass of your own" if callable(default) else "give such a value")
            )
        checked[name] = value
    return checked


def run_file(path: str) -> ModuleType:
    """Import a user's file; it may import its neighbours, which are imported as they are now.

    Raises:
        UserError: there is none, or it does not run.
    """
    file = pathlib.Path(path)
    if not os.path.isfile(path):  # False of any name, too long or with a NUL in it
        raise UserError(f"no cell file {path!r}; give --cell as path/to/file.py:MyCell")
    place = hashlib.sha256(os.fsencode(file.absolute())).hexdigest()[:8]
    name = f"_lstmjax_cell_{file.stem}_{place}"  # files of one name in two folders are two modules
    module_spec = importlib.util.spec_from_file_location(name, file)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"cell file {path!r} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look a class's module up by name
    sys.path.insert(0, str(file.parent.absolute()))
    keep, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # stale within a second of it
    try:
        beside = _neighbours(file)
        if any(_LOADED.get(name, digest) != digest for name, digest in beside.items()):
            for neighbour in beside.keys() & _LOADED.keys():  # of another folder, or from before
                sys.modules.pop(neighbour, None)
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"cell file {path!r} does not run: {_line(error)}") from error
    finally:
        sys.dont_write_bytecode = keep
        sys.path.remove(str(file.parent.absolute()))
    for neighbour, digest in beside.items():
        where = getattr(sys.modules.get(neighbour), "__file__", None)
        if where and os.path.dirname(where) == str(file.parent.absolute()):
            _LOADED[neighbour] = digest
    return module


def _neighbours(file: pathlib.Path) -> dict[str, str]:
    """The modules beside a file that it imports: SHA-256 of place and content, by name."""
    where = os.fsencode(file.parent.absolute())
    return {
        name.removesuffix(".py"): hashlib.sha256(where + b"\0" + content).hexdigest()
        for name, content in files_of(file).items()
        if name != CELL
    }


def cell_source(spec: str) -> dict[str, bytes]:
    """A user's cell as files, by name: `CELL`, and those beside it that it imports.

    So with those that they import; packages, and what is imported from elsewhere, are not among
    them. Of a built-in cell there is nothing.

    Example:
        >>> cell_source("LSTM")
        {}
    """
    path = CellSpec.parse(spec).path
    return files_of(pathlib.Path(path)) if path else {}


def files_of(file: pathlib.Path) -> dict[str, bytes]:
    """A user's file, as `CELL`, and those beside it that it imports, by name."""
    found = {CELL: read_bytes(file, MAX_JSON_BYTES)}
    waiting = [found[CELL]]
    while waiting:
        try:
            tree = ast.parse(waiting.pop())
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            continue
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                beside = file.with_name(f"{name.partition('.')[0]}.py")
                if beside.name not in (*found, file.name) and beside.is_file():
                    found[beside.name] = read_bytes(beside, MAX_JSON_BYTES)
                    waiting.append(found[beside.name])
    return found


def source_digest(spec: str) -> str | None:
    """SHA-256 of what `cell_source` gives, None for a built-in cell.

    Example:
        >>> source_digest("LSTM") is None
        True
    """
    files = cell_source(spec)
    return digest_of(files) if files else None


def digest_of(files: Mapping[str, bytes]) -> str:
    """SHA-256 of a file alone, or of a list of several, their names and SHA-256.

    >>> digest_of({"cell.py": b""}) == hashlib.sha256().hexdigest()
    True
    """
    each = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    if len(each) == 1:
        return next(iter(each.values()))
    return hashlib.sha256(repr(sorted(each.items())).encode()).hexdigest()


def same_program(a: bytes, b: bytes) -> bool:
    """Whether two Python files differ in comments and layout alone.

    >>> same_program(b"x = 1  # one", b"# two\\nx = (1)"), same_program(b"x = 1", b"x = 2")
    (True, False)
    """
    if a == b:
        return True
    try:
        first, second = (ast.dump(ast.parse(source)) for source in (a, b))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return first == second


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{user_line(error)}"
