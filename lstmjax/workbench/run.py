"""Training on a task: one model, or many side by side in one program."""

import dataclasses
import hashlib
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jaxtyping import PyTree

from lstmjax import stopping, training
from lstmjax.cells import Cell, CellSpec, load_cell, source_digest
from lstmjax.cells.loading import cell_source
from lstmjax.data import SideBySide, Source
from lstmjax.errors import UserError
from lstmjax.files import Json
from lstmjax.layers import Recurrent
from lstmjax.models import SequenceConfig, count_parameters, summary
from lstmjax.recurrence import Workload, choose_engine
from lstmjax.tasks import Task
from lstmjax.tasks.metric import Metric
from lstmjax.tasks.text import Text
from lstmjax.trained import ModelConfig, SequenceModelConfig, describe, describe_texts
from lstmjax.training.checkpoint import Checkpoints, Position
from lstmjax.training.devices import place, sharded
from lstmjax.training.loop import filled, means
from lstmjax.training.objective import CrossEntropy
from lstmjax.training.repeat import without
from lstmjax.training.report import Figure, Record
from lstmjax.training.step import Steps, Sums, TrainState
from lstmjax.workbench.classes import Classes, classes_of, confusion_table, draw_confusion
from lstmjax.workbench.config import HERE_ONLY, Config, check
from lstmjax.workbench.rows import Replica, Row, outcome_of, rate_text, table_of

_HERE_ONLY = ("data_dir", "archive")
"""Of a task's settings: where its data are, not which."""

EVALUATION_BATCHES = 4
"""Times the rows of a training batch that are evaluated at once."""


def train(config: Config, cell: Cell | None = None) -> list[Row]:
    """Train what ``config`` asks for, print, and leave a run folder.

    Args:
        config: the settings.
        cell: the recurrence; by default the one that ``config.cell`` names.

    Raises:
        UserError: settings that cannot work, or nothing that can be trained with them.
    """
    check(config)
    training.check_viewers(config.log)
    task, replicas = config.sizes, config.replicas
    mesh = training.make_mesh(config.accelerator, config.batch_size, len(replicas))
    cell = cell or load_cell(config.cell, config.model.hidden_size)
    model = nnx.eval_shape(lambda: make_model(config, cell, config.seed))
    training.require_room(len(replicas) * count_parameters(model), mesh)
    sources = {
        name: training.padded_for(mesh, source)
        for name, source in sources_of(task, config.batch_size).items()
    }
    table = summary(model, jax.ShapeDtypeStruct(*shape_of(config, sources)))
    engine = engine_of(config, model, mesh, sources)
    steps = make_steps(config, cell, sources["train"], mesh)
    fingerprints = [source.fingerprint for source in sources.values()]
    with open_run(config, mesh, fingerprints) as run:
        stopping.advise(f"go on: the same command with --resume --run-dir {quote(str(run.path))}")
        print(table)
        print(introduction(config, sources, mesh, run.path, engine))
        describe_model(config, run)
        run.show_in(config.log)
        started = time.perf_counter()
        with training.counting_compilations() as made:
            rows, history, classes = learn(config, cell, steps, sources, run, mesh)
        facts = {
            "parameters": count_parameters(model),
            "seconds": time.perf_counter() - started,
            "epoch_seconds": [record["seconds"] for record in history],
        }
        outcome = outcome_of(config.sizes.metric, rows, config.side_by_side)
        if matrices := confusions(classes):
            facts["confusion"] = [matrix.tolist() for matrix in matrices]
        run.write_result(config, mesh, outcome, **facts, task=config.task, epochs=history)
        run.draw_curves(f"{cell_name(config.cell)} · {config.task} · {_seeds(config)}")
        print(f"\n{table_of(task.metric, rows)}")
        if classes:
            tell_classes(config, classes, run.path)
        print(f"{made}; everything in {run.path}")
    return rows


def confusions(classes: Sequence[Classes]) -> list[np.ndarray]:
    """The confusion matrices, if there are some."""
    return [found.confusion for found in classes if found.confusion is not None]


def tell_classes(config: Config, classes: Sequence[Classes], path: pathlib.Path) -> None:
    """Print F1, AUC and confusion matrix, of several their means and sum, and draw the matrix."""
    names, several = config.sizes.class_names, len(classes) > 1
    f1, auc = (float(np.mean([getattr(c, name) for c in classes])) for name in ("f1", "auc"))
    print(
        f"test: F1 {f1:.4f}{' (mean over classes)' if len(names) > 2 else ''}, AUC {auc:.4f}"
        f"{' (a class has no row to test on)' if np.isnan(auc) else ''}"
        f"{', means over all runs; their confusion matrices added up:' if several else ''}"
    )
    matrices = confusions(classes)
    if not matrices:
        print(f"{len(names):,} classes: too many for a confusion matrix")
        return
    matrix = np.sum(matrices, axis=0)
    print(confusion_table(matrix, names))
    draw_confusion(
        path / "confusion.png", f"{cell_name(config.cell)} · {config.task}", matrix, names
    )


def sources_of(task: Task, batch_size: int) -> dict[str, Source]:
    """``train``, ``validation``, and the test sets by name."""
    rows = EVALUATION_BATCHES * batch_size
    return {
        "train": task.train(batch_size),
        "validation": task.validation(rows),
        **task.tests(rows),
    }


def make_model(config: Config, cell: Cell, seed: int | Array) -> nnx.Module:
    """The model of a seed before the first step."""
    engine = None if config.engine == "auto" else config.engine
    settings = {
        "precision": config.precision,
        "engine": engine,
        "rngs": nnx.Rngs(jax.random.key(seed)),
    }
    return config.sizes.make_model(cell, config.model, **settings)


def make_models(config: Config, cell: Cell, mesh: Mesh) -> nnx.Module:
    """The model, or one that holds the parameters of all replicas, stacked."""
    seeds = [replica.seed for replica in config.replicas]
    drawn = seeds if config.side_by_side else config.seed
    model = training.draw_models(lambda seed: make_model(config, cell, seed), drawn, mesh)
    config.sizes.pretrained(model)
    return model


def make_steps(config: Config, cell: Cell, train: Source, mesh: Mesh) -> Steps:
    """The compiled functions of the run."""
    task, replicas = config.sizes, config.replicas
    optimizer = training.make_optimizer(config.optimizer, config.epochs * len(train))
    if task.frozen:
        optimizer = optax.chain(training.without_gradient(task.frozen), optimizer)
    base = config.optimizer.learning_rate
    return training.make_steps(
        make_models(config, cell, mesh),
        optimizer,
        mesh,
        padding=train.padding,
        masked=task.masked,
        objective=task.objective,
        carried_rows=config.batch_size if task.carried else 0,
        replicas=[r.learning_rate / base for r in replicas] if config.side_by_side else (),
    )


class Learned(NamedTuple):
    """What a run gave.

    Attributes:
        rows: one a replica.
        history: the records of the epochs.
        classes: of a classification, what more there is to say of each replica on test data.
    """

    rows: list[Row]
    history: Sequence[Record]
    classes: list[Classes]


def learn(
    config: Config,
    cell: Cell,
    steps: Steps,
    sources: Mapping[str, Source],
    run: training.RunFolder,
    mesh: Mesh,
) -> Learned:
    """Train, evaluating on validation data; then measure on test data, once."""
    replicas, several = config.replicas, config.side_by_side
    score = config.sizes.objective.score
    with training.explained(cell):
        state, history = training.fit(
            steps,
            SideBySide(sources["train"]) if several else sources["train"],
            {"validation": sources["validation"]},
            run,
            mesh,
            epochs=config.epochs,
            seed=tuple(r.seed for r in replicas) if several else replicas[0].seed,
            resume=config.resume or config.resume_or_start,
            checkpoint_every=config.checkpoint_every,
            keep=config.keep,
            keep_best=config.keep_best,
            patience=config.patience,
            score=score,
        )
        last = history[-1]
        if config.keep_best:
            last = dict(training.best_epoch(history, "validation"))
            state = state._replace(params=run.read_parameters(state.params))
        tests = {name: s for name, s in sources.items() if name not in ("train", "validation")}
        found = {
            name: training.evaluate(steps, state.params, source, mesh, name)
            for name, source in tests.items()
        }
    figures = {name: last[name] for name in (f"validation_{score}", "validation_loss")}
    for name, sums in found.items():
        figures |= means(name, sums, score, "at the end")
    classes = []
    if config.sizes.class_names:
        classes = classes_on(config, steps, state.params, sources["test"], mesh)
        for name in ("f1", "auc"):
            values = [getattr(found, name) for found in classes]
            figures[f"test_{name}"] = values if several else values[0]
    rows = rows_of(config, [*tests], figures, score)
    if config.side_by_side:
        leave_replicas(config, state, history, rows, run)
    return Learned(rows, history, classes)


def classes_on(
    config: Config, steps: Steps, params: PyTree, source: Source, mesh: Mesh
) -> list[Classes]:
    """F1, AUC and confusion matrix of every replica on the answers that count."""
    assert steps.outputs is not None
    where = steps.evaluation_rows or sharded(mesh)
    outputs: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for batch in source.in_order():
        whole = filled(batch, where)
        counts = whole.weights > 0
        found = np.asarray(steps.outputs(params, place(whole, where)))
        found = found if config.side_by_side else found[None]
        outputs.append(found[:, counts])
        labels.append(whole.labels[counts])
    together = np.concatenate(outputs, axis=1)
    return [classes_of(one, np.concatenate(labels)) for one in together]


def rows_of(
    config: Config, tests: Sequence[str], figures: Mapping[str, Figure | None], score: str
) -> list[Row]:
    """One row a replica, from figures that are lists where there are several."""
    metric, rows = config.sizes.metric, []
    for number, replica in enumerate(config.replicas):
        own = {
            name: _number(value[number] if isinstance(value, list) else value)
            for name, value in figures.items()
        }
        test = {name: value_of(metric, own, name, score) for name in tests}
        rows.append(Row(*replica, value_of(metric, own, "validation", score), test, own))
    return rows


def _number(value: float | str | None) -> float:
    return float("nan" if value is None else value)


def value_of(metric: Metric, figures: Mapping[str, float], name: str, score: str) -> float:
    """The task's metric on the data called ``name``."""
    return metric.scale * figures[f"{name}_{score if metric.of == 'score' else 'loss'}"]


def leave_replicas(
    config: Config,
    state: TrainState,
    history: Sequence[Record],
    rows: Sequence[Row],
    run: training.RunFolder,
) -> None:
    """A run folder of its own for every replica, as its single run would have left it."""
    host = jax.device_get(state)
    step = int(host.step)
    for number, (replica, row) in enumerate(zip(config.replicas, rows, strict=True)):
        folder = run.path / replica_name(config, replica)
        if (folder / "result.json").exists():
            continue
        own = config.alone(replica)
        records = [_of_one(record, number) for record in history]
        part = jax.tree.map(lambda a, n=number: a[n], host._replace(step=()))
        one = part._replace(step=np.int32(step))
        with training.RunFolder.open(
            folder.name,
            {**run.config(), **settings_of(own)},
            path=folder,
            resume=True,
            start=True,
            environment=run.environment(),
            cell_source=cell_source(config.cell),
        ) as alone:
            if not np.isnan(row.validation):
                keeper = Checkpoints(alone.checkpoints)
                keeper.save(jax.tree.map(jnp.asarray, one), _end(records, step // len(records)))
                keeper.close()
                alone.write_parameters(part.params)
                describe_model(own, alone)
            for record in run.records():
                alone.log(_of_one(record, number))
            result = {
                **outcome_of(own.sizes.metric, [row], False),
                "seed": own.seed,
                "epochs": records,
            }
            alone.write("result.json", {**result, "config": training.as_dict(own)})


def describe_model(config: Config, run: training.RunFolder) -> None:
    """Write what `lstmjax.load_run` needs beside the parameters.

    Nothing of a task with a model of its own. Classes without names are called by their numbers.
    """
    task = config.sizes
    common: dict[str, Any] = {
        "num_outputs": task.num_outputs,
        "classes": task.class_names,
        "precision": config.precision,
        "data": config.task,
    }
    if isinstance(task, Text):
        sizes = task.sizes_of(config.model)
        common |= {"max_length": task.max_length, "tokenizer": task.tokenizer_name}
        described = ModelConfig(config.cell, sizes, **common)
        describe_texts(run, described, task.vocabulary)
    elif type(task).make_model is Task.make_model and isinstance(config.model, SequenceConfig):
        if not task.class_names and isinstance(task.objective, CrossEntropy):
            common["classes"] = tuple(map(str, range(max(2, task.num_outputs))))
        kind = {name: getattr(task, name) for name in ("tokens", "features", "per_step")}
        describe(run, SequenceModelConfig(config.cell, config.model, **common, **kind))


def _end(records: Sequence[Record], batches: int) -> Position:
    """Where a finished run stands: before the last evaluation. Means take the place of sums."""
    *before, last = records
    loss, score = (v for k, v in last.items() if k.startswith("train_"))
    sums = Sums(loss, score, 1.0, 0.0)
    return Position(len(before), batches, sums, history=tuple(before))


def replica_name(config: Config, replica: Replica) -> str:
    """What a replica's folder is called.

    >>> replica_name(Config(seeds=2), Replica(1, 0.001))
    'seed1'
    """
    return f"seed{replica.seed}" + (
        f"-lr{rate_text(replica.learning_rate)}" if len({*config.learning_rates}) > 1 else ""
    )


def _of_one(record: Record, number: int) -> dict[str, Figure]:
    picked = {k: value[number] if isinstance(value, list) else value for k, value in record.items()}
    return {k: value for k, value in picked.items() if value is not None}


def settings_of(config: Config) -> dict[str, Json]:
    """What a run's numbers depend on, for its ``config.json``."""
    here_only = (*HERE_ONLY, *(f"sizes.{name}" for name in _HERE_ONLY))
    return without(training.as_dict(config), here_only)


def task_sources(config: Config) -> dict[str, Json]:
    """SHA-256 of each file of the user's that the task's numbers come from, by the setting that
    names it: the task's own, those it imports from beside it, data, vectors of words, a tokenizer.
    """
    found: dict[str, Json] = {}
    named = {f.name: getattr(config.sizes, f.name) for f in dataclasses.fields(config.sizes)}
    for name, value in {"task": config.task, **named}.items():
        if isinstance(value, str) and os.path.isfile(CellSpec.parse(value).path):
            found[f"{name}_sha256"] = source_digest(value)
        elif isinstance(value, pathlib.Path) and value.is_file() and name not in _HERE_ONLY:
            with open(value, "rb") as file:
                found[f"{name}_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def cell_name(cell: str) -> str:
    """What a cell is called: of a user's file, the class, and hyper-parameters."""
    return CellSpec.parse(cell).call


def open_run(config: Config, mesh: Mesh, data: Sequence[str]) -> training.RunFolder:
    """The folder of this run: new, or with ``resume`` the one to go on with."""
    task = "".join(c if c.isalnum() or c in "-._" else "_" for c in config.task.rpartition(":")[2])
    name = training.run_name(task, cell=config.cell, seed=config.seed)
    if config.side_by_side:
        name += f"-{len(config.replicas)}runs"
    settings = settings_of(config)
    return training.RunFolder.open(
        name,
        {
            **settings,
            "cell_source": source_digest(config.cell),
            "task_sources": task_sources(config),
            "data_sha256": [*data],
        },
        path=config.run_dir,
        resume=config.resume or config.resume_or_start,
        start=not config.resume,
        environment=training.surroundings(mesh),
        cell_source=cell_source(config.cell),
    )


def shape_of(config: Config, sources: Mapping[str, Source]) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of what a model sees of the longest batch."""
    shape = max(sources["train"].shapes, key=lambda shape: shape[1])
    task = config.sizes
    return (shape, "int32") if _sees_ids(task) else ((*shape, task.features), "float32")


def _sees_ids(task: Task) -> bool:
    return bool(task.tokens) or hasattr(task, "top_words")


def engine_of(
    config: Config, model: nnx.Module, mesh: Mesh, sources: Mapping[str, Source]
) -> tuple[str, str]:
    """The engine that runs the first layer in training, and why that one."""
    layer = next(m for _, m in nnx.iter_graph(model) if isinstance(m, Recurrent))
    (rows, steps, *_), _ = shape_of(config, sources)
    work = Workload(
        mesh.devices.flat[0].platform,
        "float32",
        config.precision,
        steps,
        max(1, rows // mesh.size),
        layer.input_size,
        training=bool(layer.cell.noise),
    )
    try:
        engine, why = choose_engine(layer.cell, work, layer.engine)
        return engine.name, why
    except ValueError as error:
        raise UserError(f"{error}; leave out --engine") from error


def introduction(
    config: Config,
    sources: Mapping[str, Source],
    mesh: Mesh,
    path: pathlib.Path,
    engine: tuple[str, str],
) -> str:
    """The task, its source, its data, and what runs it, in a few lines."""
    task, train = config.sizes, sources["train"]
    lines = [f"{config.task}: {task.source}; reported: {task.reported or 'nothing'}"]
    lines += [f"  {name}: {fact}" for name, fact in task.facts().items()]
    lines.append(
        f"{len(train)} batches an epoch in at most {len(train.shapes)} shape(s); "
        f"{_seeds(config)}; {training.accelerator_name(mesh)} x {mesh.size}; engine {engine[0]} "
        f"({engine[1]}); chance {task.metric.text(task.chance)}; run folder {path}"
    )
    return "\n".join(lines)


def _seeds(config: Config) -> str:
    seeds = f"seed {config.seed}"
    if config.seeds > 1:
        seeds = f"seeds {config.seed} to {config.seed + config.seeds - 1}"
    if len(config.learning_rates) > 1:
        seeds += f", learning rates {', '.join(map(rate_text, config.learning_rates))}"
    return seeds
