"""Checkpoints by Orbax: the train state and the place in the data, enough to go on bit for bit.

A checkpoint is written under a temporary name, with a checksum of every array and of the place,
synced to the disk, and only then renamed: what has a name is whole. What is read is compared with
its checksums; a damaged checkpoint is put aside, and the one before it is taken.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import Any, TypedDict, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lstmjax import files
from lstmjax.errors import StorageError, UserError, extra, first_line, os_error, reason
from lstmjax.training.devices import place
from lstmjax.training.processes import arrays_from_first, from_first, is_first
from lstmjax.training.report import Record
from lstmjax.training.step import Sums, TrainState

MANIFEST = "manifest.json"
_FORMAT = 2
_ASIDE = "damaged-"


@dataclasses.dataclass(frozen=True)
class Position:
    """Where in the run a state stands: ``batch`` batches of ``epoch`` are done.

    Attributes:
        epoch: number of the epoch, from 0.
        batch: batches of it that are done.
        sums: the epoch's totals so far.
        since: the totals since the last line of ``metrics.jsonl``.
        seconds: time that the epoch has taken so far.
        history: the records of the epochs before.
    """

    epoch: int = 0
    batch: int = 0
    sums: Sums = dataclasses.field(default_factory=Sums)
    since: Sums = dataclasses.field(default_factory=Sums)
    seconds: float = 0.0
    history: tuple[Record, ...] = ()


class _Place(TypedDict):
    """A `Position` as JSON has it."""

    epoch: int
    batch: int
    sums: list[float | list[float | None]]
    since: list[float | list[float | None]]
    seconds: float
    history: list[Record]


class _Described(TypedDict):
    """What is known of an array."""

    shape: list[int]
    dtype: str
    sha256: str


class _Manifest(TypedDict):
    """What a checkpoint says of itself."""

    format: int
    step: int
    position: _Place
    leaves: dict[str, _Described]


class Damaged(Exception):
    """A checkpoint is not what was written."""


class Checkpoints:
    """The newest checkpoints in a folder, written as a whole or not at all.

    Args:
        folder: made if it is missing.
        keep: how many stay.
        before: called before each is published: makes safe what must not be older than it.
    """

    def __init__(
        self, folder: pathlib.Path, keep: int = 2, before: Callable[[], None] = lambda: None
    ) -> None:
        self._folder, self._keep, self._before = folder, keep, before
        self._active = is_first()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: list[Future[None]] = []
        try:
            if not self._active:
                return
            files.make_folder(folder)
            for path in folder.glob(f".*{files.TEMPORARY}"):  # of a process that was killed
                files.discard(path)
        except OSError as error:
            raise StorageError(f"cannot write {folder}: {reason(error)}") from error

    @functools.cached_property
    def _orbax(self) -> ModuleType:
        with extra("train"):
            import orbax.checkpoint  # slow to import: not before something is saved or read

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # it reports each save at length
        sys.unraisablehook = functools.partial(_unless_late, sys.unraisablehook)
        return orbax.checkpoint

    def _arrays(self) -> Any:
        # One process has all there is to save: the state is the same on every device.
        alone = self._orbax.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        handler = self._orbax.StandardCheckpointHandler(multiprocessing_options=alone)
        return self._orbax.Checkpointer(handler, multiprocessing_options=alone)

    def save(self, state: TrainState, position: Position) -> None:
        """Write ``state`` and wait until it is safe; nothing happens if this step is there.

        Raises:
            StorageError: it cannot be written.
        """
        self.save_later(state, position)
        self.wait()

    def save_later(self, state: TrainState, position: Position, skip: bool = False) -> None:
        """Write ``state`` in a thread; with ``skip`` only if nothing waits to be written.

        Raises:
            StorageError: one before could not be written.
        """
        busy = [writing for writing in self._writing if not writing.done()]
        for writing in self._writing:
            if writing.done():
                writing.result()
        self._writing = busy
        if self._active and not (skip and busy):
            self._writing.append(self._writer.submit(self._save, state, position))

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
            StorageError: it cannot be written.
        """
        while self._writing:
            self._writing.pop(0).result()

    def _save(self, state: TrainState, position: Position) -> None:
        step = int(state.step)
        if step in self._steps():
            return
        try:
            self._write(step, _leaves(jax.device_get(state)), position)
            self._drop_old()
        except Exception as error:  # TensorStore has exceptions of many kinds
            kept = self.latest()
            raise StorageError(
                f"the checkpoint of step {step} cannot be written to {self._folder}: "
                f"{reason(error)}; "
                + ("no other is there" if kept is None else f"that of step {kept} is kept")
                + ". Mend that, then go on: the same command with --resume"
            ) from error

    def _write(self, step: int, leaves: dict[str, Array | np.ndarray], position: Position) -> None:
        temporary = self._folder / f".{step}{files.TEMPORARY}"
        files.discard(temporary)
        temporary.mkdir()
        arrays = [*leaves.values()]
        self._arrays().save(
            (temporary / "state").absolute(), args=self._orbax.args.StandardSave(arrays)
        )
        content = {
            "format": _FORMAT,
            "step": step,
            "position": dataclasses.asdict(position),
            "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
        }
        text = json.dumps(content, default=_as_list)
        files.publish_json(
            temporary / MANIFEST, {"sha256": _digest(text.encode()), "content": text}
        )
        files.sync_tree(temporary)
        self._before()
        os.rename(temporary, self._folder / str(step))
        files.sync_folder(self._folder)

    def restore(self, like: TrainState) -> tuple[TrainState, Position] | None:
        """The newest sound state, laid out over devices as ``like`` is; None if there is none.

        The first process reads it and tells the others.

        Damaged checkpoints are put aside, and each is named on standard error.

        Raises:
            UserError: a checkpoint is of another model, cannot be read, or all are damaged.
        """
        tree = jax.tree.structure(like)
        arrays = [np.empty(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(like)]

        def read() -> _Place | None:
            found = self._newest_sound(like)
            if found is None:
                return None
            arrays[:] = found[0]
            return found[1]

        place_in_data = from_first(read)
        if place_in_data is None:
            return None
        placed = [
            place(array, leaf.sharding)
            for array, leaf in zip(arrays_from_first(arrays), jax.tree.leaves(like), strict=True)
        ]
        return jax.tree.unflatten(tree, placed), _position(place_in_data)

    def _newest_sound(self, like: TrainState) -> tuple[list[np.ndarray], _Place] | None:
        steps = self._steps()
        for step in reversed(steps):
            try:
                found = self._read(step, like)
                self._drop_old()  # killed before it had done so
                return found
            except Damaged as error:
                print(f"checkpoint {self._folder / str(step)} is damaged: {error}", file=sys.stderr)
                self._put_aside(step)
        if steps or any(self._folder.glob(f"{_ASIDE}*")):
            raise UserError(
                f"no checkpoint in {self._folder} is sound: put a copy of it back, or start anew "
                "with another --run-dir"
            )
        return None

    def _drop_old(self) -> None:
        for old in self._steps()[: -self._keep]:
            files.remove_tree(self._folder / str(old))

    def _put_aside(self, step: int) -> None:
        aside = self._folder / f"{_ASIDE}{step}"
        try:
            files.discard(aside)
            os.rename(self._folder / str(step), aside)
            files.sync_folder(self._folder)
        except OSError as error:
            raise StorageError(f"cannot put {aside} aside: {reason(error)}") from error

    def _read(self, step: int, like: TrainState) -> tuple[list[np.ndarray], _Place]:
        folder = self._folder / str(step)
        try:
            content = _read_manifest(folder)
            _compare(folder, content["leaves"], _leaves(like))
            for path in folder.rglob("*"):
                _require_readable(path)
            if content["step"] != step:
                raise Damaged(f"it is of step {content['step']}")
            _position(content["position"])
            empty = [np.empty(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(like)]
            arrays = self._arrays().restore(
                (folder / "state").absolute(), args=self._orbax.args.StandardRestore(empty)
            )
        except (UserError, Damaged):
            raise
        except Exception as error:  # whatever a damaged file makes the readers stumble over
            if os_error(error) in (1, 13):
                raise StorageError(f"cannot read {folder}: {reason(error)}") from error
            raise Damaged(reason(error)) from error
        for array, (name, wanted) in zip(arrays, content["leaves"].items(), strict=True):
            if _describe(array) != wanted:
                raise Damaged(f"{name} has another checksum")
        return [np.asarray(array) for array in arrays], content["position"]

    def _steps(self) -> list[int]:
        """Numbers of the steps that have a checkpoint, rising."""
        names = [path.name for path in self._folder.iterdir()]
        return sorted(int(a) for a in names if a.isascii() and a.isdigit() and a == str(int(a)))

    def latest(self) -> int | None:
        """Number of steps done in the newest checkpoint."""
        return max(self._steps(), default=None) if self._active else None

    def close(self) -> None:
        """Wait for what is being written; what has failed is not told here."""
        self._writer.shutdown()


_Raised = TypeVar("_Raised")
"""What Python hands to `sys.unraisablehook`."""


def _unless_late(hook: Callable[[_Raised], object], unraisable: _Raised) -> None:
    """Pass over what TensorStore's threads raise when a write that has failed is given up."""
    if "Event loop is closed" not in str(getattr(unraisable, "exc_value", "")):
        hook(unraisable)


@jax.jit
def copied(state: TrainState) -> TrainState:
    """The state in buffers of its own, for the next step takes those of the state itself."""
    return jax.tree.map(jnp.copy, state)


def _leaves(state: TrainState) -> dict[str, Array | np.ndarray]:
    """The arrays of a state by name."""
    found = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in found}


def _describe(leaf: Array | np.ndarray) -> _Described:
    leaf = np.asarray(leaf)
    content = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    return {"shape": [*leaf.shape], "dtype": str(leaf.dtype), "sha256": _digest(content.data)}


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _require_readable(path: pathlib.Path) -> None:
    """Raise an error unless it is a file or a folder that can be read; a pipe would never end."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise Damaged(f"{path.name} is neither file nor folder")
    if not os.access(path, os.R_OK):
        raise PermissionError(13, "Permission denied", str(path))


def _read_manifest(folder: pathlib.Path) -> _Manifest:
    try:
        sealed = files.as_object(files.read_json(folder / MANIFEST))
        text = sealed["content"]
        if not isinstance(text, str) or sealed["sha256"] != _digest(text.encode()):
            raise ValueError("it has another checksum")
        content = files.as_object(files.parse_json(text))
        if content["format"] != _FORMAT:
            raise UserError(
                f"{folder} was written by another version of lstmjax: go on with that one"
            )
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        raise Damaged(f"{MANIFEST}: {first_line(error)}") from error
    return cast(_Manifest, content)  # its checksum says that it is what was written


def _as_list(array: np.ndarray) -> list[float | None]:
    """Of replicas, as JSON has it: None for what is not finite."""
    return [float(a) if np.isfinite(a) else None for a in array]


def _position(place_in_data: _Place) -> Position:
    def sums(numbers: Sequence[float | list[float | None]]) -> Sums:
        return Sums(*(np.array(a, float) if isinstance(a, list) else a for a in numbers))

    return Position(
        epoch=place_in_data["epoch"],
        batch=place_in_data["batch"],
        sums=sums(place_in_data["sums"]),
        since=sums(place_in_data["since"]),
        seconds=place_in_data["seconds"],
        history=tuple(place_in_data["history"]),
    )


def _compare(
    folder: pathlib.Path, saved: Mapping[str, _Described], like: Mapping[str, Array | np.ndarray]
) -> None:
    """Raise `UserError` unless a sound checkpoint is of this model and optimizer."""

    def line(shape: Sequence[int], dtype: np.dtype | str) -> str:
        return f"{dtype}{[*shape]}"

    there = {name: line(leaf["shape"], leaf["dtype"]) for name, leaf in saved.items()}
    here = {name: line(leaf.shape, leaf.dtype) for name, leaf in like.items()}
    for name in [*here, *there]:
        if there.get(name) != here.get(name):
            raise UserError(
                f"{folder} is of another model or optimizer: {name} is {there.get(name, 'missing')}"
                f" there and {here.get(name, 'missing')} here; resume with the same settings"
            )
