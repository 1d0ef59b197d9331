"""Tasks: batches as functions of (seed, step), labels by an independent rule, a user's own data."""

import dataclasses
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstmjax.data import Batch, SideBySide, words_of
from lstmjax.errors import UserError
from lstmjax.tasks import (
    S5,
    TASKS,
    Adding,
    AssociativeRecall,
    Characters,
    CopyMemory,
    Cumsum,
    Demo,
    Digits,
    Generated,
    Mnist1d,
    Parity,
    SelectiveCopy,
    SequenceFile,
    TextFile,
    load_task,
)
from lstmjax.tasks.rows import split_rows

GENERATED = [
    Adding(length=12),
    CopyMemory(delay=5, copied=3),
    SelectiveCopy(length=9, copied=3),
    Parity(length=7),
    S5(length=6),
    AssociativeRecall(pairs=3, length=12, keys=5, values=4),
    Cumsum(length=5),
]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


@pytest.mark.parametrize("task", GENERATED, ids=lambda task: type(task).__name__)
def test_a_batch_is_a_function_of_seed_and_step(task):
    assert isinstance(task, Generated)
    train = dataclasses.replace(task, updates=3).train(4)
    first, second = list(train.epoch(0, 0)), list(train.epoch(0, 1))
    assert len(first) == len(second) == 3
    assert same(next(train.epoch(0, 1, start=2)), second[2])
    seen = [*first, *second, *train.epoch(1, 0), *task.validation(4).in_order()]
    seen += [*dataclasses.replace(task, test_rows=8).tests(4)["test"].in_order()]
    for a, b in itertools.combinations(seen[:10], 2):
        assert not same(a, b)
    batch = first[0]
    assert batch.ids.shape[:2] == train.shapes[0] == (4, batch.ids.shape[1])
    assert batch.labels.shape == batch.weights.shape
    assert batch.labels.shape == (batch.ids.shape[:2] if task.per_step else (4,))
    if task.tokens:
        assert 0 <= batch.ids.min() <= batch.ids.max() < task.tokens
    if batch.labels.dtype == np.int32:
        assert 0 <= batch.labels.min() <= batch.labels.max() < max(2, task.num_outputs)
    assert task.source
    assert task.reported


def test_every_task_says_what_chance_is():
    """The share of the most frequent answer among those that count, or the variance."""
    for task in GENERATED:
        batch = task.train(4000).batch(0, 0)
        labels = batch.labels[batch.weights > 0]
        if task.metric.of == "loss":
            assert labels.var() == pytest.approx(task.chance, rel=0.1)
        elif not isinstance(task, Cumsum):
            count = np.bincount(labels)
            assert count.max() / len(labels) < 1.5 * task.chance
            assert len(count) == round(1 / task.chance)


def test_labels_by_another_way():
    rng = np.random.default_rng(3)
    x, labels, _ = Adding(length=9).draw(rng, 50)
    assert ((x[..., 1] == 1).sum(1) == 2).all()
    assert (x[:, :4, 1].sum(1) == 1).all()
    np.testing.assert_allclose([row[row[:, 1] == 1, 0].sum() for row in x], labels, rtol=1e-6)
    x, labels, _ = Parity(length=9).draw(rng, 50)
    assert all(labels[b, t] == bin(int("".join(map(str, x[b, : t + 1])), 2)).count("1") % 2
               for b in range(50) for t in range(9))  # fmt: skip
    elements = [*itertools.permutations(range(5))]
    x, labels, _ = S5(length=6).draw(rng, 20)
    for row, found in zip(x, labels, strict=True):
        things = list(range(5))  # where each thing is after all moves
        for move, label in zip(row, found, strict=True):
            things = [elements[move][place] for place in things]
            assert elements[label] == tuple(things)
    task = AssociativeRecall(pairs=3, length=14, keys=5, values=4)
    x, labels, counts = task.draw(rng, 50)
    assert (counts.sum(1) == 3).all()
    for row, label, count in zip(x, labels, counts, strict=True):
        pairs = dict(zip(row[0:6:2], row[1:6:2], strict=True))
        assert len(pairs) == 3
        for t in np.flatnonzero(count):
            assert t >= 6
            assert pairs[row[t]] == 1 + task.keys + label[t]
    for task in (CopyMemory(delay=4, copied=3), SelectiveCopy(length=9, copied=3)):
        x, labels, counts = task.draw(rng, 20)
        for row, label in zip(x, labels, strict=True):
            assert [*row[row > 1] - 2] == [*label[-3:]]
            assert (row[-3:] == 1).all()
        assert (counts[:, -3:]).all()
        assert counts.sum() == 60


def test_state_tracking_is_tested_at_longer_sequences():
    for task in (Parity(length=5, test_rows=16), S5(length=5, test_rows=16)):
        shapes = {name: source.shapes for name, source in task.tests(4).items()}
        assert shapes == {"test": ((4, 5),), "test_2x": ((4, 10),), "test_4x": ((4, 20),)}


def test_tasks_are_loaded_by_name_and_from_files(tmp_path):
    assert load_task("adding(length=40)") == Adding(length=40)
    for name, kind in TASKS.items():
        assert type(load_task(name)) is kind
    (tmp_path / "mine.py").write_text(
        "import dataclasses\nfrom lstmjax.tasks import Parity\n"
        "@dataclasses.dataclass(frozen=True)\nclass Mine(Parity):\n    extra: int = 3\n"
    )
    assert load_task(f"{tmp_path}/mine.py:Mine(extra=4)").extra == 4
    for spec, message in {
        "addin": "no task 'addin'; there are adding",
        "adding(40)": "cannot read",
        "adding(size=3)": "unexpected keyword argument 'size'",
        "adding(length=1)": "--length must be at least 2, got 1",
        "adding(length=f())": "cannot read",
        f"adding(length={'-' * 100_000}1)": "cannot read",
        f"adding(length={'(' * 100_000}1)": "cannot read",
        f"{tmp_path}/mine.py:Other": "no task 'Other'",
    }.items():
        with pytest.raises(UserError, match=message.replace("(", r"\(")):
            load_task(spec)


class Ragged:
    """A source whose batches are of another length for every seed."""

    padding, shapes, fingerprint = "right", ((2, 6), (2, 8)), ""

    def __len__(self):
        return 1

    def in_order(self):
        return self.epoch(0, 0)

    def epoch(self, seed, epoch, start=0):
        steps = np.arange(3 + seed, dtype=np.int32)
        ids = np.stack([1 + steps, 9 - steps])
        yield Batch(ids, *[np.full(2, len(steps), np.int32)] * 2, np.ones(2, np.float32))


@pytest.mark.parametrize("train", [Demo(size=200).train(8), Ragged()], ids=["demo", "ragged"])
def test_replicas_batches_are_those_of_their_seeds(train):
    for together, a, b in zip(
        SideBySide(train).epoch((3, 5), 1), train.epoch(3, 1), train.epoch(5, 1), strict=True
    ):
        for number, part in enumerate((a, b)):
            steps = part.ids.shape[1]
            np.testing.assert_array_equal(together.ids[number, :, :steps], part.ids)
            assert not together.ids[number, :, steps:].any()
            np.testing.assert_array_equal(together.lengths[number], part.lengths)
            np.testing.assert_array_equal(together.labels[number], part.labels)


# -- characters -----------------------------------------------------------------------------------


def test_characters_are_read_on_from_batch_to_batch(tmp_path):
    text = "".join(np.random.default_rng(0).choice(list("abcdé\n"), 3000))
    (tmp_path / "t.txt").write_bytes(text.replace("\n", "\r\n").encode())
    task = Characters(file=tmp_path / "t.txt", length=10, streams=3)
    assert task.tokens == 7
    train = task.train(4)
    parts = list(train.epoch(1, 2))
    assert len(parts) == len(train) > 10
    ids = np.concatenate([part.ids for part in parts], axis=1)
    labels = np.concatenate([part.labels for part in parts], axis=1)
    np.testing.assert_array_equal(ids[:, 1:], labels[:, :-1])
    letters = sorted(set(text))
    assert "".join(letters[i - 1] for i in ids[0]) in text
    resets = np.concatenate([part.resets for part in parts], axis=1)
    assert resets[:, 0].all()
    assert resets.sum() == 4
    assert same(next(train.epoch(1, 2, start=7)), parts[7])
    assert not same(next(train.epoch(1, 3)), parts[0])
    (test,) = task.tests(4)["test"].in_order()
    assert test.ids.shape == (3, 49)
    assert 2.3 < task.chance < 2.8  # six characters, equally frequent: log2(6) bits


def test_a_text_that_is_no_text(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        Characters(file=tmp_path / "t.txt").train(4)
    (tmp_path / "t.txt").write_text("short")
    with pytest.raises(UserError, match="too short"):
        Characters(file=tmp_path / "t.txt").train(4)


# -- a user's own data ----------------------------------------------------------------------------


def write_csv(path, rows, head="id,text,stars"):
    path.write_bytes(("\r\n".join([head, *rows]) + "\r\n").encode())
    return path


def test_a_csv_of_texts(tmp_path):
    """Quotes, line ends of Windows, other scripts; the vocabulary is that of the training part."""
    words = ["ça", "ÉTÉ", "größe", "слово", "plain"]
    rows = [f'{n},"{words[n % 5]}, word{n}\nline two",{"ab"[n % 2]}' for n in range(50)]
    file = write_csv(tmp_path / "t.csv", rows)
    task = TextFile(file=file, label_column="stars", class_weights="balanced")
    parts = task.parts()
    assert {name: len(part.sequences) for name, part in parts.items()} == {
        "train": 35, "validation": 5, "test": 10,
    }  # fmt: skip
    assert task.class_names == ("a", "b")
    assert task.num_outputs == 1
    vocabulary = parts["train"].vocabulary
    assert {"ça", "été", "größe", "слово", "plain", "line", "two"} <= {*vocabulary.words}
    own = {word for word in vocabulary.words if word.startswith("word")}
    assert len(own) == 35  # none of the 15 others
    count = np.bincount(parts["train"].labels)
    weights = task.objective.class_weights
    np.testing.assert_allclose(np.array(weights) * count, 35 / 2)
    batch = next(task.train(8).epoch(0, 0))
    assert batch.labels.dtype == np.int32
    assert "a" not in task.facts()["train"]["classes"][:1]
    assert task.facts()["test"]["rows"] == 10


def test_labels_are_classes_or_numbers(tmp_path):
    few = write_csv(tmp_path / "a.csv", [f"{n},t{n},{n % 3 + 1}" for n in range(40)])
    many = write_csv(tmp_path / "b.csv", [f"{n},t{n},{n / 7}" for n in range(40)])
    assert TextFile(file=few, label_column="stars").class_names == ("1", "2", "3")
    assert TextFile(file=few, label_column="stars").num_outputs == 3
    numbers = TextFile(file=few, label_column="stars", labels="numbers")
    assert numbers.num_classes == 0
    task = TextFile(file=many, label_column="stars")
    assert (task.num_classes, task.metric.name) == (0, "mean squared error")
    assert next(task.train(8).epoch(0, 0)).labels.dtype == np.float32
    assert task.objective.score == "absolute_error"


def test_identical_texts_stay_together():
    parts = split_rows([n % 7 for n in range(70)], 0.3, 0.3)
    for group in range(7):
        assert len({name for name, part in parts.items() if part[group::7].any()}) == 1


def test_json_lines_and_a_tokenizer_of_ones_own(tmp_path):
    rows = [{"text": f"{'xy'[n % 2]}{n}", "label": n % 2 == 0} for n in range(30)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "mine.py").write_text("def letters(text):\n    return list(text)\n")
    task = TextFile(file=tmp_path / "t.jsonl", tokenizer=f"{tmp_path}/mine.py:letters")
    assert task.class_names == ("False", "True")
    assert {"x", "y", "1"} <= {*task.parts()["train"].vocabulary.words}
    assert words_of("Don't, naïve!") == ["don't", "naïve"]


BAD_TEXTS = {
    "no column": ("t.csv", "id,text\n1,a\n", r"row 1 has no column 'label' \(it has: 'id', 'te"),
    "empty": ("t.csv", "text,label\na,1\n ,2\n", "row 2 has no 'text'"),
    "fields": ("t.csv", "text,label\na,1\nb,c,2\n", r"row 2 \(line 3\) has 3 fields"),
    "quotes": ("t.csv", 'text,label\na,1\n"b,2\n', r"row 2 \(line 3\)"),
    "json": ("t.jsonl", '{"text": "a", "label": 1}\nnot\n', "line 2 is no JSON"),
    "object": ("t.jsonl", "[1]\n", "line 1 is no JSON object"),
    "one class": ("t.csv", "text,label\na,1\nb,1\n", "all rows have the label '1'"),
    "suffix": ("t.doc", "text\n", "give a .csv, .tsv or .jsonl file"),
    "nested": ("t.jsonl", "\n" + "[" * 100_000, "line 2 is no JSON: nested too deep"),
    "NaN": ("t.jsonl", '{"text": "a", "label": NaN}\n', "line 1 is no JSON"),
    "infinite": ("t.jsonl", '{"text": "a", "label": 1e999}\n', "row 1 has the label 'inf', a numb"),
    "digits": ("t.jsonl", f'{{"text": "a", "label": {"1" * 400}}}\n', "row 1 has the label '1111"),
    "large": ("t.csv", "text,label\na,0.5\nb,1e300\n", "row 2 has the label '1e300', a number th"),
    "none": ("t.csv", "text,label\n", "has no rows"),
    "few": ("t.csv", "text,label\na,1\nb,2\n", "2 rows are too few"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_bad_file_is_named_with_its_row(tmp_path, name):
    file, content, message = BAD_TEXTS[name]
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        TextFile(file=tmp_path / file).train(4)


def test_names_of_classes_may_look_like_numbers(tmp_path):
    rows = [f"{n},t{n},{('nan', 'inf', '1e300', '2')[n % 4]}" for n in range(40)]
    file = write_csv(tmp_path / "t.csv", rows)
    task = TextFile(file=file, label_column="stars", labels="classes")
    assert task.class_names == ("2", "1e300", "inf", "nan")


def test_a_file_in_another_encoding(tmp_path):
    (tmp_path / "t.csv").write_bytes("text,label\na,1\nété,2\n".encode("latin1"))
    with pytest.raises(UserError, match="not UTF-8 in line 3: convert it"):
        TextFile(file=tmp_path / "t.csv").train(4)


@pytest.mark.parametrize("kind", ["classes", "numbers", "steps"])
def test_sequences_of_ones_own(tmp_path, kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 9, 3)).astype(np.float32)
    lengths = rng.integers(2, 10, 40)
    y = {
        "classes": rng.integers(0, 4, 40),
        "numbers": rng.normal(size=40),
        "steps": rng.integers(0, 2, (40, 9)),
    }[kind]
    np.savez(tmp_path / "a.npz", x=x, y=y, lengths=lengths)
    task = SequenceFile(file=tmp_path / "a.npz")
    assert task.features == 3
    assert task.num_outputs == {"classes": 4}.get(kind, 1)
    assert task.per_step == (kind == "steps")
    seen = 0
    for source in (task.train(4), task.validation(4), task.tests(4)["test"]):
        for batch in source.in_order():
            for row, length, label, weight in zip(*batch[:4], strict=True):
                if length == 0:
                    assert not np.any(weight)
                    continue
                (number,) = np.flatnonzero((x[:, 0] == row[0]).all(-1))
                seen += 1
                assert length == lengths[number]
                np.testing.assert_array_equal(row[:length], x[number, :length])
                wanted = y[number, :length] if kind == "steps" else y[number]
                found = label[:length] if kind == "steps" else label
                np.testing.assert_allclose(found, wanted, rtol=1e-6)
                assert np.sum(weight) == (length if kind == "steps" else 1)
    assert seen == 40


def test_sequences_that_do_not_fit_together(tmp_path):
    x, y = np.zeros((4, 3, 2)), np.arange(4)
    cases = {
        "has no array 'y'": {"x": x},
        r"y has the shape \(5,\), not \(4,\) or \(4, 3\)": {"x": x, "y": np.arange(5)},
        "y holds texts; give classes as integers": {"x": x, "y": np.array([*"abcd"])},
        "x holds texts; give numbers": {"x": x.astype(str), "y": y},
        r"x has the shape \(4, 3, 0\); give .*, none of them 0": {"x": x[..., :0], "y": y},
        "lengths holds floats; give integers": {"x": x, "y": y, "lengths": np.ones(4)},
        r"lengths has the shape \(3,\), not \(4,\)": {"x": x, "y": y, "lengths": [1, 1, 1]},
        "row 0 of x is not finite in float32": {"x": x + 1e300, "y": y},
        "all of y is 0: nothing to learn": {"x": x, "y": 0 * y},
        "4 classes, but they are numbered up to 29: number them from 0": {
            "x": x,
            "y": np.array([0, 1, 2, 29]),
        },
        "row 1 has the length 4 of 3 steps": {"x": x, "y": y, "lengths": [1, 4, 1, 1]},
        "row 0 of x is not finite": {"x": x + np.nan, "y": y},
        "row 2 of y is -1: number the classes from 0, here below 40": {
            "x": x,
            "y": np.array([0, 1, -1, 1]),
        },
        "row 3 of y is 300000000: number": {"x": x, "y": y // 3 * 300_000_000},
        "row 1 of y is 4611686018427387904": {"x": x, "y": y % 2 * 2**62},
        "row 1 of y is 9223372036854775808": {"x": x, "y": y.astype(np.uint64) % 2 * 2**63},
        r"row 1 of y is 1e\+300: give numbers that are finite": {"x": x, "y": y * 1e300},
        "row 1 of y is nan": {"x": x, "y": np.where(np.eye(4, 3, -1), np.nan, 0)},
    }
    for message, arrays in cases.items():
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(UserError, match=message):
            SequenceFile(file=tmp_path / "a.npz").rows()
    with pytest.raises(UserError, match="cannot read"):
        SequenceFile(file=tmp_path / "none.npz").rows()


def test_truth_values_are_numbers(tmp_path):
    x = np.eye(4, 3) > 0
    np.savez(tmp_path / "a.npz", x=x, y=x[:, 0])
    found = SequenceFile(file=tmp_path / "a.npz").rows()
    np.testing.assert_array_equal(np.stack(found.sequences)[..., 0], x)
    assert found.labels.tolist() == [1, 0, 0, 0]


def test_rows_that_are_the_same_are_told_where_too_few_are_left(tmp_path):
    file = tmp_path / "a.npz"
    np.savez(file, x=np.repeat(np.eye(2, 3), 20, axis=0), y=[0, 1] * 20)
    with pytest.raises(UserError, match=r"40 rows are too few: .*stay together: 2 different ones"):
        SequenceFile(file=file).facts()


def test_what_has_no_effect_is_refused(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("text,label\n" + "".join(f"word{n},{n / 7}\n" for n in range(40)))
    with pytest.raises(UserError, match="--class-weights is for classes"):
        TextFile(file=file, class_weights="balanced").objective  # noqa: B018
    with pytest.raises(UserError, match="--freeze-embeddings without --embeddings"):
        TextFile(file=file, freeze_embeddings=True).frozen  # noqa: B018


def test_what_is_no_literal_or_no_batch_is_told_by_its_flag():
    with pytest.raises(
        UserError, match=r"no literal\): write it like .*text\(file='reviews.csv'\)"
    ):
        load_task("text(file=rev.csv)")
    with pytest.raises(UserError, match=r"0 batches of 4 rows for train: .*--updates"):
        load_task("adding(updates=0)").train(4)


def test_labels_behind_the_end_do_not_count(tmp_path):
    y = np.array([[0, 1, -1], [1, 2**62, 7], [1, 0, 2]])
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 3)), y=y, lengths=[2, 1, 3])
    found = SequenceFile(file=tmp_path / "a.npz").rows().labels
    assert [row.tolist() for row in found] == [[0, 1], [1], [1, 0, 2]]


def test_curves():
    pytest.importorskip("mnist1d")
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    task = Mnist1d()
    assert len(task.rows().sequences) == 5000
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_digits():
    pytest.importorskip("sklearn")
    task = Digits()
    batch = next(task.train(8).epoch(0, 0))
    assert batch.ids.shape == (8, 64, 1)
    assert task.num_outputs == 10
    assert 0 <= batch.ids.min() < batch.ids.max() <= 1


@pytest.mark.parametrize("name", sorted({*TASKS} - {"imdb", "text", "sequences"}))
def test_a_model_answers_in_the_shape_of_the_labels(name):
    if name in ("digits", "mnist1d"):
        pytest.importorskip({"digits": "sklearn"}.get(name, name))
    from flax import nnx

    from lstmjax import LSTM

    task = load_task(name)
    batch = next(task.train(4).epoch(0, 0))

    def answer():
        config = dataclasses.replace(task.recipe.model, hidden_size=3)
        model = task.make_model(LSTM(3), config, rngs=nnx.Rngs(0))
        return task.objective(model(batch.ids), jnp.asarray(batch.labels))

    with jax.numpy_dtype_promotion("standard"):
        losses, scores = jax.eval_shape(answer)
    assert losses.shape == scores.shape == batch.labels.shape


def test_a_file_may_stand_in_brackets(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("text,label\n" + "".join(f"word{n},{n % 2}\n" for n in range(20)))
    task = load_task(f"text(file={str(file)!r}, test_share=0.5)")
    assert (task.file, task.embeddings, task.test_share) == (file, None, 0.5)
    assert task.class_names == ("0", "1")


def test_a_file_that_has_changed_is_read_anew(tmp_path, monkeypatch):
    """In a notebook the same task is asked twice, from one folder or from another."""
    for folder, rows in (("a", 20), ("a", 30), ("b", 40)):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        np.savez(
            "sequences.npz",
            x=np.random.default_rng(0).normal(size=(rows, 2)),
            y=[0, 1] * (rows // 2),
        )
        (tmp_path / folder / "texts.csv").write_text(
            "text,label\n" + "".join(f"word{n},{n % 2}\n" for n in range(rows))
        )
        (tmp_path / folder / "text.txt").write_text("ab" * 40 * rows)
        for task in (SequenceFile(), TextFile()):
            facts = (fact for fact in task.facts().values() if isinstance(fact, dict))
            assert sum(fact["rows"] for fact in facts) == rows, task
        text = Characters(file=pathlib.Path("text.txt"), length=4, streams=2)
        assert len(text.train(2)) == pytest.approx(len("ab" * 40 * rows) * 0.9 / 8, rel=0.1)
