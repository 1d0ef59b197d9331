"""What a run leaves behind: config, environment, metrics as they come, curves, the result."""

import contextlib
import dataclasses
import html
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from lstmjax import files
from lstmjax.cells import CellSpec
from lstmjax.cells.loading import CELL, digest_of, files_of, same_program
from lstmjax.errors import DISK_FAILS, StorageError, UserError, drawable, extra, reason
from lstmjax.files import Json
from lstmjax.interop import read_safetensors, write_safetensors
from lstmjax.models import named_parameters
from lstmjax.shown import html_picture
from lstmjax.training import sums
from lstmjax.training.devices import accelerator_name
from lstmjax.training.processes import from_first
from lstmjax.training.trackers import Trackers, Viewer, check_viewers

MAX_METRICS_BYTES = 2**30
CONFIG, COPY = "config.json", ".config.json"
PARAMS = "params.safetensors"
"""The run folder's trained parameters, by name."""
_MOST = 1e308
_PACKAGES = ("lstmjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from source
            found[name] = importlib.metadata.version(name)
    return found


def surroundings(mesh: Mesh) -> dict[str, Json]:
    """What a run's numbers depend on besides versions: kind and number of devices, processes."""
    return {
        "accelerator": accelerator_name(mesh),
        "devices": mesh.size,
        "processes": jax.process_count(),
    }


def run_name(*parts: str, cell: str, seed: int) -> str:
    """What a run is called; of a cell from a user's file, its class.

    >>> run_name("imdb", "default", cell="path/to/file.py:MyCell(leak=0.1)", seed=3)
    'imdb-default-MyCell-leak=0.1-seed3'
    """
    called = re.sub(r"[^\w.=]+", "-", CellSpec.parse(cell).call).strip("-")
    return "-".join([*parts, called[:100], f"seed{seed}"])


Figure: TypeAlias = int | float | str | list[float | None]
"""A number; of replicas a list of them, None for what is not finite; or a word."""

Record: TypeAlias = Mapping[str, Figure]
"""A line of the metrics: figures by name, and its ``kind``, ``"step"`` or ``"epoch"``."""


if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from matplotlib.axes import Axes

    class Seeded(DataclassInstance, Protocol):
        """The config of a run: a dataclass with a seed."""

        @property
        def seed(self) -> int:
            """What everything random follows from."""
            ...
else:
    DataclassInstance = Seeded = Axes = object


class RunFolder:
    """One run's folder.

    Attributes:
        path: the folder.
        checkpoints: where the checkpoints go.

    Example:
        >>> import tempfile
        >>> with (
        ...     tempfile.TemporaryDirectory() as folder,
        ...     RunFolder.create(pathlib.Path(folder) / "a", {"seed": 0}) as run,
        ... ):
        ...     run.log({"kind": "step", "step": 10, "epoch": 1, "loss": 0.5})
        ...     run.records()
        [{'kind': 'step', 'step': 10, 'epoch': 1, 'loss': 0.5}]
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._metrics = path / "metrics.jsonl"
        self._lock = files.Lock(path)
        self._trackers = Trackers(path, (), {})

    @classmethod
    def open(
        cls,
        name: str,
        config: Mapping[str, Json],
        *,
        path: pathlib.Path | None = None,
        resume: bool = False,
        start: bool | None = None,
        environment: Mapping[str, Json] | None = None,
        cell_source: Mapping[str, bytes] = {},
    ) -> "RunFolder":
        """The folder of a run: a new one, or with ``resume`` the one to go on with.

        Of several processes the first opens it; to the others it does nothing.

        Args:
            name: what the run is called; gives the folder if there is no ``path``.
            config: what the run is asked for, as JSON-ready values.
            path: the folder.
            resume: go on with the run in ``path``, else with the newest of this name.
            start: start one if there is none to go on with; by default the opposite of ``resume``.
            environment: what else the results depend on; a difference is told on resuming.
            cell_source: a user's cell as files, to be kept with the run.

        Raises:
            UserError: as `create` and `reopen`.
        """
        start = not resume if start is None else start
        opened: list[RunFolder] = []

        def open_it() -> str:
            there = path or cls.newest(name)
            if not _in_unicode(there):
                raise UserError(
                    f"the name of {there} is no Unicode here: set PYTHONUTF8=1, or name another "
                    "--run-dir"
                )
            if resume and not (start and not _holds_a_run(there)):
                opened.append(cls.reopen(there, config, environment, cell_source))
            else:
                opened.append(cls.create(path or cls.free(name), config, environment, cell_source))
            return str(opened[0].path)

        found = pathlib.Path(from_first(open_it))
        return opened[0] if opened else _Elsewhere(found)

    @staticmethod
    def free(name: str) -> pathlib.Path:
        """``runs/<name>``, numbered from 2 on where earlier runs are in the way; made here.

        Raises:
            UserError: it cannot be made.
        """
        folder = RunFolder._numbered(name)[-1]
        try:
            files.make_folder(folder.parent)
            while True:
                with contextlib.suppress(FileExistsError):  # another run was faster
                    folder.mkdir()
                    return folder
                folder = RunFolder._numbered(name)[-1]
        except OSError as error:
            raise _cannot_write(f"the run folder {folder}", error) from error

    @staticmethod
    def newest(name: str) -> pathlib.Path:
        """The folder that `free` gave out last under this name."""
        numbered = RunFolder._numbered(name)
        return numbered[-2] if len(numbered) > 1 else numbered[-1]

    @staticmethod
    def _numbered(name: str) -> list[pathlib.Path]:
        folders = [pathlib.Path("runs") / name]
        while os.path.lexists(folders[-1]):
            folders.append(pathlib.Path("runs") / f"{name}-{len(folders) + 1}")
        return folders

    @classmethod
    def create(
        cls,
        path: pathlib.Path,
        config: Mapping[str, Json],
        environment: Mapping[str, Json] | None = None,
        cell_source: Mapping[str, bytes] = {},
    ) -> "RunFolder":
        """A new run's folder, locked; what a start that was cut short left there does not count.

        Raises:
            UserError: the folder is in use or not empty, or cannot be written.
        """
        run = cls(path)
        try:
            files.make_folder(path)
            run._take_lock()
            if _holds_a_run(path):
                raise UserError(
                    f"{path} is not empty: name another --run-dir, or resume the run that it holds"
                )
            run.write("environment.json", _environment(environment))
            for name, content in cell_source.items():
                files.publish(path / name, content)
            run._write_config(config)  # last: it makes the folder a run
        except OSError as error:
            run.close()
            raise _cannot_write(f"the run folder {path}", error) from error
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def reopen(
        cls,
        path: pathlib.Path,
        config: Mapping[str, Json],
        environment: Mapping[str, Json] | None = None,
        cell_source: Mapping[str, bytes] = {},
    ) -> "RunFolder":
        """The folder of a run to go on with, locked.

        The config may differ in more ``epochs``, in ``patience``, and in comments of the cell's
        file: those need not have been known from the start.

        Raises:
            UserError: there is no run, or it had another config; the message names the fields. Or
                the folder is in use, or cannot be written.
        """
        run = cls(path)
        try:
            run.config()  # before a lock is made where there is no run
            run._take_lock()
            now = json.loads(json.dumps(config))
            before = run._sound_config(now)
            if run._same_cell(before, cell_source):
                now["cell_source"] = before["cell_source"]
            free = _free_to_differ(before, now)
            differing = differences({**before, **free}, now)
            if differing:
                raise UserError(
                    f"{path} was run with another config ({'; '.join(differing)}); "
                    "resume with the same settings, or start anew with another --run-dir"
                )
            run._tell_changes(_environment(environment))
            if differences(before, now):
                if "epochs" in free:
                    print(
                        f"going on to {now['epochs']} epochs, not {before['epochs']}: a learning "
                        "rate that depends on their number is from here on that of the longer run",
                        file=sys.stderr,
                    )
                run._write_config(now)
        except OSError as error:
            run.close()
            raise _cannot_write(f"the run folder {path}", error) from error
        except BaseException:
            run.close()
            raise
        return run

    def config(self) -> dict[str, Json]:
        """What the run in this folder was asked for; of a damaged ``config.json`` its copy.

        Raises:
            UserError: there is none.
        """
        try:
            return self._read_config(CONFIG)
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError, ValueError):
                return self._read_config(COPY)
            remedy = "start without --resume"
            if _holds_a_run(self.path):
                remedy = "put a copy of config.json back, or start anew with another --run-dir"
            raise UserError(
                f"nothing to resume in {self.path}: no readable config.json; {remedy}"
            ) from error

    def _read_config(self, name: str) -> dict[str, Json]:
        return files.as_object(files.read_json(self.path / name))

    def _write_config(self, config: Mapping[str, Json]) -> None:
        self.write(COPY, config)
        self.write(CONFIG, config)

    def _sound_config(self, now: Mapping[str, Json]) -> dict[str, Json]:
        """What the run was asked for; a damaged file is replaced by its copy, and that is said."""
        there: dict[str, Json] | None = None
        with contextlib.suppress(OSError, ValueError):
            there = self._read_config(CONFIG)
        with contextlib.suppress(OSError, ValueError):
            copy = self._read_config(COPY)
            if there is None or (there != copy and not differences(copy, now)):
                print(f"{self.path / CONFIG} is damaged: its copy is taken", file=sys.stderr)
                self.write(CONFIG, copy)
                return copy
        return self.config()

    def _same_cell(self, before: Mapping[str, Json], source: Mapping[str, bytes]) -> bool:
        """Whether the files of the cell are those of the run but for comments and layout."""
        with contextlib.suppress(OSError, ValueError):
            kept = files_of(self.path / CELL)
            whole = digest_of(kept) == before.get("cell_source")
            alike = (same_program(kept[name], source[name]) for name in kept)
            return whole and kept.keys() == source.keys() and all(alike)
        return False

    def environment(self) -> dict[str, Json]:
        """What ``environment.json`` says, nothing if it cannot be read."""
        with contextlib.suppress(OSError, ValueError):
            return files.as_object(files.read_json(self.path / "environment.json"))
        return {}

    def _tell_changes(self, now: Mapping[str, Json]) -> None:
        """Announce on standard error what the results depend on and what has changed since."""
        before = self.environment()
        changed = differences(before, json.loads(json.dumps(now)))
        if not before:
            print(
                f"{self.path / 'environment.json'} cannot be read: on other devices or versions "
                "than before the numbers are equal to rounding only",
                file=sys.stderr,
            )
        elif changed:
            print(
                f"going on in another environment ({'; '.join(changed)}): equal to rounding, no "
                "longer bit for bit",
                file=sys.stderr,
            )
        if changed:
            self.write("environment.json", now)

    def _take_lock(self) -> None:
        try:
            self._lock.take(wait=False)
        except files.Busy as error:
            raise UserError(
                f"{self.path} is in use by {self._lock.holder()}: wait for it, or stop it, or name "
                "another --run-dir"
            ) from error

    def show_in(self, viewers: Sequence[Viewer]) -> None:
        """Let other viewers have what is logged, too.

        Raises:
            UserError: the package of one is not installed.
        """
        check_viewers(viewers)
        self._trackers = Trackers(self.path, viewers, self.config())

    def close(self) -> None:
        """Let another process go on with the run."""
        self._trackers.close()
        self._lock.release()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path}{self._stand()})"

    def _stand(self) -> str:
        """How far the run has come, and what it measured last."""
        with contextlib.suppress(UserError):
            config, epochs = self.config(), [r for r in self.records() if r["kind"] == "epoch"]
            if not epochs:
                return ": no epoch has ended"
            name, last = [*epochs[-1].items()][-1]
            known = [a for a in (last if isinstance(last, list) else [last]) if a is not None]
            figure = f", {name} {np.mean(np.array(known, float)):.4g}" if known else ""
            return f": epoch {epochs[-1]['epoch']} of {config.get('epochs', '?')}{figure}"
        return ""

    def _repr_html_(self) -> str:
        """The same, and the curves, once they are drawn."""
        picture = self.path / "curves.png"
        shown = html.escape(repr(self))
        if picture.is_file():
            shown += f"<br>{html_picture(picture.read_bytes())}"
        return shown

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_result(
        self, config: Seeded, mesh: Mesh, outcome: Mapping[str, object], **facts: object
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

    def write(self, name: str, value: object) -> None:
        """Write ``value`` as JSON, as a whole or not at all.

        Raises:
            StorageError: it cannot be written.
        """
        with _told(self.path / name):
            files.publish_json(self.path / name, value)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file of the model, as a whole or not at all, and its sum.

        Raises:
            StorageError: it cannot be written.
        """
        with _told(self.path / name):
            sums.publish(self.path / name, content)

    def write_parameters(self, params: PyTree) -> None:
        """Write ``params.safetensors``: the parameters of a model, by name.

        Raises:
            StorageError: it cannot be written.
        """
        with _told(self.path / PARAMS):
            named = jax.device_get(named_parameters(params))
            write_safetensors(self.path / PARAMS, named, sums.publish)

    def read_parameters(self, like: PyTree) -> PyTree:
        """What `write_parameters` wrote last, laid out over the devices as ``like`` is.

        Raises:
            UserError: it is damaged.
        """
        with sums.checked(self.path, [PARAMS]):
            named = read_safetensors(self.path / PARAMS)
        names = iter(named_parameters(like))
        return jax.tree.map(lambda leaf: jax.device_put(named[next(names)], leaf.sharding), like)

    def log(self, record: Record) -> None:
        """Append one line to ``metrics.jsonl``.

        Raises:
            StorageError: it cannot be written.
        """
        with _told(self._metrics), self._metrics.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        self._trackers.log(record)

    def sync(self) -> None:
        """Let the metrics outlive a power cut."""
        if self._metrics.exists():
            with self._metrics.open("rb") as file:
                os.fsync(file.fileno())

    def records(self) -> list[Record]:
        """The records in ``metrics.jsonl``, in its order; what is none is passed over."""
        try:
            lines = files.read_bytes(self._metrics, MAX_METRICS_BYTES).split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(
                f"cannot read {self._metrics}: {reason(error)}; mend that, or move it elsewhere"
            ) from error
        except ValueError as error:
            raise UserError(f"{self._metrics} is {error}: move it elsewhere") from error
        return [record for line in lines if (record := _record(line)) is not None]

    def rewind(self, step: int, history: Sequence[Record], steps: Sequence[int] = ()) -> None:
        """Put ``metrics.jsonl`` back to what it was after ``step`` steps.

        Lines that are missing, doubled or damaged are told on standard error.

        Args:
            step: lines of later steps go.
            history: the records of the epochs before; they replace those in the file.
            steps: where there was a line; a line for another step goes, too.
        """
        self._trackers.begins_after = step
        found = self.records()
        if found and not step:
            print(f"no checkpoint in {self.checkpoints}: the run begins anew", file=sys.stderr)
        lines = {r["step"]: r for r in reversed(found) if r["kind"] == "step"}
        kept = [lines[n] for n in steps if n <= step and n in lines]
        lost = sum(n <= step for n in steps) - len(kept)
        if lost:
            print(
                f"{self._metrics} lacks {lost} of its lines: curves.png will lack them, nothing "
                "else does",
                file=sys.stderr,
            )
        whole = sorted([*kept, *history], key=lambda r: (r["step"], r["kind"] == "epoch"))
        text = "".join(json.dumps(record) + "\n" for record in whole)
        with _told(self._metrics):
            files.publish(self._metrics, text.encode())

    def draw_curves(self, title: str) -> None:
        """Draw ``curves.png``: losses and accuracies of training and evaluation, by step.

        A failure is told on standard error and costs nothing else.
        """
        try:
            records = self.records()
            steps = [r for r in records if r["kind"] == "step"]
            epochs = [r for r in records if r["kind"] == "epoch"]
            draw_curves(self.path / "curves.png", title, steps, epochs)
        except Exception as error:  # whatever Matplotlib stumbles over: the result is there
            print(f"no curves.png: {reason(error)}; the result is not affected", file=sys.stderr)


class _Elsewhere(RunFolder):
    """The run's folder to a process that leaves it to the first one."""

    def write(self, name: str, value: object) -> None:
        pass

    def write_bytes(self, name: str, content: bytes) -> None:
        pass

    def show_in(self, viewers: Sequence[Viewer]) -> None:
        pass

    def write_parameters(self, params: PyTree) -> None:
        pass

    def log(self, record: Record) -> None:
        pass

    def sync(self) -> None:
        pass

    def rewind(self, step: int, history: Sequence[Record], steps: Sequence[int] = ()) -> None:
        pass

    def draw_curves(self, title: str) -> None:
        pass


def prepare_drawing() -> None:
    """Import Matplotlib in a thread: half a second that passes while XLA compiles something."""
    threading.Thread(target=importlib.import_module, args=("matplotlib.figure",)).start()


def draw_curves(
    path: pathlib.Path,
    title: str,
    steps: Sequence[Record],
    epochs: Sequence[Record] = (),
) -> None:
    """Draw losses on the left and all else that was measured on the right, over the same steps.

    Lines are of training, as it went; points are what was evaluated at the end of each epoch. Of a
    split the colour is the same on both sides.

    Args:
        path: PNG file to write.
        title: what was run.
        steps: records with ``step``, ``loss`` and other metrics.
        epochs: records with ``step`` and ``<split>_<metric>``, ``validation_loss`` say.
    """
    with extra("train"):
        import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    figure.suptitle(drawable(title), parse_math=False)
    points = {key for r in epochs for key in r if "_" in key and not key.startswith("train_")}
    splits = sorted({key.partition("_")[0] for key in points})
    colors = {split: f"C{n}" for n, split in enumerate(splits, 1)}
    metrics = sorted({key for r in steps for key in r} - {"kind", "step", "epoch", "loss"})
    metrics = metrics or sorted({key.partition("_")[2] for key in points} - {"loss"})
    for axes, names in ((left, ["loss"]), (right, metrics)):
        for name in names:
            label = "training" if len(names) == 1 else f"training {name}"
            _draw_curve(axes, steps, name, label, color="C0", lw=1)
            for split in splits:
                label = split if len(names) == 1 else f"{split} {name}"
                style: dict[str, Any] = {"color": colors[split], "marker": "o", "lw": 1.2}
                _draw_curve(axes, epochs, f"{split}_{name}", label, **style)
        units = ["accuracy (%)" if name == "accuracy" else name for name in names]
        axes.set(xlabel="step", ylabel=", ".join(units))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        else:
            axes.set_visible(False)
    left.set_xlim(left=0)
    files.publish(path, lambda file: figure.savefig(file, dpi=120, format="png"))


def _draw_curve(axes: Axes, records: Sequence[Record], key: str, label: str, **style: Any) -> None:
    """One figure by step; of replicas a line each, with a gap where one is not finite."""
    found = [r for r in records if key in r]
    if not found:
        return
    values = (100 if key.endswith("accuracy") else 1) * np.array([r[key] for r in found], float)
    several = values.ndim > 1
    if len(found) == 1:
        style.setdefault("marker", ".")
    lines = axes.plot(
        np.array([r["step"] for r in found]), values, alpha=0.6 if several else 1, **style
    )
    lines[0].set_label(f"{label}, {len(lines)} seeds" if several else label)


def as_dict(config: DataclassInstance) -> dict[str, Json]:
    """A config dataclass as JSON-ready values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def differences(before: Json, now: Json, name: str = "") -> list[str]:
    """A phrase for every value that differs between two JSON values."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [
            line
            for key in keys
            for line in differences(before.get(key), now.get(key), key.replace("_", "-"))
        ]
    if before == now:
        return []
    there, here = _short(before), _short(now)
    return [f"{name}: {there} there, {here} here" if there != here else f"{name}: others here"]


def _free_to_differ(before: Mapping[str, Json], now: Mapping[str, Json]) -> dict[str, Json]:
    """The values of ``now`` that a run may be resumed with although it began with others."""
    free: dict[str, Json] = {}
    there, here = before.get("epochs"), now.get("epochs")
    if isinstance(there, int) and isinstance(here, int) and here > there:
        free["epochs"] = here
    if "patience" in before and "patience" in now:
        free["patience"] = now["patience"]
    return free


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _record(line: bytes) -> Record | None:
    """What one line of the metrics records, None if it is damaged."""
    try:
        record = files.parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("kind") not in ("step", "epoch"):
        return None
    if not all(type(record.get(name)) is int for name in ("step", "epoch")):
        return None
    numbers = [value for key, value in record.items() if key != "kind"]
    return cast(Record, record) if all(map(_is_figure, numbers)) else None


def _is_figure(value: Json) -> bool:
    """Whether it is a number, or of replicas a list of them, None for those that diverged."""
    if isinstance(value, list):
        return all(a is None or _is_figure(a) for a in value)
    return type(value) in (int, float) and -_MOST < cast(float, value) < _MOST


def _in_unicode(path: pathlib.Path) -> bool:
    """Whether a name can be told to TensorStore, which knows UTF-8 alone."""
    try:
        return bool(str(path.absolute()).encode())
    except UnicodeEncodeError:
        return False


def _holds_a_run(path: pathlib.Path) -> bool:
    """Whether more is there than a start that was cut short leaves."""
    try:
        if isinstance(files.read_json(path / CONFIG), dict):
            return True
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        if not (path / CONFIG).is_file():
            return True
    left = {files.LOCK, CONFIG, COPY, "environment.json", CELL}
    left |= {f".{name}{files.TEMPORARY}" for name in left}
    if not path.exists():
        return False
    found = {entry.name for entry in path.iterdir()}
    if "environment.json" in found:  # the first that is written; then a user's cell
        left |= {name for name in found if name.endswith((".py", f".py{files.TEMPORARY}"))}
    return not found <= left


def _environment(more: Mapping[str, Json] | None) -> dict[str, Json]:
    machine = {"machine": platform.machine(), "cores": os.cpu_count()}
    return {"versions": versions(), **machine, **(more or {})}


@contextlib.contextmanager
def _told(path: pathlib.Path) -> Iterator[None]:
    """A file that cannot be written is a `UserError`, of a disk that fails a `StorageError`."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(str(path), error) from error


def _cannot_write(what: str, error: OSError) -> UserError:
    if error.errno not in DISK_FAILS:
        return UserError(f"cannot write {what}: {reason(error)}; name another --run-dir")
    return StorageError(
        f"cannot write {what}: {reason(error)}; mend that, then go on: the same command with "
        "--resume"
    )
