"""How things print: as the call that makes them; and tables, in a terminal and in a notebook."""

import base64
import dataclasses
import html
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def as_call(name: str, positional: Sequence[object], named: Mapping[str, object]) -> str:
    """A call as it is written.

    >>> as_call("Recurrent", ["LSTM", 32], {"reverse": True})
    "Recurrent('LSTM', 32, reverse=True)"
    """
    parts = [*map(_value, positional), *(f"{key}={_value(a)}" for key, a in named.items())]
    return f"{name}({', '.join(parts)})"


def _value(value: object) -> str:
    """Functions and types of numbers by their names."""
    if isinstance(value, np.dtype):
        return repr(value.name)
    named = callable(value) and not dataclasses.is_dataclass(value)
    return getattr(value, "__name__", repr(value)) if named else repr(value)


def fields_as_call(value: Any) -> str:
    """A dataclass as the call that makes it: what must be given, then what is not the default.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Sizes:
    ...     hidden: int
    ...     layers: int = 1
    ...     words: int = 5000
    >>> fields_as_call(Sizes(8, words=100))
    'Sizes(8, words=100)'
    """
    positional: list[object] = []
    named: dict[str, object] = {}
    for field in dataclasses.fields(value):
        found, made = getattr(value, field.name), field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        if default is dataclasses.MISSING and not field.kw_only:
            positional.append(found)
        elif found != default:
            named[field.name] = found
    return as_call(type(value).__name__, positional, named)


class InitSignature:
    """As ``__signature__`` of a class: that of its ``__init__``, which NNX's metaclass hides.

    Args:
        settings: the class whose arguments ``**settings: Unpack[...]`` are handed on to.
        without: those of them that cannot be.
    """

    def __init__(self, settings: type | None = None, without: Sequence[str] = ()) -> None:
        self._settings, self._without = settings, without

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is not None:  # an instance has that of its __call__
            raise AttributeError("__signature__")
        own = inspect.signature(owner.__init__)  # type: ignore[misc]
        named = [p for p in [*own.parameters.values()][1:] if p.kind is not p.VAR_KEYWORD]
        if self._settings is not None:
            (handed_on,) = (p for p in own.parameters.values() if p.kind is p.VAR_KEYWORD)
            (keys,) = handed_on.annotation.__args__
            theirs = inspect.signature(self._settings).parameters
            known = {p.name for p in named} | {*self._without}
            named += [p for n, p in theirs.items() if n in keys.__annotations__ and n not in known]
        return own.replace(parameters=named)


class Shown:
    """A module that prints as the call that makes it, parameters aside."""

    __signature__ = InitSignature()

    def _made_of(self) -> Mapping[str, object]:
        """Arguments of ``__init__`` that are kept in another form."""
        return {}

    def __repr__(self) -> str:
        kind = type(self)
        try:
            known = {**self._made_of(), **vars(self)}
        except (AttributeError, KeyError):  # not whole yet
            return object.__repr__(self)
        positional: list[object] = []
        named: dict[str, object] = {}
        for p in inspect.signature(kind).parameters.values():
            value = known.get(p.name, p.default)
            if p.name not in known or (p.default is not p.empty and value == p.default):
                continue
            if p.kind is p.KEYWORD_ONLY:
                named[p.name] = value
            else:
                positional.append(value)
        return as_call(kind.__name__, positional, named)


class Table(str):
    """A table as text, which prints as it reads; in a notebook it is shown as one.

    >>> table = Table.of([["layer", "parameters"], ["dense", "21"]], ["total", "21"])
    >>> print(table)
    layer  parameters
    -----------------
    dense          21
    -----------------
    total          21
    """

    rows: Sequence[Sequence[str]]
    """The first is the heading."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[str]], total: Sequence[str] = ()) -> "Table":
        """Rows of equally many texts, the last column to the right; and one under a rule."""
        table = [*rows, total] if total else [*rows]
        wide = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for row in table:
            cells = [f"{a:<{n}}" for a, n in zip(row[:-1], wide[:-1], strict=True)]
            lines.append("  ".join([*cells, f"{row[-1]:>{wide[-1]}}"]))
        rule = "-" * len(lines[0])
        body = [lines[0], rule, *lines[1 : len(rows)], *([rule, lines[-1]] if total else [])]
        made = cls("\n".join(body))
        made.rows = table
        return made

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html_table(self.rows)


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table, its first row the heading, its first column names.

    >>> html_table([["cell", "p"], ["LSTM", "< 0.1"]])
    '<table><tr><th>cell</th><th>p</th></tr><tr><td>LSTM</td><td>&lt; 0.1</td></tr></table>'
    """

    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(a)}</{tag}>' for a in cells)}</tr>"

    head, *body = rows
    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in body)}</table>"


def html_picture(png: bytes) -> str:
    """A picture that stands in the page itself."""
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}">'
