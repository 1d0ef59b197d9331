"""The notebook's model, trained by Keras on its ids, gives the same answers here.

    python -m benchmarks.keras_notebook --epochs 1 --data-dir DIR

Needs the extra ``peers``. Keras trains Embedding(5000, 32), LSTM(100), Dense(1) on IMDB as
`load_imdb` gives it with ``word_ids="keras"``, saves ``.keras``, and tests; the file is then loaded
by `lstmjax.interop.classifier_from_keras` and tested on the same 25,000 reviews.
"""

import dataclasses
import os
import pathlib
import tempfile
import time

import numpy as np

from lstmjax.data import Batches, Dataset, load_imdb


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings."""

    epochs: int = 1
    """Passes over the training reviews, in Keras."""
    seed: int = 0
    """Of Keras."""
    data_dir: pathlib.Path | None = None
    """TFDS folder; without it TFDS_DATA_DIR, else TFDS' own."""
    backend: str = "jax"
    """Of Keras."""


def padded(dataset: Dataset) -> np.ndarray:
    """``(reviews, 500)``, zeros in front."""
    batches = Batches(dataset, len(dataset.sequences), boundaries=(500,), padding="left")
    return next(batches.in_order()).ids


def main(config: Config) -> None:
    """Train there, test there and here."""
    os.environ["KERAS_BACKEND"] = config.backend
    import jax
    import keras

    from lstmjax.interop import classifier_from_keras

    keras.utils.set_random_seed(config.seed)
    train, test = (
        load_imdb(split, data_dir=config.data_dir, word_ids="keras") for split in ("train", "test")
    )
    model = keras.Sequential(
        [
            keras.Input((500,), dtype="int32"),
            keras.layers.Embedding(5000, 32),
            keras.layers.LSTM(100),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    started = time.perf_counter()
    model.fit(padded(train), train.labels, batch_size=64, epochs=config.epochs, verbose=2)
    print(f"Keras {keras.__version__} on {config.backend}: {time.perf_counter() - started:.0f} s")
    ids, labels = padded(test), test.labels == 1
    theirs = np.asarray(model.predict(ids, batch_size=250, verbose=0))[:, 0]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "notebook.keras"
        model.save(path)
        ours_model = classifier_from_keras(path)
    run = jax.jit(lambda ids: jax.nn.sigmoid(ours_model(ids)))
    ours = np.concatenate([np.asarray(run(part)) for part in np.split(ids, 100)])
    for name, found in (("Keras", theirs), ("here", ours)):
        print(f"{name}: {((found > 0.5) == labels).mean():.4%} of {len(labels):,} test reviews")
    print(f"largest difference of probabilities {np.abs(ours - theirs).max():.1e}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
