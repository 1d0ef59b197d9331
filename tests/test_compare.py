"""Comparisons: what is run and what is not, the choice of the learning rate, verdicts, output."""

import csv
import io
import json
import math
import pathlib
import signal

import jax
import numpy as np
import pytest

from lstmjax import files, training
from lstmjax.errors import UserError
from lstmjax.training import NonFiniteLossError
from lstmjax.workbench import compare as module
from lstmjax.workbench.compare import Comparing, compare, units_for, units_of
from lstmjax.workbench.rows import Row, outcome_of

TASK = "parity(length=4,updates=2,test_rows=32)"
TINY = {"tasks": (TASK,), "epochs": 1, "batch_size": 8, "hidden_size": 3, "accelerator": "cpu"}


pytestmark = pytest.mark.usefixtures("as_for_users")


def made_up(monkeypatch, value, validation=None):
    """In place of training, ``value(config, seed)``; returns what was asked for."""
    asked = []

    def train(config):
        asked.append((config.cell, config.learning_rates, [r.seed for r in config.replicas]))
        rows = []
        for replica in config.replicas:
            found = value(config, replica.seed)
            known = found if validation is None else validation(config, replica.seed)
            rows.append(Row(*replica, known, {"test": found, "test_2x": found}, {}))
        files.make_folder(config.run_dir)
        files.publish_json(config.run_dir / "config.json", {})
        files.publish_json(
            config.run_dir / "result.json", outcome_of(config.sizes.metric, rows, True)
        )
        return rows

    monkeypatch.setattr(module, "train", train)
    return asked


def noise(seed, scale=0.01):
    return scale * np.random.default_rng(seed).normal()


@pytest.mark.slow
def test_a_real_comparison(monkeypatch, capsys):
    """The same cell under two names differs by nothing, though the second run was stopped."""
    pathlib.Path("mine.py").write_text(
        "from lstmjax.cells import LSTM\nclass Mine(LSTM):\n    pass\n"
    )
    asked = Comparing(cells=("LSTM", "mine.py:Mine"), seeds=2, **TINY)
    fit, begun = training.fit, []

    def told(*arguments, **more):
        begun.append(more["resume"])
        if len(begun) == 2:
            raise training.Interrupted(signal.SIGTERM)
        return fit(*arguments, **more)

    monkeypatch.setattr(training, "fit", told)
    with pytest.raises(training.Interrupted):
        compare(asked)
    (report,) = compare(asked)
    assert begun == [True, True, True]
    assert report.values("LSTM") == report.values("Mine")
    assert "No verdict on Mine and LSTM: 2 seeds cannot reach p < 0.05, 6 can" in str(
        report.verdicts[0]
    )
    out = capsys.readouterr().out
    assert "| LSTM | 3 |" in out
    folder = pathlib.Path("runs/comparison")
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    table = [*csv.DictReader(io.StringIO((folder / "comparison.csv").read_text()))]
    assert [(line["cell"], line["seed"]) for line in table] == [
        ("LSTM", "0"), ("LSTM", "1"), ("Mine", "0"), ("Mine", "1"),
    ]  # fmt: skip
    (found,) = json.loads((folder / "comparison.json").read_text())
    assert float(table[0]["test"]) == found["cells"]["LSTM"]["runs"][0]["test"]["test"]
    assert found["verdicts"][0]["verdict"] == "too few seeds"


def test_what_is_finished_is_not_repeated(monkeypatch):
    asked = made_up(monkeypatch, lambda config, seed: 0.5 + noise(seed))
    first = {"learning_rates": (1e-3, 1e-2), **TINY}
    compare(Comparing(seeds=3, at_once=2, **first))
    assert len(asked) == 2 * 2 * 2
    assert asked[0] == ("LSTM", (1e-3,), [0, 1])
    assert asked[1] == ("LSTM", (1e-3,), [2])
    asked.clear()
    compare(Comparing(seeds=3, **first))
    assert asked == []
    compare(Comparing(seeds=5, cells=("LSTM", "GRU", "MGU"), **first))
    assert asked == [
        *((cell, (rate,), [3, 4]) for cell in ("LSTM", "GRU") for rate in (1e-3, 1e-2)),
        *(("MGU", (rate,), [0, 1, 2, 3, 4]) for rate in (1e-3, 1e-2)),
    ]
    asked.clear()
    compare(Comparing(seeds=1, **{**first, "hidden_size": 4}))
    assert len(asked) == 4  # another size, other runs


def test_an_edited_cell_is_another_cell(monkeypatch):
    asked = made_up(monkeypatch, lambda config, seed: 0.5)
    text = "from lstmjax.cells import LSTM\nclass Mine(LSTM):\n    bias_init = {'f': %s}\n"
    for forget, runs in ((1.0, 2), (2.0, 1), (1.0, 0)):
        pathlib.Path("mine.py").write_text(text % forget)
        asked.clear()
        compare(Comparing(cells=("LSTM", "mine.py:Mine"), seeds=1, **TINY))
        assert len(asked) == runs


def test_a_cell_whose_neighbour_was_edited_is_another_cell(monkeypatch):
    asked = made_up(monkeypatch, lambda config, seed: 0.5)
    for folder in ("one", "two"):
        pathlib.Path(folder).mkdir()
        pathlib.Path(folder, "mine.py").write_text(
            "from lstmjax.cells import LSTM\nfrom beside_mine import K\n"
            "class Mine(LSTM):\n    bias_init = {'f': K}\n"
        )
    cells = ("one/mine.py:Mine", "two/mine.py:Mine")
    for one, two, runs in ((1.0, 1.0, 1), (1.0, 2.0, 1), (3.0, 2.0, 1), (1.0, 2.0, 0)):
        pathlib.Path("one/beside_mine.py").write_text(f"K = {one}\n")
        pathlib.Path("two/beside_mine.py").write_text(f"K = {two}\n")
        asked.clear()
        compare(Comparing(cells=cells, seeds=1, **TINY))
        assert len(asked) == runs


LAST_BIT = """
import dataclasses
import numpy as np
from lstmjax.tasks import Generated, Sample
@dataclasses.dataclass(frozen=True)
class LastBit(Generated):
    per_step, tokens, chance = True, 2, 0.5
    def draw(self, random, rows):
        x = random.integers(0, 2, (rows, 6), np.int32)
        return Sample(x, np.roll(x, {}, axis=1), np.ones(x.shape, bool))
"""


def test_a_task_or_data_that_were_edited_are_others(monkeypatch):
    asked = made_up(monkeypatch, lambda config, seed: 0.5)
    own = {**TINY, "tasks": ("bit.py:LastBit(updates=2)", "text(file='t.csv', tokenizer='t.py:f')")}
    for delay, word, letters, runs in ((2, "a", "", 4), (3, "a", "", 2), (3, "b", "", 2),
                                       (3, "b", "[:1]", 2), (2, "a", "", 0)):  # fmt: skip
        pathlib.Path("bit.py").write_text(LAST_BIT.format(delay))
        pathlib.Path("t.py").write_text(f"def f(text):\n    return text{letters}.split()\n")
        rows = "".join(f"{word}{n} word,{n % 2}\n" for n in range(60))
        pathlib.Path("t.csv").write_text(f"text,label\n{rows}")
        asked.clear()
        compare(Comparing(seeds=1, **own))
        assert len(asked) == runs


def test_rates_that_are_near_are_two(monkeypatch):
    asked = made_up(monkeypatch, lambda config, seed: 0.5)
    near = (1e-3, 1.0000002e-3, 1e-3)
    (report,) = compare(Comparing(seeds=1, learning_rates=near, **TINY))
    assert len(asked) == 4
    assert len(report.entries["GRU"].tried) == 2


def test_several_share_a_folder(monkeypatch, capsys):
    """A unit that another process is at is left to it, and looked at again at the end."""
    asked = made_up(monkeypatch, lambda config, seed: 0.5)
    config = Comparing(seeds=1, cells=("LSTM", "GRU", "MGU"), **TINY)
    theirs = units_of(config)[0]
    files.make_folder(theirs.folder)
    lock = files.Lock(theirs.folder)
    lock.take(wait=True)
    take, order = files.Lock.take, []

    def taken(self, wait):
        order.append(wait)
        if wait:
            lock.release()  # they have stopped before the end
        take(self, wait)

    monkeypatch.setattr(files.Lock, "take", taken)
    compare(config)
    assert [cell for cell, *_ in asked] == ["GRU", "MGU", "LSTM"]
    assert order == [False, False, False, True]
    assert "waiting for another process" in capsys.readouterr().out


def test_the_learning_rate_is_chosen_on_validation_data(monkeypatch):
    """Of LSTM the small one is best on validation data, and worse on test data."""

    def value(config, seed):
        return 0.9 if config.learning_rates == (1e-2,) else 0.5

    def validation(config, seed):
        (rate,) = config.learning_rates
        return {1e-3: 0.6, 1e-2: 0.5 if config.cell == "LSTM" else 0.7, 1e-1: math.nan}[rate]

    made_up(monkeypatch, value, validation)
    (report,) = compare(Comparing(seeds=6, learning_rates=(1e-3, 1e-2, 1e-1), **TINY))
    assert report.entries["LSTM"].unit.learning_rate == 1e-3
    assert report.entries["GRU"].unit.learning_rate == 1e-2
    assert report.entries["LSTM"].tried == {1e-3: 0.6, 1e-2: 0.5, 1e-1: None}
    (verdict,) = report.verdicts
    assert verdict.verdict == "better"
    assert verdict.mean == pytest.approx(40)
    assert "At the edge" in module.markdown(report)
    assert "LSTM; a wider range" in module.markdown(report)


def test_runs_that_diverge_count_as_chance(monkeypatch):
    def value(config, seed):
        return math.nan if (config.cell, seed) == ("GRU", 2) else 0.8

    made_up(monkeypatch, value)
    (report,) = compare(Comparing(seeds=3, **TINY))
    assert report.values("GRU") == {0: 80.0, 1: 80.0, 2: 50.0}
    assert "Diverged, and counted as chance, 50.00 %: GRU seed 2" in module.markdown(report)


def test_a_run_that_diverges_gains_nothing(monkeypatch):
    """All others are worse than chance; the line of each run says what counts."""

    def value(config, seed):
        return math.nan if (config.cell, seed) == ("GRU", 2) else 0.3 - 0.01 * seed

    made_up(monkeypatch, value)
    (report,) = compare(Comparing(seeds=8, **TINY))
    assert report.values("GRU")[2] == pytest.approx(23)
    assert "counted as the worst of all other runs, 23.00 %" in module.markdown(report)
    lines = csv.DictReader(pathlib.Path("runs/comparison/comparison.csv").read_text().splitlines())
    counted = [float(line["counted"]) for line in lines if line["cell"] == "GRU"]
    assert [100 * a for a in counted] == pytest.approx([*report.values("GRU").values()])


@pytest.mark.parametrize("lost", ["LSTM", "GRU"])
def test_on_a_cell_that_always_diverges_there_is_no_verdict(monkeypatch, lost):
    made_up(monkeypatch, lambda config, seed: math.nan if config.cell == lost else 0.3)
    cells = ("LSTM", "GRU", "SimpleRNN")
    (report,) = compare(Comparing(cells=cells, seeds=8, **TINY))
    assert [v.a for v in report.verdicts] == (["SimpleRNN"] if lost == "GRU" else [])
    text = module.markdown(report)
    assert f"No verdict on {lost}: every run diverged." in text
    assert "| diverged |" in next(line for line in text.splitlines() if f"| {lost} |" in line)


def test_a_cell_that_always_diverges_is_told(monkeypatch):
    def train(config):
        files.make_folder(config.run_dir)
        raise NonFiniteLossError("loss is nan")

    monkeypatch.setattr(module, "train", train)
    (report,) = compare(Comparing(seeds=2, **TINY))
    assert len(report.diverged) == 4
    assert not report.verdicts


def test_the_figures_are_those_of_the_right_seeds(monkeypatch):
    """Paired: a difference far below the spread of the seeds is seen."""

    def value(config, seed):
        return 0.5 + noise(seed, 0.05) + (0.01 + noise(seed + 99, 0.001)) * (config.cell == "GRU")

    made_up(monkeypatch, value)
    (report,) = compare(Comparing(seeds=8, seed=3, **TINY))
    (verdict,) = report.verdicts
    assert verdict.verdict == "better"
    assert verdict.seeds == tuple(range(3, 11))
    assert 0.8 < verdict.mean < 1.2


def test_equal_numbers_of_parameters():
    cells = ("LSTM", "GRU", "SimpleRNN")
    asked = Comparing(cells=cells, match="parameters", **{**TINY, "hidden_size": 12})
    lstm, gru, simple = units_of(asked)
    assert lstm.config.model.hidden_size == 12
    assert gru.config.model.hidden_size == 15
    for unit in (gru, simple):
        assert abs(unit.parameters / lstm.parameters - 1) < 0.06
    assert units_for(even, 1250, 4) == 12
    assert units_for(even, 1310, 40) == 14


def even(units):
    if units % 2:
        raise ValueError("two heads do not divide the units")
    return 100 * units


def test_what_cannot_be_compared_is_told():
    for changes, message in (
        ({"cells": ("LSTM",)}, "--cells needs two different ones"),
        ({"cells": ("LSTM", "LSTM")}, "--cells needs two different ones"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"tasks": ("addin",)}, "no task 'addin'"),
        ({"cells": ("LSTM", "GRUU")}, "no cell 'GRUU'"),
        ({"learning_rates": (-1.0,)}, "--learning-rate must be positive"),
        ({"target": -1.0}, "--target must be at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            compare(Comparing(**{**TINY, **changes}))
    assert not pathlib.Path("runs").exists()


DAMAGED = {
    "empty": "",
    "no object": "[]",
    "cut": '{"replicas": [{"seed": 0',
    "no figures": '{"replicas": [{"seed": 0}]}',
    "no rows": '{"replicas": []}',
    "nothing": "{}",
    "words": '{"replicas": [{"seed": 0, "learning_rate": "x", "validation": 1, "test": {"a": 1}, '
    '"figures": {}}], "seeds": [null]}',
    "of others": '{"replicas": [{"seed": 5, "learning_rate": 1, "validation": 1, "test": {"a": 1}, '
    '"figures": {}}], "seeds": [5]}',
}


@pytest.mark.parametrize("name", ["result.json", "diverged.json"])
@pytest.mark.parametrize("how", DAMAGED)
def test_a_group_whose_outcome_is_damaged_is_run_again(monkeypatch, capsys, name, how):
    """The line names the file; what is sound is not run again, and the next start says nothing."""
    asked = made_up(monkeypatch, lambda config, seed: 0.5)
    config = Comparing(seeds=1, **TINY)
    compare(config)
    unit = units_of(config)[0]
    file = unit.folder / "seeds0-0" / name
    if name == "diverged.json":
        (file.parent / "result.json").unlink()
    file.write_text(DAMAGED[how])
    asked.clear()
    capsys.readouterr()
    (report,) = compare(config)
    assert [(cell, seeds) for cell, _, seeds in asked] == [("LSTM", [0])]
    assert report.values("LSTM") == {0: 50.0}
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "damaged" in text]
    assert str(file) in line
    assert line.endswith("its group is run again, from its checkpoints")
    assert (file.parent / f"damaged-{name}").read_text() == DAMAGED[how]
    compare(config)
    assert len(asked) == 1
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_damaged_result_is_what_it_was(capsys):
    asked = Comparing(seeds=2, **TINY)
    (before,) = compare(asked)
    for file in pathlib.Path("runs").rglob("seeds0-1/result.json"):
        file.write_bytes(b"")
    (after,) = compare(asked)
    assert capsys.readouterr().out.count("is damaged") == 2
    assert [after.values(name) for name in after.entries] == [
        before.values(name) for name in before.entries
    ]
