"""Whether one cell is better than another, from runs with several seeds.

Two cells are compared seed by seed: a seed fixes the order of the batches, so what it does to both
falls out of their difference. A difference counts as shown if the sign-flip test says so, after
Holm's correction where several cells are compared, *and* the bootstrap interval leaves out zero.

The sign-flip test asks how often random signs in front of the differences would give a mean as far
from zero. Were it no matter which cell is which, all signs would be equally likely: nothing else is
assumed, so runs that now and then collapse do no harm. ``n`` pairs have a smallest two-sided p of
``2 / 2^n``: five seeds can never reach 0.05, six can.

Sources: Efron 1987 (BCa interval); Fisher 1935 (sign flips); Holm 1979; Bouthillier et al. 2021,
arXiv 2103.03098 (paired seeds, P(A > B)).

Example:
    >>> lstm = {0: 88.1, 1: 87.9, 2: 87.8, 3: 88.2, 4: 88.0, 5: 87.7}
    >>> mine = {0: 88.6, 1: 88.5, 2: 88.1, 3: 88.9, 4: 88.2, 5: 88.4}
    >>> print(compare({"LSTM": lstm, "Mine": mine}, unit="points")[0])
    Mine is better than LSTM by 0.50 points (95 % interval 0.33 to 0.63) over 6 seeds: sign-flip p = 0.031, Mine ahead in 100% of the seeds.
"""  # noqa: E501

import bisect
import dataclasses
import functools
import html
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

__all__ = [
    "ALPHA",
    "POWER",
    "Comparison",
    "Verdict",
    "bca_interval",
    "compare",
    "detectable_difference",
    "fewest_seeds",
    "holm",
    "probability_of_better",
    "seeds_needed",
    "sign_flip_test",
]

ALPHA = 0.05
"""Of the tests; the intervals are of 1 - `ALPHA`."""
POWER = 0.8
"""The chance to show a difference of the size called `Comparison.detectable`."""
_EXACT_PAIRS = 16
_RESAMPLES = 9_999

Verdict = Literal["better", "worse", "not shown", "too few seeds"]
"""Of a cell beside the baseline."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Cell ``a`` against cell ``b``; all in the unit of the metric, differences are ``a - b``.

    Attributes:
        a, b: their names.
        seeds: those that both have.
        differences: one a seed.
        mean, deviation: of the differences.
        interval: BCa bootstrap interval of the mean, 95 %.
        p_value: of the sign-flip test, two-sided.
        adjusted_p: after Holm's correction for all comparisons that were made together.
        probability: P(A > B), the share of seeds in which ``a`` was better; ties count half.
        detectable: the smallest true difference that so many seeds show with 80 % power, were
            their spread the one seen here.
        target: a difference that would matter.
        seeds_needed: seeds to show it with 80 % power, likewise.
        fewest_seeds: with fewer no verdict is possible.
        verdict: on ``a``: better, worse, not shown, or too few seeds to say.
        unit: of the metric.
    """

    a: str
    b: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    deviation: float
    interval: tuple[float, float]
    p_value: float
    adjusted_p: float
    probability: float
    detectable: float
    target: float
    seeds_needed: int
    fewest_seeds: int
    verdict: Verdict
    unit: str

    @property
    def _digits(self) -> str:
        """Two decimals; of small numbers as many as show two figures."""
        size = max(abs(self.mean), self.deviation) or 1.0
        return f".{max(2, 1 - math.floor(math.log10(size)))}f"

    def __repr__(self) -> str:
        return f"Comparison({self})"

    def _repr_html_(self) -> str:
        return html.escape(str(self))

    def __str__(self) -> str:
        """One sentence, or two where nothing was shown."""
        n, unit = len(self.seeds), f" {self.unit}" if self.unit else ""
        low, high = self.interval
        show, signed = (f"{{:{sign}{self._digits}}}".format for sign in ("", "+"))
        corrected = ", corrected" if self.adjusted_p != self.p_value else ""
        evidence = (
            f"sign-flip p = {self.adjusted_p:.2g}{corrected}, "
            f"{self.a} ahead in {self.probability:.0%} of the seeds"
        )
        if self.verdict in ("better", "worse"):
            low, high = sorted((abs(low), abs(high)))
            return (
                f"{self.a} is {self.verdict} than {self.b} by {show(abs(self.mean))}{unit} "
                f"(95 % interval {show(low)} to {show(high)}) over {n} seeds: {evidence}."
            )
        figures = (
            f"{self.a} - {self.b} = {signed(self.mean)}{unit} (95 % interval {signed(low)} to "
            f"{signed(high)}) over {n} seeds: {evidence}"
        )
        needs = f"{self.target:.3g}{unit} would need {self.seeds_needed} seeds"
        if self.verdict == "too few seeds":
            return (
                f"No verdict on {self.a} and {self.b}: {n} seeds cannot reach p < {ALPHA}, "
                f"{self.fewest_seeds} can. {figures}; {needs}."
            )
        return (
            f"No difference shown: {figures}. So many seeds would show "
            f"{show(self.detectable)}{unit} with {POWER * 100:.0f} % power; {needs}."
        )


def compare(
    results: Mapping[str, Mapping[int, float]],
    *,
    baseline: str | None = None,
    target: float = 0.3,
    unit: str = "",
    higher_is_better: bool = True,
) -> list[Comparison]:
    """Every cell against one, corrected for how many they are.

    Args:
        results: by cell, its metric by seed.
        baseline: the cell that the others are compared with; the first by default.
        target: a difference that would matter, in the metric's unit.
        unit: of the metric, for the sentences.
        higher_is_better: False for a loss.

    Returns:
        One `Comparison` for each cell but the baseline, in the order given.

    Raises:
        ValueError: fewer than two cells, an unknown baseline, fewer than two common seeds, or a
            number that is not finite.
    """
    b = _baseline(results, baseline)
    others = [name for name in results if name != b]
    seeds = {a: tuple(s for s in results[a] if s in results[b]) for a in others}
    for a in others:
        if len(seeds[a]) < 2:
            raise ValueError(f"{a} and {b} have {len(seeds[a])} seeds in common; run 2 at least")
    differences = {a: [results[a][s] - results[b][s] for s in seeds[a]] for a in others}
    p_values = {a: sign_flip_test(differences[a]) for a in others}
    adjusted = dict(zip(others, holm([*p_values.values()]), strict=True))
    found = []
    for a, d in differences.items():
        deviation, interval = float(np.std(d, ddof=1)), bca_interval(d)
        fewest = fewest_seeds(len(others))
        found.append(
            Comparison(
                a=a,
                b=b,
                seeds=seeds[a],
                differences=tuple(d),
                mean=float(np.mean(d)),
                deviation=deviation,
                interval=interval,
                p_value=p_values[a],
                adjusted_p=adjusted[a],
                probability=probability_of_better(d, higher_is_better),
                detectable=detectable_difference(deviation, max(len(d), fewest), len(others)),
                target=target,
                seeds_needed=seeds_needed(deviation, target, len(others)),
                fewest_seeds=fewest,
                verdict=_verdict(d, interval, adjusted[a], fewest, higher_is_better),
                unit=unit,
            )
        )
    return found


def _verdict(
    d: Sequence[float],
    interval: tuple[float, float],
    p_value: float,
    fewest: int,
    higher_is_better: bool,
) -> Verdict:
    """A difference is shown if the test and the interval say so."""
    if len(d) < fewest:
        return "too few seeds"
    if p_value > ALPHA or interval[0] <= 0 <= interval[1]:
        return "not shown"
    return "better" if (np.mean(d) > 0) == higher_is_better else "worse"


def _baseline(results: Mapping[str, Mapping[int, float]], asked: str | None) -> str:
    """The cell to compare with; a ValueError for results that say nothing."""
    if len(results) < 2:
        raise ValueError(f"comparing needs two cells at least, got {list(results)}")
    if asked is not None and asked not in results:
        raise ValueError(f"no results of the baseline {asked!r}; there are {list(results)}")
    for name, values in results.items():
        for seed, value in values.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"seed {seed} of {name} has {value}: give a run that diverged its metric at "
                    "chance level, or leave the seed out of all cells"
                )
    return next(iter(results)) if asked is None else asked


def bca_interval(values: ArrayLike, confidence: float = 1 - ALPHA) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron 1987).

    The same values always give the same interval. Fewer than some ten values give one that is too
    narrow: no verdict rests on it alone.

    Example:
        >>> low, high = bca_interval([0.5, 0.6, 0.3, 0.7, 0.2, 0.7])
        >>> round(low, 2), round(high, 2)
        (0.33, 0.63)
    """
    x = np.asarray(values, np.float64)
    n, mean = len(x), x.mean()
    if n < 2:
        raise ValueError(f"an interval needs two values at least, got {n}")
    if np.ptp(x) == 0:
        return float(mean), float(mean)
    means = _resamples(n) @ x
    below = (np.mean(means < mean) + np.mean(means <= mean)) / 2
    bias = special.ndtri(below)
    left_out = (x - mean) / (n - 1)  # what leaving one out takes from the mean
    acceleration = np.sum(left_out**3) / (6 * np.sum(left_out**2) ** 1.5)
    z = bias + special.ndtri([(1 - confidence) / 2, (1 + confidence) / 2])
    low, high = np.quantile(means, special.ndtr(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


def sign_flip_test(differences: ArrayLike) -> float:
    """Two-sided p of the hypothesis that the sign of each difference is a coin's.

    Exact up to 16 pairs, from 65,535 random flips, always the same, for more.

    Example:
        >>> sign_flip_test([0.5, 0.6, 0.3, 0.7, 0.2, 0.7])
        0.03125
    """
    d = np.asarray(differences, np.float64)
    n = len(d)
    exact = n <= _EXACT_PAIRS
    if exact:
        flips = _subsets(n)
    else:
        flips = np.random.default_rng(0).integers(0, 2, (2**_EXACT_PAIRS - 1, n)).astype(float)
    sums = np.abs(d.sum() - 2 * flips @ d)
    as_far = np.sum(sums >= np.abs(d.sum()) - 1e-12 * np.sum(np.abs(d)))
    return float(as_far / len(sums) if exact else (1 + as_far) / (1 + len(sums)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected for how many they are (Holm 1979).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = highest
    return adjusted


def probability_of_better(differences: ArrayLike, higher_is_better: bool = True) -> float:
    """P(A > B): the share of seeds in which A is better; a tie counts half.

    Example:
        >>> probability_of_better([0.3, 0.1, -0.2, 0.0])
        0.625
    """
    signs = np.sign(np.asarray(differences, np.float64))
    return float(np.mean((1 + signs if higher_is_better else 1 - signs) / 2))


def fewest_seeds(comparisons: int = 1) -> int:
    """Seeds without which no difference, however large, could be shown.

    Example:
        >>> [fewest_seeds(comparisons) for comparisons in (1, 2, 5)]
        [6, 7, 8]
    """
    return 1 + math.ceil(math.log2(comparisons / ALPHA))


def detectable_difference(deviation: float, seeds: int, comparisons: int = 1) -> float:
    """The true difference that the sign-flip test shows with 80 % power.

    For differences that are normally distributed, and the strictest of the corrections that Holm
    makes for so many comparisons.

    Args:
        deviation: standard deviation of the differences.
        seeds: how many pairs; `fewest_seeds` at least.
        comparisons: how many are made together.

    Example:
        >>> round(detectable_difference(deviation=1.0, seeds=8), 1)
        1.2
    """
    return deviation * _detectable(seeds, comparisons)


def seeds_needed(deviation: float, difference: float, comparisons: int = 1) -> int:
    """How many pairs show a true ``difference`` with 80 % power; see `detectable_difference`.

    Example:
        >>> seeds_needed(deviation=0.27, difference=0.3), seeds_needed(0.98 * 2**0.5, 0.3)
        (9, 170)
    """
    if difference <= 0:
        raise ValueError(f"the difference to show must be positive, got {difference}")
    candidates = range(fewest_seeds(comparisons), 10_000_000)
    found = bisect.bisect_left(
        candidates,
        True,
        key=lambda n: detectable_difference(deviation, n, comparisons) <= difference,
    )
    return candidates.start + found


@functools.cache
def _detectable(seeds: int, comparisons: int) -> float:
    """`detectable_difference` for differences of standard deviation 1.

    Of few pairs, which have few possible p-values, by simulation. Let z be n normal numbers and d
    the true difference. Flipping the signs of a set S of z + d gives a sum as large exactly if
    d <= -mean(z_S), so with K sets allowed, the empty one among them, the test rejects exactly if d
    is larger than the K-th largest of these numbers. Of many pairs, the t test's power, which is
    at most 0.02 above the sign-flip test's from 13 pairs on.
    """
    alpha = ALPHA / comparisons
    if seeds <= 12:
        allowed = int(alpha * 2**seeds / 2)
        if allowed < 1:
            raise ValueError(f"{seeds} seeds show no difference in {comparisons} comparisons")
        z = np.random.default_rng(0).standard_normal((4_000, seeds))
        sets = _subsets(seeds)[1:]
        borders = -z @ (sets / sets.sum(axis=1, keepdims=True)).T
        critical = np.partition(borders, -allowed, axis=1)[:, -allowed]
        return float(np.quantile(critical, POWER))
    border = special.stdtrit(seeds - 1, 1 - alpha / 2)
    return float(special.nctdtrinc(seeds - 1, 1 - POWER, border) / math.sqrt(seeds))


@functools.lru_cache(maxsize=16)
def _resamples(n: int) -> NDArray[np.float64]:
    """How much each of n values counts in each resample's mean, ``(R, n)``."""
    return np.random.default_rng(0).multinomial(n, [1 / n] * n, _RESAMPLES) / n


@functools.lru_cache(maxsize=16)
def _subsets(n: int) -> NDArray[np.float64]:
    """All subsets of n things, ones and zeros ``(2^n, n)``, the empty one first."""
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.float64)
