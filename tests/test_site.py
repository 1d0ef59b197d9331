"""Every public name has a docstring, a place in the reference, and is shown at work somewhere.

`make docs` builds the site, where a dead link or a warning is an error; this needs no builder.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import pathlib
import pkgutil
import re
import typing

import pytest

import lstmjax
from lstmjax.cells import Cell
from lstmjax.recurrence import Engine
from lstmjax.tasks import Task
from tests.test_docs import PAGES, ROOT, code

SOURCES = sorted(pathlib.Path(lstmjax.__file__).parent.rglob("*.py"))
REFERENCE = sorted((ROOT / "docs/reference").glob("*.md"))
LISTS = {"lstmjax", "lstmjax.workbench.rows"}
"""Modules whose ``__all__`` has names of others."""
INSIDE = {"lstmjax.traced", "lstmjax.training", "lstmjax.aot.gpu", "lstmjax.aot.tpu"}
"""What engines and commands are made of: described, without an example of each."""


@functools.cache
def modules():
    """Every module that says what is public."""
    found = {"lstmjax": lstmjax}
    for info in pkgutil.walk_packages(lstmjax.__path__, "lstmjax."):
        if not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            if "__all__" in vars(module):
                found[info.name] = module
    return found


NAMES = [(m, n) for m, module in modules().items() if m not in LISTS for n in module.__all__]


@functools.cache
def on_pages():
    """The public names that a page of the reference takes from their docstrings."""
    found = []
    for page in REFERENCE:
        entries = re.finditer(r"^::: ([\w.]+)\n((?:^ .*\n)*)", page.read_text(), re.M)
        for entry in entries:
            members = re.search(r"members: \[([^\]]*)\]", entry[2])
            names = re.findall(r"\w+", members[1]) if members else modules()[entry[1]].__all__
            found += [(entry[1], name) for name in names]
    return found


def docstring(module, name):
    """That of a class or function; of anything else the text behind its assignment."""
    value = getattr(modules()[module], name)
    if inspect.isclass(value) or function(value):
        own = value.__doc__ or ""
        return "" if own.startswith(f"{name}(") else inspect.cleandoc(own)
    return assigned().get(name, "")


@functools.cache
def assigned():
    """The text behind each assignment of the package, by name."""
    found = {}
    for file in SOURCES:
        nodes = ast.walk(ast.parse(file.read_text()))
        bodies = [
            b for node in nodes for b in (getattr(node, "body", 0), getattr(node, "orelse", 0))
        ]
        for body in (body for body in bodies if isinstance(body, list)):
            for node, after in itertools.pairwise(body):
                target = node.targets[0] if isinstance(node, ast.Assign) else node
                target = getattr(target, "target", target)
                if isinstance(target, ast.Name) and isinstance(after, ast.Expr):
                    found.setdefault(target.id, ast.unparse(after))
    return found


def test_every_public_name_is_on_one_page():
    assert sorted(on_pages()) == sorted(NAMES)


def test_what_is_imported_from_the_top_is_described_where_it_is_from():
    described = {name for _, name in NAMES}
    assert {*lstmjax.__all__} - described == {"__version__"}
    overview = (ROOT / "docs/reference/index.md").read_text()
    linked = set(re.findall(r"\[`(\w+)`\]\[", overview))
    cells = {n for n in lstmjax.__all__ if n in vars(importlib.import_module("lstmjax.cells"))}
    assert {*lstmjax.__all__} - cells - linked == {"__version__"}


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_public_name_has_a_docstring(module, name):
    assert len(docstring(module, name).split()) > 1


def function(value):
    return callable(value) and inspect.isfunction(inspect.unwrap(value))


def called(value):
    """Whether it is something that a user calls, rather than is given or derives from."""
    if function(value):
        return True
    if not inspect.isclass(value) or (value.__doc__ or "").startswith("Base of "):
        return False
    given = (tuple, list, dict, Exception, typing.Protocol)
    record = dataclasses.is_dataclass(value) and not issubclass(value, Cell | Engine | Task)
    return not (record or inspect.isabstract(value) or any(k in value.__mro__ for k in given))


@functools.cache
def at_work():
    """Every word of the code on all pages, in notebooks, and in the examples of docstrings."""
    text = " ".join(block.code for page in PAGES for block in code(page))
    for file in SOURCES:
        text += "".join(re.findall(r"^ *(?:>>>|\.\.\.) .*\n", file.read_text(), re.M))
    notebooks = "".join(p.read_text() for p in (ROOT / "docs/notebooks").glob("*.ipynb"))
    return set(re.findall(r"\w+", text + notebooks))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (module, name)
        for module, name in NAMES
        if module not in INSIDE and called(getattr(modules()[module], name))
    ],
)
def test_every_name_that_a_user_calls_is_shown_at_work(module, name):
    assert ">>> " in docstring(module, name) or name in at_work()
