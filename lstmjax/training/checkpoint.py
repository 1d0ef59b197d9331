"""Checkpoints by Orbax: the train state and the place in the data, enough to go on bit for bit."""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax

from lstmjax.errors import UserError
from lstmjax.training.step import Sums, TrainState


@dataclasses.dataclass(frozen=True)
class Position:
    """Where in the run a state stands: ``batch`` batches of ``epoch`` are done.

    ``sums`` and ``seconds`` are the epoch's totals so far.
    """

    epoch: int = 0
    batch: int = 0
    sums: Sums = dataclasses.field(default_factory=Sums)
    seconds: float = 0.0


class Checkpoints:
    """The two newest checkpoints in a folder, written as a whole or not at all."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def _orbax(self) -> Any:
        import orbax.checkpoint  # slow to import: not before something is saved or read

        logging.getLogger("absl").setLevel(logging.ERROR)  # it reports each save at length
        return orbax.checkpoint

    @functools.cached_property
    def _manager(self) -> Any:
        options = self._orbax.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        )
        return self._orbax.CheckpointManager(self._folder.absolute(), options=options)

    def save(self, state: TrainState, position: Position) -> None:
        """Write ``state``; nothing happens if this step is already there."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        leaves = jax.device_get(jax.tree.leaves(state))  # Orbax would compile a cut of each array
        self._manager.save(
            step,
            args=self._orbax.args.Composite(
                state=self._orbax.args.StandardSave(leaves),
                position=self._orbax.args.JsonSave(dataclasses.asdict(position)),
            ),
        )

    def restore(self, like: TrainState) -> tuple[TrainState, Position] | None:
        """The newest state, laid out over devices as ``like`` is, or None if there is none.

        Raises:
            UserError: the checkpoint is damaged.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        leaves, tree = jax.tree.flatten(like)
        try:
            saved = self._manager.restore(
                step,
                args=self._orbax.args.Composite(
                    state=self._orbax.args.StandardRestore(leaves),
                    position=self._orbax.args.JsonRestore(),
                ),
            )
            place: dict[str, Any] = dict(saved["position"])
            place["sums"] = Sums(*place["sums"])
            return jax.tree.unflatten(tree, saved["state"]), Position(**place)
        except Exception as error:  # whatever a damaged file makes the readers stumble over
            raise UserError(
                f"the checkpoint {self._folder / str(step)} cannot be read "
                f"({type(error).__name__}); delete that folder to go on from the one before"
            ) from error

    def latest(self) -> int | None:
        """Number of steps done in the newest checkpoint."""
        if not any(self._folder.iterdir()):
            return None
        step = self._manager.latest_step()
        return None if step is None else int(step)

    def close(self) -> None:
        """Let go of the folder."""
        if "_manager" in self.__dict__:
            self._manager.close()


class Interruption:
    """Remembers that SIGINT or SIGTERM arrived; its number is in ``signal``, else 0."""

    def __init__(self) -> None:
        self.signal = 0

    def __bool__(self) -> bool:
        return self.signal != 0

    @contextlib.contextmanager
    def watching(self) -> Iterator["Interruption"]:
        """Catch both signals inside the block, so that the step in flight can finish.

        A second one acts as it would have without the block. Signals reach only the main thread:
        in another one nothing is caught.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before: dict[int, Any] = {}

        def remember(number: int, frame: FrameType | None) -> None:
            self.signal = number
            # Reentrant, unlike print.
            os.write(2, b"\nstopping after this step; once more to stop without saving\n")
            put_back()

        def put_back() -> None:
            for number, handler in before.items():
                if handler is not None:  # None: installed by another language than Python
                    signal.signal(number, handler)

        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, remember)
        try:
            yield self
        finally:
            put_back()
