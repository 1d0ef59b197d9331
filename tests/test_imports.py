"""What a program imports from the top, and what that costs."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import lstmjax
from lstmjax import cells

ROOT = pathlib.Path(__file__).parent.parent


def modules_after(code):
    """The modules that a new interpreter has loaded after running ``code``."""
    code = f"{code}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_loads_nothing_that_jax_does_not():
    jax, both = modules_after("import jax"), modules_after("import jax, lstmjax")
    assert len({name for name in both - jax if not name.startswith("__editable__")}) == 1
    assert "jax" not in modules_after("import lstmjax; dir(lstmjax)")


def test_a_cell_is_loaded_without_flax():
    loaded = modules_after("from lstmjax import LSTM, unroll; import lstmjax; lstmjax.__version__")
    assert not loaded & {"flax", "optax", "matplotlib", "tensorflow_datasets", "lstmjax.layers"}


@pytest.mark.parametrize("name", lstmjax.__all__)
def test_every_name_can_be_imported(name):
    found = getattr(lstmjax, name)
    assert found is getattr(lstmjax, name)
    assert name in dir(lstmjax)
    if name != "__version__":
        assert found.__module__.startswith("lstmjax."), found
        assert found.__doc__


def test_names_for_the_editor_are_those_that_are_there():
    tree = ast.parse(pathlib.Path(lstmjax.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    named = {
        (node.module, alias.name)
        for node in imports
        for alias in node.names
        if node.module.startswith("lstmjax.")
    }
    assert {name for _, name in named} == {*lstmjax.__all__} - {"__version__"}
    for module, name in named:
        assert getattr(lstmjax, name) is getattr(importlib.import_module(module), name)


def test_every_cell_is_at_the_top():
    assert {*cells.__all__} - {*lstmjax.__all__} == {
        "CellSpec",
        "Params",
        "cell_source",
        "source_digest",
    }


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert lstmjax.__version__ == project["version"]


def test_an_unknown_name_is_told():
    with pytest.raises(AttributeError, match="module 'lstmjax' has no attribute 'LSMT'"):
        lstmjax.LSMT  # noqa: B018


@pytest.mark.parametrize("page", ["README.md", "docs/modify_the_cell.md"])
def test_every_name_of_the_examples_is_at_the_top(page):
    text = (ROOT / page).read_text()
    modules = r"from lstmjax(?:\.(?:cells|recurrence|layers|models))? import ([\w, ]+)"
    names = {name for found in re.findall(modules, text) for name in found.split(", ")}
    assert names
    assert names <= {*lstmjax.__all__}
