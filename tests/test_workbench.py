"""Training on tasks: replicas as their single runs, going on, what a run leaves behind."""

import dataclasses
import json
import math
import pathlib
import re
import signal

import jax
import numpy as np
import pytest

from lstmjax import load_run, training
from lstmjax.cells import load_cell
from lstmjax.data import words_of
from lstmjax.errors import UserError
from lstmjax.tasks import Adding, Characters, Demo, Parity, TextFile
from lstmjax.tasks.metric import MEAN_SQUARED_ERROR
from lstmjax.training import NonFiniteLossError, step
from lstmjax.training.checkpoint import Checkpoints
from lstmjax.workbench import Replica, classes, config_of, run, train
from lstmjax.workbench.classes import classes_of, draw_confusion
from lstmjax.workbench.rows import Row, outcome_of

pytestmark = pytest.mark.usefixtures("as_for_users")


def config(task="parity", **changes):
    """Something tiny: a few updates of a few rows."""
    made = config_of(task)
    tiny = {"hidden_size": 4, "embedding_size": 3}
    sizes = {
        "parity": Parity(length=5, updates=4, test_rows=64),
        "adding": Adding(length=6, updates=4, test_rows=64),
        "demo": Demo(size=60, top_words=80, max_length=40, buckets=3),
        "characters": Characters(length=8, file=pathlib.Path("t.txt"), streams=3),
    }[task]
    if task == "characters":
        text = "".join(np.random.default_rng(0).choice(list("abc "), 900))
        pathlib.Path("t.txt").write_text(text)
    return dataclasses.replace(
        made,
        sizes=sizes,
        model=dataclasses.replace(made.model, **tiny),
        batch_size=8,
        epochs=2,
        accelerator="cpu",
        **changes,
    )


def close(a, b):
    """Sums in another order and products of another shape, over a dozen updates of Adam."""
    return np.allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "seeds"), [("parity", 8), ("demo", 3), ("characters", 2)])
@pytest.mark.parametrize("in_turn", [True, False])
def test_each_replica_is_as_its_single_run(task, seeds, in_turn, monkeypatch):
    """On eight devices: eight replicas are spread over them, otherwise the rows are.

    On CPUs those of a device go one after the other, elsewhere side by side.
    Each has a run folder of its own, as the single run leaves it, with a checkpoint to go on from.
    """
    monkeypatch.setattr(step, "on_cpu", lambda mesh: in_turn)
    several = train(config(task, seed=3, seeds=seeds, run_dir=pathlib.Path("all")))
    assert [row.seed for row in several] == [*range(3, 3 + seeds)]
    row = several[-1]
    alone = config(task, seed=row.seed, run_dir=pathlib.Path("alone"))
    (single,) = train(alone)
    assert single.figures.keys() == row.figures.keys()
    for name, value in single.figures.items():
        assert close(value, row.figures[name]), name
    values = [row.test["test"] for row in several]
    assert len({*np.round(values, 6)}) > 1
    left = pathlib.Path("all") / f"seed{row.seed}"
    assert _json(left / "config.json") == _json("alone/config.json")
    ours, theirs = (_json(folder / "result.json") for folder in (left, pathlib.Path("alone")))
    assert ours["epochs"][1].keys() == theirs["epochs"][1].keys()
    steps = run.make_steps(alone, load_cell("LSTM", 4), alone.sizes.train(8), _mesh())
    ours, theirs = (
        Checkpoints(folder / "checkpoints").restore(steps.init())
        for folder in (left, pathlib.Path("alone"))
    )
    assert int(ours[0].step) == int(theirs[0].step)
    for a, b in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(theirs[0]), strict=True):
        assert close(a, b)
    assert (ours[1].epoch, ours[1].batch) == (theirs[1].epoch, theirs[1].batch)
    found = _json("all/result.json")
    assert [row["seed"] for row in found["replicas"]] == [row.seed for row in several]
    (means,) = found["by_learning_rate"].values()
    assert means["test"]["mean"] == pytest.approx(np.mean(values))


def _json(path):
    return json.loads(pathlib.Path(path).read_text())


def _mesh():
    return training.make_mesh("cpu", 8)


@pytest.mark.slow
def test_learning_rates_are_a_further_axis():
    """One that makes its replica diverge takes no other with it."""
    asked = config("adding", learning_rates=(1e-3, 1e-2, 1e30), run_dir=pathlib.Path("all"))
    rows = train(asked)
    assert [(row.seed, row.learning_rate) for row in rows] == [(0, 1e-3), (0, 1e-2), (0, 1e30)]
    alone = asked.alone(Replica(0, 1e-2))
    (single,) = train(dataclasses.replace(alone, run_dir=None))
    assert close([*single.figures.values()], [*rows[1].figures.values()])
    assert not close([*single.figures.values()], [*rows[0].figures.values()])
    assert math.isnan(rows[2].validation)
    assert math.isnan(rows[2].test["test"])
    assert {p.name for p in pathlib.Path("all").glob("seed*")} == {
        "seed0-lr0.001", "seed0-lr0.01", "seed0-lr1e+30",
    }  # fmt: skip
    assert _json("all/result.json")["replicas"][2]["validation"] is None


def test_where_all_diverge_it_is_told():
    with pytest.raises(NonFiniteLossError, match="ower --learning-rate"):
        train(config("adding", learning_rates=(1e30, 1e31)))


@pytest.mark.slow
def test_replicas_go_on_bit_for_bit(monkeypatch):
    """With the carried state, which is that of the step before."""
    asked = config("characters", seeds=2)
    make_steps, done = run.make_steps, []

    def interrupted(*arguments):
        steps = make_steps(*arguments)

        def once(state, batch, key):
            done.append(1)
            if len(done) == 3:
                signal.raise_signal(signal.SIGTERM)
            return steps.train(state, batch, key)

        return steps._replace(train=once)

    whole = train(dataclasses.replace(asked, run_dir=pathlib.Path("whole")))
    monkeypatch.setattr(run, "make_steps", interrupted)
    with pytest.raises(training.Interrupted):
        train(dataclasses.replace(asked, run_dir=pathlib.Path("run")))
    again = train(dataclasses.replace(asked, run_dir=pathlib.Path("run"), resume=True))
    for a, b in zip(again, whole, strict=True):
        np.testing.assert_array_equal([*a.figures.values()], [*b.figures.values()])


def test_state_is_carried_from_batch_to_batch():
    """What the second batch says depends on the first, unless it begins anew."""
    asked = config("characters")
    cell = load_cell("LSTM", 4)
    source = asked.sizes.train(8)
    steps = run.make_steps(asked, cell, source, _mesh())
    key = jax.random.key(0)
    first, second = list(source.epoch(0, 0))[:2]
    assert not second.resets.any()

    def loss(*batches):
        state = steps.init()
        for batch in batches:
            state, sums = steps.train(state, batch, key)
        return float(sums.loss), state

    anew = second._replace(resets=np.zeros_like(second.resets))
    anew.resets[:, 0] = True
    assert loss(first, second)[0] != loss(first, anew)[0]
    carry = loss(first)[1].carry
    assert np.abs(carry[0].h).max() > 0.01


def test_what_cannot_work_is_told():
    for changes, message in (
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"learning_rates": (0.0,)}, "--learning-rate must be positive"),
        ({"seed": 2**32 - 1, "seeds": 2}, "--seed must lie in"),
        ({"cell": "LTSM"}, "no cell 'LTSM'"),
    ):
        with pytest.raises(UserError, match=message):
            train(config(**changes))
    assert not pathlib.Path("runs").exists()


# -- a user's own texts ---------------------------------------------------------------------------


@pytest.mark.slow
def test_texts_of_ones_own_from_file_to_verdict(capsys):
    """Three classes that a word gives away, pretrained vectors of it, and they are frozen."""
    rng, names = np.random.default_rng(0), ["rouge", "vert", "bleu"]
    lines = ["text,couleur"]
    for n in range(120):
        words = [names[n % 3], *rng.choice(["un", "deux", "trois", "quatre"], 4)]
        lines.append(f"{' '.join(rng.permutation(words))} n{n},{names[n % 3]}")
    pathlib.Path("t.csv").write_text("\n".join(lines))
    vectors = {name: np.eye(3)[k] for k, name in enumerate(names)}
    pathlib.Path("v.txt").write_text(
        "".join(f"{word} {' '.join(map(str, v))}\n" for word, v in vectors.items())
        + "other 1 2 3\n"
    )
    made = config_of("text")
    sizes = TextFile(
        file=pathlib.Path("t.csv"),
        label_column="couleur",
        class_weights="balanced",
        embeddings=pathlib.Path("v.txt"),
        freeze_embeddings=True,
        buckets=1,
    )
    small = dataclasses.replace(
        made.model, hidden_size=4, embedding_size=3, dropout_before=0.0, dropout_after=0.0
    )
    asked = dataclasses.replace(
        made,
        sizes=sizes,
        model=small,
        epochs=12,
        batch_size=8,
        accelerator="cpu",
        keep_best=True,
        run_dir=pathlib.Path("r"),
        optimizer=dataclasses.replace(made.optimizer, learning_rate=0.05),
    )
    (row,) = train(asked)
    assert row.figures["test_f1"] == row.figures["test_auc"] == row.test["test"] == 1
    out = capsys.readouterr().out
    assert re.search(r"true . said +bleu +rouge +vert", out)
    assert "3 of them with pretrained vectors" in out
    assert pathlib.Path("r/confusion.png").exists()
    found = _json("r/result.json")
    assert np.trace(found["confusion"][0]) == np.sum(found["confusion"][0]) == 24
    steps = run.make_steps(asked, load_cell("LSTM", 4), sizes.train(8), _mesh())
    state = Checkpoints(pathlib.Path("r/checkpoints")).restore(steps.init())[0]
    table = state.params["embedding"]["embedding"][...]
    np.testing.assert_array_equal(table, steps.init().params["embedding"]["embedding"][...])
    vocabulary = sizes.parts()["train"].vocabulary
    for word, vector in vectors.items():
        np.testing.assert_array_equal(table[vocabulary.id(word)], vector)
    model = load_run("r")
    texts = ["un bleu deux", "rouge", "Trois VERT"]
    assert [model.config.classes[k] for k in model.predict(texts).argmax(1)] == [
        "bleu", "rouge", "vert",
    ]  # fmt: skip
    assert model.vocabulary.tokenizer is words_of
    wide = dataclasses.replace(asked, model=dataclasses.replace(small, embedding_size=5))
    with pytest.raises(UserError, match="line 1 has 3 numbers for 'rouge'"):
        train(wide)


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_figure_that_there_is_none_of_costs_no_result(seeds, capsys):
    """A class is in the training part alone; another has a name that nobody can write."""
    names = ["\ud800x", r"$\foo$"]
    rows = [{"text": f"good film {n}", "label": names[n % 2]} for n in range(60)]
    rows.append({"text": "rare", "label": "rare"})
    pathlib.Path("t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = config_of("text")
    asked = dataclasses.replace(
        made,
        sizes=TextFile(file=pathlib.Path("t.jsonl"), buckets=1),
        model=dataclasses.replace(made.model, hidden_size=2, embedding_size=2),
        epochs=1,
        seeds=seeds,
        accelerator="cpu",
        run_dir=pathlib.Path("r"),
    )
    rows = train(asked)
    assert all(math.isnan(row.figures["test_auc"]) for row in rows)
    found = _json("r/result.json")
    for one in [found] if seeds == 1 else [row["figures"] for row in found["replicas"]]:
        assert one["test_auc"] is None
        assert one["test_f1"] >= 0
    out = capsys.readouterr().out
    assert "AUC nan (a class has no row to test on)" in out
    assert re.search(r"\n +rare( +0){3} +–\n", out)
    assert re.search(r"\n +.ud800x ", out)
    assert pathlib.Path("r/confusion.png").exists()


def test_what_diverged_is_null_in_the_result():
    row = Row(0, 0.1, math.nan, {"test": math.inf}, {"test_loss": -math.inf})
    assert outcome_of(MEAN_SQUARED_ERROR, [row], False) == {
        "test_loss": None, "metric": "mean squared error", "value": None,
    }  # fmt: skip
    several = outcome_of(MEAN_SQUARED_ERROR, [row], True)
    assert several["replicas"][0]["test"] == {"test": None}
    assert {*several["by_learning_rate"]["0.1"]["validation"].values()} == {None}


def test_of_very_many_classes_there_is_no_confusion_matrix(monkeypatch):
    outputs, labels = np.eye(50_000, dtype=np.float32)[:20], np.arange(20)
    few = classes_of(outputs[:, :40], labels)
    assert classes_of(outputs[:, :400], labels).f1 == few.f1 == 1  # of those that there are
    asked = []
    monkeypatch.setattr(classes, "area_under_curve", lambda *of: asked.append(of))
    found = classes_of(outputs, labels)
    assert few.confusion.shape == (40, 40)
    assert found.confusion is None
    assert np.isnan(found.auc)
    assert not asked  # of 50,000, when some have no row, each would take its time for nothing


def test_a_class_without_rows_does_not_count_unless_it_is_said():
    labels = np.array([0, 0, 1, 1])
    right = np.eye(3)[labels]
    assert classes_of(right, labels).f1 == 1
    assert classes_of(np.eye(3)[[0, 0, 1, 2]], labels).f1 == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_names_in_any_script_are_drawn(tmp_path):
    """Without a warning of the font's; and what is no text moves no cursor."""
    names = ["好", "schön", "плохо\x1b[2J"]
    draw_confusion(tmp_path / "confusion.png", "任务", np.eye(3, dtype=int), names)
    assert (tmp_path / "confusion.png").stat().st_size > 5000


def test_f1_and_auc_by_definition():
    rng = np.random.default_rng(1)
    outputs, labels = rng.normal(size=(60, 3)).round(1), rng.integers(0, 3, 60)
    found = classes_of(outputs, labels)
    said, f1, auc = outputs.argmax(1), [], []
    for k in range(3):
        precision = (labels[said == k] == k).mean()
        recall = (said[labels == k] == k).mean()
        f1.append(2 * precision * recall / (precision + recall))
        pairs = outputs[labels == k, k][:, None] - outputs[labels != k, k][None]
        auc.append(((pairs > 0) + (pairs == 0) / 2).mean())
    assert found.f1 == pytest.approx(np.mean(f1))
    assert found.auc == pytest.approx(np.mean(auc))
    assert found.confusion.sum() == 60
    two = classes_of(outputs[:, 0], (labels > 0).astype(int))
    assert two.confusion.shape == (2, 2)
    assert math.isnan(classes_of(outputs[:, 0], np.zeros(60, int)).auc)
