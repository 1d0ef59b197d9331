"""Several real processes on this machine, joined by JAX's distributed runtime."""

import json
import signal
import socket
import subprocess

import numpy as np
import pytest
from crashes import LONG, PROGRAM, environment, made_once, shared, tell

from lstmjax import training
from lstmjax.errors import UserError

FLAGS = (
    *("--data", "demo", "--recipe", "notebook", "--hidden-size", "4", "--embedding-size", "3"),
    *("--max-length", "12", "--batch-size", "1000", "--epochs", "2", "--checkpoint-every", "5"),
)
TOLERANCE = 2e-6  # as in test_training: sums of a few rows in another order


STARTED = []


@pytest.fixture(autouse=True)
def none_is_left():
    """Else a test that fails costs the next one, too."""
    yield
    while STARTED:
        with STARTED.pop() as process:
            process.kill()


def start(environment, count, folder, *flags):
    """All processes of a run, with two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    own = {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    processes = []
    for number in range(count):
        command = [*PROGRAM, *FLAGS, *flags, "--run-dir", str(folder)]
        if count > 1:
            command += ["--coordinator", address, "--processes", str(count)]
            command += ["--process-id", str(number)]
        processes.append(
            subprocess.Popen(
                command, env={**environment, **own}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
        STARTED.append(processes[-1])
    return processes


def outputs(processes):
    return [[text.decode() for text in p.communicate(timeout=200)] for p in processes]


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r.get("loss", r.get("test_loss"))) for r in map(json.loads, lines)]


@pytest.fixture(scope="module")
def alone(environment, tmp_path_factory):
    """The same run in one process."""
    folder = shared(tmp_path_factory) / "alone"

    def make():
        (process,) = start(environment, 1, folder / "run")
        outputs([process])
        assert process.returncode == 0

    made_once(folder, make)
    return folder / "run"


def read_until(process, text):
    seen = b""
    while text not in seen:
        piece = process.stderr.read1()
        assert piece, seen
        seen += piece


@pytest.mark.slow
def test_four_processes_train_as_one_and_one_speaks(environment, alone, tmp_path):
    processes = start(environment, 4, tmp_path / "run")
    (first, _), *others = outputs(processes)
    assert [p.returncode for p in processes] == [0] * 4, others
    assert "cpu (cpu) x 8" in first or "cpu (cpu) x 4" in first
    assert all(out == "" and "step/s" not in errors for out, errors in others)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("doing", "shown"), [("compile", b"0/8"), ("evaluate", b"test:")])
def test_a_signal_to_one_saves_and_fewer_processes_go_on(
    doing, shown, environment, alone, tmp_path
):
    """Whatever they are doing, none leaves the others waiting."""
    processes = start(environment, 2, tmp_path / "run", "--epochs", "2")
    read_until(processes[0], shown)
    processes[1].send_signal(signal.SIGTERM)
    out = outputs(processes)
    assert [p.returncode for p in processes] == [143, 143], out
    assert "stopped and saved" in out[0][0]
    (process,) = start(environment, 1, tmp_path / "run", "--resume")
    ((_, errors),) = outputs([process])
    assert process.returncode == 0, errors
    words = "exit 143: stopped and saved; go on: the same command with --resume"
    fault = f"of two processes, one gets SIGTERM while they {doing}"
    tell(fault, "the run then goes on in one", 1, words)
    assert "devices: 4 there, 2 here; processes: 2 there, 1 here" in errors
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1] if LONG else [0])
def test_when_one_is_killed_the_others_stop(environment, alone, tmp_path, killed):
    """By heartbeat within 20 s; at once if it was the first, which all are connected to."""
    processes = start(environment, 2, tmp_path / "run", "--epochs", "500")
    read_until(processes[0], b"epoch 3/")
    processes[killed].kill()
    out = outputs(processes)
    assert processes[1 - killed].returncode == 75, out
    last = out[1 - killed][1].strip().splitlines()[-1]
    assert last.startswith("error: another process of this run is gone or did not come")
    assert any((tmp_path / "run" / "checkpoints").iterdir())
    tell(f"of two processes, number {killed} is killed", "`kill -9`", 1, f"exit 75: `{last}`")


@pytest.mark.parametrize(
    "arguments", [("host:1", 2, 2), ("host:1", 0, 0), ("", 2, 1), ("host", 2, 0)]
)
def test_flags_that_do_not_fit_together(arguments):
    with pytest.raises(UserError, match=r"--coordinator host:port, --processes N"):
        training.join(*arguments)
