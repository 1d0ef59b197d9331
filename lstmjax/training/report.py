"""What a run leaves behind: config, environment, metrics as they come, curves, the result."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from lstmjax.errors import UserError
from lstmjax.training.devices import accelerator_name

_PACKAGES = ("lstmjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from source
            found[name] = importlib.metadata.version(name)
    return found


def run_name(*parts: str, cell: str, seed: int) -> str:
    """What a run is called; of a cell from a user's file, its class.

    >>> run_name("imdb", "default", cell="path/to/file.py:MyCell", seed=3)
    'imdb-default-MyCell-seed3'
    """
    return "-".join([*parts, cell.rpartition(":")[2], f"seed{seed}"])


class RunFolder:
    """One run's folder.

    Attributes:
        path: the folder.
        checkpoints: where the checkpoints go.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = RunFolder.create(pathlib.Path(folder) / "a", {"seed": 0})
        ...     run.log({"kind": "step", "step": 10, "epoch": 1, "loss": 0.5})
        ...     run.records()
        [{'kind': 'step', 'step': 10, 'epoch': 1, 'loss': 0.5}]
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._metrics = path / "metrics.jsonl"

    @classmethod
    def open(
        cls,
        name: str,
        config: Mapping[str, Any],
        *,
        path: pathlib.Path | None = None,
        resume: bool = False,
    ) -> "RunFolder":
        """The folder of a run: a new one, or with ``resume`` the one to go on with.

        Args:
            name: what the run is called; gives the folder if there is no ``path``.
            config: what the run is asked for, as JSON-ready values.
            path: the folder.
            resume: go on with the run in ``path``, else with the newest of this name.

        Raises:
            UserError: as `create` and `reopen`.
        """
        if resume:
            return cls.reopen(path or cls.newest(name), config)
        return cls.create(path or cls.free(name), config)

    @staticmethod
    def free(name: str) -> pathlib.Path:
        """``runs/<name>``, numbered from 2 on where earlier runs are in the way."""
        return RunFolder._numbered(name)[-1]

    @staticmethod
    def newest(name: str) -> pathlib.Path:
        """The folder that `free` gave out last under this name."""
        numbered = RunFolder._numbered(name)
        return numbered[-2] if len(numbered) > 1 else numbered[-1]

    @staticmethod
    def _numbered(name: str) -> list[pathlib.Path]:
        folders = [pathlib.Path("runs") / name]
        while folders[-1].exists():
            folders.append(pathlib.Path("runs") / f"{name}-{len(folders) + 1}")
        return folders

    @classmethod
    def create(cls, path: pathlib.Path, config: Mapping[str, Any]) -> "RunFolder":
        """A new run's folder.

        Raises:
            UserError: the folder is not empty, or cannot be written.
        """
        machine = {"machine": platform.machine(), "cores": os.cpu_count()}
        run = cls(path)
        try:
            if path.exists() and any(path.iterdir()):
                raise UserError(
                    f"{path} is not empty: name another --run-dir, or resume the run that it holds"
                )
            path.mkdir(parents=True, exist_ok=True)
            run.write("config.json", config)
            run.write("environment.json", {"versions": versions(), **machine})
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {path}: {error.strerror}; name another --run-dir"
            ) from error
        return run

    @classmethod
    def reopen(cls, path: pathlib.Path, config: Mapping[str, Any]) -> "RunFolder":
        """The folder of a run to go on with.

        Raises:
            UserError: there is no run, or it had another config; the message names the fields.
        """
        try:
            before = json.loads((path / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"nothing to resume in {path}: no readable config.json; start without --resume"
            ) from error
        now = json.loads(json.dumps(config))
        differing = _differences(before, now)
        if differing:
            raise UserError(
                f"{path} was run with another config ({'; '.join(differing)}); "
                "resume with the same settings, or start anew with another --run-dir"
            )
        return cls(path)

    def write_result(
        self, config: Any, mesh: Mesh, outcome: Mapping[str, Any], **facts: Any
    ) -> None:
        """Write ``result.json``: the outcome first, then the facts and what every run records.

        Args:
            config: the config dataclass of the run; it has a ``seed``.
            mesh: the devices that the run used.
            outcome: what was measured.
            facts: what else this experiment has to say.
        """
        common = {
            "accelerator": accelerator_name(mesh),
            "devices": mesh.size,
            "seed": config.seed,
            "config": as_dict(config),
            "versions": versions(),
        }
        self.write("result.json", {**outcome, **facts, **common})

    def write(self, name: str, value: Any) -> None:
        """Write ``value`` as JSON, as a whole or not at all."""
        self._replace(name, json.dumps(value, indent=2, default=str, allow_nan=False) + "\n")

    def _replace(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text)
        os.replace(temporary, self.path / name)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        with self._metrics.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """All whole lines of ``metrics.jsonl``.

        Raises:
            UserError: a line is not a record.
        """
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_text().splitlines(keepends=True)
        try:
            records = [json.loads(line) for line in lines if line.endswith("\n")]
            if not all({"kind", "step", "epoch"} <= set(record) for record in records):
                raise ValueError
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self._metrics} is damaged: a line is no record; delete that line"
            ) from error
        return records

    def rewind(self, step: int, epoch: int) -> list[dict[str, Any]]:
        """Drop what was logged after ``step`` or in later epochs; returns the epochs' records."""
        kept = [
            r
            for r in self.records()
            if (r["epoch"] < epoch if r["kind"] == "epoch" else r["step"] <= step)
        ]
        self._replace(self._metrics.name, "".join(json.dumps(record) + "\n" for record in kept))
        return [record for record in kept if record["kind"] == "epoch"]

    def draw_curves(self, title: str) -> None:
        """Draw ``curves.png``: training loss by step, accuracy by epoch."""
        records = self.records()
        steps = [r for r in records if r["kind"] == "step"]
        epochs = [r for r in records if r["kind"] == "epoch"]
        draw_curves(self.path / "curves.png", title, steps, epochs)


def prepare_drawing() -> None:
    """Import Matplotlib in a thread: half a second that passes while XLA compiles something."""
    threading.Thread(target=importlib.import_module, args=("matplotlib.figure",)).start()


def draw_curves(
    path: pathlib.Path,
    title: str,
    steps: Sequence[Mapping[str, Any]],
    epochs: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Draw the training loss by step and, where there are epochs, accuracies by epoch.

    Args:
        path: PNG file to write.
        title: what was run.
        steps: records with ``step`` and ``loss``.
        epochs: records with ``step`` and any of the keys that end in ``_accuracy``.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    left.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="tab:blue", lw=1)
    left.set(xlabel="step", ylabel="training loss (mean since the last point)")
    curves = epochs or steps
    names = sorted({name for r in curves for name in r if name.endswith("accuracy")})
    for name in names:
        points = [(r["step"], 100 * r[name]) for r in curves if name in r]
        marker = "o" if epochs else None
        right.plot(*zip(*points, strict=True), marker=marker, lw=1, label=name.replace("_", " "))
    right.set(xlabel="step", ylabel="accuracy (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend()
    figure.savefig(path, dpi=120)


def as_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON-ready values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [
            line
            for key in keys
            for line in _differences(before.get(key), now.get(key), key.replace("_", "-"))
        ]
    return [] if before == now else [f"{name}: {before} there, {now} here"]
