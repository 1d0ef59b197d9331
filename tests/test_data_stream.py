"""Rows streamed from disk: the same batches as from memory."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from lstmjax.commands import imdb
from lstmjax.data import Batches, StreamedBatches, load_demo, write_rows
from lstmjax.errors import UserError
from lstmjax.training.command import run_command

BOUNDARIES = (64, 128, 500)


def write(folder, split="train", size=100):
    dataset = load_demo(split, size=size)
    write_rows(folder, zip(dataset.sequences, dataset.labels, strict=True), shard_rows=30)
    return dataset


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_stream_gives_the_batches_of_memory(tmp_path, padding):
    dataset = write(tmp_path / "rows")
    inside = Batches(dataset, 8, boundaries=BOUNDARIES, padding=padding)
    streamed = StreamedBatches(tmp_path / "rows", 8, boundaries=BOUNDARIES, padding=padding)
    assert streamed.shapes == inside.shapes
    for a, b in (
        (inside.epoch(3, 1, start=4), streamed.epoch(3, 1, start=4)),
        (inside.in_order(), streamed.in_order()),
        (inside.share(1, 4).epoch(3, 0), streamed.share(1, 4).epoch(3, 0)),
    ):
        jax.tree.map(np.testing.assert_array_equal, list(a), list(b))


def test_shares_make_up_the_batch(tmp_path):
    whole = Batches(load_demo("train", size=50), 8, boundaries=BOUNDARIES)
    parts = [whole.share(n, 2).epoch(0, 0) for n in range(2)]
    for batch, *shares in zip(whole.epoch(0, 0), *parts, strict=True):
        joined = jax.tree.map(lambda *a: np.concatenate(a), *shares)
        jax.tree.map(np.testing.assert_array_equal, joined, batch)
    with pytest.raises(UserError, match="not a multiple of the 3 processes"):
        whole.share(0, 3)


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(UserError, match="no rows can be read from"):
        StreamedBatches(tmp_path / "none", 8, boundaries=BOUNDARIES)
    write(tmp_path / "rows")
    with pytest.raises(UserError, match="exists"):
        write(tmp_path / "rows")
    with pytest.raises(UserError, match="no rows to write"):
        write_rows(tmp_path / "empty", [])
    (tmp_path / "rows" / "rows-00002.array_record").unlink()
    batches = StreamedBatches(tmp_path / "rows", 8, boundaries=BOUNDARIES)
    with pytest.raises(UserError, match=r"holds 70 rows of 100"):
        next(batches.in_order())


def test_a_run_on_a_stream_is_that_on_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LSTMJAX_CACHE_DIR", str(tmp_path / "cache"))
    for split in ("train", "test"):
        write(pathlib.Path("rows", split), split)
    load = imdb.load_demo
    monkeypatch.setattr(imdb, "load_demo", lambda split, **more: load(split, size=100, **more))
    flags = ["--recipe", "notebook", "--hidden-size", "3", "--embedding-size", "2"]
    flags += ["--max-length", "12", "--batch-size", "20", "--epochs", "1", "--top-words", "50"]
    found = []
    for source in (["--data", "demo"], ["--data", "rows", "--data-dir", "rows"]):
        folder = tmp_path / f"run-{source[1]}"
        monkeypatch.setattr(sys, "argv", ["imdb", *flags, *source, "--run-dir", str(folder)])
        with jax.numpy_dtype_promotion("standard"):
            run_command(imdb.RECIPES, imdb.main, "")
        found.append(json.loads((folder / "result.json").read_text())["epochs"][0])
    assert {**found[0], "seconds": 0} == {**found[1], "seconds": 0}
