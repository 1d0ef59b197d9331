"""One file from a paper to a verdict: a cell is written, checked, trained, compared, and used."""

import pathlib

import jax
import pytest

from lstmjax import check_cell, load_run
from lstmjax.cells import load_cell
from lstmjax.workbench.compare import Comparing, compare

CELL = '''
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid

from lstmjax import Cell


class Mine(Cell):
    """Keeps what the gate keeps of the running maximum."""

    gates = ("f", "g")
    bias_init = {"f": 1.0}

    class State(NamedTuple):
        m: Array

    def step(self, pre, state, params):
        m = jnp.maximum(sigmoid(pre.f) * state.m, jnp.tanh(pre.g))
        return jnp.tanh(m), self.State(m)
'''


pytestmark = pytest.mark.usefixtures("as_for_users")


@pytest.mark.slow
def test_one_file_from_a_paper_to_a_verdict():
    pathlib.Path("mine.py").write_text(CELL)
    assert check_cell(load_cell("mine.py:Mine", 4), speed=False, targets=()).ok
    (report,) = compare(
        Comparing(
            cells=("LSTM", "mine.py:Mine"),
            tasks=("demo(size=40,top_words=60,max_length=16,buckets=1)",),
            seeds=8,
            hidden_size=3,
            batch_size=8,
            epochs=1,
            accelerator="cpu",
        )
    )
    (verdict,) = report.verdicts
    assert verdict.seeds == tuple(range(8))
    assert verdict.verdict in ("better", "worse", "not shown")  # with eight seeds there is one
    entry = report.entries["Mine"]
    best = max(entry.rows.values(), key=lambda row: row.validation)
    model = load_run(entry.unit.folder / "seeds0-7" / f"seed{best.seed}")
    assert type(model.module.recurrent.layers[0].cell).__name__ == "Mine"
    probabilities = model.predict(["the bed was lovely and the soup was fresh", "it was filthy"])
    assert probabilities.shape == (2,)
    assert ((probabilities > 0) & (probabilities < 1)).all()
