"""Small runs on the demo corpus, for the tests of what one does with a trained model."""

import contextlib
import dataclasses
import io
import pathlib

import jax

from lstmjax.commands import imdb
from lstmjax.models import ClassifierConfig

CELL_FILE = """
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid

from lstmjax import Cell


class Mine(Cell):
    gates = ("f", "g", "o")
    leak: float = 0.5
    squash = jnp.tanh
    sizes: tuple = (1, 2)

    class State(NamedTuple):
        c: Array

    def __post_init__(self):
        super().__post_init__()
        assert self.leak > 0

    def step(self, pre, state, params):
        f = sigmoid(pre.f)
        c = f * state.c + self.leak * (1 - f) * jnp.tanh(pre.g)
        return sigmoid(pre.o) * jnp.tanh(c), self.State(c)
"""
CELL_FILE = CELL_FILE.replace("squash = jnp", "squash: object = jnp")

LEARNS = ClassifierConfig(top_words=200, embedding_size=8, hidden_size=6, pooling=("max", "mean"))


def train(
    folder,
    *,
    cell="LSTM",
    epochs=2,
    resume=False,
    learning_rate=3e-2,
    schedule="constant",
    padding="bucketed",
    validation=0.0,
    model=None,
    max_length=12,
    batch_size=500,
    **options,
):
    """Train a tiny classifier; returns the folder of the run."""
    sizes = model or ClassifierConfig(top_words=50, embedding_size=3, hidden_size=4)
    base = imdb.RECIPES["notebook"]
    config = dataclasses.replace(
        base,
        cell=cell,
        epochs=epochs,
        resume=resume,
        run_dir=pathlib.Path(folder),
        model=sizes,
        data=dataclasses.replace(
            base.data,
            data="demo",
            max_length=max_length,
            batch_size=batch_size,
            buckets=2,
            padding=padding,
            validation=validation,
        ),
        optimizer=dataclasses.replace(
            base.optimizer, learning_rate=learning_rate, schedule=schedule
        ),
        **options,
    )
    with jax.numpy_dtype_promotion("standard"), contextlib.redirect_stdout(io.StringIO()):
        imdb.main(config)
    return pathlib.Path(folder)
