"""The worked examples of CONTRIBUTING.md, put where it says, pass what it says."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstmjax import GRU, LSTM, ZoneoutLSTM, cells, check_cell, load_cell, unroll
from lstmjax.cells.loading import run_file
from lstmjax.recurrence import choice
from lstmjax.tasks import load_task
from lstmjax.workbench import config_of, train
from tests import references, test_contract, test_every_cell, test_tasks

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
ENGINES = (ROOT / "docs" / "engines.md").read_text()  # where the page has its engine
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE + ENGINES, re.M | re.S)


@pytest.fixture
def example(tmp_path):
    """Writes the block that has some words to a file."""

    def write(words, name):
        (block,) = [block for block in BLOCKS if words in block]
        (tmp_path / name).write_text(block)
        return tmp_path / name

    return write


@pytest.fixture
def leaky(example, monkeypatch):
    """The cell and its twin, each in its place."""
    cell = load_cell(f"{example('class LeakyRNN', 'leaky.py')}:LeakyRNN", 5)
    twin = vars(run_file(str(example("def leaky_rnn", "twin.py"))))["leaky_rnn"]
    line = re.search(r'^    "LeakyRNN": (Paper\(.*\)),$', PAGE, re.M)[1]
    monkeypatch.setattr(cells, "LeakyRNN", type(cell), raising=False)
    monkeypatch.setattr(references.gated, "leaky_rnn", twin, raising=False)
    monkeypatch.setitem(references.PAPERS, "LeakyRNN", eval(line, vars(references)))
    return cell, twin


@pytest.mark.parametrize(("engine", "reverse"), [("scan", False), ("derived", True)])
def test_the_cell_is_what_its_twin_is(leaky, engine, reverse):
    test_every_cell.test_a_paper_cell_agrees_with_its_paper("LeakyRNN", engine, reverse)


@pytest.mark.slow
def test_the_cell_passes_every_check(leaky):
    cell, twin = leaky

    def reference(*args):
        h, state, _ = twin(*args)
        return h, state

    report = check_cell(cell, reference=reference, speed=False, targets=())
    assert report.ok, report
    assert report["reference"].status == "ok"


def test_the_task_trains_from_its_file(example, as_for_users, tmp_path):
    spec = f"{example('class Majority', 'majority.py')}:Majority"
    sample = load_task(f"{spec}(length=3)").draw(np.random.default_rng(0), 50)
    ones = [sum(x) for x in sample.x.tolist()]
    assert [n >= 2 for n in ones] == sample.labels.astype(bool).tolist()
    test_tasks.test_a_batch_is_a_function_of_seed_and_step(load_task(f"{spec}(length=31)"))
    asked = config_of(f"{spec}(length=5,updates=40,test_rows=256)")
    model = dataclasses.replace(asked.model, hidden_size=8, embedding_size=4)
    (row,) = train(dataclasses.replace(asked, epochs=2, model=model, run_dir=tmp_path / "run"))
    assert row.test["test"] > 0.7  # chance is 0.5


@pytest.fixture
def written_out(example, monkeypatch):
    """The engine, in its line of `ENGINES`."""
    engine = vars(run_file(str(example("class WrittenOut", "engine.py"))))["WrittenOut"]()
    monkeypatch.setitem(choice.ENGINES, engine.name, engine)
    return engine


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", [LSTM(6), GRU(6), ZoneoutLSTM(6)], ids=repr)
def test_the_engine_is_the_plain_scan_to_rounding(written_out, cell, reverse):
    keys = jax.random.key(3) if cell.noise else None
    options = {"keys": keys, "reverse": reverse, "return_states": True, **test_contract.FLAGS}
    test_contract.agree(cell, written_out.name, **options)


def test_the_engine_is_asked_for_by_name_or_not_at_all(written_out):
    params, x = test_contract.draw(LSTM(6))
    run = functools.partial(unroll, LSTM(6), params)
    assert run(x, engine="written_out")[0].shape == run(x)[0].shape
    with pytest.raises(ValueError, match=r"cannot run LSTM\(6\): it writes out 32 steps at most"):
        run(jnp.ones((1, 33, 3)), engine="written_out")


def test_every_command_is_one_of_make():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    commands = re.findall(r"^ +make ((?:[a-z]+-?)+(?: [a-z-]+)*)", PAGE, re.M)
    assert {"test-fast", "test", "lint"} <= {*targets}
    for command in commands:
        first = command.split()[0]
        assert first in targets, command
