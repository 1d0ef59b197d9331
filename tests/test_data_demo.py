import time

import numpy as np
import pytest

from lstmjax.data import Batches, bucket_boundaries, load_demo
from lstmjax.data.demo import _WORDS, reports
from lstmjax.errors import UserError


@pytest.fixture(scope="module")
def train():
    return load_demo("train")


@pytest.fixture(scope="module")
def test():
    return load_demo("test")


def counts_of_words(dataset):
    counts = np.zeros((len(dataset.sequences), len(dataset.vocabulary) + 4))
    for row, ids in enumerate(dataset.sequences):
        np.add.at(counts[row], ids, 1)
    return np.sqrt(counts)


def test_sizes_labels_and_lengths(train, test):
    assert (len(train.sequences), len(test.sequences)) == (8000, 1000)
    assert train.labels.dtype == np.int32
    assert train.sequences[0].dtype == np.int32
    assert abs(train.labels.mean() - 0.5) < 0.02
    lengths = np.array([len(row) for row in train.sequences])
    assert 110 < lengths.mean() < 140
    assert lengths.max() == 500
    assert 200 < len(train.vocabulary) < 400


def test_every_word_of_test_is_known(test):
    assert all(2 not in row for row in test.sequences)


def test_same_words_but_no_report_in_both(train, test):
    assert train.vocabulary == test.vocabulary
    assert not {row.tobytes() for row in train.sequences} & {
        row.tobytes() for row in test.sequences
    }


def test_a_function_of_its_arguments():
    reports.cache_clear()
    first = load_demo("test", size=50)
    reports.cache_clear()
    again, other = load_demo("test", size=80), load_demo("test", size=50, seed=1)
    for a, b in zip(first.sequences, again.sequences, strict=False):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first.labels, again.labels[:50])
    assert any(len(a) != len(b) for a, b in zip(first.sequences, other.sequences, strict=True))


def test_written_in_seconds():
    reports.cache_clear()
    start = time.process_time()
    load_demo("train")
    load_demo("test")
    assert time.process_time() - start < 6  # measured 1 s


def test_limits():
    dataset = load_demo("test", top_words=20, max_length=30, size=40)
    assert max(row.max() for row in dataset.sequences) == 19
    assert max(len(row) for row in dataset.sequences) == 30


def test_the_label_follows_from_the_grammar():
    good, bad = set(_WORDS["good"]), set(_WORDS["bad"])
    for text, label in zip(*reports("test", 200, 0), strict=True):
        first, *sentences = [sentence.strip() for sentence in text.split(".") if sentence.strip()]
        votes = 0
        for sentence in sentences:
            words = sentence.rpartition(", but ")[2].split()
            if words[-1] in good | bad:
                votes += (1 if words[-1] in good else -1) * (-1 if "not" in words else 1)
        if "opposite" in first:
            votes = -votes
        assert votes != 0
        assert label == (votes > 0)


def test_counting_words_is_not_enough(train, test):
    """Logistic regression on word counts: better than chance, far below what order allows."""
    x, unseen = counts_of_words(train), counts_of_words(test)
    mean, scale = x.mean(0), x.std(0) + 1e-3
    x, unseen = (x - mean) / scale, (unseen - mean) / scale
    weights, bias = np.zeros(x.shape[1]), 0.0
    for _ in range(100):
        error = 1 / (1 + np.exp(-(x @ weights + bias))) - train.labels
        weights -= 0.3 * (x.T @ error / len(x) + 0.01 * weights)
        bias -= 0.3 * error.mean()
    accuracy = ((unseen @ weights + bias > 0) == test.labels).mean()
    assert 0.62 < accuracy < 0.80


def test_padding_share_of_the_default_recipe(train):
    lengths = [len(row) for row in train.sequences]
    batches = Batches(train, 64, boundaries=bucket_boundaries(lengths))
    assert batches.padding_share < 0.10
    assert Batches(train, 64, boundaries=(500,)).padding_share > 0.7


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"split": "valid"}, "no split 'valid': choose train or test"),
        ({"split": "train", "size": 0}, "size is 0"),
        ({"split": "train", "top_words": 4}, "top_words is 4"),
        ({"split": "train", "max_length": 0}, "max_length is 0"),
    ],
)
def test_wrong_arguments(arguments, match):
    with pytest.raises(UserError, match=match):
        load_demo(**arguments)
