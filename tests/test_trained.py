"""A run folder holds a model that one can use: loading, predicting, choosing an epoch, going on."""

import contextlib
import dataclasses
import io
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from lstmjax import files, load_run
from lstmjax.cells import CellSpec, load_cell
from lstmjax.cells.loading import same_program
from lstmjax.commands import export, imdb, predict
from lstmjax.data import load_demo
from lstmjax.errors import UserError
from lstmjax.export import save_exported
from lstmjax.inspection import look
from lstmjax.interop import read_safetensors
from lstmjax.models import SequenceConfig
from lstmjax.trained import ModelConfig, SequenceModelConfig, read_texts
from lstmjax.training import RunFolder, sums
from lstmjax.training.loop import best_epoch
from lstmjax.workbench import config_of
from lstmjax.workbench import train as workbench_train
from tests.trained_run import CELL_FILE, train

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _as_for_users(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LSTMJAX_CACHE_DIR", str(tmp_path / "cache"))
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def copied(trained_run, tmp_path):
    return pathlib.Path(shutil.copytree(trained_run, tmp_path / "copied"))


def result(folder):
    return json.loads((folder / "result.json").read_text())


# -- the model ------------------------------------------------------------------------------------


def test_three_lines_predict_what_the_run_measured(trained_run):
    """On the test split, text by text, as many are right as the run says."""
    model = load_run(trained_run)
    test = load_demo("test", top_words=200, max_length=50)
    found = model.predict_ids(test.sequences)
    accuracy = float(((found > 0.5) == (test.labels == 1)).mean())
    assert accuracy == pytest.approx(result(trained_run)["test_accuracy"], abs=1e-7)
    losses = -np.log(np.where(test.labels == 1, found, 1 - found))
    assert float(losses.mean()) == pytest.approx(result(trained_run)["test_loss"], rel=1e-5)
    assert np.ptp(found) > 0.1  # it has learnt something


def test_a_text_is_judged_alike_alone_and_among_others(trained_run):
    model = load_run(trained_run)
    texts = ["the train was late", "", "we slept " * 30, "ÿ\ud800 \x00", b"good \xff\xfe seats"]
    together = model.predict(texts)
    assert together.shape == (5,)
    assert ((together > 0) & (together < 1)).all()
    alone = np.concatenate([model.predict(text) for text in texts])
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_the_model_says_what_it_is(trained_run):
    model = load_run(trained_run)
    assert repr(model) == (
        "TrainedModel(cell.py:Mine(leak=0.25), built-in DEMO corpus (not IMDB), negative, positive)"
    )
    assert model.module.recurrent.layers[0].cell.leak == 0.25
    assert len(model.vocabulary) == 196
    assert model.vocabulary.words == load_demo("train").vocabulary.words[:196]
    names = set(read_safetensors(trained_run / "params.safetensors"))
    assert {"embedding.embedding", "recurrent.layers.0.params.recurrent_kernel"} < names


def test_a_built_in_cell_and_zeros_in_front(tmp_path):
    folder = train(tmp_path / "r", cell="GRU", padding="front")
    model = load_run(folder)
    test = load_demo("test", top_words=50, max_length=12)
    accuracy = float(((model.predict_ids(test.sequences) > 0.5) == (test.labels == 1)).mean())
    assert accuracy == pytest.approx(result(folder)["test_accuracy"], abs=1e-7)
    assert not (folder / "cell.py").exists()


# -- sequences, and numbers -----------------------------------------------------------------------

KINDS = {"classes": 3, "two classes": 2, "numbers": 0, "classes per step": 3, "numbers per step": 0}


def trained_on(task, model, epochs=1, seeds=1, **sizes):
    """A tiny run in the folder ``s``; returns the task."""
    made = config_of(task)
    config = dataclasses.replace(
        made,
        sizes=dataclasses.replace(made.sizes, **sizes),
        model=dataclasses.replace(made.model, hidden_size=4, **model),
        epochs=epochs,
        seeds=seeds,
        batch_size=8,
        accelerator="cpu",
        run_dir=pathlib.Path("s"),
    )
    workbench_train(config)
    return config.sizes


def trained_sequences(kind):
    """A run on a file of sequences of two features and different lengths."""
    rng, (rows, steps) = np.random.default_rng(0), (60, 9)
    x = rng.normal(size=(rows, steps, 2)).astype(np.float32)
    of = (rows, steps) if kind.endswith("step") else (rows,)
    classes = KINDS[kind]
    y = rng.integers(0, classes, of) if classes else rng.normal(size=of).astype(np.float32)
    np.savez("s.npz", x=x, y=y, lengths=rng.integers(4, steps + 1, rows))
    return trained_on(
        "sequences", {"bidirectional": True}, 2, file=pathlib.Path("s.npz"), buckets=2
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_are_predicted_as_the_run_measured(kind, capsys):
    """One row at a time and all together; the command says the same."""
    task, model = trained_sequences(kind), load_run("s")
    rows, labels = [], []
    for batch in task.tests(8)["test"].in_order():
        for x, label, n in zip(batch.ids, batch.labels, batch.lengths, strict=True):
            if n:
                rows.append(x[:n])
                labels.append(label[:n] if label.ndim else label)
    found = model.predict(rows)
    assert len(found) == len(rows) > 8
    for row, answer in zip(rows, found, strict=True):
        (alone,) = model.predict([row])
        np.testing.assert_allclose(alone, answer, rtol=1e-5, atol=1e-6)
    if kind.endswith("step"):
        assert [len(a) for a in found] == [len(row) for row in rows]
    flat = np.concatenate(found) if kind.endswith("step") else found
    labels = np.concatenate([np.atleast_1d(label) for label in labels])
    if KINDS[kind] == 0:
        losses = (flat - labels) ** 2
    else:
        shares = flat if KINDS[kind] == 3 else np.stack([1 - flat, flat], axis=1)
        losses = -np.log(shares[np.arange(len(labels)), labels])
        np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    assert float(losses.mean()) == pytest.approx(result(pathlib.Path("s"))["test_loss"], rel=1e-4)
    capsys.readouterr()
    predict.main(predict.Config(pathlib.Path("s"), file=pathlib.Path("s.npz"), json=True))
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["row"] == 0
    assert {*first} == {"row", "probabilities" if KINDS[kind] else "number"}
    predict.main(predict.Config(pathlib.Path("s"), file=pathlib.Path("s.npz")))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 60
    assert lines[7].endswith("row 7")


@pytest.mark.slow
def test_a_model_of_ids_names_the_row_that_it_cannot_take():
    trained_on("copy", {}, delay=3, updates=2, test_rows=32)
    model = load_run("s")
    assert "TrainedSequences(LSTM, copy, 0, 1" in repr(model)
    (answer,) = model.predict([[1, 2, 3]])
    assert answer.shape == (3, len(model.config.classes))
    for rows, message in (
        ([[1], [99]], "row 1 must hold ids from 0 to"),
        ([[1.0]], "row 0 must hold ids"),
        ([[[1]]], r"row 0 is int64\[1, 1\]; this model sees ids"),
        ([[]], "row 0 is"),
        ([np.array(3)], "row 0 is"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict(rows)
    with pytest.raises(UserError, match="s holds a model of sequences; this is for models of text"):
        export.main(export.Config(pathlib.Path("s"), pathlib.Path("to")))
    with pytest.raises(UserError, match=r"--file mine\.npz"):
        predict.main(predict.Config(pathlib.Path("s"), texts=("a",)))
    np.savez("other.npz", x=np.ones((2, 3, 5)))
    with pytest.raises(UserError, match=r"other.npz: row 0 is float32\[3, 5\]"):
        predict.main(predict.Config(pathlib.Path("s"), file=pathlib.Path("other.npz")))


OWN_MODEL = """
from lstmjax.tasks import Adding

class Mine(Adding):
    def make_model(self, cell, config, **settings):
        return super().make_model(cell, config, **settings)
"""


@pytest.mark.slow
def test_each_replica_is_loaded_and_a_model_of_ones_own_is_not(tmp_path):
    trained_on("adding", {}, seeds=2, length=5, updates=2, test_rows=32)
    (first,), (second,) = (load_run(f"s/seed{n}").predict([np.ones((5, 2))]) for n in (0, 1))
    assert first != second
    shutil.rmtree("s")
    (tmp_path / "mine.py").write_text(OWN_MODEL)
    trained_on(f"{tmp_path / 'mine.py'}:Mine", {}, length=5, updates=2, test_rows=32)
    with pytest.raises(UserError, match=r"no trained model in s: it has no model\.json"):
        load_run("s")


@pytest.mark.slow
def test_numbers_of_texts_are_predicted_as_the_run_measured(capsys):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["un", "deux", "trois"], 5)) + f" n{n}" for n in range(60)]
    lines = [f"{text},{text.count('deux') + 0.5}" for text in texts]
    pathlib.Path("t.csv").write_text("\n".join(["text,label", *lines]))
    task = trained_on("text", {"embedding_size": 3}, file=pathlib.Path("t.csv"), buckets=1)
    model, test = load_run("s"), task.parts()["test"]
    errors = (model.predict_ids(test.sequences) - test.labels) ** 2
    assert errors.mean() == pytest.approx(result(pathlib.Path("s"))["test_loss"], rel=1e-4)
    capsys.readouterr()
    predict.main(predict.Config(pathlib.Path("s"), texts=("un deux",)))
    number, text = capsys.readouterr().out.split("  ")
    assert float(number) == pytest.approx(float(model.predict("un deux")[0]), rel=1e-4)
    assert text == "un deux\n"
    with pytest.raises(UserError, match="predicts numbers"):
        look(model, "un deux")
    export.main(export.Config(pathlib.Path("s"), pathlib.Path("to"), ("cpu",)))
    assert json.loads(pathlib.Path("to/signature.json").read_text())["classes"] == []


# -- what is wrong with a folder ------------------------------------------------------------------


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def set_in(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


DAMAGE = {
    "another cell file": (set_in("cell", value="/tmp/other.py:Mine"), "which is not in"),
    "no cell": (set_in("cell", value="cell.py:Yours"), "no cell 'Yours'"),
    "hyper-parameter": (set_in("cell", value="cell.py:Mine(lek=1)"), "no hyper-parameter 'lek'"),
    "size": (set_in("classifier", "hidden_size", value=5), r"kernel is .*; this model has .*"),
    "huge": (set_in("classifier", "top_words", value=10**12), r"embedding.embedding is float32"),
    "many layers": (set_in("classifier", "num_layers", value=10**9), "num_layers is 1000000000"),
    "no size": (set_in("classifier", "hidden_size", value=0), "hidden_size"),
    "kind": (set_in("max_length", value="12"), "max_length is '12'"),
    "length": (set_in("max_length", value=-1), "max_length is -1"),
    "padding": (set_in("padding", value="behind"), "its padding is 'behind'"),
    "precision": (set_in("precision", value="int8"), "its precision is 'int8'"),
    "outputs": (set_in("num_outputs", value=3), "3 outputs for 2 classes"),
    "pooling": (set_in("classifier", "pooling", value=["most"]), "pooling must be"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_description_that_does_not_fit_is_told(copied, name, no_type_checks):
    change, message = DAMAGE[name]
    edit(copied / "model.json", change)
    with pytest.raises(UserError, match=message) as error:
        load_run(copied)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["model.json", "params.safetensors", "vocabulary.txt", "cell.py"])
@pytest.mark.parametrize("how", ["missing", "cut", "nonsense"])
def test_damaged_files_are_named(copied, file, how):
    path = copied / file
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 - 1])
    else:
        path.write_bytes(b"\xff\x00\xfe" * 40)
    if (file, how) == ("vocabulary.txt", "cut"):
        with pytest.raises(UserError, match=r"vocabulary\.txt has \d+ words"):
            load_run(copied)
        return
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        load_run(copied)


def test_only_the_cells_file_is_run(copied):
    marker = copied / "ran"
    for name in ("conftest.py", "model.py", "sitecustomize.py"):
        (copied / name).write_text(f"open({str(marker)!r}, 'w')")
    load_run(copied)
    assert not marker.exists()


def test_the_files_that_a_cell_imports_are_kept_too(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    (place / "far_of_mine.py").write_text("LEAK = 0.125\n")
    (place / "near_of_mine.py").write_text(
        "import math\nimport far_of_mine\nLEAK = far_of_mine.LEAK\n"
    )
    (place / "other_of_mine.py").write_text("LEAK = 1\n")
    head = "from near_of_mine import LEAK\n"
    (place / "mine.py").write_text(
        head + CELL_FILE.replace("leak: float = 0.5", "leak: float = LEAK")
    )
    folder = train(tmp_path / "r", cell=f"{place / 'mine.py'}:Mine", epochs=1)
    shutil.rmtree(place)
    for name in ("near_of_mine", "far_of_mine"):
        del sys.modules[name]
    assert load_run(folder).module.recurrent.layers[0].cell.leak == 0.125
    assert sys.modules["near_of_mine"].__file__ == str(folder / "near_of_mine.py")
    assert not (folder / "other_of_mine.py").exists()


# -- predict.py -----------------------------------------------------------------------------------


def asked(capsys, monkeypatch, config):
    predict.main(config)
    return capsys.readouterr().out.splitlines()


def test_predict_answers_in_order(trained_run, capsys, monkeypatch, tmp_path):
    texts = ("the seats were good", "", "a " * 200 + "\x1b[31m")
    lines = asked(capsys, monkeypatch, predict.Config(trained_run, texts=texts))
    assert len(lines) == 3
    for line, share in zip(lines, load_run(trained_run).predict(texts), strict=True):
        said, name, *_ = line.split()
        assert float(said) == pytest.approx(max(share, 1 - share), abs=1e-4)
        assert name == ("positive" if share > 0.5 else "negative")
        assert "\x1b" not in line
    file = tmp_path / "texts"
    file.write_bytes("\n".join(texts).encode())
    assert asked(capsys, monkeypatch, predict.Config(trained_run, file=file)) == lines
    as_json = asked(capsys, monkeypatch, predict.Config(trained_run, file=file, json=True))
    assert [json.loads(line)["text"] for line in as_json] == [*texts]
    assert sum(json.loads(as_json[0])["probabilities"].values()) == pytest.approx(1)


def test_predict_reads_standard_input_of_any_kind(trained_run):
    """Bytes that are no text, nothing at all, and a million words, in another process."""
    texts = [b"good \xff\xfe\x00 seats", b"", b"good " * 1_000_000, b"late\r"]
    program = [sys.executable, str(ROOT / "experiments" / "predict.py"), "--run", str(trained_run)]
    done = subprocess.run(program, input=b"\n".join(texts), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4


PREDICTED = {
    "a full disk": ("good film >/dev/full", 74, "cannot write the answers: No space left"),
    "closed output": ("good film >&-", 74, "cannot write the answers: standard output is closed"),
    "a reader that is gone": ("good film | true", 0, ""),
    "closed input": ("<&-", 2, "nothing to predict: give texts or --file"),
    "unreadable input": ("0>/dev/null", 74, "cannot read standard input: Bad file descriptor"),
}


@pytest.mark.parametrize("case", PREDICTED)
def test_answers_that_cannot_be_given_are_told(trained_run, case):
    """To predict, the output is the result."""
    arguments, status, said = PREDICTED[case]
    program = f"{sys.executable} {ROOT / 'experiments' / 'predict.py'} --run {trained_run} --json"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{program} {arguments}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.count("\n") == (1 if said else 0)
    assert done.stderr.startswith(f"error: {said}" if said else "")


def test_answers_are_json_and_names_are_printable():
    config = SequenceModelConfig(classes=("\ud800x", "a\nb"))
    line = predict.told(config, {"row": 0}, "row 0", np.array(0.2), False)
    assert line == r"0.8000  \ud800x   row 0"
    numbers = SequenceModelConfig()
    for of, answer in ((config, np.nan), (numbers, np.inf), (numbers, [np.nan, 1])):
        found = predict.told(of, {"row": 0}, "row 0", np.array(answer), True)
        assert "null" in found
        assert files.parse_json(found)["row"] == 0


def test_predict_tells_what_is_missing(trained_run, tmp_path):
    with pytest.raises(UserError, match="--run"):
        predict.main(predict.Config())
    with pytest.raises(UserError, match="leave out one"):
        predict.main(predict.Config(trained_run, file=tmp_path, texts=("a",)))
    with pytest.raises(UserError, match="cannot read"):
        predict.main(predict.Config(trained_run, file=tmp_path / "none"))
    with pytest.raises(UserError, match="no trained model in nowhere"):
        predict.main(predict.Config(pathlib.Path("nowhere"), texts=("a",)))


def test_lines_are_bounded():
    assert list(read_texts(io.BytesIO(b"a\r\n\nb").readline)) == [b"a", b"", b"b"]
    with pytest.raises(UserError, match="line 2 has more than 5 bytes"):
        list(read_texts(io.BytesIO(b"a\n123456\n").readline, longest=5))


# -- the epoch that is kept -----------------------------------------------------------------------


@pytest.mark.slow
def test_the_best_epoch_is_kept_and_training_ends_without_patience(tmp_path):
    """A learning rate so high that the first epoch is the best one."""
    options = {"validation": 0.3, "epochs": 9, "keep_best": True, "learning_rate": 2.0}
    folder = train(tmp_path / "r", patience=2, **options)
    found = result(folder)
    losses = [record["validation_loss"] for record in found["epochs"]]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 9
    assert found["kept_epoch"] == best + 1
    assert found["validation_loss"] == losses[best]
    alone = train(tmp_path / "alone", **{**options, "epochs": best + 1, "keep_best": False})
    one, other = (read_safetensors(f / "params.safetensors") for f in (folder, alone))
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)
    train(folder, patience=2, resume=True, **options)  # nothing is left to do
    assert result(folder)["epochs"][-1]["validation_loss"] == losses[-1]
    further = train(folder, patience=4, resume=True, **options)
    assert len(result(further)["epochs"]) > len(losses)


def test_test_data_choose_no_epoch(tmp_path):
    for options in ({"keep_best": True}, {"patience": 1}):
        with pytest.raises(UserError, match=r"test data must not: add --validation"):
            train(tmp_path / "r", **options)
    with pytest.raises(UserError, match="--patience must be at least 0"):
        train(tmp_path / "r", patience=-1)


def test_of_equal_epochs_the_first_is_best():
    history = [{"epoch": n, "v_loss": loss} for n, loss in enumerate((0.5, 0.2, 0.2, 0.3), 1)]
    assert best_epoch(history, "v")["epoch"] == 2


# -- going on -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_more_epochs_on_resume_are_as_from_the_start(tmp_path, capsys):
    short = train(tmp_path / "short", epochs=1, schedule="constant")
    train(short, epochs=3, schedule="constant", resume=True)
    assert "going on to 3 epochs, not 1" in capsys.readouterr().err
    whole = train(tmp_path / "whole", epochs=3, schedule="constant")
    assert [r["test_loss"] for r in result(short)["epochs"]] == [
        r["test_loss"] for r in result(whole)["epochs"]
    ]
    assert json.loads((short / "config.json").read_text())["epochs"] == 3
    with pytest.raises(UserError, match="epochs: 3 there, 2 here"):
        train(short, epochs=2, schedule="constant", resume=True)


@pytest.mark.slow
def test_a_comment_in_the_cells_file_does_not_matter(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CELL_FILE)
    options = {"cell": f"{file}:Mine", "epochs": 1}
    folder = train(tmp_path / "r", **options)
    file.write_text("# A comment.\n" + CELL_FILE.replace("leak: float = 0.5", "leak: float=0.5"))
    train(folder, resume=True, **options)
    assert (folder / "cell.py").read_text() == CELL_FILE
    file.write_text(CELL_FILE.replace("leak: float = 0.5", "leak: float = 0.25"))
    with pytest.raises(UserError, match="cell-source"):
        train(folder, resume=True, **options)
    file.write_text("# A comment.\n" + CELL_FILE)
    (folder / "cell.py").write_text(CELL_FILE + "\n")  # no longer what the run was made with
    with pytest.raises(UserError, match="cell-source"):
        train(folder, resume=True, **options)


def test_a_run_goes_on_with_the_same_neighbours_only(tmp_path):
    file, beside = tmp_path / "mine.py", tmp_path / "beside_the_cell.py"
    file.write_text("from beside_the_cell import LEAK\n" + CELL_FILE.replace("= 0.5", "= LEAK"))
    beside.write_text("LEAK = 0.5\n")
    options = {"cell": f"{file}:Mine", "epochs": 1}
    folder = train(tmp_path / "r", **options)
    beside.write_text("LEAK  =  0.5  # A comment.\n")
    train(folder, resume=True, **options)
    assert (folder / "beside_the_cell.py").read_text() == "LEAK = 0.5\n"
    beside.write_text("LEAK = 0.25\n")
    with pytest.raises(UserError, match="cell-source"):
        train(folder, resume=True, **options)


def test_a_run_goes_on_with_the_same_task_only(tmp_path):
    task = tmp_path / "mine.py"
    text = (
        "from lstmjax.tasks import Adding\nfrom beside_the_task import LENGTH\n"
        "class Mine(Adding):\n    def draw(self, random, rows):\n"
        "        return Adding(length=LENGTH).draw(random, rows)\n"
    )
    task.write_text(text)
    (tmp_path / "beside_the_task.py").write_text("LENGTH = 5\n")
    made = config_of(f"{task}:Mine(length=5, updates=2, test_rows=64)")
    tiny = {"epochs": 1, "batch_size": 8, "accelerator": "cpu", "run_dir": tmp_path / "r"}
    config = dataclasses.replace(made, model=SequenceConfig(hidden_size=2), **tiny)
    workbench_train(config)
    workbench_train(dataclasses.replace(config, resume=True, epochs=2))
    (tmp_path / "beside_the_task.py").write_text("LENGTH = 4\n")
    with pytest.raises(UserError, match="task-sha256"):
        workbench_train(dataclasses.replace(config, resume=True, epochs=3))


def test_a_folder_of_several_runs_is_told(tmp_path):
    for name in ("seed0", "seed1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "params.safetensors").write_bytes(b"")
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds several runs, name one of them: .*seed0, .*seed1"):
        load_run(tmp_path)


@pytest.mark.parametrize("source", [b"def (", b"x = 1\x00", b"(" * 10_000, b"\xff"])
def test_what_is_no_program_is_only_the_same_as_itself(source):
    assert same_program(source, source)
    assert not same_program(source, b"x = 1")


# -- hyper-parameters on the command line ---------------------------------------------------------

SPECS = {
    "LSTM": ("", "LSTM", {}),
    "a.py:Mine": ("a.py", "Mine", {}),
    "a.py:Mine()": ("a.py", "Mine", {}),
    "d (1)/a.py:Mine(leak=0.1, n=-3)": ("d (1)/a.py", "Mine", {"leak": 0.1, "n": -3}),
    "d(1)/a.py:Mine(leak=0.1)": ("d(1)/a.py", "Mine", {"leak": 0.1}),
    "a:b.py:Mine(t='x:y(1)', u=(1, 2))": ("a:b.py", "Mine", {"t": "x:y(1)", "u": (1, 2)}),
    "Mine(leak=None, on=True)": ("", "Mine", {"leak": None, "on": True}),
    "": ("", "", {}),
    "a.py:Mine(leak=": ("a.py", "Mine(leak=", {}),
}


@pytest.mark.parametrize("spec", SPECS)
def test_a_cell_is_taken_apart(spec):
    path, name, values = SPECS[spec]
    found = CellSpec.parse(spec)
    assert (found.path, found.name) == (path, name)
    assert found.hyper_parameters() == values
    assert CellSpec.parse(found.within(path)) == found


BAD_VALUES = {
    "lek=0.1": r"Mine has no hyper-parameter 'lek' to give in --cell; it has: use_bias, .*leak",
    "hidden_size=3": "no hyper-parameter 'hidden_size'",
    "0.1": "give each hyper-parameter by name",
    "**{'leak': 1}": "give each hyper-parameter by name",
    "leak=open('/etc/passwd')": "is no literal",
    "leak=__import__('os').system('true')": "is no literal",
    "leak=[0.1][0]": "is no literal",
    "leak='0.1'": r"leak is a float \(0.5\) by default, got '0.1'",
    "leak=True": "leak is a float",
    "squash='tanh'": "squash is a .*by default, got 'tanh'; set it in a subclass",
    "sizes=[1]": r"sizes is a tuple",
    "leak=-1": "cannot be built from hidden_size=4, leak=-1.0: AssertionError",
}


@pytest.mark.parametrize("given", BAD_VALUES)
def test_hyper_parameters_that_cannot_be(tmp_path, given):
    file = tmp_path / "mine.py"
    file.write_text(CELL_FILE)
    with pytest.raises(UserError, match=BAD_VALUES[given]) as error:
        load_cell(f"{file}:Mine({given})", 4)
    assert "\n" not in str(error.value)


def test_hyper_parameters_reach_the_cell(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CELL_FILE)
    cell = load_cell(f"{file}:Mine(leak=1, sizes=(3, 4), use_bias=False)", 4)
    assert (cell.leak, cell.sizes, cell.use_bias) == (1.0, (3, 4), False)
    assert math.isclose(load_cell("PhasedLSTM(leak=0.5)", 4).leak, 0.5)


def test_the_description_is_of_the_run(trained_run):
    found = json.loads((trained_run / "model.json").read_text())
    assert {*found} == {field.name for field in dataclasses.fields(ModelConfig)}
    assert found["cell"] == "cell.py:Mine(leak=0.25)"
    assert imdb.CORPUS["demo"] == found["data"]


# -- sums -----------------------------------------------------------------------------------------

SUMMED = ("model.json", "params.safetensors", "vocabulary.txt")


@pytest.mark.parametrize("name", SUMMED)
def test_a_bit_that_has_changed_is_told_with_its_file(copied, name):
    """Wherever it is: in a number, a word, a name, or in white space."""
    whole = (copied / name).read_bytes()
    for place in range(0, len(whole), len(whole) // 7):
        content = bytearray(whole)
        content[place] ^= 1
        (copied / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} is damaged or was changed: its SHA") as error:
            load_run(copied)
        assert "\n" not in str(error.value)
    (copied / name).write_bytes(whole)
    load_run(copied)


def test_a_vocabulary_that_was_edited_is_used_once_its_sum_is_gone(copied):
    words = (copied / "vocabulary.txt").read_text().split("\n")
    (copied / "vocabulary.txt").write_text("\n".join(["mine", *words[1:]]))
    with pytest.raises(UserError, match=r"not [0-9a-f]{12}.*; put .*, or, .* delete .*sums\.json"):
        load_run(copied)
    (copied / "vocabulary.txt").write_text("\n".join(words[1:]))
    with pytest.raises(UserError, match=r"was changed: .*txt has 195 words, but the run had 196"):
        load_run(copied)
    (copied / "vocabulary.txt").write_text("\n".join(["mine", *words[1:]]))
    (copied / "sums.json").unlink()  # as of a run of before
    assert load_run(copied).vocabulary.words[0] == "mine"


@pytest.mark.parametrize("content", [b"", b"[]", b'{"model.json": 1}', b'{"model.json": [1]}'])
def test_damaged_sums_are_told(copied, content):
    (copied / "sums.json").write_bytes(content)
    with pytest.raises(UserError, match=r"sums\.json is damaged: .*, or delete it"):
        load_run(copied)


def test_a_crash_leaves_a_file_whose_sum_is_known(tmp_path, monkeypatch):
    """After any of the changes, of a run with sums and of one of before."""
    path, publish = tmp_path / "a", files.publish
    sums.publish(path, b"1")
    for old in (False, True):
        for content, stops in ((b"2", 0), (b"3", 1), (b"4", 1), (b"5", 2)):
            if old:
                (tmp_path / "sums.json").unlink(missing_ok=True)
            left = [stops]

            def killed(path, content, left=left):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                publish(path, content)

            monkeypatch.setattr(files, "publish", killed)
            with contextlib.suppress(KeyboardInterrupt):
                sums.publish(path, content)
            monkeypatch.setattr(files, "publish", publish)
            with sums.checked(tmp_path, ["a"]):
                pass
    path.write_bytes(b"6")
    with pytest.raises(UserError, match="a is damaged"), sums.checked(tmp_path, ["a"]):
        pass
    sums.publish(path, b"7")
    path.write_bytes(b"6")  # what was damaged did not become sound by being replaced
    with pytest.raises(UserError, match="a is damaged"), sums.checked(tmp_path, ["a"]):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("keep_best", [False, True])
def test_a_run_that_goes_on_has_its_sums(tmp_path, keep_best):
    """Of the epoch that is kept; a run without sums gets them."""
    options = {"validation": 0.3, "keep_best": keep_best, "learning_rate": 2.0}
    folder = train(tmp_path / "r", epochs=2, **options)
    load_run(folder)
    (folder / "sums.json").unlink()
    train(folder, epochs=4, resume=True, **options)
    load_run(folder)
    assert {*json.loads((folder / "sums.json").read_text())} >= {"model.json", "vocabulary.txt"}
    train(folder, epochs=4, resume=True, **options)  # nothing is left to do
    load_run(folder)


@pytest.mark.slow
def test_the_best_parameters_are_not_tested_once_damaged(monkeypatch):
    train_it, damaged = RunFolder.write_parameters, []

    def write(self, params):
        train_it(self, params)
        file = self.path / "params.safetensors"
        damaged.append(file)
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")

    monkeypatch.setattr(RunFolder, "write_parameters", write)
    made = config_of("adding(length=5,updates=2,test_rows=32)")
    config = dataclasses.replace(
        made, epochs=1, batch_size=8, accelerator="cpu", keep_best=True, run_dir=pathlib.Path("s")
    )
    with pytest.raises(UserError, match=r"s/params\.safetensors is damaged or was changed"):
        workbench_train(config)
    assert damaged
