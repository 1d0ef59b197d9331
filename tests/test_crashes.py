"""A run, and the preparation of data, stopped at every change of a file; then begun again.

All of them are tried with ``make long``; else some, spread over the whole.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import jax
import pytest
from crashes import (
    FLAGS,
    PROGRAM,
    Disk,
    changes_in,
    environment,
    faults,
    outcome,
    points,
    recorded,
    tell,
)
from test_data_imdb import FEW, write_archive

from lstmjax.data import archive as archives
from lstmjax.data import imdb as data
from lstmjax.data import load_imdb


@pytest.fixture(autouse=True)
def _as_for_users(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with jax.numpy_dtype_promotion("standard"):
        yield


LEFT = {
    "all": "`kill -9`",
    "torn": "`kill -9`, half of the last write done",
    "synced": "power cut, nothing survives that was not synced",
    "names": "power cut, names survive, unsynced content is zeros",
}


GO_ON = """
import functools, sys
from lstmjax.commands import imdb
from lstmjax.training.command import run_command
from lstmjax.training import report
imdb.load_demo = functools.cache(imdb.load_demo)
report.draw_curves = lambda path, *_: path.write_bytes(b"half a second is saved")
flags, runs = sys.argv[1:{count}], sys.argv[{count}:]
for run in runs:
    sys.argv = ["imdb.py", *flags, "--resume-or-start", "--run-dir", run]
    run_command(imdb.RECIPES, imdb.main, "")
"""


def go_on(runs, environment):
    """Resume all of these runs, in one other process."""
    code = GO_ON.format(count=len(FLAGS) + 1)
    command = [sys.executable, "-c", code, *FLAGS, *map(str, runs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])


def everything_in(folder):
    """Names and contents of all that is below a folder, in one number."""
    paths = sorted(folder.rglob("*"))
    return hash(tuple((str(p.relative_to(folder)), p.is_file() and p.read_bytes()) for p in paths))


def crash_at(changes, number, left, path):
    """Leave at ``path`` what a crash after so many changes leaves."""
    disk = Disk()
    for change in changes[:number]:
        disk.apply(change)
    if left == "torn":
        disk.write(path, "all", changes[number])
    else:
        disk.write(path, left)


@pytest.mark.slow
def test_whatever_a_crash_leaves_the_run_ends_the_same(recorded, environment, tmp_path):
    """A killed process, a write half done, and two kinds of power cut."""
    whole, changes = recorded
    wanted, seen, crashes = outcome(whole), set(), []
    for left in LEFT:
        for number in points(len(changes), some=2, seed=len(left)):
            run = tmp_path / f"{left}-{number}"
            crash_at(changes, number, left, run)
            if (content := everything_in(run)) in seen:  # a sync changes nothing for a process
                shutil.rmtree(run)
            else:
                crashes.append((run, number, left))
            seen.add(content)
    for some in (crashes[n : n + 100] for n in range(0, len(crashes), 100)):
        go_on([run for run, *_ in some], environment)
        for run, number, left in some:
            assert outcome(run) == wanted, (left, number, changes[number - 1])
    for left, fault in LEFT.items():
        tell(
            f"the run: {fault}",
            f"rebuilt after each of {len(changes)} changes of a file, equal states once",
            sum(crash[2] == left for crash in crashes),
            "nothing: `--resume-or-start` goes on",
        )


def test_a_process_killed_at_a_change_goes_on(recorded, environment, tmp_path):
    """The real thing, which ends with half of the last write done."""
    whole, changes = recorded
    wanted, run, kills = outcome(whole), tmp_path / "run", 0
    numbers = points(len(changes), some=1, seed=3, many=40)
    for number in numbers:
        shutil.rmtree(run, ignore_errors=True)
        command = [*PROGRAM, *FLAGS, "--run-dir", str(run), "--resume-or-start"]
        doomed = environment | faults(run, kill=number + 1)
        killed = subprocess.run(command, env=doomed, capture_output=True, timeout=100)
        # A slow disk leaves checkpoints out, so that there are fewer changes than were recorded.
        assert killed.returncode in (-signal.SIGKILL, 0), number
        kills += killed.returncode != 0
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, (number, done.stderr)
        assert outcome(run) == wanted, number
    assert kills > len(numbers) / 2
    tell(
        "the run: `kill -9`, half of the last write done",
        "a process of its own kills itself at a change, is started again",
        kills,
        "nothing: `--resume-or-start` goes on",
    )


PREPARE = """
import sys
from lstmjax.data import archive, imdb, load_imdb
archive.REVIEWS.update({few})
for split in ("train", "test"):
    load_imdb(split, data_dir=sys.argv[1] + "/data", archive=sys.argv[2], progress=False)
"""


@pytest.mark.parametrize("left", LEFT)
def test_whatever_a_crash_leaves_of_a_preparation(tmp_path, left, environment, monkeypatch):
    root, log = tmp_path / "recorded", tmp_path / "log"
    root.mkdir()
    archive = write_archive(tmp_path / "small.tar.gz")
    recording = environment | faults(root, log=log) | {"LSTMJAX_CACHE_DIR": str(root / "cache")}
    command = [sys.executable, "-c", PREPARE.format(few=FEW), str(root), str(archive)]
    subprocess.run(command, env=recording, check=True, timeout=100)
    changes = changes_in(log, root)
    monkeypatch.setattr(archives, "REVIEWS", FEW)
    monkeypatch.setattr(data, "_prepare", prepare_few)
    monkeypatch.setenv("LSTMJAX_CACHE_DIR", str(root / "cache"))
    wanted = load_imdb("train", data_dir=root / "data", progress=False)
    numbers = points(len(changes), some=4, seed=len(left))
    for number in numbers:
        crashed = tmp_path / "crashed"
        shutil.rmtree(crashed, ignore_errors=True)
        crash_at(changes, number, left, crashed)
        monkeypatch.setenv("LSTMJAX_CACHE_DIR", str(crashed / "cache"))
        found = load_imdb("train", data_dir=crashed / "data", archive=archive, progress=False)
        same = [a.tobytes() for a in found.sequences] == [a.tobytes() for a in wanted.sequences]
        assert same, (left, number, changes[number - 1])
        assert found.vocabulary == wanted.vocabulary
        assert [path.name for path in (crashed / "data").iterdir()] == ["imdb_reviews"]
        assert len(list((crashed / "cache").iterdir())) == 1
    how = "rebuilt after each change of a file, loaded again"
    tell(
        f"preparing and encoding IMDB: {LEFT[left]}", how, len(numbers), "nothing: it begins again"
    )


_prepare = data._prepare


def prepare_few(root, archive, progress):
    _prepare(root, archive, progress, FEW)
