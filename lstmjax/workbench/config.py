"""What a run of a task is asked for, and what replicas it is made of."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from lstmjax.errors import UserError
from lstmjax.models import SequenceConfig
from lstmjax.precision import Precision
from lstmjax.recurrence.choice import EngineName
from lstmjax.tasks import Adding, Task, load_task
from lstmjax.training import Accelerator, OptimizerConfig, Viewer
from lstmjax.training.command import (
    require_layers,
    require_positive,
    require_rate,
    require_seed,
    require_share,
)
from lstmjax.workbench.rows import Replica, replicas_of

HERE_ONLY = (
    "run_dir",
    "resume",
    "resume_or_start",
    "accelerator",
    "checkpoint_every",
    "keep",
    "log",
)
"""Fields of `RunConfig` that a run's numbers do not depend on: each start has its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that every training run has."""

    cell: str = "LSTM"
    """LSTM, GRU, PeepholeLSTM, or your own: path/to/file.py:MyCell; with hyper-parameters, if any:
    "path/to/file.py:MyCell(leak=0.1)"."""
    accelerator: Accelerator = "auto"
    """Device to run on; auto takes the best there is."""
    precision: Precision = "float32"
    """bfloat16: products in bfloat16, sums and states in float32."""
    engine: Literal["auto", EngineName] = "auto"
    """What runs the recurrence; auto takes the fastest that can run the cell, and says which."""
    seed: int = 0
    """Of parameters, batches and dropout; with --seeds the first of them."""
    seeds: int = 1
    """Train so many replicas side by side in one program, each equal to its single run."""
    learning_rates: tuple[float, ...] = ()
    """Train every seed with each of these, in the same program."""
    run_dir: pathlib.Path | None = None
    """Where the run is written; without it, a new folder under runs/."""
    resume: bool = False
    """Go on with the run in --run-dir; without it, the newest of this task or recipe, data, cell
    and seed."""
    resume_or_start: bool = False
    """The same if there is such a run, else start it: for schedulers, which repeat a command."""
    checkpoint_every: int = 0
    """Save every so many steps, besides each epoch's end; 0: not."""
    keep: int = 2
    """How many checkpoints stay."""
    log: tuple[Viewer, ...] = ()
    """Show the metrics in other viewers, too: tensorboard, wandb (offline); each is an extra."""
    keep_best: bool = False
    """The model that the run leaves, and tests, is that of the epoch with the smallest validation
    loss, not the last one."""
    patience: int = 0
    """End after so many epochs without a smaller validation loss; 0: not."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """The runs that this one is made of."""
        rates = self.learning_rates or (self.optimizer.learning_rate,)
        return replicas_of(self.seed, self.seeds, rates)

    @property
    def side_by_side(self) -> bool:
        """Whether they are replicas in one program, be it one alone."""
        return self.seeds > 1 or bool(self.learning_rates)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of a run on any task."""

    task: str = "adding"
    """adding, characters, copy, cumsum, demo, digits, imdb, mnist1d, parity, recall, s5,
    selective-copy; sequences or text: your own --file; or your own task, path/to/file.py:MyTask.
    Gives every other flag its default."""
    epochs: int = 10
    """How often it is evaluated; of a data set, passes over it."""
    batch_size: int = 64
    """Rows an update, over all devices together."""
    sizes: Task = dataclasses.field(default_factory=Adding)
    """The task's own."""
    model: Any = dataclasses.field(default_factory=SequenceConfig)
    """Of the model around the cell."""

    def alone(self, replica: Replica) -> "Config":
        """What the single run is asked for that a replica equals."""
        rate = dataclasses.replace(self.optimizer, learning_rate=replica.learning_rate)
        return dataclasses.replace(
            self, seed=replica.seed, seeds=1, learning_rates=(), optimizer=rate
        )


def config_of(task: str) -> Config:
    """The settings with which a task is trained, unless it is said otherwise.

    >>> config_of("adding(length=50)").sizes.length
    50
    """
    sizes = load_task(task)
    recipe = sizes.recipe
    return Config(
        task=task,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        sizes=sizes,
        model=recipe.model,
        optimizer=recipe.optimizer,
    )


def check(config: Config) -> None:
    """Raise `UserError` for settings that cannot work."""
    sizes = {
        name: value
        for name, value in vars(config.model).items()
        if name in ("hidden_size", "embedding_size", "conv_width", "conv_pool")
    }
    counts = {name: getattr(config, name) for name in ("epochs", "batch_size", "seeds", "keep")}
    optional = {n: max(getattr(config.model, n, 1), 1) for n in ("conv_filters", "top_words")}
    require_positive({**counts, **sizes, **optional})
    require_layers(config.model.num_layers)
    require_share({n: value for n, value in vars(config.model).items() if n.startswith("dropout_")})
    require_rates([config.optimizer.learning_rate, *config.learning_rates])
    require_seed(config.seed)
    require_seed(config.seed + config.seeds - 1)
    require_replicas(config.seeds, config.learning_rates)
    for name in ("checkpoint_every", "patience"):
        if getattr(config, name) < 0:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be at least 0, got {getattr(config, name)}")
    if config.side_by_side and (config.keep_best or config.patience):
        raise UserError(
            "--keep-best and --patience end each run at another epoch: leave them out, or train "
            "one seed at a time"
        )
    clip = config.optimizer.clip_norm
    if not (clip >= 0 and math.isfinite(clip)):
        raise UserError(f"--clip-norm must be at least 0 and finite, got {clip}")


def require_replicas(seeds: int, rates: Sequence[float], most: int = 10_000) -> None:
    """Raise `UserError` for more runs side by side than are worth counting out."""
    runs = seeds * max(len(rates), 1)
    if runs > most:
        raise UserError(
            f"--seeds and --learning-rates make {runs:,} runs, of at most {most:,} in one program: "
            "lower --seeds"
        )


def require_rates(rates: Sequence[float]) -> None:
    """Raise `UserError` unless all learning rates are positive and finite."""
    for rate in rates:
        require_rate(rate)
