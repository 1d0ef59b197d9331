"""Sentiment of movie reviews: is a review positive or negative?

    lstmjax imdb --recipe notebook          # on IMDB, by TFDS
    lstmjax imdb --data demo                # on the built-in corpus, no network

Recipes: ``notebook`` is Embedding(5000, 32) -> LSTM(100) -> Dense(1), reviews cut and padded at the
front to 500 ids; ``notebook-dropout`` adds dropout 0.2 before and after the LSTM; ``conv`` puts a
convolution and max pooling in front; ``default`` is what we would train today.

Expect on IMDB after three epochs, over seeds 0 to 4 on two x86-64 cores (AVX2, jax 0.10.2, two CPU
devices, the CPU engine), this test accuracy:

    notebook            86.74 ± 0.65 %  (86.26-87.85)
    notebook-dropout    86.92 ± 0.30 %  (86.55-87.31)
    conv                88.12 ± 0.63 %  (87.38-88.72)
    default             87.96 ± 0.27 %  (87.64-88.30)

The README has the single runs.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from lstmjax import stopping, training
from lstmjax.cells import (
    Cell,
    CellSpec,
    cell_source,
    load_cell,
    source_digest,
)
from lstmjax.data import (
    Batches,
    Dataset,
    SideBySide,
    StreamedBatches,
    bucket_boundaries,
    hold_out,
    load_demo,
    load_imdb,
    row_lengths,
)
from lstmjax.errors import UserError
from lstmjax.models import Classifier, ClassifierConfig, count_parameters, summary
from lstmjax.recurrence import Engine, Workload, choose_engine
from lstmjax.trained import ModelConfig, describe_texts
from lstmjax.training.command import (
    require_layers,
    require_positive,
    require_rate,
    require_seed,
    require_share,
    run_command,
)
from lstmjax.training.repeat import without
from lstmjax.training.report import Figure, Record
from lstmjax.workbench.config import HERE_ONLY, RunConfig, require_replicas
from lstmjax.workbench.rows import ACCURACY, Row, outcome_of, table_of


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Reviews and how they are cut into batches."""

    data: Literal["imdb", "demo", "rows"] = "imdb"
    """imdb: by TFDS; demo: a small corpus of our own, made on the spot; rows: what write_rows has
    written to train and test in --data-dir, streamed from disk."""
    data_dir: pathlib.Path | None = None
    """TFDS folder to read, or to prepare into; without it TFDS_DATA_DIR, else TFDS' own."""
    archive: pathlib.Path | None = None
    """Local aclImdb tar.gz to prepare from instead of downloading."""
    max_length: int = 500
    """Ids kept of a review, the last ones."""
    padding: Literal["bucketed", "front"] = "front"
    """bucketed: padded behind to few lengths, and masked; front: zeros in front, not masked."""
    buckets: int = 10
    """Most lengths that bucketed batches may have; each is compiled once, every second one to
    evaluate."""
    batch_size: int = 64
    """Reviews a step, over all devices together."""
    word_ids: Literal["frequency", "keras"] = "frequency"
    """Which of IMDB's equally frequent words has the smaller id: that seen first, or that which the
    index published by Keras has first."""
    validation: float = 0.0
    """Share of the training reviews to hold out; evaluated in place of the test split. --keep-best
    and --patience need it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of one run."""

    recipe: Literal["notebook", "notebook-dropout", "conv", "default"] = "notebook"
    """Gives every other flag its default."""
    epochs: int = 3
    """Passes over the training reviews."""
    repeat: pathlib.Path | None = None
    """Run again what this folder's run was asked for, and say whether the numbers are the same."""
    coordinator: str = ""
    """Of a run in several processes, host:port of the first; Slurm and TPU slices need none."""
    processes: int = 0
    """How many processes there are, where --coordinator is given."""
    process_id: int = -1
    """Number of this process, from 0, where --coordinator is given."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ClassifierConfig = dataclasses.field(default_factory=ClassifierConfig)


OF_THIS_START = (
    *HERE_ONLY,
    *("coordinator", "processes", "process_id", "repeat", "data.data_dir", "data.archive"),
)
"""What a run's numbers do not depend on."""
CORPUS = {
    "imdb": "IMDB",
    "demo": "built-in DEMO corpus (not IMDB)",
    "rows": "rows streamed from --data-dir (not IMDB)",
}
NOTEBOOK = Config(data=DataConfig(word_ids="keras"))
RECIPES = {
    "notebook": NOTEBOOK,
    "notebook-dropout": dataclasses.replace(
        NOTEBOOK,
        recipe="notebook-dropout",
        model=ClassifierConfig(dropout_before=0.2, dropout_after=0.2),
    ),
    "conv": Config(recipe="conv", model=ClassifierConfig(conv_filters=32)),
    "default": Config(
        recipe="default",
        data=DataConfig(padding="bucketed"),
        model=ClassifierConfig(
            top_words=20_000,
            embedding_size=64,
            pooling=("max", "mean"),
            conv_filters=128,
            dropout_words=0.4,
            dropout_before=0.5,
            dropout_after=0.5,
        ),
        optimizer=training.OptimizerConfig(learning_rate=3e-3, schedule="one-cycle", clip_norm=1.0),
    ),
}


def check(config: Config) -> None:
    """Raise `UserError` for settings that cannot work."""
    model, data = config.model, config.data
    require_positive(
        {
            "epochs": config.epochs,
            "batch-size": data.batch_size,
            "max-length": data.max_length,
            "buckets": data.buckets,
            "embedding-size": model.embedding_size,
            "hidden-size": model.hidden_size,
            "conv-width": model.conv_width,
            "conv-pool": model.conv_pool,
            "conv-filters": max(model.conv_filters, 1),
            "top-words": max(model.top_words, 1),
            "keep": config.keep,
            "seeds": config.seeds,
        }
    )
    require_layers(model.num_layers)
    require_share(
        {"validation": data.validation}
        | {name: value for name, value in vars(model).items() if name.startswith("dropout_")}
    )
    if config.model.top_words < 5:
        raise UserError(
            f"--top-words must be at least 5 (ids 0-3 are no words), got {model.top_words}"
        )
    if not model.pooling:
        raise UserError("--pooling needs at least one of last, mean, max")
    for name in ("checkpoint_every", "patience"):
        if getattr(config, name) < 0:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be at least 0, got {getattr(config, name)}")
    if (config.keep_best or config.patience) and not data.validation:
        raise UserError(
            "--keep-best and --patience choose an epoch, which test data must not: add "
            "--validation 0.1, say"
        )
    if model.conv_filters < 0:
        raise UserError(f"--conv-filters must be at least 0, got {model.conv_filters}")
    if config.side_by_side and (config.keep_best or config.patience or config.processes):
        raise UserError(
            "--seeds and --learning-rates go without --keep-best, --patience and --processes"
        )
    rate, clip = config.optimizer.learning_rate, config.optimizer.clip_norm
    for one in (rate, *config.learning_rates):
        require_rate(one)
    if not (clip >= 0 and math.isfinite(clip)):
        raise UserError(f"--clip-norm must be at least 0 and finite, got {clip}")
    require_seed(config.seed)
    require_seed(config.seed + config.seeds - 1)
    require_replicas(config.seeds, config.learning_rates)
    if config.epochs > 10_000:
        raise UserError(f"--epochs must be at most 10000, got {config.epochs}")


def require_apart(before: pathlib.Path | None, now: pathlib.Path | None) -> None:
    """Raise `UserError` where a run that is repeated would be written over."""
    if before and now and now.exists() and before.samefile(now):
        raise UserError(f"--repeat and --run-dir are both {before}: name another --run-dir")


def open_run(config: Config, mesh: Mesh, data: list[str]) -> training.RunFolder:
    """The folder of this run: new, or with ``resume`` the one to go on with."""
    name = training.run_name(
        "imdb", config.recipe, config.data.data, cell=config.cell, seed=config.seed
    )
    if config.side_by_side:
        name += f"-{len(config.replicas)}runs"
    resume = config.resume or config.resume_or_start
    there = training.RunFolder.newest(name) if resume else None
    require_apart(config.repeat, config.run_dir or there)
    settings = without(training.as_dict(config), OF_THIS_START)
    return training.RunFolder.open(
        name,
        {**settings, "cell_source": source_digest(config.cell), "data_sha256": data},
        path=config.run_dir,
        resume=resume,
        start=not config.resume,
        environment=training.surroundings(mesh),
        cell_source=cell_source(config.cell),
    )


def load(config: Config, split: Literal["train", "test"]) -> Dataset:
    """One split, as the config asks for it."""
    data, top_words = config.data, config.model.top_words
    if data.data == "demo":
        return load_demo(split, top_words=top_words, max_length=data.max_length)
    return load_imdb(
        split,
        top_words=top_words,
        max_length=data.max_length,
        data_dir=data.data_dir,
        archive=data.archive,
        word_ids=data.word_ids,
    )


def make_batches(config: Config) -> tuple[Batches, dict[str, Batches]]:
    """Batches to train on, and those to evaluate on by name; of each this process's share."""
    padding: Literal["left", "right"] = "right" if config.data.padding == "bucketed" else "left"
    share, size = (jax.process_index(), jax.process_count()), config.data.batch_size

    def cut(rows: Dataset | pathlib.Path, size: int, boundaries: tuple[int, ...]) -> Batches:
        if isinstance(rows, Dataset):
            return Batches(rows, size, boundaries=boundaries, padding=padding).share(*share)
        limits: Any = {"boundaries": boundaries, "top_words": config.model.top_words}
        return StreamedBatches(rows, size, padding=padding, **limits).share(*share)

    name, train, held_out = sources(config)
    boundaries: tuple[int, ...] = (config.data.max_length,)
    if config.data.padding == "bucketed":
        lengths = lengths_of(train, config.data.max_length)
        boundaries = bucket_boundaries(lengths, count=config.data.buckets)
    # Evaluating a few steps more of padding takes less time than compiling for every length.
    every_second = boundaries[::-2][::-1]
    return cut(train, size, boundaries), {name: cut(held_out, 4 * size, every_second)}


def sources(config: Config) -> tuple[str, Dataset | pathlib.Path, Dataset | pathlib.Path]:
    """What to evaluate on is called, what to train on, and that to evaluate on."""
    if config.data.data == "rows":
        folder = config.data.data_dir
        if folder is None or config.data.validation:
            raise UserError("--data rows needs --data-dir, and cannot hold out --validation")
        return "test", folder / "train", folder / "test"
    train = load(config, "train")
    if config.data.validation:
        return "validation", *hold_out(train, config.data.validation)
    return "test", train, load(config, "test")


def lengths_of(rows: Dataset | pathlib.Path, longest: int) -> Any:
    """The length of each row, at most ``longest``."""
    if isinstance(rows, Dataset):
        return [len(ids) for ids in rows.sequences]
    return np.minimum(row_lengths(rows)[0], longest)


def main(config: Config) -> None:
    """Run the experiment."""
    if config.repeat:
        config = training.config_of(config.repeat, config, OF_THIS_START)
    check(config)
    training.check_viewers(config.log)
    training.join(config.coordinator, config.processes, config.process_id)
    replicas = len(config.replicas)
    mesh = training.make_mesh(config.accelerator, config.data.batch_size, replicas)
    cell = load_cell(config.cell, config.model.hidden_size)
    model = nnx.eval_shape(lambda: make_model(config, cell, config.seed))
    training.require_room(replicas * count_parameters(model), mesh)
    train, evaluations = make_batches(config)
    train = training.padded_for(mesh, train)
    evaluations = {name: training.padded_for(mesh, rows) for name, rows in evaluations.items()}
    engine, reason = engine_for(config, cell, mesh)
    models = make_models(config, cell, mesh)
    shape = (config.data.batch_size, config.data.max_length)
    table = summary(model, jax.ShapeDtypeStruct(shape, "int32"))
    with open_run(config, mesh, [b.fingerprint for b in (train, *evaluations.values())]) as run:
        stopping.advise(f"go on: the same command with --resume --run-dir {quote(str(run.path))}")
        print(table)
        print(
            f"{CORPUS[config.data.data]}: {len(train)} batches an epoch in at most "
            f"{len(train.shapes)} shape(s), each compiled once, {train.padding_share:.1%} padding; "
            f"{training.accelerator_name(mesh)} x {mesh.size}; engine {engine.name} ({reason}); "
            f"run folder {run.path}"
        )
        if not config.side_by_side:
            describe_model(config, train, run)
        run.show_in(config.log)
        started = time.perf_counter()
        with training.counting_compilations() as made:
            history = learn(config, cell, models, train, evaluations, run, mesh)
        facts = {
            "parameters": count_parameters(model),
            "seconds": time.perf_counter() - started,
            "epoch_seconds": [record["seconds"] for record in history],
        }
        (name,) = evaluations
        report(config, run, mesh, history, name, facts)
        if config.repeat:
            print(training.compare(training.RunFolder(config.repeat), run))
        print(f"{made.programs['jit(local_gradient)']} shape(s) trained on; {made}")


def describe_model(config: Config, train: Batches, run: training.RunFolder) -> None:
    """Write what `lstmjax.load_run` needs; rows on disk come without words."""
    if train.vocabulary is not None:
        described = ModelConfig(
            config.cell,
            config.model,
            precision=config.precision,
            max_length=config.data.max_length,
            padding=config.data.padding,
            data=CORPUS[config.data.data],
        )
        describe_texts(run, described, train.vocabulary)


def report(
    config: Config,
    run: training.RunFolder,
    mesh: Mesh,
    history: Sequence[Record],
    name: str,
    facts: Mapping[str, object],
) -> None:
    """Write the result, then all that may fail; ``name`` is the split that was evaluated."""
    kept = training.best_epoch(history, name) if config.keep_best else history[-1]
    corpus, cell = CORPUS[config.data.data], CellSpec.parse(config.cell).call
    outcome = {key: kept[key] for key in (f"{name}_accuracy", f"{name}_loss")}
    rows = rows_of(config, kept, name)
    if config.side_by_side:
        outcome = outcome_of(ACCURACY, rows, several=True)
    facts = {**facts, "kept_epoch": kept["epoch"]}
    run.write_result(config, mesh, outcome, **facts, data=config.data.data, epochs=history)
    run.draw_curves(f"{cell} · recipe {config.recipe} · {corpus} · seed {config.seed}")
    print_table(history, name)
    if config.side_by_side:
        print(f"\n{table_of(ACCURACY, rows)}")
    accuracy = float(np.mean([row.test[name] for row in rows]))
    print(
        f"{corpus}, {name} accuracy {accuracy:.2%} after epoch {kept['epoch']}; "
        f"everything in {run.path}"
    )


def rows_of(config: Config, record: Record, name: str) -> list[Row]:
    """One row a replica of an epoch's record; ``name`` is the split that was evaluated."""
    keys = (f"{name}_accuracy", f"{name}_loss")
    columns = [np.atleast_1d(np.array(record[key], float)).tolist() for key in keys]
    return [
        Row(seed, rate, math.nan, {name: found[0]}, dict(zip(keys, found, strict=True)))
        for (seed, rate), *found in zip(config.replicas, *columns, strict=True)
    ]


def engine_for(config: Config, cell: Cell, mesh: Mesh) -> tuple[Engine, str]:
    """The engine that runs the first layer in training, and why that one."""
    platform, rows = mesh.devices.flat[0].platform, config.data.batch_size // mesh.size
    features = config.model.conv_filters or config.model.embedding_size
    steps = config.data.max_length
    noisy = bool(cell.noise)
    work = Workload(platform, "float32", config.precision, steps, rows, features, training=noisy)
    try:
        return choose_engine(cell, work, None if config.engine == "auto" else config.engine)
    except ValueError as error:
        raise UserError(f"{error}; leave out --engine") from error


def make_model(config: Config, cell: Cell, seed: int | Array) -> Classifier:
    """The model of a seed before the first step.

    Without ``--engine``, every layer and every shape of batch gets an engine that can run it.
    """
    engine = None if config.engine == "auto" else config.engine
    rngs = nnx.Rngs(jax.random.key(seed))
    return Classifier(cell, config.model, precision=config.precision, engine=engine, rngs=rngs)


def make_models(config: Config, cell: Cell, mesh: Mesh) -> Classifier:
    """The model, or one that holds the parameters of all replicas, stacked."""
    seeds = [replica.seed for replica in config.replicas] if config.side_by_side else config.seed
    return training.draw_models(lambda seed: make_model(config, cell, seed), seeds, mesh)


def learn(
    config: Config,
    cell: Cell,
    model: Classifier,
    train: Batches,
    evaluations: dict[str, Batches],
    run: training.RunFolder,
    mesh: Mesh,
) -> Sequence[Record]:
    """Train and evaluate; one record an epoch."""
    optimizer = training.make_optimizer(config.optimizer, config.epochs * len(train))
    masked = config.data.padding == "bucketed"
    several, rate = config.side_by_side, config.optimizer.learning_rate
    steps = training.make_steps(
        model,
        optimizer,
        mesh,
        padding=train.padding,
        masked=masked,
        replicas=[r.learning_rate / rate for r in config.replicas] if several else (),
    )
    with training.explained(cell):
        return training.fit(
            steps,
            SideBySide(train) if several else train,
            evaluations,
            run,
            mesh,
            epochs=config.epochs,
            seed=tuple(r.seed for r in config.replicas) if several else config.seed,
            resume=config.resume or config.resume_or_start,
            checkpoint_every=config.checkpoint_every,
            keep=config.keep,
            keep_best=config.keep_best,
            patience=config.patience,
        )[1]


def print_table(history: Sequence[Record], name: str) -> None:
    """A line an epoch, of replicas their means; ``name`` is the split that was evaluated."""
    heads = ("epoch", "train loss", "train acc", f"{name} loss", f"{name} acc", "seconds")
    print("\n" + "  ".join(f"{head:>15}" for head in heads))
    for r in history:
        values = (
            f"{r['epoch']}",
            f"{_mean(r['train_loss']):.4f}",
            f"{_mean(r['train_accuracy']):.2%}",
            f"{_mean(r[f'{name}_loss']):.4f}",
            f"{_mean(r[f'{name}_accuracy']):.2%}",
            f"{r['seconds']:.1f}",
        )
        print("  ".join(f"{value:>15}" for value in values))


def _mean(value: Figure) -> float:
    """Of replicas, those that did not diverge."""
    return float(np.nanmean(np.array(value, float)))


def run() -> None:
    """Parse the command line and run `main`."""
    run_command(RECIPES, main, description=__doc__)
