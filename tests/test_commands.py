"""``lstmjax COMMAND``: what there is, what it costs to ask, and that each runs."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

import lstmjax
from lstmjax import commands, stopping

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def lstmjax_command(monkeypatch, capsys):
    """What a call prints, and its exit status; no signal is taken from the tests."""
    monkeypatch.setattr(stopping, "exit_on_signals", lambda: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lstmjax", *arguments])
        status = 0
        try:
            commands.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


def test_without_a_command_all_are_listed(lstmjax_command):
    status, out, errors = lstmjax_command()
    assert (status, errors) == (0, "")
    assert out == lstmjax_command("--help")[1] == lstmjax_command("-h")[1]
    lines = out.splitlines()
    for name, purpose in commands.COMMANDS.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(purpose)
        assert len(line) <= 88


def test_the_version(lstmjax_command):
    assert lstmjax_command("--version") == (0, f"{lstmjax.__version__}\n", "")


def test_an_unknown_command_is_one_line(lstmjax_command):
    for name, near in (("trian", "train"), ("Predict", "predict"), ("idmb", "imdb")):
        said = f"error: no command {name!r}: did you mean {near!r}?\n"
        assert lstmjax_command(name) == (2, "", said)
    said = f"error: no command '--cell': there are {', '.join(commands.COMMANDS)}\n"
    assert lstmjax_command("--cell") == (2, "", said)


def test_each_command_is_a_module():
    folder = pathlib.Path(commands.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} == {"__init__", *commands.COMMANDS}


def test_each_experiment_calls_a_command():
    called = set()
    for path in (ROOT / "experiments").glob("*.py"):
        tree = ast.parse(path.read_text())
        (name,) = [
            node.args[0].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        assert f"lstmjax/commands/{name}.py" in ast.get_docstring(tree), path
        called.add(name)
    assert called == {*commands.COMMANDS} - {"check", "aot"}  # those are ``python -m`` as well


def test_asking_is_cheap():
    """Nothing is imported that takes time before the command is known."""
    code = (
        "import sys; from lstmjax import commands; sys.argv = ['lstmjax']; commands.main(); "
        "print(*sys.modules, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stderr.split())
    assert not loaded & {"jax", "numpy", "flax", "tyro"}
    assert {name for name in loaded if name.startswith("lstmjax.")} == {
        "lstmjax.commands",
        "lstmjax.errors",
        "lstmjax.stopping",
    }


def test_signals_are_heard_before_anything_is_imported(monkeypatch):
    done = []
    monkeypatch.setattr(stopping, "exit_on_signals", lambda: done.append("signals"))
    monkeypatch.setattr(
        commands.importlib, "import_module", lambda name: done.append(name) or pytest
    )
    monkeypatch.setattr(pytest, "run", lambda: done.append("run"), raising=False)
    monkeypatch.setattr(sys, "argv", ["lstmjax", "imdb", "--seed", "1"])
    commands.main()
    assert done == ["signals", "lstmjax.commands.imdb", "run"]
    assert sys.argv == ["lstmjax imdb", "--seed", "1"]


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_each_command_has_help(lstmjax_command, name):
    status, out, _ = lstmjax_command(name, "--help")
    assert status == 0
    assert out.startswith(f"usage: lstmjax {name} ")


def test_a_command_runs_from_any_folder(tmp_path):
    """The real thing, in a process of its own."""
    subprocess.run(
        [sys.executable, "-m", "lstmjax", "cumsum", "--updates", "3", "--run-dir", "run"],
        cwd=tmp_path, env={**os.environ, "LSTMJAX_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True, check=True, timeout=120,
    )  # fmt: skip
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_loss"] > 0
