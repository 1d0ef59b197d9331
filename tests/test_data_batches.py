import itertools
import time
import tracemalloc

import numpy as np
import pytest

from lstmjax.data import Batches, Dataset, Vocabulary, bucket_boundaries, hold_out
from lstmjax.errors import UserError


def make(lengths, seed=0):
    """Rows of the given lengths; the first id of each row is its number + 10."""
    generator = np.random.default_rng(seed)
    rows = [generator.integers(4, 10, n, dtype=np.int32) for n in lengths]
    for number, row in enumerate(rows):
        row[-1] = number + 10
    labels = generator.integers(0, 2, len(rows), dtype=np.int32)
    return Dataset(rows, labels, Vocabulary(("a",)))


def numbers(batches):
    """The rows in the order in which they appear."""
    return [
        int(ids[length - 1]) - 10
        for batch in batches
        for ids, length in zip(batch.ids, batch.lengths, strict=True)
        if length
    ]


LENGTHS = np.random.default_rng(1).integers(1, 60, 203)


@pytest.fixture
def batches():
    return Batches(make(LENGTHS), 8, boundaries=(10, 25, 60))


@pytest.mark.parametrize("padding", ["right", "left"])
def test_content(padding):
    dataset = make(LENGTHS)
    batches = Batches(dataset, 8, boundaries=(10, 25, 60), padding=padding)
    seen = 0
    for batch in itertools.chain(batches.epoch(0, 0), batches.in_order()):
        assert batch.ids.shape in batches.shapes
        assert [a.dtype for a in batch[:4]] == [np.int32, np.int32, np.int32, np.float32]
        for ids, length, label, weight in zip(*batch[:4], strict=True):
            inside = ids[:length] if padding == "right" else ids[len(ids) - length :]
            outside = ids[length:] if padding == "right" else ids[: len(ids) - length]
            assert not outside.any()
            if weight == 0:
                assert length == label == 0
                continue
            seen += 1
            number = inside[-1] - 10
            np.testing.assert_array_equal(inside, dataset.sequences[number])
            assert label == dataset.labels[number]
            assert weight == 1
    assert seen == 2 * len(LENGTHS)


def test_every_row_once_and_filler_in_one_batch(batches):
    assert len(batches) == 26
    for epoch in (list(batches.epoch(0, e)) for e in range(3)):
        assert len(epoch) == len(batches)
        assert sorted(numbers(epoch)) == list(range(203))
        filler = [int((batch.weights == 0).sum()) for batch in epoch]
        assert sorted(filler) == [0] * 25 + [5]


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 64])
def test_the_number_of_batches(rows):
    batches = Batches(make(LENGTHS[:rows]), 8, boundaries=(20, 40, 60))
    for epoch in range(5):
        assert len(list(batches.epoch(3, epoch))) == len(batches) == -(-rows // 8)


def test_order_is_a_function_of_seed_and_epoch(batches):
    def order(seed, epoch):
        return numbers(batches.epoch(seed, epoch))

    first = order(0, 1)
    order(5, 5)
    assert order(0, 1) == first
    again = Batches(make(LENGTHS), 8, boundaries=(10, 25, 60))
    assert numbers(again.epoch(0, 1)) == first
    others = [order(0, 0), order(1, 0), order(1, 1), order(0, 2)]
    assert all(other != first for other in others)
    assert len({tuple(other) for other in others}) == 4


def test_the_order_of_batches_is_shuffled(batches):
    widths = [batch.ids.shape[1] for batch in batches.epoch(0, 0)]
    assert widths != sorted(widths)
    assert {10, 25, 60} == set(widths)


def test_the_order_of_shapes_is_one_for_all_seeds_and_another_in_each_epoch(batches):
    """So that seeds side by side are padded no more than one alone; which rows is the seed's."""
    one, other, later = ([*batches.epoch(seed, epoch)] for seed, epoch in ((0, 0), (1, 0), (0, 1)))
    widths = [[batch.ids.shape[1] for batch in epoch] for epoch in (one, other, later)]
    assert widths[0] == widths[1] != widths[2]
    assert numbers(one) != numbers(other)
    longest = [{*numbers(b for b in epoch if b.ids.shape[1] == 60)} for epoch in (one, other)]
    assert longest[0] != longest[1]  # rows move between the batches of a shape and the next


@pytest.mark.parametrize("start", [0, 1, 13, 25, 26, 40])
def test_resuming(batches, start):
    whole = list(batches.epoch(2, 7))[start:]
    resumed = list(batches.epoch(2, 7, start))
    assert len(whole) == len(resumed)
    for a, b in zip(whole, resumed, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_resuming_does_not_build_what_is_skipped(batches, monkeypatch):
    built = []
    build = Batches._batch
    monkeypatch.setattr(Batches, "_batch", lambda self, rows: built.append(1) or build(self, rows))
    next(batches.epoch(0, 0, start=20))
    assert len(built) == 1


def test_in_order_with_one_boundary_is_the_order_of_the_rows():
    batches = Batches(make(LENGTHS), 10, boundaries=(60,))
    assert numbers(batches.in_order()) == list(range(203))
    assert batches.shapes == ((10, 60),)
    assert numbers(batches.epoch(0, 0)) != list(range(203))


def test_longer_rows_keep_their_last_ids():
    dataset = make([30, 5])
    (batch,) = Batches(dataset, 2, boundaries=(12,)).in_order()
    np.testing.assert_array_equal(batch.ids[0], dataset.sequences[0][-12:])
    assert batch.lengths.tolist() == [12, 5]


def test_padding_share(batches):
    padded = [(batch.ids.size, batch.lengths.sum()) for batch in batches.in_order()]
    steps, used = map(sum, zip(*padded, strict=True))
    assert batches.padding_share == pytest.approx(1 - used / steps)
    full = Batches(make([8] * 16), 8, boundaries=(8,))
    assert full.padding_share == 0


def test_a_batch_is_quick():
    batches = Batches(make([500] * 640), 64, boundaries=(500,))
    plan = batches._plan(np.arange(640))
    times = []
    for rows in plan:
        start = time.perf_counter()
        batches._batch(rows)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"boundaries": ()}, "not positive and rising"),
        ({"boundaries": (20, 10)}, "not positive and rising"),
        ({"boundaries": (10, 10)}, "not positive and rising"),
        ({"boundaries": (0, 10)}, "not positive and rising"),
        ({"boundaries": (10,), "batch_size": 0}, "batch_size is 0"),
        ({"boundaries": (10,), "padding": "front"}, "padding is 'front': choose right or left"),
        ({"boundaries": (10,), "dataset": make([])}, "has 0 rows"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_wrong_arguments(arguments, match):
    with pytest.raises(UserError, match=match):
        Batches(**{"dataset": make([3]), "batch_size": 4, **arguments})


def test_wrong_numbers(batches):
    for arguments, match in (((-1, 0), "seed -1"), ((0, -2), "seed -2"), ((0, 0, -3), "start is")):
        with pytest.raises(UserError, match=match):
            batches.epoch(*arguments)


# Boundaries


def padded_steps(lengths, boundaries):
    return sum(next(b for b in boundaries if b >= length) for length in lengths)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_boundaries_are_the_best_of_all(seed, count):
    lengths = np.random.default_rng(seed).integers(1, 38, 60)
    found = bucket_boundaries(lengths, count, multiple=4)
    longest = int(lengths.max())
    candidates = [*range(4, longest, 4)]
    every = [
        (*chosen, longest) for n in range(count) for chosen in itertools.combinations(candidates, n)
    ]
    best = min(padded_steps(lengths, boundaries) for boundaries in every)
    assert len(found) <= count
    assert found[-1] == longest
    assert all(length % 4 == 0 for length in found[:-1])
    assert padded_steps(lengths, found) == best


def test_no_more_boundaries_than_useful():
    assert bucket_boundaries([5, 5, 5], count=10, multiple=1) == (5,)
    assert bucket_boundaries([8, 16, 16], count=10, multiple=8) == (8, 16)
    assert bucket_boundaries([1], count=3) == (1,)
    assert bucket_boundaries([500] * 3 + [100], count=2) == (104, 500)


@pytest.mark.parametrize(
    "arguments",
    [([],), ([3], 0), ([3], 2, 0), ([0, 0],)],
    ids=["none", "count", "multiple", "zero"],
)
def test_no_boundaries(arguments):
    with pytest.raises(UserError, match="at least 1"):
        bucket_boundaries(*arguments)


# Held-out rows


def test_hold_out_is_a_partition():
    dataset = make(LENGTHS)
    rest, held = hold_out(dataset, 0.2, seed=3)
    assert len(held.sequences) == 40
    rows = [int(row[-1]) - 10 for part in (rest, held) for row in part.sequences]
    assert sorted(rows) == list(range(203))
    assert rows[:163] == sorted(rows[:163])
    labels = np.concatenate([rest.labels, held.labels])
    np.testing.assert_array_equal(labels, dataset.labels[rows])
    assert rest.vocabulary is dataset.vocabulary


def test_hold_out_is_a_function_of_the_seed():
    dataset = make(LENGTHS)

    def held(seed):
        return [int(row[-1]) for row in hold_out(dataset, seed=seed)[1].sequences]

    assert held(1) == held(1)
    assert held(1) != held(2)


@pytest.mark.parametrize("seed", range(5))
def test_identical_rows_stay_together(seed):
    distinct = make(LENGTHS[:60])
    copies = Dataset(distinct.sequences * 3, np.tile(distinct.labels, 3), distinct.vocabulary)
    rest, held = ({row.tobytes() for row in part.sequences} for part in hold_out(copies, 0.3, seed))
    assert held
    assert not rest & held


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 0.001])
def test_hold_out_refuses_an_empty_part(fraction):
    with pytest.raises(UserError, match="fraction"):
        hold_out(make([5] * 10), fraction)


def with_label(row, label):
    dataset = make([3, 5, 4])
    labels = dataset.labels.tolist()
    labels[row] = label
    return dataset._replace(labels=np.asarray(labels, object if label is None else None))


@pytest.mark.parametrize("label", [2, -1, 0.5, float("nan"), None, "pos"])
@pytest.mark.usefixtures("no_type_checks")
def test_a_label_that_cannot_be_learned_is_named(label):
    dataset = with_label(1, label)
    with pytest.raises(UserError, match=r"row \d has the label .*: labels must be .* from 0 to 1"):
        Batches(dataset, 2, boundaries=(8,))
    if label == 2:
        batches = Batches(dataset, 2, boundaries=(8,), num_classes=3)
        assert max(batch.labels.max() for batch in batches.in_order()) == 2


@pytest.mark.usefixtures("no_type_checks")
def test_labels_may_be_whole_numbers_of_any_type():
    for kind in (bool, np.uint8, float):
        dataset = make([3, 5, 4])
        kept = Batches(dataset._replace(labels=dataset.labels.astype(kind)), 3, boundaries=(8,))
        np.testing.assert_array_equal(next(kept.in_order()).labels, dataset.labels)


@pytest.mark.usefixtures("no_type_checks")
def test_a_missing_label_is_told():
    dataset = make([3, 5, 4])
    for labels in (dataset.labels[:2], np.append(dataset.labels, 0), dataset.labels[:, None]):
        with pytest.raises(
            UserError, match=r"3 rows, but labels of shape .*: give one label a row"
        ):
            Batches(dataset._replace(labels=labels), 2, boundaries=(8,))
        with pytest.raises(UserError, match="give one label a row"):
            hold_out(dataset._replace(labels=labels), 0.5)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([4, -2, 4], "row 1 has the id -2: ids must be at least 0 and less than 50"),
        ([4, 50], "row 1 has the id 50: ids must be at least 0 and less than 50"),
        ([0.5, 1.0], r"row 1 is float64\[2\]: give a list of whole ids"),
        ([[4, 5]], r"row 1 is int64\[1, 2\]: give a list of whole ids"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_ids_that_no_table_has_are_named(ids, message):
    dataset = make([3, 5, 4])
    dataset.sequences[1] = np.asarray(ids)
    with pytest.raises(UserError, match=message):
        Batches(dataset, 2, boundaries=(8,), top_words=50)


def test_an_empty_row_is_a_row():
    dataset = make([3, 5, 4])
    dataset.sequences[1] = np.zeros(0, np.int32)
    dataset.sequences[2] = np.array([60], np.int32)
    with pytest.raises(UserError, match="row 2 has the id 60"):
        Batches(dataset, 2, boundaries=(8,), top_words=50)
    assert len(Batches(dataset, 2, boundaries=(8,))) == 2


def by_brute_force(lengths, count, multiple):
    """The least number of steps of any choice of boundaries."""
    longest = max(lengths)
    ends = [*range(multiple, longest, multiple)]
    choices = ((*some, longest) for n in range(count) for some in itertools.combinations(ends, n))
    return min(steps_of(lengths, choice) for choice in choices)


def steps_of(lengths, boundaries):
    return sum(min(end for end in boundaries if end >= length) for length in lengths)


@pytest.mark.parametrize("seed", range(20))
def test_boundaries_are_the_best_there_are(seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 40, generator.integers(1, 30))
    lengths[0] += 1
    count, multiple = int(generator.integers(1, 4)), int(generator.integers(1, 9))
    chosen = bucket_boundaries(lengths, count, multiple)
    assert len(chosen) <= count
    assert chosen[-1] == lengths.max()
    assert all(end % multiple == 0 for end in chosen[:-1])
    assert steps_of(lengths, chosen) == by_brute_force(lengths.tolist(), count, multiple)


def test_boundaries_take_memory_of_the_lengths_not_of_their_square():
    generator = np.random.default_rng(0)
    many = np.append(generator.integers(1, 16_000, 2_000), 80_000)
    tracemalloc.start()
    try:
        assert bucket_boundaries([80_000]) == (80_000,)
        assert bucket_boundaries(many)[-1] == 80_000
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
