"""Sentiment of movie reviews: is a review positive or negative?

    python experiments/imdb.py --recipe notebook          # on IMDB, by TFDS
    python experiments/imdb.py --data demo                # on the built-in corpus, no network

Recipes: ``notebook`` is Embedding(5000, 32) -> LSTM(100) -> Dense(1), reviews cut and padded at the
front to 500 ids; ``notebook-dropout`` adds dropout 0.2 before and after the LSTM; ``conv`` puts a
convolution and max pooling in front; ``default`` is what we would train today. Their results, with
seeds and machine, are in the README.
"""

import dataclasses
import pathlib
import time
from typing import Literal

from lstmjax.cells import load_cell
from lstmjax.data import Batches, Dataset, bucket_boundaries, hold_out, load_demo, load_imdb
from lstmjax.errors import UserError
from lstmjax.models import ClassifierConfig
from lstmjax.precision import Precision
from lstmjax.training import Accelerator, OptimizerConfig, RunFolder
from lstmjax.training.command import require_positive, require_share, run_command


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Reviews and how they are cut into batches."""

    data: Literal["imdb", "demo"] = "imdb"
    """imdb: by TFDS; demo: a small corpus of our own, made on the spot."""
    data_dir: pathlib.Path | None = None
    """TFDS folder to read, or to prepare into (default: TFDS_DATA_DIR, else TFDS' own)."""
    archive: pathlib.Path | None = None
    """Local aclImdb tar.gz to prepare from instead of downloading."""
    max_length: int = 500
    """Ids kept of a review, the last ones."""
    padding: Literal["bucketed", "front"] = "front"
    """bucketed: padded behind to few lengths, and masked; front: zeros in front, not masked."""
    batch_size: int = 64
    """Reviews a step, over all devices together."""
    validation: float = 0.0
    """Share of the training reviews to hold out; evaluated in place of the test split."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one run."""

    recipe: Literal["notebook", "notebook-dropout", "conv", "default"] = "notebook"
    """Gives every other flag its default."""
    cell: str = "LSTM"
    """LSTM, GRU, PeepholeLSTM, or your own: path/to/file.py:MyCell."""
    accelerator: Accelerator = "auto"
    """Device to run on; auto takes the best there is."""
    precision: Precision = "float32"
    """bfloat16: products in bfloat16, sums and states in float32."""
    seed: int = 0
    """Of parameters, order of batches and dropout."""
    epochs: int = 3
    """Passes over the training reviews."""
    run_dir: pathlib.Path | None = None
    """Where the run is written (default: a new folder under runs/)."""
    resume: bool = False
    """Go on with the run in --run-dir (default: the newest of this recipe, data, cell, seed)."""
    data: DataConfig = DataConfig()
    model: ClassifierConfig = ClassifierConfig()
    optimizer: OptimizerConfig = OptimizerConfig()


NOTEBOOK = Config()
RECIPES = {
    "notebook": NOTEBOOK,
    "notebook-dropout": dataclasses.replace(
        NOTEBOOK,
        recipe="notebook-dropout",
        model=ClassifierConfig(dropout_before=0.2, dropout_after=0.2),
    ),
    "conv": dataclasses.replace(
        NOTEBOOK, recipe="conv", model=ClassifierConfig(conv_filters=32)
    ),
    "default": Config(
        recipe="default",
        data=DataConfig(max_length=400, padding="bucketed"),
        model=ClassifierConfig(
            top_words=20_000,
            pooling=("max", "mean"),
            dropout_before=0.4,
            dropout_after=0.4,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="one-cycle", clip_norm=1.0),
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
            "embedding-size": model.embedding_size,
            "hidden-size": model.hidden_size,
            "num-layers": model.num_layers,
            "conv-width": model.conv_width,
            "conv-pool": model.conv_pool,
        }
    )
    require_share(
        {"validation": data.validation}
        | {name: value for name, value in vars(model).items() if name.startswith("dropout_")}
    )
    if config.model.top_words < 5:
        raise UserError(f"--top-words must be at least 5 (ids 0-3 are no words), got {model.top_words}")
    if not model.pooling:
        raise UserError("--pooling needs at least one of last, mean, max")
    if model.conv_filters < 0:
        raise UserError(f"--conv-filters must be at least 0, got {model.conv_filters}")
    if not config.optimizer.learning_rate > 0:
        raise UserError(f"--learning-rate must be positive, got {config.optimizer.learning_rate}")


def open_run(config: Config) -> RunFolder:
    """The folder of this run: new, or with ``resume`` the one to go on with."""
    from lstmjax.training import as_dict

    cell = config.cell.rpartition(":")[2]
    name = f"imdb-{config.recipe}-{config.data.data}-{cell}-seed{config.seed}"
    settings = as_dict(config)
    for here_only in ("run_dir", "resume", "accelerator"):
        del settings[here_only]
    for here_only in ("data_dir", "archive"):
        del settings["data"][here_only]
    if config.resume:
        return RunFolder.reopen(config.run_dir or RunFolder.newest(name), settings)
    return RunFolder.create(config.run_dir or RunFolder.free(name), settings)


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
    )


def make_batches(config: Config) -> tuple[Batches, dict[str, Batches]]:
    """Batches to train on, and those to evaluate on by name."""
    train = load(config, "train")
    name, held_out = "test", None
    if config.data.validation:
        train, held_out = hold_out(train, config.data.validation)
        name = "validation"
    held_out = held_out or load(config, "test")
    padding: Literal["left", "right"] = "left"
    boundaries: tuple[int, ...] = (config.data.max_length,)
    if config.data.padding == "bucketed":
        padding = "right"
        boundaries = bucket_boundaries([len(ids) for ids in train.sequences])
    size = config.data.batch_size
    return (
        Batches(train, size, boundaries=boundaries, padding=padding),
        {name: Batches(held_out, 4 * size, boundaries=boundaries, padding=padding)},
    )


def main(config: Config) -> None:
    """Run the experiment."""
    check(config)
    from lstmjax import training

    mesh = training.make_mesh(config.accelerator, rows=config.data.batch_size)
    cell = load_cell(config.cell, config.model.hidden_size)
    train, evaluations = make_batches(config)
    run = open_run(config)

    import jax
    from flax import nnx

    from lstmjax.models import Classifier, count_parameters, summary

    model = Classifier(
        cell, config.model, precision=config.precision, rngs=nnx.Rngs(config.seed)
    )
    shape = (config.data.batch_size, config.data.max_length)
    print(summary(model, jax.ShapeDtypeStruct(shape, "int32")))
    corpus = {"imdb": "IMDB", "demo": "the built-in DEMO corpus (not IMDB)"}[config.data.data]
    print(
        f"{corpus}: {len(train)} batches an epoch, {train.padding_share:.1%} padding, "
        f"{len(train.shapes)} batch shapes; {training.accelerator_name(mesh)} x {mesh.size}; "
        f"run folder {run.path}"
    )
    steps = training.make_steps(
        model,
        training.make_optimizer(config.optimizer, config.epochs * len(train)),
        mesh,
        padding=train.padding,
        masked=config.data.padding == "bucketed",
    )
    started = time.perf_counter()
    try:
        _, history = training.fit(
            steps,
            train,
            evaluations,
            run,
            mesh,
            epochs=config.epochs,
            seed=config.seed,
            resume=config.resume,
        )
    except training.Interrupted:
        print(f"stopped and saved; go on with the same command and --resume --run-dir {run.path}")
        raise
    report(config, run, history, count_parameters(model), mesh, time.perf_counter() - started)


def report(config, run, history, parameters, mesh, seconds) -> None:
    """Write ``result.json`` and the curves, print the table."""
    from lstmjax import training

    (name,) = {key.removesuffix("_accuracy") for key in history[-1] if key.endswith("_accuracy")} - {
        "train"
    }
    result = {
        f"{name}_accuracy": history[-1][f"{name}_accuracy"],
        f"{name}_loss": history[-1][f"{name}_loss"],
        "parameters": parameters,
        "epoch_seconds": [record["seconds"] for record in history],
        "seconds": seconds,
        "data": config.data.data,
        "accelerator": training.accelerator_name(mesh),
        "devices": mesh.size,
        "seed": config.seed,
        "epochs": history,
        "config": training.as_dict(config),
        "versions": training.versions(),
    }
    run.write("result.json", result)
    corpus = {"imdb": "IMDB", "demo": "DEMO corpus, not IMDB"}[config.data.data]
    run.draw_curves(f"{config.cell} · recipe {config.recipe} · {corpus} · seed {config.seed}")
    print(f"\nepoch  train loss  train acc  {name} loss  {name} acc  seconds   ({corpus})")
    for r in history:
        print(
            f"{r['epoch']:>5}  {r['train_loss']:>10.4f}  {100 * r['train_accuracy']:>8.2f}%"
            f"  {r[f'{name}_loss']:>{len(name) + 5}.4f}  {100 * r[f'{name}_accuracy']:>{len(name) + 3}.2f}%"
            f"  {r['seconds']:>7.1f}"
        )
    print(f"{run.path}/result.json, curves.png, metrics.jsonl, checkpoints/")


if __name__ == "__main__":
    run_command(RECIPES, main, description=__doc__)
