"""Exported models run in a process that has never heard of the library, with the same numbers."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn import sigmoid

from lstmjax import load_run
from lstmjax.cells import LSTM, Carry
from lstmjax.commands import export as command
from lstmjax.errors import UserError
from lstmjax.export import PLATFORMS, export_classifier, export_stream, save_exported
from lstmjax.models import Classifier
from lstmjax.recurrence import length_mask
from tests.tolerances import assert_close

TEXTS = ["the seats were good but the journey was not", "late", "", "we slept " * 40]

# What a user writes who has the folder and jax alone.
READER = """
import json, pathlib, sys
import jax, numpy as np

folder = pathlib.Path(sys.argv[1])
signature = json.loads((folder / "signature.json").read_text())
words = (folder / "vocabulary.txt").read_text().split("\\n")
number = {word: n for n, word in enumerate(words, signature["ids"]["first_word"])}
run = {p.stem: jax.export.deserialize(p.read_bytes()).call for p in folder.glob("*.jax")}
texts = json.load(sys.stdin)
rows = [[signature["ids"]["start"]] + [number.get(w, 2) for w in t.split()] for t in texts]
rows = [row[-signature["max_length"]:] for row in rows]
lengths = np.array([len(row) for row in rows], np.int32)
ids = np.zeros((len(rows), lengths.max()), np.int32)
for line, row in zip(ids, rows):
    line[:len(row)] = row
whole = run["classify"](ids, lengths)
carry, last = run["start"](ids[:, 0]), np.zeros(len(rows))
for t in range(ids.shape[1]):
    carry, so_far = run["step"](carry, ids[:, t])
    last = np.where(lengths == t + 1, so_far, last)
assert not [name for name in sys.modules if name.startswith(("lstmjax", "flax"))]
print(json.dumps({"whole": np.asarray(whole).tolist(), "stream": last.tolist()}))
"""


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    with jax.numpy_dtype_promotion("standard"):
        command.main(command.Config(trained_run, folder))
    return folder


def test_without_the_library_whole_and_word_by_word(trained_run, exported, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", READER, str(exported)],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found, ours = json.loads(done.stdout), load_run(trained_run).predict(TEXTS)
    assert np.ptp(ours) > 0.02
    for name in ("whole", "stream"):
        assert_close(np.array(found[name]), ours, reduction=50 * 14, dtype="float32", what=name)


def test_open_sizes_and_every_platform(trained_run, exported):
    signature = json.loads((exported / "signature.json").read_text())
    assert signature["shapes"] == {"classify": "(b, t)", "start": "(b)", "step": "(b)"}
    assert signature["platforms"] == ["cpu", "cuda", "tpu"]
    assert signature["stream"] is True
    for name in signature["shapes"]:
        program = jax.export.deserialize((exported / f"{name}.jax").read_bytes())
        assert program.platforms == PLATFORMS
    call = jax.export.deserialize((exported / "classify.jax").read_bytes()).call
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    for rows, steps in ((1, 1), (1, 6), (2, 3)):
        assert call(ids[:rows, :steps], np.full(rows, steps, np.int32)).shape == (rows,)


@pytest.mark.parametrize(
    ("sizes", "padding", "why"),
    [
        ({"bidirectional": True}, "bucketed", "reads from the end"),
        ({"conv_filters": 2}, "bucketed", "sees words to come"),
        ({}, "front", "zeros in front"),
    ],
)
def test_what_cannot_stream_is_told_and_exports_whole(trained_run, sizes, padding, why):
    """Of a model that was never trained: only its form counts."""
    trained = load_run(trained_run)
    classifier = dataclasses.replace(trained.config.classifier, num_layers=2, **sizes)
    config = dataclasses.replace(trained.config, classifier=classifier, padding=padding)
    module = Classifier(
        trained.module.recurrent.layers[0].cell, classifier, num_outputs=1, rngs=nnx.Rngs(0)
    )
    model = dataclasses.replace(trained, config=config, module=module)
    with pytest.raises(UserError, match=why):
        export_stream(model)
    program = export_classifier(model, ("cpu",))
    assert program.shapes == "b, t"
    (ids, lengths) = next((a, b) for _, a, b in model.batches([model.encode(t) for t in TEXTS[:2]]))
    found = program.exported.call(ids, *([lengths] if model.masked else []))
    ours = np.sort(model.predict(TEXTS[:2]))
    assert_close(np.sort(np.asarray(found)[:2]), ours, reduction=50 * 14, dtype="float32")


class Begun(LSTM):
    """Makes its first carry on the host, which an open number of rows does not allow."""

    def initial_carry(self, batch_size, dtype=jnp.float32):
        zeros = jnp.asarray(np.zeros((batch_size, self.hidden_size)), dtype)
        return Carry(zeros, self.State(zeros))


class Closed(LSTM):
    """Can be trained and not exported."""

    def transition(self, params, x, carry, dot, **more):
        raise TypeError("only at home")


def of_cell(trained, cell):
    """The model with another cell, not trained."""
    module = Classifier(cell, trained.config.classifier, num_outputs=1, rngs=nnx.Rngs(0))
    return dataclasses.replace(trained, module=module)


def test_where_rows_cannot_be_open_there_is_one(trained_run):
    model = of_cell(load_run(trained_run), Begun(6))
    program = export_classifier(model, ("cpu",))
    assert program.shapes == "1, t"
    assert [part.shapes for part in export_stream(model, ("cpu",))] == ["1", "1"]
    for length in (12, 7):
        ids = np.random.default_rng(0).integers(4, 50, (1, length), dtype=np.int32)
        lengths = np.array([length - 2], np.int32)
        found, ours = (
            program.exported.call(ids, lengths),
            model.module(ids, length_mask(lengths, length)),
        )
        assert_close(
            np.asarray(found), np.asarray(sigmoid(ours)), reduction=50 * 14, dtype="float32"
        )


def test_what_cannot_be_exported_at_all_is_told(trained_run):
    with pytest.raises(UserError, match=r"cannot export for cpu: .*only at home"):
        export_classifier(of_cell(load_run(trained_run), Closed(6)), ("cpu",))


def test_a_folder_that_cannot_be_written_and_wrong_platforms(trained_run):
    model = load_run(trained_run)
    with pytest.raises(UserError, match="cannot write /proc/nothing"):
        save_exported(model, "/proc/nothing", ("cpu",))
    with pytest.raises(UserError, match="no platform 'abacus'"):
        export_classifier(model, ("cpu", "abacus"))
    with pytest.raises(UserError, match="--platforms needs"):
        command.main(command.Config(trained_run, pathlib.Path("x"), ()))
    with pytest.raises(UserError, match="--run"):
        command.main(command.Config())
