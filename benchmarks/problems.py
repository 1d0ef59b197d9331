"""What is computed: weights and inputs, drawn by NumPy, so that every process has the same."""

import os
import pathlib
from typing import Any

import numpy as np

Case = dict[str, Any]
"""Sizes of one measurement, JSON-ready."""

S: Case = {"steps": 500, "batch": 64, "features": 32, "hidden": 100}
"""Sizes of the notebook's recurrence, T, B, D and H."""

TOP_WORDS = 5000


def cell_weights(case: Case) -> dict[str, np.ndarray]:
    """An LSTM's ``kernel (D, 4H)``, ``recurrent_kernel (H, 4H)``, ``bias (4H,)``: i, f, g, o.

    As lstmjax draws them: uniform, a block a gate orthogonal, 1 for the forget gate.
    """
    rng, features, hidden = np.random.default_rng(0), case["features"], case["hidden"]
    limit = (6 / (features + 4 * hidden)) ** 0.5
    blocks = [np.linalg.qr(rng.standard_normal((hidden, hidden)))[0] for _ in range(4)]
    return {
        "kernel": rng.uniform(-limit, limit, (features, 4 * hidden)).astype(np.float32),
        "recurrent_kernel": np.concatenate(blocks, axis=1).astype(np.float32),
        "bias": np.repeat(np.array([0, 1, 0, 0], np.float32), hidden),
    }


def recurrence(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Weights, inputs ``x (T, B, D)``, and the cotangents of all outputs, ``d_hs (T, B, H)``."""
    rng, (steps, batch) = np.random.default_rng(1), (case["steps"], case["batch"])
    x = rng.standard_normal((steps, batch, case["features"]), np.float32)
    return cell_weights(case), x, rng.standard_normal((steps, batch, case["hidden"]), np.float32)


def lengths(case: Case, parts: int) -> tuple[np.ndarray, ...]:
    """Of the rows, one array ``(B,)``, if the case asks for some: from T down to 1, in each part of
    the batch, or mixed."""
    if case.get("lengths", "full") == "full":
        return ()
    falling = np.linspace(case["steps"], 1, case["batch"]).round().astype(np.int32)
    if case["lengths"] == "sorted":
        return (np.concatenate([falling[k::parts] for k in range(parts)]),)
    return (np.random.default_rng(5).permutation(falling),)


def notebook(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Weights of the notebook's model, in Keras' order, and some batches of random ids, labels."""
    rng, rows = np.random.default_rng(2), case["batch"] * case["batches"]
    embedding = rng.uniform(-0.05, 0.05, (TOP_WORDS, case["features"])).astype(np.float32)
    head = rng.standard_normal((case["hidden"], 1), np.float32) / case["hidden"] ** 0.5
    weights = {"embedding": embedding, **cell_weights(case), "head_kernel": head}
    weights["head_bias"] = np.zeros(1, np.float32)
    ids = rng.integers(0, TOP_WORDS, (rows, case["steps"])).astype(np.int32)
    return weights, ids, rng.integers(0, 2, rows).astype(np.int32)


def cumsum(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Sequences ``(updates, 10, 1)`` and their labels, one an update."""
    x = np.random.default_rng(3).random((case["updates"], 10, 1), np.float32)
    return x, (x.cumsum(1) >= 10 / 4).astype(np.float32)


def imdb_folder(data_dir: str | None) -> pathlib.Path:
    """The TFDS folder to read IMDB from."""
    folder = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(folder).expanduser().resolve()


def imdb(case: Case, split: str = "train") -> tuple[list[np.ndarray], np.ndarray]:
    """Reviews as ids, the last ``steps`` of each, and labels, in a random but fixed order."""
    from lstmjax.data import load_imdb

    data = load_imdb(split, TOP_WORDS, case["steps"], case["data_dir"], progress=False)
    order = np.random.default_rng(4).permutation(len(data.labels))
    return [data.sequences[row] for row in order], data.labels[order]


def front_padded(rows: list[np.ndarray], steps: int) -> np.ndarray:
    """Ids ``(rows, steps)``, zeros in front, as the notebook pads."""
    ids = np.zeros((len(rows), steps), np.int32)
    for target, row in zip(ids, rows, strict=True):
        target[steps - len(row) :] = row
    return ids
