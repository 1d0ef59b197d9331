"""Long runs: memory, programs, files and threads do not grow, and steps do not slow down."""

import os
import pathlib
import resource
import threading
import time

import jax
import numpy as np
import pytest
from crashes import LONG, tell
from test_training import batches, make_mesh, make_steps, new_run

from lstmjax import training

STEPS = 20_000 if LONG else 600


@pytest.fixture(autouse=True)
def _optax_mixes_integers_and_floats():
    with jax.numpy_dtype_promotion("standard"):
        yield


def memory():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="not Linux")
def test_nothing_grows(tmp_path):
    mesh, seen = make_mesh(2), []
    steps, rows = make_steps(mesh), 8 * STEPS // 10

    def train(state, batch, key):
        if len(seen) % (STEPS // 20) == 0:
            handles = len(os.listdir("/proc/self/fd"))
            marks.append((time.perf_counter(), memory(), handles, threading.active_count()))
        seen.append(None)
        return steps.train(state, batch, key)

    marks = []
    with training.counting_compilations() as made:
        training.fit(
            steps._replace(train=train),
            batches(rows),
            {"test": batches(30, seed=1)},
            new_run(tmp_path / "run"),
            mesh,
            epochs=10,
            seed=0,
            checkpoint_every=STEPS // 20,
        )
    assert len(seen) == STEPS
    programs = {name: n for name, n in made.programs.items() if n > 4}
    assert not programs
    times, used, handles, threads = map(np.array, zip(*marks, strict=True))
    later = slice(len(marks) // 5, None)
    assert used[-1] - used[len(marks) // 5] < 2**25
    half = len(marks) // 2  # while a checkpoint is written, there are some more
    assert handles[half:].min() <= handles[2:half].min() + 2
    assert threads[half:].min() <= threads[2:half].min() + 1
    tenths = np.diff(times[::2])
    how = f"{used[later].min() / 2**20:.0f} to {used[later].max() / 2**20:.0f} MiB, "
    how += f"{handles[later].min()} to {handles[later].max()} file handles, second tenth "
    how += f"{tenths[1]:.2f} s, last {tenths[-1]:.2f} s"
    tell(f"a run of {STEPS:,} steps", how, 1, "nothing")
    if LONG:
        assert tenths[-1] < 1.1 * tenths[1]  # the very first one compiles
