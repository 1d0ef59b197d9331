"""Verdicts on cells: exact p-values, intervals as SciPy's, false alarms and power as promised."""

import doctest
import itertools

import numpy as np
import pytest
import scipy.stats

from lstmjax import statistics
from lstmjax.statistics import (
    ALPHA,
    POWER,
    bca_interval,
    compare,
    detectable_difference,
    fewest_seeds,
    holm,
    seeds_needed,
    sign_flip_test,
)

SKEWED = [0.1, 0.3, -0.2, 1.9, 0.4, 0.2, 0.9, 3.1]


def test_examples():
    assert doctest.testmod(statistics).failed == 0


def test_p_is_that_of_scipys_permutation_test():
    expected = scipy.stats.permutation_test(
        (SKEWED,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_test(SKEWED) == expected.pvalue
    assert sign_flip_test(np.zeros(8)) == 1


@pytest.mark.parametrize("n", [5, 6, 8])
def test_of_all_signs_at_most_five_percent_are_called_significant(n):
    """The test's level, exactly: under the hypothesis all signs are equally likely."""
    size = np.random.default_rng(n).exponential(size=n)
    p = np.array([sign_flip_test(size * s) for s in itertools.product((1, -1), repeat=n)])
    assert np.mean(p <= ALPHA) <= ALPHA
    assert np.any(p <= ALPHA) == (n >= fewest_seeds())
    assert p.min() == 2 / 2**n


def test_sampled_p_is_near_the_exact_one(monkeypatch):
    exact = sign_flip_test(SKEWED)
    monkeypatch.setattr(statistics, "_EXACT_PAIRS", 7)
    monkeypatch.setattr(statistics, "_subsets", None)
    assert abs(sign_flip_test(SKEWED) - exact) < 3 * np.sqrt(exact * (1 - exact) / 127)


def test_interval_is_that_of_scipys_bootstrap():
    expected = scipy.stats.bootstrap(
        (SKEWED,), np.mean, method="BCa", n_resamples=99_999, rng=np.random.default_rng(1)
    ).confidence_interval
    np.testing.assert_allclose(bca_interval(SKEWED), expected, atol=0.02)
    assert bca_interval([0.2, 0.2]) == (0.2, 0.2)


def test_holm_never_puts_a_smaller_p_behind_a_larger():
    np.testing.assert_allclose(holm([0.04, 0.01, 0.9, 0.011]), [0.08, 0.04, 0.9, 0.04])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def runs(rng, n, collapses=0.0):
    """A metric of n seeds; now and then a run ends far below the others."""
    return 88 + rng.normal(0, 0.4, n) - 10 * rng.exponential(size=n) * (rng.random(n) < collapses)


def verdicts(cells, seeds, shift=0.0, collapses=0.0, repeats=1_000):
    """Of so many comparisons with a baseline; the first cell is better by ``shift``."""
    rng, found = np.random.default_rng(17), []
    for _ in range(repeats):
        results = {k: runs(rng, seeds, collapses) + shift * (k == 1) for k in range(1 + cells)}
        results = {str(k): dict(enumerate(a)) for k, a in results.items()}
        found.append([c.verdict for c in compare(results)])
    return np.array(found)


@pytest.mark.parametrize(("seeds", "collapses"), [(6, 0), (8, 0), (8, 0.2)])
def test_false_alarms_are_rarer_than_five_percent(seeds, collapses):
    assert np.mean(verdicts(1, seeds, collapses=collapses) != "not shown") <= ALPHA


def test_false_alarms_among_several_cells_are_rarer_than_five_percent():
    assert np.mean(np.any(verdicts(4, 8) != "not shown", axis=1)) <= ALPHA


@pytest.mark.parametrize(("cells", "seeds"), [(1, 6), (1, 8), (3, 8), (1, 14)])
def test_power_is_the_one_stated(cells, seeds):
    """A difference of the size called detectable is shown four times out of five."""
    deviation, repeats = 0.4 * np.sqrt(2), 500
    shift = detectable_difference(deviation, seeds, cells)
    shown = np.mean(verdicts(cells, seeds, shift, repeats=repeats)[:, 0] == "better")
    allowed = 3 * np.sqrt(POWER * (1 - POWER) / repeats)
    # Holm's correction is milder than the strictest, by little: the other cells are no better.
    assert POWER - allowed <= shown <= POWER + allowed + 0.02 * (cells > 1)


def test_seeds_needed_is_where_the_detectable_difference_gets_below():
    for target in (1.0, 0.3, 0.05):
        n = seeds_needed(0.4, target)
        assert detectable_difference(0.4, n) <= target
        assert n == fewest_seeds() or detectable_difference(0.4, n - 1) > target


def test_detectable_differences_shrink_without_a_jump_where_simulation_ends():
    for comparisons in (1, 3):
        sizes = [detectable_difference(1.0, n, comparisons) for n in range(8, 20)]
        shrink = np.divide(sizes[1:], sizes[:-1])
        assert np.all(shrink < 1)
        assert np.all(shrink > 0.87)


LSTM = {0: 88.1, 1: 87.9, 2: 87.8, 3: 88.2, 4: 88.0, 5: 87.7}


def shifted(by):
    return {seed: value + by + 0.01 * seed for seed, value in LSTM.items()}


def test_verdicts_in_words():
    better, worse = compare(
        {"LSTM": LSTM | {6: 88.0, 7: 88.0}, "A": shifted(1) | {6: 90.0, 9: 0.0}, "B": shifted(-1)},
        target=0.5,
    )
    assert better.seeds == (0, 1, 2, 3, 4, 5, 6)
    assert better.fewest_seeds == 7
    assert str(better).startswith("A is better than LSTM by 1.16 (95 % interval 1.02 to 1.5")
    assert worse.verdict == "too few seeds"  # 2/2^6 twice
    assert str(worse).startswith("No verdict on B and LSTM: 6 seeds cannot reach p < 0.05, 7 can.")

    (loss,) = compare({"A": shifted(1), "B": LSTM}, baseline="A", higher_is_better=False)
    assert (loss.verdict, loss.mean) == ("better", pytest.approx(-1.025))
    assert "B ahead in 100% of the seeds" in str(loss)
    assert "B is better than A by 1.03" in str(loss)
    assert "interval 1.01 to 1.04" in str(loss)

    noisy = {seed: value + (-1) ** seed for seed, value in LSTM.items()}
    (same,) = compare({"LSTM": LSTM, "Noisy": noisy}, unit="points", target=0.3)
    assert same.verdict == "not shown"
    assert str(same).startswith("No difference shown: Noisy - LSTM = +0.00 points")
    assert f"0.3 points would need {same.seeds_needed} seeds." in str(same)

    (twice,) = compare({"LSTM": LSTM, "again": LSTM})
    assert (twice.verdict, twice.p_value, twice.probability) == ("not shown", 1, 0.5)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"A": LSTM}, "two cells"),
        ({"A": LSTM, "B": {0: 1.0}}, "1 seeds in common"),
        ({"A": LSTM, "B": LSTM | {3: float("nan")}}, "seed 3 of B has nan"),
    ],
)
def test_what_cannot_be_compared_is_told(results, message):
    with pytest.raises(ValueError, match=message):
        compare(results)
    with pytest.raises(ValueError, match="no results of the baseline 'C'"):
        compare({"A": LSTM, "B": LSTM}, baseline="C")
