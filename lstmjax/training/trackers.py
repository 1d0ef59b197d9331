"""A run's metrics in other people's viewers, beside ``metrics.jsonl``: TensorBoard, wandb offline.

Both are optional: ``pip install 'lstmjax[tensorboard]'`` or ``'lstmjax[wandb]'``. Nothing is sent
anywhere. What fails here is told once and costs nothing else.
"""

import functools
import hashlib
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

from jaxtyping import PyTree

from lstmjax.errors import UserError, reason
from lstmjax.files import Json

Viewer = Literal["tensorboard", "wandb"]
"""Who can show a run's metrics."""


class Tracker(Protocol):
    """Takes a run's numbers as they come."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Write what is not yet written."""


class _TensorBoard:
    """Event files in ``<run>/tensorboard``."""

    def __init__(self, run: pathlib.Path, config: Mapping[str, Json], step: int) -> None:
        import tensorboardX

        # What an earlier part of the run wrote of later steps is not shown.
        self._writer = tensorboardX.SummaryWriter(
            logdir=str(run / "tensorboard"),
            purge_step=step + 1 if step else None,
            filename_suffix=f".after{step}",  # files begun in one second had one name
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """An offline run in ``<run>/wandb``, for ``wandb sync``."""

    def __init__(self, run: pathlib.Path, config: Mapping[str, Json], step: int) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it reports its own faults
        import wandb

        self._run = wandb.init(
            project="lstmjax",
            name=run.name,
            id=hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:16],
            dir=str(run),
            config=dict(config),
            mode="offline",
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_KINDS: dict[str, tuple[str, type[_TensorBoard] | type[_Wandb]]] = {
    "tensorboard": ("tensorboardX", _TensorBoard),
    "wandb": ("wandb", _Wandb),
}


def check_viewers(viewers: Sequence[Viewer]) -> None:
    """Raise `UserError` for a viewer whose package is not installed."""
    import importlib.util

    for viewer in viewers:
        package = _KINDS[viewer][0]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--log {viewer} needs {package}: pip install 'lstmjax[{viewer}]', or leave it out"
            )


class Trackers:
    """Several of them, opened when the first numbers come.

    Args:
        run: the run's folder.
        viewers: which.
        config: what the run was asked for.
    """

    def __init__(
        self, run: pathlib.Path, viewers: Sequence[Viewer], config: Mapping[str, Json]
    ) -> None:
        self._run, self._config = run, config
        self._waiting: list[str] = list(dict.fromkeys(viewers))
        self._open: dict[str, Tracker] = {}
        self.begins_after = 0
        """The last step that was done before."""

    def log(self, record: Mapping[str, PyTree]) -> None:
        """Take a record of ``metrics.jsonl``."""
        values, step = scalars(record), int(record["step"])
        for viewer in self._waiting:
            kind = _KINDS[viewer][1]
            self._try(viewer, functools.partial(self._start, viewer, kind))
        self._waiting = []
        for viewer, tracker in list(self._open.items()):
            self._try(viewer, functools.partial(tracker.log, values, step))

    def close(self) -> None:
        """Write what is not yet written."""
        for viewer, tracker in list(self._open.items()):
            self._try(viewer, tracker.close)
        self._open = {}

    def _start(self, viewer: str, kind: Callable[..., Tracker]) -> None:
        self._open[viewer] = kind(self._run, self._config, self.begins_after)

    def _try(self, viewer: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever a viewer's package stumbles over
            self._open.pop(viewer, None)
            print(
                f"nothing more for {viewer}: {reason(error)}; metrics.jsonl has it all",
                file=sys.stderr,
            )


def scalars(record: Mapping[str, PyTree]) -> dict[str, float]:
    """The numbers of a record under the names that viewers group by.

    >>> scalars({"kind": "epoch", "epoch": 1, "step": 7, "test_loss": 0.5, "seconds": 3.0})
    {'test/loss': 0.5, 'epoch/seconds': 3.0}
    >>> scalars({"kind": "step", "epoch": 1, "step": 7, "loss": 0.5})
    {'step/loss': 0.5}
    >>> scalars({"kind": "step", "epoch": 1, "step": 7, "loss": [0.5, None, 0.25]})  # replicas
    {'step/loss/0': 0.5, 'step/loss/2': 0.25}
    """
    found: dict[str, float] = {}
    for name, value in record.items():
        if name not in ("kind", "epoch", "step"):
            split, _, metric = name.partition("_")
            path = f"{split}/{metric}" if metric else f"{record['kind']}/{name}"
            if isinstance(value, list):
                found |= {f"{path}/{n}": float(a) for n, a in enumerate(value) if a is not None}
            else:
                found[path] = float(value)
    return found
