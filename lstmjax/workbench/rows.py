"""What comes of runs: a row each, their summary, and how both are written and printed."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lstmjax.tasks.metric import ACCURACY, Metric

__all__ = [
    "ACCURACY",
    "Metric",
    "Replica",
    "Row",
    "Summary",
    "finite",
    "outcome_of",
    "rate_text",
    "replicas_of",
    "summarized",
    "table_of",
]


class Replica(NamedTuple):
    """One of the runs that share a program."""

    seed: int
    learning_rate: float


def replicas_of(seed: int, seeds: int, rates: Sequence[float]) -> tuple[Replica, ...]:
    """Each of so many seeds, from ``seed`` on, with each learning rate, be it named twice.

    >>> [tuple(replica) for replica in replicas_of(3, 2, (0.1, 0.2, 0.1))]
    [(3, 0.1), (4, 0.1), (3, 0.2), (4, 0.2)]
    """
    different = dict.fromkeys(rates)
    return tuple(Replica(s, rate) for rate in different for s in range(seed, seed + seeds))


def rate_text(rate: float) -> str:
    """A learning rate as names have it: short, but never that of another one.

    >>> rate_text(0.001), rate_text(1.0000002e-3)
    ('0.001', '0.0010000002')
    """
    return short if float(short := f"{rate:g}") == rate else repr(rate)


class Row(NamedTuple):
    """What became of one replica.

    Attributes:
        seed, learning_rate: which it is.
        validation: the task's metric on validation data; NaN: it diverged.
        test: the same on each of the test sets, by name; the first is what models are judged by.
        figures: loss and score of each of these, by name.
    """

    seed: int
    learning_rate: float
    validation: float
    test: Mapping[str, float]
    figures: Mapping[str, float]


class Summary(NamedTuple):
    """Mean of several seeds, their standard deviation, and a 95 % interval of the mean (t)."""

    mean: float
    sd: float
    low: float
    high: float


def summarized(values: Sequence[float]) -> Summary:
    """Mean, standard deviation, and interval; those that need two values are NaN for one.

    >>> [round(a, 3) for a in summarized([1.0, 2.0, 3.0])]
    [2.0, 1.0, -0.484, 4.484]
    """
    from scipy.special import stdtrit

    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Summary(mean, *[float("nan")] * 3)
    sd = float(np.std(values, ddof=1))
    half = float(stdtrit(count - 1, 0.975)) * sd / count**0.5
    return Summary(mean, sd, mean - half, mean + half)


def outcome_of(metric: Metric, rows: Sequence[Row], several: bool) -> dict[str, Any]:
    """What ``result.json`` says first: of one run its figures, of several a row each, and more.

    As JSON has it: None for what is not finite.
    """
    if not several:
        (row,) = rows
        value = next(iter(row.test.values()))
        return finite({**row.figures, "metric": metric.name, "value": value})
    per_rate: dict[str, Any] = {}
    for rate in dict.fromkeys(row.learning_rate for row in rows):
        own = [row for row in rows if row.learning_rate == rate]
        per_rate[rate_text(rate)] = {
            name: summarized([row.test[name] for row in own])._asdict() for name in rows[0].test
        } | {"validation": summarized([row.validation for row in own])._asdict()}
    replicas = [row._asdict() for row in rows]
    return finite({"metric": metric.name, "replicas": replicas, "by_learning_rate": per_rate})


def finite(value: Any) -> Any:
    """As JSON has it: None for what is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(a) for key, a in value.items()}
    if isinstance(value, list):
        return [finite(a) for a in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def table_of(metric: Metric, rows: Sequence[Row]) -> str:
    """A line a run; of several a line of means for each learning rate, and their intervals."""
    columns: dict[str, list[float]] = {"validation": [row.validation for row in rows]}
    columns |= {name: [row.test[name] for row in rows] for name in rows[0].test}
    if all(math.isnan(value) for value in columns["validation"]):
        del columns["validation"]
    table = [["seed", "rate", *columns]]
    for number, row in enumerate(rows):
        values = (metric.text(column[number]) for column in columns.values())
        table.append([str(row.seed), rate_text(row.learning_rate), *values])
    for rate in dict.fromkeys(row.learning_rate for row in rows) if len(rows) > 1 else ():
        own = [row.learning_rate == rate for row in rows]
        found = [summarized([*itertools.compress(c, own)]) for c in columns.values()]
        table.append(["mean", rate_text(rate), *(metric.text(s.mean) for s in found)])
        table.append(["s.d.", "", *(metric.text(s.sd) for s in found)])
        bounds = (f"{metric.text(s.low)} to {metric.text(s.high)}" for s in found)
        table.append(["95 %", "", *bounds])
    wide = [max(len(line[n]) for line in table) for n in range(len(table[0]))]
    heading = f"{metric.name}, {'higher' if metric.higher_is_better else 'lower'} is better"
    lines = ["  ".join(f"{a:>{n}}" for a, n in zip(line, wide, strict=True)) for line in table]
    return "\n".join([heading, *lines])
