"""Pictures of comparisons: a point a seed, and intervals."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lstmjax import files, statistics
from lstmjax.errors import extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lstmjax.workbench.compare import Report
else:
    Axes = Report = object


def draw_comparison(path: pathlib.Path, reports: Sequence[Report]) -> None:
    """For each task every run, and below it the difference to the first cell's of that seed; two
    tasks side by side.

    Args:
        path: PNG file to write.
        reports: what was found.
    """
    with extra("train"):
        import matplotlib.figure

    most = max(len(report.entries) for report in reports)
    across = min(2, len(reports))
    down = -(-len(reports) // across)
    size = (max(4.0, 0.75 * most) * across, 7 * down)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = figure.subplots(2 * down, across, squeeze=False, height_ratios=(3, 2) * down)
    for none in axes[-2:, len(reports) % across or across :].flat:
        none.set_visible(False)
    for number, report in enumerate(reports):
        row, column = divmod(number, across)
        top, bottom = axes[2 * row : 2 * row + 2, column]
        names = [*report.entries]
        unit = " (%)" if report.metric.percent else ""
        for place, name in enumerate(names):
            if name in report.lost_cells:
                middle = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "center"}
                top.annotate("diverged", (place, 0.5), rotation=90, fontsize=8, **middle)
            else:
                _points(top, place, [*report.values(name).values()])
        chance = (100 if report.metric.percent else 1) * report.chance
        if _near(chance, [v for name in names for v in report.values(name).values()]):
            top.axhline(chance, color="0.6", lw=1, ls=":")
            beside: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            top.annotate("chance", (1, chance), (3, 0), va="center", fontsize=8, **beside)
        better = "higher" if report.metric.higher_is_better else "lower"
        top.set(title=report.task, ylabel=f"{report.metric.name}{unit}, {better} is better")
        for verdict in report.verdicts:
            place = names.index(verdict.a)
            _points(bottom, place, verdict.differences)
            if verdict.verdict in ("better", "worse"):
                bottom.annotate(
                    verdict.verdict,
                    (place, 1.0),
                    xycoords=("data", "axes fraction"),
                    ha="center",
                    va="bottom",
                    fontsize=8,
                )
        bottom.axhline(0, color="0.4", lw=1)
        bottom.set(ylabel=f"minus {names[0]},\nsame seed{unit and ' (points)'}")
        if report.metric.percent:
            top.set_ylim(max(-2, top.get_ylim()[0]), min(102, top.get_ylim()[1]))
        for axis in (top, bottom):
            axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=9)
            axis.set_xlim(-0.6, len(names) - 0.4)
            axis.grid(axis="y", alpha=0.3)
    files.publish(path, lambda file: figure.savefig(file, dpi=120, format="png"))


def _points(axes: Axes, place: int, values: Sequence[float]) -> None:
    """A point a seed, side by side in their order; the mean and its interval beside them."""
    spread = np.linspace(-0.2, 0.1, len(values)) if len(values) > 1 else np.zeros(1)
    color = f"C{place % 10}"
    axes.plot(place + spread, values, "o", ms=4, alpha=0.6, color=color, mew=0)
    mean = float(np.mean(values))
    axes.plot([place + 0.25], [mean], "D", ms=5, color=color)
    if len(values) > 1:
        low, high = statistics.bca_interval(np.array(values))
        axes.plot([place + 0.25] * 2, [low, high], lw=2, color=color)


def _near(value: float, values: Sequence[float]) -> bool:
    """Whether a line at ``value`` leaves room for the points."""
    low, high = min(values), max(values)
    return low - 2 * (high - low) <= value <= high + 2 * (high - low)
