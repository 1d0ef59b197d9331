"""Keras 3 on the backend that the process's ``KERAS_BACKEND`` names, by ``fit`` as a user would."""

import json
import pathlib
import sys
from typing import Any

import keras
from keras import layers

from benchmarks import problems
from benchmarks.contenders import Job, training_job
from benchmarks.problems import Case

if keras.backend.backend() == "torch":
    import torch

    torch.set_flush_denormal(True)  # see torch_peers.py


def _model(*stack: Any) -> Any:
    model = keras.Sequential(list(stack))
    model.compile(loss="binary_crossentropy", optimizer="adam", metrics=["accuracy"])
    return model


def _notebook(features: int = 32, hidden: int = 100) -> Any:
    embedding = layers.Embedding(problems.TOP_WORDS, features)
    return _model(embedding, layers.LSTM(hidden), layers.Dense(1, activation="sigmoid"))


def train_step(case: Case) -> Job:
    """``fit`` on a few batches of full length."""
    weights, ids, labels = problems.notebook(case)
    model = _notebook(case["features"], case["hidden"])
    model.build((None, case["steps"]))
    model.set_weights(list(weights.values()))

    def run() -> float:
        fitted = model.fit(ids, labels, batch_size=case["batch"], shuffle=False, verbose=0)
        return fitted.history["loss"][0]

    return training_job(run)


def epoch(case: Case) -> Job:
    """``fit`` on reviews padded in front; each run trains the next ``share`` batches."""
    rows, labels = problems.imdb(case)
    ids, model = problems.front_padded(rows, case["steps"]), _notebook()
    share = 64 * case["share"]
    cuts = iter([slice(start, start + share) for start in range(0, len(ids), share)])

    def fit(cut: slice) -> None:
        model.fit(ids[cut], labels[cut], batch_size=64, verbose=0)

    def warm_up() -> None:
        for size in {64, len(ids) % 64 or 64}:
            fit(slice(size))

    return Job(lambda: fit(next(cuts)), warm_up=warm_up)


def cumsum(case: Case, each: bool) -> Job:
    """``LSTM(20)`` with an output a step; a ``fit`` for each sequence, or one for all of them."""
    x, y = problems.cumsum(case)
    head = layers.TimeDistributed(layers.Dense(1, activation="sigmoid"))
    model = _model(layers.Input(x.shape[1:]), layers.LSTM(20, return_sequences=True), head)
    cuts = [slice(k, k + 1) for k in range(len(x))] if each else [slice(None)]

    def run() -> None:
        for cut in cuts:
            model.fit(x[cut], y[cut], batch_size=1, shuffle=False, verbose=0)

    return Job(run)


def main(run_dir: str, seed: str, epochs: str, data_dir: str) -> None:
    """Train the notebook's model on IMDB, an epoch a line in ``<run_dir>/metrics.jsonl``."""
    keras.utils.set_random_seed(int(seed))
    case = {"steps": 500, "data_dir": data_dir}
    rows, labels = problems.imdb(case)
    test_rows, test_labels = problems.imdb(case, "test")
    ids, test_ids = (problems.front_padded(part, 500) for part in (rows, test_rows))
    model = _notebook()
    for number in range(1, int(epochs) + 1):
        model.fit(ids, labels, batch_size=64, verbose=0)
        _, accuracy = model.evaluate(test_ids, test_labels, batch_size=64, verbose=0)
        with pathlib.Path(run_dir, "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"epoch": number, "test_accuracy": accuracy}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
