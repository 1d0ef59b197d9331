"""The experiments as a user runs them: results, errors in one line, interruption by signal."""

import dataclasses
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
from typing import get_args, get_type_hints

import jax
import pytest

from lstmjax.commands import cumsum, imdb, train
from lstmjax.cores import usable_cores
from lstmjax.errors import UserError
from lstmjax.models import ClassifierConfig
from lstmjax.recurrence import CPU, ENGINES, Derived
from lstmjax.training import as_dict
from lstmjax.training import config_of as config_of_run
from lstmjax.training.command import as_user_error, run_command
from lstmjax.training.repeat import without
from lstmjax.workbench import config_of

ROOT = pathlib.Path(__file__).parent.parent
SMALL = (
    *("--hidden-size", "4", "--embedding-size", "3", "--top-words", "50"),
    *("--max-length", "12", "--batch-size", "500"),
)


@pytest.fixture(autouse=True)
def _as_for_users(monkeypatch, tmp_path):
    """Optax mixes integers and floats; runs and caches stay in the test's own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LSTMJAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def run(monkeypatch):
    def call(experiment, *arguments):
        monkeypatch.setattr(sys, "argv", ["experiment.py", *map(str, arguments)])
        run_command(experiment.RECIPES, experiment.main, experiment.__doc__)

    return call


@pytest.fixture
def error_of(run, capsys):
    def call(experiment, *arguments):
        with pytest.raises(SystemExit) as stop:
            run(experiment, *arguments)
        assert stop.value.code == 2
        errors = capsys.readouterr().err
        (line,) = [text for text in errors.splitlines() if text.startswith("error: ")]
        assert "Traceback" not in errors
        return line

    return call


def result(folder):
    return json.loads((pathlib.Path(folder) / "result.json").read_text())


def test_demo_run_leaves_everything_behind(run, capsys):
    run(imdb, "--data", "demo", "--epochs", 2, "--seed", 3, "--conv-filters", 6, *SMALL)
    folder = pathlib.Path("runs/imdb-default-demo-LSTM-seed3")
    found = result(folder)
    assert found["data"] == "demo"
    assert found["seed"] == 3
    embedding, convolution, lstm, head = 50 * 3, (3 * 3 + 1) * 6, 4 * (6 + 4 + 1) * 4, 2 * 4 + 1
    assert found["parameters"] == embedding + convolution + lstm + head
    assert len(found["epoch_seconds"]) == 2
    assert 0 < found["test_accuracy"] < 1 < found["devices"]
    for key in ("test_loss", "accelerator", "config", "versions"):
        assert found[key]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "engine cpu (the first choice)" in out
    assert "DEMO" in out
    assert "not IMDB" in out


@pytest.mark.slow
def test_replicas_are_as_their_single_runs(run, capsys):
    small = ("--data", "demo", "--epochs", 1, *SMALL, "--dropout-words", 0.1)
    run(imdb, *small, "--seed", 1, "--run-dir", "one")
    run(imdb, *small, "--seeds", 2, "--run-dir", "both")
    assert "95 %" in capsys.readouterr().out
    found = result("both")["replicas"][1]
    assert (found["seed"], found["learning_rate"]) == (
        1,
        imdb.RECIPES["default"].optimizer.learning_rate,
    )
    assert found["figures"]["test_loss"] == pytest.approx(result("one")["test_loss"], rel=2e-5)


def test_the_command_line_knows_every_engine(error_of):
    assert get_args(get_type_hints(imdb.Config)["engine"]) == ("auto", *ENGINES)
    line = error_of(imdb, "--data", "demo", "--engine", "pallas_tpu", "--accelerator", "cpu")
    assert "engine 'pallas_tpu' cannot run LSTM(100): it needs a TPU" in line


def test_an_engine_that_cannot_run_the_cell_is_refused(error_of, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from typing import NamedTuple\n"
        "import jax, jax.numpy as jnp\n"
        "from lstmjax.cells import LSTM, Carry\n"
        "class Mine(LSTM):\n"
        "    class State(NamedTuple):\n"
        "        c: jax.Array\n"
        "        n: jax.Array\n"
        "    def initial_carry(self, batch_size, dtype=jnp.float32):\n"
        "        zeros = jnp.zeros((batch_size, self.hidden_size), dtype)\n"
        "        return Carry(zeros, self.State(zeros, jnp.zeros((batch_size, 1), jnp.int32)))\n"
        "    def step(self, pre, state, params):\n"
        "        return jnp.tanh(pre.i), self.State(state.c + pre.g, state.n + 1)\n"
    )
    options = ("--data", "demo", "--cell", tmp_path / "mine.py:Mine", "--engine", "derived")
    line = error_of(imdb, *options, *SMALL)
    assert "engine 'derived' cannot run Mine(4): Mine carries state.n" in line
    assert "leave out --engine" in line


def test_a_shape_that_the_engine_cannot_run_gets_another(run, monkeypatch):
    """Evaluated on are four times the rows: a kernel may lack the memory for them."""
    refused = []

    def refusal(self, cell, work):
        if work.batch > 500 // 4:
            refused.append(work.batch)
            return "too many rows"
        return None

    for engine in (CPU, Derived):
        monkeypatch.setattr(engine, "refusal", refusal)
    jax.clear_caches()  # other tests may have run the same shapes
    run(imdb, "--data", "demo", "--epochs", 1, *SMALL)
    jax.clear_caches()
    assert refused
    assert result("runs/imdb-default-demo-LSTM-seed0")["test_accuracy"] > 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", sorted(imdb.RECIPES))
def test_every_recipe_runs(run, recipe):
    run(imdb, "--recipe", recipe, "--data", "demo", "--epochs", 1, *SMALL, "--run-dir", "r")
    assert result("r")["config"]["recipe"] == recipe


def test_the_notebook_recipe_is_the_notebook():
    config = imdb.RECIPES["notebook"]
    assert (config.data.max_length, config.data.batch_size, config.epochs) == (500, 64, 3)
    assert config.data.padding == "front"
    assert (config.model.top_words, config.model.embedding_size) == (5000, 32)
    assert config.model.pooling == ("last",)
    assert (config.optimizer.learning_rate, config.optimizer.clip_norm) == (1e-3, 0)


def test_validation_comes_out_of_the_training_split(run, monkeypatch):
    asked = []
    load = imdb.load_demo
    monkeypatch.setattr(
        imdb, "load_demo", lambda split, **kw: asked.append(split) or load(split, **kw)
    )
    run(imdb, "--data", "demo", "--epochs", 1, "--validation", 0.3, "--run-dir", "r", *SMALL)
    assert asked == ["train"]
    assert "validation_accuracy" in result("r")
    assert "test_accuracy" not in result("r")


def test_a_users_cell_and_bfloat16(run):
    pathlib.Path("mine.py").write_text(
        "from lstmjax.cells import LSTM\nclass Mine(LSTM):\n    bias_init = {'f': 2.0}\n"
    )
    run(
        imdb, "--data", "demo", "--cell", "mine.py:Mine", "--precision", "bfloat16",
        "--epochs", 1, *SMALL,
    )  # fmt: skip
    assert result("runs/imdb-default-demo-Mine-seed0")["config"]["precision"] == "bfloat16"


NOISY = """
from lstmjax.cells import LSTM, kept

class MyZoneout(LSTM):
    noise = {"h": kept(0.1)}
    uses_h = True

    def step(self, pre, state, params, h, noise):
        new, state = super().step(pre, state, params)
        return noise.h * h + (1 - noise.h) * new, state


class MyGaps(LSTM):
    step_inputs = {"dt": 1}

    def step(self, pre, state, params, inputs):
        return super().step(pre, state, params)
"""


@pytest.mark.slow
def test_a_cell_with_noise_trains(run):
    pathlib.Path("mine.py").write_text(NOISY)
    run(imdb, "--data", "demo", "--cell", "mine.py:MyZoneout", "--epochs", 1, *SMALL)
    run(cumsum, "--cell", "mine.py:MyZoneout", "--updates", 20, "--hidden-size", 4)
    losses = [
        json.loads(p.read_text())["test_loss"] for p in pathlib.Path().glob("runs/*/result.json")
    ]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))


def test_a_cell_that_needs_more_than_the_data_has_leaves_no_folder(error_of):
    pathlib.Path("mine.py").write_text(NOISY)
    message = "error: MyGaps needs inputs={'dt': ...}"
    for experiment in ((imdb, "--data", "demo", *SMALL), (cumsum,)):
        assert error_of(*experiment, "--cell", "mine.py:MyGaps").startswith(message)
    assert not pathlib.Path("runs").exists()


@pytest.mark.slow
def test_a_finished_run_can_be_resumed_and_another_config_is_refused(run, error_of):
    arguments = ("--data", "demo", "--epochs", 1, *SMALL)
    run(imdb, *arguments)
    folder = "runs/imdb-default-demo-LSTM-seed0"
    before = result(folder)["test_loss"]
    run(imdb, *arguments, "--resume")
    assert result(folder)["test_loss"] == before
    assert "batch-size: 500 there, 250 here" in error_of(
        imdb, *arguments, "--batch-size", 250, "--resume"
    )
    run(imdb, *arguments)
    assert pathlib.Path(folder + "-2/result.json").exists()


ERRORS = {
    "accelerator": (["--accelerator", "tpu"], "no tpu here; this JAX finds: cpu"),
    "cell file": (["--cell", "none.py:Mine"], "no cell file 'none.py'"),
    "cell name": (["--cell", "LTSM"], "no cell 'LTSM'"),
    "epochs": (["--epochs", "0"], "--epochs must be at least 1, got 0"),
    "hidden size": (["--hidden-size", "0"], "--hidden-size must be at least 1, got 0"),
    "batch size": (["--batch-size", "-3"], "--batch-size must be at least 1, got -3"),
    "length": (["--max-length", "0"], "--max-length must be at least 1"),
    "layers": (["--num-layers", "0"], "--num-layers must be at least 1"),
    "too many layers": (["--num-layers", "1001"], "--num-layers must be at most 1,000, got 1001"),
    "far too large": (["--max-length", "9" * 30], "--max-length must be at most 2,147,483,647"),
    "many words": (["--top-words", "3000000000"], "--top-words must be at most 2,147,483,647"),
    "units": (["--hidden-size", "1000000"], r"parameters need [\d,]+ GiB to be trained"),
    "wide words": (["--embedding-size", "1000000000"], "lower --hidden-size, --embedding-size"),
    "wide filters": (["--conv-filters", "4", "--conv-width", "1000000000"], "GiB to be trained"),
    "no Unicode": (["--run-dir", "n\udcff"], "is no Unicode here: set PYTHONUTF8=1"),
    "words": (["--top-words", "4"], "--top-words must be at least 5"),
    "dropout": (["--dropout-after", "1"], r"--dropout-after must lie in \[0, 1\), got 1"),
    "validation": (["--validation", "1.5"], r"--validation must lie in \[0, 1\)"),
    "rate": (["--learning-rate", "0"], "--learning-rate must be positive"),
    "clipping": (["--clip-norm", "-1"], "--clip-norm must be at least 0"),
    "rate without bound": (["--learning-rate", "inf"], "--learning-rate must be positive"),
    "seed": (["--seed", "-1"], r"--seed must lie in \[0, 2\^32\), got -1"),
    "many epochs": (["--epochs", "100000"], "--epochs must be at most 10000"),
    "run folder": (["--run-dir", "/proc/nothing"], "cannot write the run folder /proc/nothing"),
    "run folder is a file": (["--run-dir", __file__], "cannot write the run folder"),
    "filters": (["--conv-filters", "-1"], "--conv-filters must be at least 0"),
    "archive": (["--data", "imdb", "--data-dir", "d", "--archive", "no.tar.gz"], "no.tar.gz"),
    "resume": (["--resume"], "nothing to resume"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(error_of, name):
    arguments, message = ERRORS[name]
    assert re.search(message, error_of(imdb, "--data", "demo", *SMALL, *arguments))


def test_a_cell_that_breaks_the_contract(error_of):
    pathlib.Path("mine.py").write_text(
        "from lstmjax.cells import LSTM\n"
        "class Mine(LSTM):\n    def step(self, pre, state, params):\n        return pre.i, pre.f\n"
    )
    line = error_of(imdb, "--data", "demo", "--cell", "mine.py:Mine", *SMALL)
    assert "Mine breaks the contract" in line


def test_an_exploding_run_names_step_and_epoch(error_of):
    pathlib.Path("mine.py").write_text(
        "import jax.numpy as jnp\nfrom lstmjax.cells import LSTM\n"
        "class Mine(LSTM):\n    def step(self, pre, state, params):\n"
        "        h, state = super().step(pre, state, params)\n"
        "        return h + jnp.log(-jnp.abs(h) - 1), state\n"
    )
    line = error_of(imdb, "--data", "demo", "--cell", "mine.py:Mine", *SMALL)
    assert re.search(r"gradient is nan at step 1 of epoch 1; no checkpoint was written yet", line)
    assert line.endswith("mine.py:6: return h + jnp.log(-jnp.abs(h) - 1), state")


@pytest.mark.slow
def test_a_run_is_repeated_from_its_folder_alone(run, capsys):
    text = "from lstmjax.cells import LSTM\nclass Mine(LSTM):\n    bias_init = {'f': 2.0}\n"
    pathlib.Path("mine.py").write_text(text)
    arguments = ("--data", "demo", "--cell", "mine.py:Mine", "--epochs", 1, "--seed", 5, *SMALL)
    run(imdb, *arguments, "--run-dir", "a")
    pathlib.Path("mine.py").unlink()
    capsys.readouterr()
    run(imdb, "--repeat", "a", "--run-dir", "b")
    assert "repeated a: the same numbers, bit for bit" in capsys.readouterr().out
    assert result("b")["config"]["seed"] == 5
    found = result("b")
    found["test_loss"] += 1
    pathlib.Path("b/result.json").write_text(json.dumps(found))
    environment = json.loads(pathlib.Path("b/environment.json").read_text())
    environment["versions"]["jax"] = "0.1.2"
    pathlib.Path("b/environment.json").write_text(json.dumps(environment))
    with pytest.raises(SystemExit) as stop:
        run(imdb, "--repeat", "b", "--run-dir", "c")
    assert stop.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"error: b is not repeated: test-loss: [\d.]+ there, 0[\d.]+ here", line)
    assert "Different are: jax: 0.1.2 there" in line


def test_nothing_to_repeat(error_of):
    assert "nothing to repeat in none: no readable config.json" in error_of(
        imdb, "--repeat", "none"
    )


@pytest.fixture
def asked(tmp_path):
    """A folder that says what a run was asked for; the function changes that."""
    folder = tmp_path / "asked"
    folder.mkdir()
    config = dataclasses.replace(
        imdb.RECIPES["notebook"],
        epochs=1,
        data=imdb.DataConfig(data="demo", max_length=12, batch_size=500),
        model=ClassifierConfig(top_words=50, embedding_size=3, hidden_size=4),
    )

    def change(name="seed", value=0):
        settings = {**without(as_dict(config), imdb.OF_THIS_START), "cell_source": None}
        *outer, last = name.split(".")
        part = settings
        for one in outer:
            part = part[one]
        part[last] = value
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return change


@pytest.mark.parametrize("start", [(), ("--resume",), ("--resume-or-start",)])
def test_a_run_is_not_repeated_over_itself(error_of, asked, start):
    folder = asked()
    pathlib.Path("link").symlink_to(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for place in (folder, f"{folder}/", pathlib.Path("link"), folder / ".." / folder.name):
        line = error_of(imdb, "--repeat", folder, "--run-dir", place, *start)
        assert f"--repeat and --run-dir are both {folder}: name another --run-dir" in line
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_newest_run_is_not_repeated_over_itself(error_of, asked):
    runs = pathlib.Path("runs")
    runs.mkdir()
    asked().rename(runs / "imdb-notebook-demo-LSTM-seed0")
    line = error_of(imdb, "--repeat", "runs/imdb-notebook-demo-LSTM-seed0", "--resume")
    assert "name another --run-dir" in line


NO_SETTINGS = {
    "precision": ["zzz", 1, None, []],
    "learning_rates": [["x"], [[1]], [None], [True], 1, {}],
    "model.pooling": [["zzz"], [1], [{}], "last", ["last"] * 100_000],
    "accelerator": ["zzz"],
    "log": [[1], ["zzz"]],
    "run_dir": [5, "a\0b"],
    "resume": [1],
    "data.data": ["zzz", None],
    "data.data_dir": [1],
    "data.archive": [[]],
    "data.padding": ["zzz"],
    "data.word_ids": ["zzz"],
    "data.max_length": [10**30, 1.5, True, "12"],
    "data.batch_size": [10**30],
    "model.conv_filters": [10**30],
    "optimizer.schedule": ["linear"],
    "optimizer.clip_norm": [10**400, "1", False],
    "recipe": ["zzz"],
    "cell": [1],
    "cell_source": [1],
    "data_sha256": [[1]],
    "model": [7, None],
    "unknown": [1],
}


@pytest.mark.parametrize("name", NO_SETTINGS)
def test_what_a_run_cannot_have_been_asked_for_is_not_repeated(asked, name):
    for value in NO_SETTINGS[name]:
        folder = asked(name, value)
        last = name.rpartition(".")[2]
        message = f"{folder}/config.json is .*: its {name} is .*: {last} must be .*; put a copy"
        with pytest.raises(UserError, match=message) as error:
            config_of_run(folder, imdb.RECIPES["notebook"], imdb.OF_THIS_START)
        assert len(str(error.value)) < 600
        assert "\n" not in str(error.value)


def test_sizes_that_no_flag_can_have_are_not_repeated(error_of, asked):
    for name in ("data.max_length", "data.batch_size", "model.top_words", "model.conv_filters"):
        line = error_of(imdb, "--repeat", asked(name, 2**62))
        assert f"--{name.partition('.')[2].replace('_', '-')} must be " in line
    assert "--num-layers must be at most" in error_of(
        imdb, "--repeat", asked("model.num_layers", 10**9)
    )


def test_more_runs_than_one_program_takes_are_refused(error_of, monkeypatch, capsys):
    message = "--seeds and --learning-rates make 2,000,000,000 runs, of at most 10,000"
    many = ("--seeds", 1_000_000_000, "--learning-rates", 0.1, 0.2)
    for experiment in (imdb, cumsum):
        assert message in error_of(experiment, *many)
    with pytest.raises(SystemExit) as stop:
        on_a_task(monkeypatch, *many)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_each_start_has_its_own_flags(asked):
    """What belongs to the run comes from the folder; where and how it is run does not."""
    like = dataclasses.replace(imdb.RECIPES["default"], run_dir=pathlib.Path("b"), seed=7)
    for name, value in (
        ("resume", True),
        ("resume_or_start", True),
        ("log", ["tensorboard"]),
        ("run_dir", "elsewhere"),
        ("repeat", "elsewhere"),
        ("keep", 9),
        ("checkpoint_every", 9),
        ("accelerator", "gpu"),
        ("data.data_dir", "elsewhere"),
        ("data.archive", "elsewhere"),
    ):
        found = config_of_run(asked(name, value), like, imdb.OF_THIS_START)
        expected = like.data if "." in name else like
        last = name.rpartition(".")[2]
        assert getattr(found.data if "." in name else found, last) == getattr(expected, last)
        assert (found.seed, found.recipe, found.run_dir) == (0, "notebook", like.run_dir)
    found = config_of_run(asked("learning_rates", [1, 0.5]), like, imdb.OF_THIS_START)
    assert found.learning_rates == (1.0, 0.5)
    assert found.model.pooling == ("last",)
    (asked("cell_source", "0" * 64) / "cell.py").write_text("")
    with pytest.raises(UserError, match=r"cell\.py is damaged or was changed"):
        config_of_run(asked("cell_source", "0" * 64), like, imdb.OF_THIS_START)


def test_what_memory_there_is_too_little_of():
    with pytest.raises(Exception, match=r"RESOURCE_EXHAUSTED|memory") as error:
        jax.block_until_ready(jax.numpy.zeros(2**46))
    assert "lower --batch-size first" in str(as_user_error(error.value))


def test_a_cell_file_that_has_changed_is_not_resumed(run, error_of):
    arguments = ("--data", "demo", "--cell", "mine.py:Mine", "--epochs", 1, *SMALL)
    text = "from lstmjax.cells import LSTM\nclass Mine(LSTM):\n    bias_init = {'f': %s}\n"
    pathlib.Path("mine.py").write_text(text % 1.0)
    run(imdb, *arguments)
    pathlib.Path("mine.py").write_text(text % 2.0)
    assert "cell-source" in error_of(imdb, *arguments, "--resume")


def test_every_second_length_is_evaluated_on():
    config = imdb.RECIPES["default"]
    data = dataclasses.replace(config.data, data="demo")
    train, evaluations = imdb.make_batches(dataclasses.replace(config, data=data))
    (test,) = evaluations.values()
    assert test.boundaries[-1] == train.boundaries[-1]
    assert test.boundaries[::-1] == train.boundaries[::-2]


def test_a_platform_that_jax_was_told_to_use_but_is_not_there():
    for name in ("cuda", "tpu"):
        outcome = subprocess.run(
            [sys.executable, str(ROOT / "experiments" / "cumsum.py"), "--run-dir", "c"],
            env={**os.environ, "JAX_PLATFORMS": name, "TPU_SKIP_MDS_QUERY": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert outcome.returncode == 2, outcome.stderr
        assert "unset JAX_PLATFORMS" in outcome.stderr
        assert "Traceback" not in outcome.stderr


def test_help_shows_the_recipes_defaults(run, capsys):
    for recipe, words in (("notebook", "5000"), ("default", "20000")):
        with pytest.raises(SystemExit) as stop:
            run(imdb, "--recipe", recipe, "--help")
        assert stop.value.code == 0
        text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        assert re.search(rf"--top-words.*?default: {words}", text, re.DOTALL)
        for flag in ("--accelerator", "--archive", "--data-dir", "--cell", "--resume", "--run-dir"):
            assert flag in text


def command(folder, *arguments):
    program = [sys.executable, str(ROOT / "experiments" / "imdb.py"), "--data", "demo"]
    return [*program, "--epochs", "6", *SMALL, "--run-dir", str(folder), *arguments]


def test_sigterm_saves_and_resume_goes_on(tmp_path):
    """The real thing: another process, stopped by its process id once it trains."""
    process = subprocess.Popen(
        command(tmp_path / "r"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT
    )
    assert process.stdout is not None
    seen = b""
    while b"epoch 2/6" not in seen:
        piece = os.read(process.stdout.fileno(), 4096)
        assert piece, seen
        seen += piece
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, seen + rest
    assert b"--resume" in rest
    assert not (tmp_path / "r" / "result.json").exists()
    quiet = {"check": True, "capture_output": True, "cwd": ROOT, "timeout": 120}
    subprocess.run(command(tmp_path / "r", "--resume"), **quiet)
    subprocess.run(command(tmp_path / "whole"), **quiet)
    resumed, whole = result(tmp_path / "r"), result(tmp_path / "whole")
    assert resumed["devices"] == max(n for n in range(1, usable_cores() + 1) if 500 % n == 0)
    for name in ("test_loss", "test_accuracy"):
        assert resumed[name] == whole[name]
    losses = [[epoch["train_loss"] for epoch in run["epochs"]] for run in (resumed, whole)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_later_starts_take_their_programs_from_disk(tmp_path):
    """Two at once begin with nothing; the third finds one program damaged. All do the same."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    started = [
        subprocess.Popen(command(tmp_path / name, "--epochs", "1"), **options) for name in "ab"
    ]
    for process in started:
        out, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
        assert re.search(r"^(\d+) shape\(s\) trained on; \d+ programs compiled", out, re.MULTILINE)
    next((tmp_path / "cache" / "programs").glob("*gradient*")).write_bytes(b"not a program")
    third = subprocess.run(command(tmp_path / "c", "--epochs", "1"), check=True, **options)
    assert re.search(r"; 1 programs compiled, [1-9]\d* found on disk$", third.stdout, re.MULTILINE)

    def records(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [{**json.loads(line), "seconds": 0} for line in lines]

    assert records("a") == records("b") == records("c")
    assert len(records("a")) > 1


def test_a_run_needs_no_place_for_its_programs(monkeypatch, tmp_path):
    monkeypatch.setenv("LSTMJAX_CACHE_DIR", "/proc/nothing")
    program = [sys.executable, str(ROOT / "experiments" / "cumsum.py"), "--updates", "5"]
    outcome = subprocess.run(program, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert outcome.returncode == 0
    assert outcome.stderr.startswith("compiled programs are not kept: ")
    assert len(outcome.stderr.splitlines()) == 1


# -- the cumulative sum ---------------------------------------------------------------------------


def test_cumsum_learns_and_prints_the_table(run, capsys):
    run(cumsum, "--updates", 300, "--run-dir", "c")
    found = result("c")
    assert found["parameters"] == 1781
    assert found["test_accuracy"] > 0.9
    out = capsys.readouterr().out
    assert re.search(r"step +number +running sum +expected +predicted", out)
    assert len(re.findall(r"^ +\d+  +0\.\d{3} ", out, re.MULTILINE)) == 10
    assert pathlib.Path("c/curves.png").exists()


def test_cumsum_is_reproducible(run):
    for name in ("a", "b"):
        run(cumsum, "--updates", 50, "--recipe", "notebook", "--run-dir", name)
    assert result("a")["test_loss"] == result("b")["test_loss"]


def test_cumsum_with_several_seeds(run, capsys):
    run(cumsum, "--updates", 40, "--seed", 1, "--run-dir", "one", "--learning-rate", 0.01)
    run(cumsum, "--updates", 40, "--seeds", 2, "--learning-rates", 0.02, 0.01, "--run-dir", "all")
    assert "95 %" in capsys.readouterr().out
    found = result("all")["replicas"]
    assert [(row["seed"], row["learning_rate"]) for row in found] == [
        (0, 0.02), (1, 0.02), (0, 0.01), (1, 0.01),
    ]  # fmt: skip
    assert found[3]["figures"]["test_loss"] == pytest.approx(result("one")["test_loss"], rel=2e-5)
    assert pathlib.Path("all/curves.png").exists()


def test_cumsum_refuses_sizes_below_one(error_of):
    assert "--updates must be at least 1, got 0" in error_of(cumsum, "--updates", 0)


# -- any task -------------------------------------------------------------------------------------


def on_a_task(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    run_command(config_of, train.main, train.__doc__, chooser="task", default="adding")


def test_a_tasks_sizes_are_flags(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(train, "train", asked.append)
    on_a_task(monkeypatch, "--task", "s5", "--length", 7, "--seeds", 3, "--hidden-size", 9)
    on_a_task(monkeypatch, "--task", "demo(size=90)", "--top-words", 40)
    on_a_task(monkeypatch)
    assert [type(config.sizes).__name__ for config in asked] == ["S5", "Demo", "Adding"]
    assert (asked[0].sizes.length, asked[0].seeds, asked[0].model.hidden_size) == (7, 3, 9)
    assert (asked[1].sizes.size, asked[1].sizes.top_words) == (90, 40)
    with pytest.raises(SystemExit):
        on_a_task(monkeypatch, "--task", "parity", "--help")
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert re.search(r"--length.*?default: 32", text, re.DOTALL)


def test_a_wrong_task_is_one_line(monkeypatch, capsys):
    for arguments, message in (
        (("--task", "addin"), "no task 'addin'; there are adding"),
        (("--task", "text", "--file", "none.csv"), "cannot read none.csv"),
        (("--seeds", 0), "--seeds must be at least 1, got 0"),
        (("--seeds", 2, "--patience", 1), "--keep-best and --patience end each run"),
    ):
        with pytest.raises(SystemExit) as stop:
            on_a_task(monkeypatch, *arguments)
        assert stop.value.code == 2
        errors = capsys.readouterr().err
        assert message in errors
        assert "Traceback" not in errors
