"""Verdicts over real comparisons whose truth is known, a hundred of them: with ``make long``."""

import pathlib

import numpy as np
import pytest
from crashes import LONG

from lstmjax import statistics
from lstmjax.statistics import ALPHA, POWER
from lstmjax.workbench.compare import Comparing, compare

pytestmark = pytest.mark.usefixtures("as_for_users")

COMPARISONS, SEEDS = 100, 8
CELLS = """
import jax
from lstmjax.cells import LSTM


class Again(LSTM):
    # The same cell, drawn from other random numbers.

    def init(self, key, *sizes, **more):
        return super().init(jax.random.fold_in(key, 1), *sizes, **more)


class Leaky(Again):
    # Worse by construction: what it was to remember fades.

    def step(self, pre, state, params):
        return super().step(pre, state._replace(c=0.65 * state.c), params)
"""


def verdicts(one, other, seeds, higher_is_better):
    """Of comparisons of so many seeds each, as many as there are."""
    names, found = [*one], []
    for first in range(0, len(names) - seeds + 1, seeds):
        group = names[first : first + seeds]
        values = {"one": {s: one[s] for s in group}, "other": {s: other[s] for s in group}}
        (told,) = statistics.compare(values, higher_is_better=higher_is_better)
        found.append(told.verdict)
    return np.array(found)


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="2,400 runs: make long")
def test_comparisons_find_what_is_there_and_nothing_else():
    """Of the same cell twice at most the stated share differs; of a worse one most do."""
    pathlib.Path("known.py").write_text(CELLS)
    asked = Comparing(
        cells=("LSTM", "known.py:Again", "known.py:Leaky"),
        tasks=("adding(length=4,updates=100,test_rows=500)",),
        seeds=COMPARISONS * SEEDS,
        at_once=100,
        epochs=1,
        hidden_size=8,
        batch_size=32,
        learning_rates=(3e-2,),
        accelerator="cpu",
    )
    (report,) = compare(asked)
    lstm, again, leaky = (report.values(name) for name in ("LSTM", "Again", "Leaky"))

    alarms = np.mean(verdicts(lstm, again, SEEDS, False) != "not shown")
    differences = np.array([leaky[seed] - lstm[seed] for seed in lstm])
    enough = statistics.seeds_needed(differences.std(ddof=1), differences.mean())
    found = verdicts(lstm, leaky, enough, False)
    shown = np.mean(found == "worse")
    print(
        f"\nof {COMPARISONS} comparisons of {SEEDS} seeds of one cell twice {alarms:.0%} found "
        f"a difference; of {len(found)} with {enough} seeds of a worse one {shown:.0%}, "
        f"{np.mean(found == 'better'):.0%} the wrong way"
    )
    assert alarms <= ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / COMPARISONS)
    assert 6 <= enough <= 16
    assert shown >= POWER - 3 * np.sqrt(POWER * (1 - POWER) / len(found))
    assert not np.any(found == "better")
