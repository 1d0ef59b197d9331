"""What a crash leaves of a folder: `faults.c` records all changes, this stops after any of them.

`record` runs a command and returns its changes; `Disk` takes them one by one, and knows at each
what a killed process, a torn write or a power cut would leave.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import shutil
import struct
import subprocess
import tempfile

import pytest

SOURCE = pathlib.Path(__file__).with_name("faults.c")
LONG = bool(os.environ.get("LSTMJAX_TEST_LONG"))


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
    """The environment of a process whose changes below ``root`` meet with faults."""
    settings = {f"FAULTS_{name.upper()}": str(value) for name, value in settings.items()}
    return {**os.environ, "LD_PRELOAD": str(library()), "FAULTS_ROOT": str(root), **settings}


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
