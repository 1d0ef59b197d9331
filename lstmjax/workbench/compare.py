"""Comparing cells: every cell on every task with the same seeds and budget, and a verdict.

The runs of one cell on one task at one learning rate are a unit. Units lie in one folder, named by
all that their numbers depend on, what is in the files of a user's cell, task and data included:
what is finished is never repeated, what was killed goes on, and several processes may share the
folder, a unit each.
"""

import contextlib
import csv
import dataclasses
import hashlib
import html
import io
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from flax import nnx

from lstmjax import files, statistics
from lstmjax.cells import CellSpec, load_cell, source_digest
from lstmjax.errors import UserError, first_line
from lstmjax.models import count_parameters
from lstmjax.precision import Precision
from lstmjax.shown import html_table
from lstmjax.tasks import Metric
from lstmjax.training import Accelerator, NonFiniteLossError
from lstmjax.training.command import require_positive, require_seed
from lstmjax.workbench.config import Config, config_of, require_rates
from lstmjax.workbench.plots import draw_comparison
from lstmjax.workbench.rows import Row, finite, rate_text, summarized
from lstmjax.workbench.run import cell_name, make_model, settings_of, task_sources, train

__all__ = [
    "Comparing",
    "Entry",
    "Report",
    "Reports",
    "Unit",
    "compare",
]

RESULT = "result.json"
DIVERGED = "diverged.json"


@dataclasses.dataclass(frozen=True)
class Comparing:
    """Settings of a comparison."""

    cells: tuple[str, ...] = ("LSTM", "GRU")
    """The first is what the others are compared with. By name, or path/to/file.py:MyCell."""
    tasks: tuple[str, ...] = ("adding",)
    """As experiments/train.py has them, sizes in brackets: "adding(length=200)"."""
    seeds: int = 8
    """Runs of each cell on each task; below 6 there are figures and no verdict."""
    seed: int = 0
    """The first of them."""
    learning_rates: tuple[float, ...] = ()
    """Of these, each cell gets on each task the one that is best on validation data; by default
    the task's own alone."""
    match: Literal["units", "parameters"] = "units"
    """What is equal for all cells; parameters: as many as the first cell's, as near as units go."""
    hidden_size: int = 0
    """Units of the first cell; 0: the task's own."""
    epochs: int = 0
    """How often each run is evaluated, or passes over a data set; 0: the task's own."""
    batch_size: int = 0
    """Rows an update; 0: the task's own."""
    at_once: int = 8
    """Seeds trained side by side in one program."""
    target: float = 0.0
    """A difference that would matter, in the unit of the metric; how many seeds would show it is
    told. 0: 0.3 points of an accuracy, a hundredth of the first cell's mean otherwise."""
    accelerator: Accelerator = "auto"
    """Device to run on; auto takes the best there is."""
    precision: Precision = "float32"
    """bfloat16: products in bfloat16, sums and states in float32."""
    dir: pathlib.Path = pathlib.Path("runs/comparison")
    """Where all of it lies; several processes may share it."""


class Unit(NamedTuple):
    """All seeds of one cell on one task at one learning rate.

    Attributes:
        task, cell: as they were named.
        learning_rate: of all seeds.
        config: what a run is asked for, its seeds left open.
        parameters: of the model.
        folder: where the runs lie.
    """

    task: str
    cell: str
    learning_rate: float
    config: Config
    parameters: int
    folder: pathlib.Path

    def __str__(self) -> str:
        """How it is told of."""
        return (
            f"{self.task} · {cell_name(self.cell)} · learning rate {rate_text(self.learning_rate)}"
        )


class Entry(NamedTuple):
    """A cell on a task, at the learning rate chosen for it.

    Attributes:
        unit: the one chosen.
        rows: its runs, by seed.
        tried: mean validation metric by learning rate; None: a run diverged.
    """

    unit: Unit
    rows: dict[int, Row]
    tried: dict[float, float | None]


class Report(NamedTuple):
    """What a comparison found on one task.

    Attributes:
        task: as it was named.
        metric: the figure that counts.
        chance: what it is without looking.
        lost: as what a run counts that diverged: chance, or the worst of all other runs if that is
            worse, so that none gains by it.
        entries: by the cell's name.
        verdicts: every other cell against the first; none of one whose runs all diverged.
        diverged: which runs did: cell and seed.
    """

    task: str
    metric: Metric
    chance: float
    lost: float
    entries: dict[str, Entry]
    verdicts: list[statistics.Comparison]
    diverged: list[tuple[str, int]]

    def __str__(self) -> str:
        """The table, and a sentence a comparison, as Markdown."""
        return markdown(self)

    def __repr__(self) -> str:
        means = {name: summarized([*self.values(name).values()]).mean for name in self.entries}
        figures = ", ".join(f"{name} {mean:.4g}" for name, mean in means.items())
        found = "; ".join(f"{v.a} against {v.b}: {v.verdict}" for v in self.verdicts)
        return f"Report({self.task}, {self.metric.name}: {figures}{found and f'; {found}'})"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        head, *sentences = _sentences(self)
        told = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
        table = html_table(_table(self))
        return f"<h4>{html.escape(head)}</h4>{table}<ul>{told}</ul>"

    @property
    def lost_cells(self) -> list[str]:
        """The cells whose runs all diverged."""
        return [
            name
            for name, entry in self.entries.items()
            if all((name, seed) in self.diverged for seed in entry.rows)
        ]

    def values(self, name: str) -> dict[int, float]:
        """The metric of a cell by seed, in points where it is a share; `lost` where it diverged."""
        scale = 100.0 if self.metric.percent else 1.0
        found = {s: _figure(r) for s, r in self.entries[name].rows.items()}
        return {s: scale * (self.lost if math.isnan(v) else v) for s, v in found.items()}


class Reports(list[Report]):
    """One a task."""

    def _repr_html_(self) -> str:
        return "".join(report._repr_html_() for report in self)


def compare(config: Comparing) -> Reports:
    """Run what is missing, and report.

    Raises:
        UserError: settings that cannot work.
    """
    check(config)
    units = units_of(config)
    wanted = range(config.seed, config.seed + config.seeds)
    run_all(units, wanted, config.at_once)
    reports = Reports(report_of(config, task, units, wanted) for task in config.tasks)
    leave(config, reports)
    return reports


def check(config: Comparing) -> None:
    """Raise `UserError` for settings that cannot work."""
    require_positive({"seeds": config.seeds, "at_once": config.at_once})
    for seed in (config.seed, config.seed + config.seeds - 1):
        require_seed(seed)
    require_rates(config.learning_rates)
    for name in ("hidden_size", "epochs", "batch_size", "target"):
        if getattr(config, name) < 0:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be at least 0, got {getattr(config, name)}")
    if len(names_of(config.cells)) < 2:
        raise UserError(f"--cells needs two different ones at least, got {[*config.cells]}")
    if not config.tasks:
        raise UserError("--tasks needs one at least")


def names_of(cells: Sequence[str]) -> dict[str, str]:
    """What each cell is called: its class, and its file where two classes have one name.

    >>> names_of(["LSTM", "a.py:Mine", "b.py:Mine"])
    {'LSTM': 'LSTM', 'a.py:Mine': 'Mine (a.py)', 'b.py:Mine': 'Mine (b.py)'}
    """
    short = [cell_name(cell) for cell in dict.fromkeys(cells)]
    return {
        cell: name
        if short.count(name) == 1
        else f"{name} ({CellSpec.parse(cell).path or 'lstmjax'})"
        for cell, name in zip(dict.fromkeys(cells), short, strict=True)
    }


# --- What is run --------------------------------------------------------------------------------


def units_of(config: Comparing) -> list[Unit]:
    """All units, task by task, cell by cell."""
    return [
        unit
        for task in dict.fromkeys(config.tasks)
        for cell in dict.fromkeys(config.cells)
        for unit in _units(config, task, cell)
    ]


def _units(config: Comparing, task: str, cell: str) -> Iterator[Unit]:
    base = base_config(config, task)
    size = base.model.hidden_size
    if config.match == "parameters" and cell != config.cells[0]:
        wanted = parameters_of(base, config.cells[0], size)
        size = units_for(lambda units: parameters_of(base, cell, units), wanted, size)
    parameters = parameters_of(base, cell, size)
    model = dataclasses.replace(base.model, hidden_size=size)
    of_cell = dataclasses.replace(base, cell=cell, model=model)
    settings = {**settings_of(of_cell), "cell": cell_name(cell), "source": source_digest(cell)}
    settings |= {"task_sources": sources} if (sources := task_sources(of_cell)) else {}
    for free in ("seed", "seeds", "learning_rates"):
        del settings[free]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    folder = config.dir / "runs" / _file_name(task) / f"{_file_name(cell_name(cell))}-{digest}"
    for rate in dict.fromkeys(config.learning_rates) or (base.optimizer.learning_rate,):
        asked = dataclasses.replace(of_cell, learning_rates=(rate,))
        yield Unit(task, cell, rate, asked, parameters, folder / f"lr{rate_text(rate)}")


def base_config(config: Comparing, task: str) -> Config:
    """What a run on ``task`` is asked for, but for the cell, the seeds and the learning rate."""
    made = config_of(task)
    own = {n: getattr(config, n) for n in ("epochs", "batch_size") if getattr(config, n)}
    size = config.hidden_size or made.model.hidden_size
    return dataclasses.replace(
        made,
        accelerator=config.accelerator,
        precision=config.precision,
        model=dataclasses.replace(made.model, hidden_size=size),
        **own,
    )


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-._=" else "_" for c in text)


def parameters_of(base: Config, cell: str, size: int) -> int:
    """Parameters of the model with so many units of the cell."""
    asked = dataclasses.replace(
        base, cell=cell, model=dataclasses.replace(base.model, hidden_size=size)
    )
    made = load_cell(cell, size)
    return count_parameters(nnx.eval_shape(lambda: make_model(asked, made, 0)))


def units_for(count: Callable[[int], int], wanted: int, most: int) -> int:
    """The number of units whose parameters are nearest to those wanted.

    Numbers that the cell refuses, not a multiple of its heads, say, are passed over.

    >>> units_for(lambda units: 4 * units * (units + 10), wanted=4000, most=100)
    27

    Raises:
        UserError: there is none.
    """

    def sound(units: range) -> tuple[int, int] | None:
        """The first of the numbers that the cell takes, and its parameters."""
        for number in units:
            with contextlib.suppress(UserError, ValueError):
                return number, count(number)
        return None

    below: tuple[int, int] | None = None
    low, high = 1, most
    above = sound(range(high, high + 65))
    while above is not None and above[1] < wanted:
        below, low, high = above, above[0] + 1, 2 * above[0]
        above = sound(range(high, high + 65))
    while low < high:  # below and above are the nearest so far, numbers between are open
        middle = (low + high) // 2
        found = sound(range(middle, high))
        if found is None or found[1] >= wanted:
            above, high = found or above, middle
        else:
            below, low = found, found[0] + 1
    near = [found for found in (below, above) if found is not None]
    if not near:
        raise UserError(f"no number of units has about {wanted:,} parameters: leave out --match")
    return min(near, key=lambda found: (abs(found[1] - wanted), found[0]))[0]


def run_all(units: Sequence[Unit], wanted: range, at_once: int) -> None:
    """Run what is missing of all units; what another process is at is waited for at the end."""
    busy = [unit for unit in units if not _run_unit(unit, units, wanted, at_once, wait=False)]
    for unit in busy:
        print(f"waiting for another process: {unit}")
        _run_unit(unit, units, wanted, at_once, wait=True)


def _run_unit(
    unit: Unit, units: Sequence[Unit], wanted: range, at_once: int, *, wait: bool
) -> bool:
    """Run what is missing of one unit; False: another process is at it."""
    files.make_folder(unit.folder)
    lock = files.Lock(unit.folder)
    try:
        lock.take(wait=wait)
    except files.Busy:
        return False
    try:
        _put_aside_damaged(unit)
        while missing := [seed for seed in wanted if seed not in rows_of(unit)]:
            group = _unfinished(unit, missing) or _first_group(missing, at_once)
            place = f"[{units.index(unit) + 1}/{len(units)}]"
            print(f"{place} {unit} · seeds {group.start} to {group.stop - 1}", flush=True)
            _run_group(unit, group)
    finally:
        lock.release()
    return True


def _run_group(unit: Unit, group: range) -> None:
    folder = _group_folder(unit, group)
    asked = dataclasses.replace(
        unit.config, seed=group.start, seeds=len(group), run_dir=folder, resume_or_start=True
    )
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            train(asked)
    except NonFiniteLossError as error:
        files.publish_json(folder / DIVERGED, {"seeds": [*group], "error": str(error)})
    finally:
        if folder.exists():
            (folder / "log.txt").write_text(log.getvalue())


def _group_folder(unit: Unit, group: range) -> pathlib.Path:
    return unit.folder / f"seeds{group.start}-{group.stop - 1}"


def _groups(unit: Unit) -> Iterator[tuple[range, pathlib.Path]]:
    """The groups of seeds that have been begun."""
    for folder in sorted(unit.folder.glob("seeds*-*")):
        first, _, last = folder.name.removeprefix("seeds").partition("-")
        if first.isdigit() and last.isdigit():
            yield range(int(first), int(last) + 1), folder


def _unfinished(unit: Unit, missing: Sequence[int]) -> range | None:
    """A group that was begun and not ended."""
    for group, folder in _groups(unit):
        if (folder / "config.json").exists() and {*group} <= {*missing}:
            return group
    return None


def _first_group(missing: Sequence[int], at_once: int) -> range:
    """Consecutive seeds, few enough for one program.

    >>> _first_group([0, 1, 2, 5], 8), _first_group([0, 1, 2, 5], 2)
    (range(0, 3), range(0, 2))
    """
    stop = missing[0] + 1
    while stop in missing and stop - missing[0] < at_once:
        stop += 1
    return range(missing[0], stop)


def rows_of(unit: Unit) -> dict[int, Row]:
    """The runs of a unit that are finished, by seed.

    Raises:
        UserError: a file that says so is damaged.
    """
    found: dict[int, Row] = {}
    for group, folder in _groups(unit):
        for name in _OUTCOMES:
            found |= {row.seed: row for row in _outcome(folder / name, unit, group)}
    return dict(sorted(found.items()))


def _put_aside_damaged(unit: Unit) -> None:
    """Let the groups whose outcome cannot be read be run again; their checkpoints are there."""
    for group, folder in _groups(unit):
        for name in _OUTCOMES:
            try:
                _outcome(folder / name, unit, group)
            except UserError as error:
                print(f"{error}, from its checkpoints", flush=True)
                os.replace(folder / name, folder / f"damaged-{name}")


def _outcome(path: pathlib.Path, unit: Unit, group: range) -> list[Row]:
    """What a file says of a group's runs, none if it is not there.

    Raises:
        UserError: it is damaged.
    """
    try:
        rows = _OUTCOMES[path.name](files.as_object(files.read_json(path)), unit)
        if [row.seed for row in rows] != [*group]:
            raise ValueError(f"its seeds are not {group.start} to {group.stop - 1}")
        return rows
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        told = f"{type(error).__name__} {first_line(error)}"
        raise UserError(f"{path} is damaged ({told[:200]}): its group is run again") from error


def _measured(result: Mapping[str, Any], unit: Unit) -> list[Row]:
    rows = [Row(**_with_nan(row)) for row in result["replicas"]]
    for row in rows:
        numbers = [row.learning_rate, row.validation, *row.test.values(), *row.figures.values()]
        if not row.test or not all(type(a) in (int, float) for a in (row.seed, *numbers)):
            raise ValueError(f"seed {row.seed} has no figures")
    return rows


def _diverged(told: Mapping[str, Any], unit: Unit) -> list[Row]:
    return [Row(s, unit.learning_rate, math.nan, {"test": math.nan}, {}) for s in told["seeds"]]


_OUTCOMES: Mapping[str, Callable[[Mapping[str, Any], Unit], list[Row]]] = {
    DIVERGED: _diverged,
    RESULT: _measured,
}


def _with_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_nan(a) for key, a in value.items()}
    return math.nan if value is None else value


# --- What is reported ---------------------------------------------------------------------------


def report_of(config: Comparing, task: str, units: Sequence[Unit], wanted: range) -> Report:
    """What was found on one task."""
    own = [unit for unit in units if unit.task == task]
    sizes = own[0].config.sizes
    names = names_of(config.cells)
    entries = {
        name: chosen([unit for unit in own if unit.cell == cell], wanted, sizes.metric)
        for cell, name in names.items()
    }
    figures = {(n, s): _figure(row) for n, e in entries.items() for s, row in e.rows.items()}
    diverged = [run for run, figure in figures.items() if math.isnan(figure)]
    worse = min if sizes.metric.higher_is_better else max
    lost = worse([sizes.chance, *(f for f in figures.values() if not math.isnan(f))])
    report = Report(task, sizes.metric, sizes.chance, lost, entries, [], diverged)
    results = {n: report.values(n) for n in entries if n not in report.lost_cells}
    if len(wanted) < 2 or len(results) < 2 or next(iter(entries)) not in results:
        return report
    first = next(iter(results.values()))
    target = config.target or (
        0.3 if sizes.metric.percent else abs(float(np.mean([*first.values()]))) / 100 or 1.0
    )
    verdicts = statistics.compare(
        results,
        target=target,
        unit="points" if sizes.metric.percent else "",
        higher_is_better=sizes.metric.higher_is_better,
    )
    return report._replace(verdicts=verdicts)


def _figure(row: Row) -> float:
    """What models are judged by; NaN: it diverged."""
    return next(iter(row.test.values()))


def chosen(units: Sequence[Unit], wanted: range, metric: Metric) -> Entry:
    """The learning rate that is best on validation data, the mean over all seeds.

    One at which a run diverged comes after all others.
    """
    rows = {unit: {s: r for s, r in rows_of(unit).items() if s in wanted} for unit in units}
    means = {
        unit: float(np.mean([row.validation for row in own.values()])) for unit, own in rows.items()
    }
    sign = 1 if metric.higher_is_better else -1

    def rank(unit: Unit) -> tuple[int, float]:
        lost = sum(math.isnan(row.validation) for row in rows[unit].values())
        sound = [r.validation for r in rows[unit].values() if not math.isnan(r.validation)]
        return -lost, sign * float(np.mean(sound)) if sound else 0.0

    best = max(units, key=rank)
    tried = {u.learning_rate: None if math.isnan(m) else m for u, m in means.items()}
    return Entry(best, rows[best], tried)


def leave(config: Comparing, reports: Sequence[Report]) -> None:
    """Write and print the comparison."""
    stem = config.dir / "comparison"
    text = "\n\n".join(map(markdown, reports)) + "\n"
    files.publish(stem.with_suffix(".md"), text.encode())
    files.publish(stem.with_suffix(".csv"), _csv(reports).encode())
    files.publish_json(stem.with_suffix(".json"), [_json(report) for report in reports])
    draw_comparison(stem.with_suffix(".png"), reports)
    print(f"\n{text}\n{stem}.md, .csv, .json, .png; the runs in {config.dir / 'runs'}")


def markdown(report: Report) -> str:
    """One task's table, and a sentence a comparison."""
    head, *sentences = _sentences(report)
    columns, *rows = _table(report)
    lines = [
        f"### {head}",
        "",
        _line(columns),
        _line(["---"] * len(columns)),
        *map(_line, rows),
        "",
        *(f"- {sentence}" for sentence in sentences),
    ]
    return "\n".join(lines)


def _sentences(report: Report) -> Iterator[str]:
    """What was measured; then one of each comparison, and what is to be known beside."""
    metric = report.metric
    head = f"{metric.name}{' (%)' if metric.percent else ''}"
    better = "higher" if metric.higher_is_better else "lower"
    yield f"{report.task}: {head}, {better} is better; chance {metric.text(report.chance)}"
    yield from map(str, report.verdicts)
    lost = report.lost_cells
    if lost:
        yield f"No verdict on {', '.join(lost)}: every run diverged."
    if some := [run for run in report.diverged if run[0] not in lost]:
        which = ", ".join(f"{name} seed {seed}" for name, seed in some)
        what = "chance" if report.lost == report.chance else "the worst of all other runs"
        yield f"Diverged, and counted as {what}, {report.metric.text(report.lost)}: {which}."
    rates = sorted({rate for entry in report.entries.values() for rate in entry.tried})
    if len(rates) > 1:
        tried = ", ".join(map(rate_text, rates))
        yield f"Learning rates were chosen on validation data, of {tried}.{_edges(report, rates)}"


def _table(report: Report) -> list[list[str]]:
    """The heading, and a line a cell."""
    found = [_columns(report, name) for name in report.entries]
    return [[*found[0]], *([*columns.values()] for columns in found)]


def _columns(report: Report, name: str) -> dict[str, str]:
    """A cell's line of the table, by column."""
    entry, values = report.entries[name], [*report.values(name).values()]
    digits, lost = 2 if report.metric.percent else 4, name in report.lost_cells
    found = summarized(values)
    low, high = (
        statistics.bca_interval(np.array(values)) if len(values) > 1 else (math.nan, math.nan)
    )
    further = [*next(iter(entry.rows.values())).test][1:]
    more = {n: np.array([r.test.get(n, math.nan) for r in entry.rows.values()]) for n in further}
    return {
        "cell": name,
        "units": f"{entry.unit.config.model.hidden_size}",
        "parameters": f"{entry.unit.parameters:,}",
        "learning rate": rate_text(entry.unit.learning_rate),
        "seeds": f"{len(values)}",
        "mean ± s.d.": "diverged" if lost else f"{found.mean:.{digits}f} ± {found.sd:.{digits}f}",
        "95 % of the mean": "" if lost else f"{low:.{digits}f} to {high:.{digits}f}",
        **{n: report.metric.text(float(np.mean(a))) for n, a in more.items()},
    }


def _edges(report: Report, rates: Sequence[float]) -> str:
    """A warning for those whose best learning rate is the first or last one tried."""
    ends = (rates[0], rates[-1])
    names = [n for n, entry in report.entries.items() if entry.unit.learning_rate in ends]
    if not names:
        return ""
    return f" At the edge of these: {', '.join(names)}; a wider range may be better for them."


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _csv(reports: Sequence[Report]) -> str:
    """A line a run at the learning rate that was chosen; ``counted`` is what enters the table."""
    lines = [
        {
            "task": report.task,
            "cell": name,
            "units": entry.unit.config.model.hidden_size,
            "parameters": entry.unit.parameters,
            "learning_rate": row.learning_rate,
            "seed": row.seed,
            "metric": report.metric.name,
            "validation": row.validation,
            **row.test,
            "counted": report.lost if math.isnan(_figure(row)) else _figure(row),
        }
        for report in reports
        for name, entry in report.entries.items()
        for row in entry.rows.values()
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*dict.fromkeys(key for line in lines for key in line)])
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _json(report: Report) -> dict[str, Any]:
    cells = {
        name: {
            "cell": entry.unit.cell,
            "units": entry.unit.config.model.hidden_size,
            "parameters": entry.unit.parameters,
            "learning_rate": entry.unit.learning_rate,
            "validation_by_learning_rate": {rate_text(k): v for k, v in entry.tried.items()},
            "runs": [finite(row._asdict()) for row in entry.rows.values()],
            "folder": str(entry.unit.folder),
        }
        for name, entry in report.entries.items()
    }
    return {
        "task": report.task,
        "metric": report.metric.name,
        "higher_is_better": report.metric.higher_is_better,
        "chance": report.chance,
        "diverged": report.diverged,
        "cells": cells,
        "verdicts": [
            {**finite(dataclasses.asdict(verdict)), "text": str(verdict)}
            for verdict in report.verdicts
        ],
    }
