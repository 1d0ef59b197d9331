"""The examples in docstrings, README and docs run, and what they point to exists."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lstmjax
from lstmjax.cells import LSTM, Cell, check_contract, load_cell
from lstmjax.models import SequenceConfig
from lstmjax.recurrence import unroll
from lstmjax.tasks import load_task

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
MODULES = sorted(m.name for m in pkgutil.walk_packages(lstmjax.__path__, "lstmjax."))


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"jax": jax, "jnp": jnp}).failed == 0


@pytest.mark.parametrize("page", ["README.md", "docs/modify_the_cell.md"])
def test_the_cell_on_the_page_is_a_cell(page, tmp_path):
    file = tmp_path / "my_cell.py"
    file.write_text(blocks(page)[0])
    assert isinstance(load_cell(f"{file}:CoupledLSTM", 5), Cell)


def test_the_readmes_program_runs():
    names = {}
    exec(blocks("README.md")[1], names)
    assert names["hs"].shape == (64, 500, 100)
    assert names["final"].state.c.shape == (64, 100)


@pytest.mark.slow
def test_the_programs_of_the_guide_run():
    """All in one, as a notebook; its cells keep the contract."""
    names = {"x": jnp.ones((2, 6, 32)), "lengths": jnp.array([6, 3])}
    for block in blocks("docs/modify_the_cell.md"):
        if block.startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(block, dict(names), "guide", None, 0)
            assert doctest.DocTestRunner().run(test).failed == 0
        else:
            exec(block, names)
    own = {n: a for n, a in names.items() if isinstance(a, type) and issubclass(a, Cell)}
    written = [a(8) for a in own.values() if a.__module__ == "builtins"]
    assert len(written) > 12
    for cell in written:
        check_contract(cell)


def test_a_cell_may_have_hyper_parameters_as_the_guide_says():
    class Leaky(Cell):
        gates = ("a",)
        uses_h = True
        leak: float = 0.5

        def step(self, pre, state, params, h):
            return (1 - self.leak) * h + self.leak * jnp.tanh(pre.a), state

    cell = Leaky(4, leak=0.1)
    check_contract(cell)
    params = cell.init(jax.random.key(0), 3)
    fast, slow = (unroll(c, params, jnp.ones((1, 6, 3)))[0] for c in (Leaky(4, leak=0.9), cell))
    assert float(jnp.abs(fast - slow).max()) > 0.01


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page):
    text = (ROOT / page).read_text()
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / target).exists(), target
    for name in re.findall(r"\b(?:lstmjax|tests|docs|experiments)/[\w/]+\.(?:py|md)\b", text):
        assert (ROOT / name).exists(), name


def test_the_task_on_the_page_is_a_task(tmp_path):
    """Where it says so, the bit of five steps ago is asked for."""
    file = tmp_path / "my_task.py"
    file.write_text(blocks("docs/workbench.md")[0])
    task = load_task(f"{file}:LastBit(delay=3)")
    batch = next(task.train(4).epoch(0, 0))
    for row, labels, weights in zip(batch.ids, batch.labels, batch.weights, strict=True):
        assert [*labels[weights > 0]] == [*row[:-3]]
    model = task.make_model(LSTM(3), SequenceConfig(hidden_size=3), rngs=nnx.Rngs(0))
    assert model(batch.ids).shape == batch.labels.shape
