"""What a crash leaves of a folder: `faults.c` records all changes, this stops after any of them.

`record` runs a command and returns its changes; `Disk` takes them one by one, and knows at each
what a killed process, a torn write or a power cut would leave.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import random
import shutil
import struct
import subprocess
import sys
import tempfile

import pytest

SOURCE = pathlib.Path(__file__).with_name("faults.c")
ROOT = SOURCE.parent.parent
LONG = bool(os.environ.get("LSTMJAX_TEST_LONG"))
PROGRAM = (sys.executable, str(ROOT / "experiments" / "imdb.py"))
FLAGS = (
    *("--data", "demo", "--recipe", "notebook", "--hidden-size", "2", "--embedding-size", "2"),
    *("--max-length", "5", "--batch-size", "2000", "--epochs", "2", "--checkpoint-every", "3"),
)


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """That of processes which share their compiled programs, over all workers of the tests."""
    cache = shared(tmp_path_factory) / "programs"
    return {**os.environ, "LSTMJAX_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def recorded(tmp_path_factory, environment):
    """A run without any fault: its folder and the changes that made it."""
    folder = shared(tmp_path_factory) / "recorded"
    run, log = folder / "run", folder / "log"

    def make():
        command = [*PROGRAM, *FLAGS, "--run-dir", str(run)]
        subprocess.run(command, env=environment | faults(run, log=log), check=True)

    made_once(folder, make)
    return run, changes_in(log, run)


def shared(tmp_path_factory):
    """A folder of this call of pytest, the same for all of its workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own


def made_once(folder, make):
    """Make what a folder holds, unless another worker of the tests has."""
    from lstmjax.files import locked

    folder.mkdir(exist_ok=True)
    with locked(folder):
        if not (folder / "made").exists():
            make()
            (folder / "made").touch()


def outcome(run):
    """All that a run has found out; times and what names the run differ."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    result = json.loads((run / "result.json").read_text())
    kept = [path for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    newest = max(kept, key=lambda p: int(p.name))
    leaves = json.loads(json.loads((newest / "manifest.json").read_text())["content"])["leaves"]
    return (
        [{**json.loads(line), "seconds": 0} for line in lines],
        [{**epoch, "seconds": 0} for epoch in result["epochs"]],
        result["test_loss"],
        leaves,
        newest.name,
        len(kept),
        (run / "curves.png").stat().st_size > 0,
    )


def points(count, some, seed=0, many=None):
    """Some numbers of changes, spread; with ``make long`` many or all of them."""
    some = (many or count) if LONG else some
    return sorted(random.Random(seed).sample(range(count), min(some, count)))


def tell(fault, how, times, told):
    """Put a line into docs/reliability.md, by ``make long``: nothing was lost."""
    if place := os.environ.get("LSTMJAX_TEST_REPORT"):
        with open(place, "a") as file:
            file.write(json.dumps([fault, how, times, told]) + "\n")


@functools.cache
def library():
    """The preloaded library, compiled once a process; the test is skipped without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None or not pathlib.Path("/proc/self").exists():
        pytest.skip("no C compiler, or not Linux")
    built = pathlib.Path(tempfile.mkdtemp()) / "faults.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", built, SOURCE], check=True)
    return built


def faults(root, **settings):
    """For the environment of a process whose changes below ``root`` meet with faults."""
    settings = {f"FAULTS_{name.upper()}": str(value) for name, value in settings.items()}
    return {"LD_PRELOAD": str(library()), "FAULTS_ROOT": str(root), **settings}


@dataclasses.dataclass(frozen=True)
class Change:
    kind: str
    path: str
    other: str
    offset: int
    data: bytes


def changes_in(log, root):
    content, at, found = pathlib.Path(log).read_bytes(), 0, []
    while at < len(content):
        kind, n, m, offset, size = struct.unpack_from("5q", content, at)
        ends = [at := at + 40, at + n, at + n + m, at + n + m + size]
        path, other, data = (content[a:b] for a, b in itertools.pairwise(ends))
        paths = [os.path.relpath(p, root) if p else "" for p in (path.decode(), other.decode())]
        found.append(Change(chr(kind), *paths, offset, data))
        at = ends[-1]
    return found


class File:
    def __init__(self):
        self.data, self.synced = b"", b""


class Folder:
    def __init__(self):
        self.entries, self.synced = {}, {}


class Disk:
    """A folder as the process sees it, and what of it is safe from a power cut."""

    def __init__(self):
        self.root = Folder()

    def _at(self, path):
        node = self.root
        for part in pathlib.PurePath(path).parts:
            node = node.entries[part]
        return node

    def _parent(self, path):
        path = pathlib.PurePath(path)
        return self._at(path.parent), path.name

    def apply(self, change):
        path = change.path
        if path == ".":  # the folder itself is made, or synced
            if change.kind == "s":
                self.root.synced = dict(self.root.entries)
            return
        folder, name = self._parent(path)
        if change.kind == "c":
            folder.entries[name] = File()
        elif change.kind == "m":
            folder.entries[name] = Folder()
        elif change.kind in "uR":
            del folder.entries[name]
        elif change.kind in "rl":
            there, new = self._parent(change.other)
            there.entries[new] = folder.entries[name]
            if change.kind == "r":
                del folder.entries[name]
        elif change.kind == "t":
            file = folder.entries[name]
            file.data = file.data[: change.offset].ljust(change.offset, b"\0")
        elif change.kind == "w":
            file = folder.entries[name]
            before = file.data[: change.offset].ljust(change.offset, b"\0")
            file.data = before + change.data + file.data[change.offset + len(change.data) :]
        elif change.kind == "s":
            node = folder.entries[name]
            node.synced = dict(node.entries) if isinstance(node, Folder) else node.data

    def write(self, path, left, tear=None):
        """What a crash leaves, as files.

        Args:
            path: the folder to make.
            left: "all": the process was killed. "synced": a power cut, and nothing unsynced
                survives. "names": a power cut that keeps all names, and of files what was synced,
                then zeros.
            tear: a last write, of which half is done.
        """
        if tear is not None and tear.kind == "w":
            half = dataclasses.replace(tear, data=tear.data[: len(tear.data) // 2])
            self.apply(half)
        _write(self.root, pathlib.Path(path), left)


def _write(node, path, left):
    if isinstance(node, Folder):
        path.mkdir()
        for name, entry in (node.synced if left == "synced" else node.entries).items():
            _write(entry, path / name, left)
    elif left == "all":
        path.write_bytes(node.data)
    else:
        lost = len(node.data) - len(node.synced) if left == "names" else 0
        path.write_bytes(node.synced + bytes(max(lost, 0)))
