"""The examples in docstrings and on all pages run, and what they point to exists."""

import ast
import doctest
import functools
import importlib
import importlib.util
import pathlib
import pkgutil
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lstmjax
from lstmjax.cells import LSTM, Cell, check_contract, load_cell
from lstmjax.models import SequenceConfig
from lstmjax.recurrence import unroll
from lstmjax.tasks import load_task

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = pathlib.Path(lstmjax.__file__).parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks/README.md")
)
MODULES = sorted(m.name for m in pkgutil.walk_packages(lstmjax.__path__, "lstmjax."))
PEERS = {"torch": "PyTorch", "keras": "Keras", "haiku": "Haiku", "equinox": "Equinox"}
NOT_RUN: dict[str, int] = {}
"""How many blocks of a page stand under ``<!-- not run: why -->``."""
SLOW = {
    "docs/modify_the_cell.md",
    "docs/trained_models.md",
    "docs/from_flax.md",
    "docs/from_haiku.md",
    "docs/from_keras.md",
    "docs/from_pytorch.md",
}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"jax": jax, "jnp": jnp}).failed == 0


# --- Code on pages -------------------------------------------------------------------------------


class Block(NamedTuple):
    """A block of Python on a page."""

    line: int
    code: str
    not_run: str | None


@functools.cache
def blocks(page):
    text = (ROOT / page).read_text()
    found = re.finditer(r"(?:<!-- not run: (.+?) -->\s*)?^```python\n(.*?)^```", text, re.M | re.S)
    return [Block(text[: m.start(2)].count("\n") + 1, m[2], m[1]) for m in found]


def code(page):
    return [block for block in blocks(page) if not block.not_run]


def imported(block):
    """The packages that a block imports."""
    if block.code.startswith(">>>"):
        return set()
    found = set()
    for node in ast.walk(ast.parse(block.code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.partition(".")[0] for name in names}
        if isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


def run(page, names):
    """All blocks of a page, one after the other, as in a notebook."""
    for line, text, _ in code(page):
        if text.startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(text, names, page, page, line)
            assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
            names |= test.globs
        else:
            exec(compile("\n" * (line - 1) + text, page, "exec"), names)


def before_data(names, monkeypatch, **_):
    """The demo corpus stands in for IMDB."""
    import lstmjax.data

    monkeypatch.setattr(
        lstmjax.data, "load_imdb", lambda split: lstmjax.data.load_demo(split, size=200)
    )


def before_guide(names, **_):
    names |= {"x": jnp.ones((2, 6, 32)), "lengths": jnp.array([6, 3])}


def before_trained_models(request, tmp_path, **_):
    """A run where the page has one."""
    shutil.copytree(request.getfixturevalue("trained_run"), tmp_path / "runs" / "x")


def after_readme(names):
    assert names["hs"].shape == (64, 500, 100)
    assert names["final"].state.c.shape == (64, 100)


def after_guide(names):
    """Its cells keep the contract."""
    own = {n: a for n, a in names.items() if isinstance(a, type) and issubclass(a, Cell)}
    written = [a(8) for a in own.values() if a.__module__ == "builtins"]
    assert len(written) > 12
    for cell in written:
        check_contract(cell)


def after_trained_models(names):
    """The exported programs agree on the text."""
    ids = names["ids"]
    whole = names["classify"](ids, np.array([ids.shape[1]], np.int32))
    assert float(whole[0]) == pytest.approx(float(names["so_far"][0]), rel=1e-4)


BEFORE = {
    "docs/data.md": before_data,
    "docs/modify_the_cell.md": before_guide,
    "docs/trained_models.md": before_trained_models,
}
AFTER = {
    "README.md": after_readme,
    "docs/modify_the_cell.md": after_guide,
    "docs/trained_models.md": after_trained_models,
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras'
@pytest.mark.usefixtures("as_for_users")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])
        for page in PAGES
        if code(page)
    ],
)
def test_the_code_on_a_page_runs(page, request, monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    peers = sorted(set().union(*map(imported, code(page))) & {*PEERS})
    for peer in peers:
        pytest.importorskip(peer, reason=f"{PEERS[peer]} is not installed")
    names = {}
    if page in BEFORE:
        BEFORE[page](names=names, request=request, monkeypatch=monkeypatch, tmp_path=tmp_path)
    with jax.numpy_rank_promotion("allow" if peers else "raise"):
        run(page, names)
    if page in AFTER:
        AFTER[page](names)


def test_blocks_that_do_not_run_are_those_listed():
    assert {page: len(blocks(page)) - len(code(page)) for page in PAGES} == {
        page: NOT_RUN.get(page, 0) for page in PAGES
    }


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/modify_the_cell.md"])
def test_the_cell_on_the_page_is_a_cell(page, tmp_path):
    file = tmp_path / "my_cell.py"
    file.write_text(blocks(page)[0].code)
    assert isinstance(load_cell(f"{file}:CoupledLSTM", 5), Cell)


def test_the_task_on_the_page_is_a_task(tmp_path):
    """Where it says so, the bit of five steps ago is asked for."""
    file = tmp_path / "my_task.py"
    file.write_text(blocks("docs/workbench.md")[0].code)
    task = load_task(f"{file}:LastBit(delay=3)")
    batch = next(task.train(4).epoch(0, 0))
    for row, labels, weights in zip(batch.ids, batch.labels, batch.weights, strict=True):
        assert [*labels[weights > 0]] == [*row[:-3]]
    model = task.make_model(LSTM(3), SequenceConfig(hidden_size=3), rngs=nnx.Rngs(0))
    assert model(batch.ids).shape == batch.labels.shape


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


# --- What pages point to -------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page):
    text = (ROOT / page).read_text()
    folder = (ROOT / page).parent
    made = {(ROOT / "docs/results.md").resolve()}  # from the README, by docs/_site/pages.py
    targets = [folder / a for a in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    named = re.findall(r"\b(?:lstmjax|tests|docs|experiments)/[\w/]+\.(?:py|md)\b", text)
    for path in {*targets, *(ROOT / name for name in named)}:
        place = path.resolve().relative_to(ROOT)
        root = PACKAGE.parent if place.parts[0] == "lstmjax" else ROOT  # it may be installed
        assert (root / place).exists() or path.resolve() in made, path


class Command(NamedTuple):
    """A line of a shell: what is run, and the options that are given to it."""

    program: str
    options: frozenset[str]
    task: str | None


@functools.cache
def commands():
    """Every command on every page that is the project's own."""
    program = r"python3?(?:\.\d+)? +((?:experiments|benchmarks|tests)/\w+\.py|-m +[a-z][\w.]*)"
    own = rf"(?:{program}|(?:(?<=`)|(?<=\n    ))(lstmjax +[a-z]+)\b)([^\n`|&;]*)"
    found = set()
    for page in PAGES:
        text = (ROOT / page).read_text().replace("\\\n", " ")
        for script, installed, rest in re.findall(own, text):
            options = re.findall(r"(?<![\w-])--([a-z][a-z-]*)", rest.partition("  #")[0])
            task = re.search(r"--task ([a-z0-9-]+)(?![\w.:-])", rest)  # of a file's own: none
            name = " ".join((script or installed).split())
            found.add(Command(name, frozenset(options) - {"help"}, task and task[1]))
    return sorted(found, key=str)


def test_programs_and_targets_on_pages_exist():
    assert len(commands()) > 20
    for name in {command.program for command in commands()}:
        if name.startswith("-m "):
            assert importlib.util.find_spec(name[3:]) is not None, name
        elif name.endswith(".py"):
            assert (ROOT / name).exists(), name
        else:
            assert importlib.util.find_spec(f"lstmjax.commands.{name.split()[1]}"), name
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        text = (ROOT / page).read_text()
        for target in re.findall(r"(?:`|^    |&& )make ([a-z][a-z-]*)", text, re.M):
            assert target in targets, (page, target)


def options_of(program, task):
    where = program.split() if program.startswith("-m ") else [program]
    if program.startswith("lstmjax "):
        where = ["-m", *program.split()]
    more = ["--task", task] if task else []
    done = subprocess.run(
        [sys.executable, *where, *more, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--([a-z][a-z-]*)", done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", sorted({c.program for c in commands() if c.options and "tests/" not in c.program})
)
def test_programs_have_the_options_that_pages_give_them(program, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("COLUMNS", "200")
    of_task = functools.cache(functools.partial(options_of, program))
    for command in commands():
        if command.program == program:
            assert command.options <= of_task(command.task), command
