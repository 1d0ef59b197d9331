"""In a notebook: bars are a line that is renewed, and the stop button saves and ends the cell."""

import os
import pathlib
import re
import sys

import pytest

pytest.importorskip("ipykernel")
manager = pytest.importorskip("jupyter_client.manager")

ROOT = pathlib.Path(__file__).parent.parent
TRAINS = """
import dataclasses, pathlib
import jax, jax.numpy as jnp
from lstmjax.workbench import config_of, train
config = config_of("adding(length=6,updates=100_000,test_rows=64)")
config = dataclasses.replace(config, epochs=1, run_dir=pathlib.Path("run"))
train(config)
"""


@pytest.fixture
def kernel(tmp_path):
    """A kernel in an empty folder, as a notebook has it."""
    where = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    where.pop("TQDM_DISABLE", None)
    where["LSTMJAX_CACHE_DIR"] = str(tmp_path / "cache")
    made = manager.KernelManager(kernel_name="python3")
    made.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    made.start_kernel(cwd=str(tmp_path), env=where)
    client = made.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        yield made, client
    finally:
        client.stop_channels()
        made.shutdown_kernel(now=True)


def run(client, code, seen=lambda message: None):
    """What the kernel says of some code, until it is idle again; each message is seen at once."""
    request = client.execute(code)
    said = []
    while True:
        message = client.get_iopub_msg(timeout=300)
        if message["parent_header"].get("msg_id") != request:
            continue
        content = message["content"]
        if message["msg_type"] == "status" and content["execution_state"] == "idle":
            return said
        said.append((message["msg_type"], content))
        seen(message)


def stream(said, name):
    texts = (c["text"] for kind, c in said if kind == "stream" and c["name"] == name)
    return "".join(texts)


@pytest.mark.slow
def test_the_stop_button_saves_and_the_kernel_lives_on(kernel):
    made, client = kernel
    pressed = []

    def press(message):
        shown = message["content"].get("text", "")
        if message["msg_type"] == "stream" and "loss" in shown and not pressed:
            pressed.append(True)
            made.interrupt_kernel()

    said = run(client, TRAINS, press)
    bars, printed = stream(said, "stderr"), stream(said, "stdout")
    assert re.search(r"epoch 1/1:   0%\|.*\| 0/100000 \[00:00, compiling\]", bars)
    assert "stopping after this step" in bars
    assert "Warning" not in bars
    assert "\n" not in bars.partition("\nstopping")[0]  # one line, renewed
    assert "--resume" not in printed  # there is no command
    ((_, error),) = [a for a in said if a[0] == "error"]
    assert error["ename"] == "Interrupted"
    assert error["traceback"] == [
        "stopped by SIGINT; saved in run. To go on, do the same with resume=True"
    ]
    # The kernel has what it had, and goes on where it was.
    said = run(client, "import lstmjax.training; lstmjax.training.RunFolder(pathlib.Path('run'))")
    (result,) = [c["data"] for kind, c in said if kind == "execute_result"]
    assert result["text/plain"] == "RunFolder(run: no epoch has ended)"
    pressed.clear()
    said = run(client, "train(dataclasses.replace(config, resume=True))", press)
    first = re.search(r"\| (\d+)/100000 \[", stream(said, "stderr"))
    assert int(first[1]) > 0


@pytest.mark.slow
def test_tables_are_shown_as_tables(kernel):
    _, client = kernel
    said = run(
        client,
        "import jax.numpy as jnp\n"
        "from flax import nnx\n"
        "from lstmjax import LSTM, Tagger, summary\n"
        "summary(Tagger(LSTM(4), 3, rngs=nnx.Rngs(0)), jnp.ones((1, 5, 3)))",
    )
    (result,) = [c["data"] for kind, c in said if kind == "execute_result"]
    assert result["text/html"].startswith("<table><tr><th>layer</th>")
    assert result["text/plain"].startswith("layer      output shape  parameters\n---")
    said = run(client, "Tagger(LSTM(4), 3, rngs=nnx.Rngs(0))")
    (result,) = [c["data"] for kind, c in said if kind == "execute_result"]
    assert result["text/plain"] == "Tagger(LSTM(4), 3): 133 parameters"
