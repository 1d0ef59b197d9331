"""Hostile input to every reader: no traceback, no hang, nothing written, memory bounded.

A few cases of each here; ``make fuzz`` runs more than 100,000.
"""

import gzip
import json
import resource
import shutil
import time

import jax.numpy as jnp
import numpy as np
import pytest
from crashes import LONG, tell
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_imdb import FEW, prepare, raw_header, write_archive

from lstmjax import files, training
from lstmjax.data import Batches, Dataset, Vocabulary, imdb
from lstmjax.data import archive as archives
from lstmjax.errors import StorageError, UserError, printable
from lstmjax.training import compilation
from lstmjax.training.checkpoint import Checkpoints, Position
from lstmjax.training.step import TrainState

MEMORY = 2**29
"""Bytes that all cases of a reader may add to the process, whatever its inputs announce."""


def cases(few, many):
    """How many inputs a reader is given."""
    _CASES.append(many if LONG else few)
    return settings(
        max_examples=many if LONG else few,
        derandomize=not LONG,
        deadline=5000,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


_CASES: list[int] = []


@st.composite
def damage(draw):
    """What to do to a file's bytes: a function."""
    kind = draw(st.sampled_from(["flip", "cut", "zeros", "insert", "repeat", "replace"]))
    place, length = draw(st.floats(0, 1)), draw(st.integers(0, 600))
    junk = draw(st.binary(max_size=40))

    def damaged(content):
        at = int(place * max(len(content) - 1, 0))
        if kind == "flip":
            changed = bytearray(content)
            for n, mask in enumerate(junk):
                changed[(at + n * n) % len(changed)] ^= mask
            return bytes(changed)
        if kind == "cut":
            return content[:at]
        if kind == "zeros":
            return content[:at] + bytes(min(length, len(content) - at)) + content[at + length :]
        if kind == "insert":
            return content[:at] + junk + content[at:]
        if kind == "repeat":
            return content[: at + length] + content[at:]
        return junk

    return damaged


@pytest.fixture(autouse=True)
def memory_is_bounded():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < MEMORY


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_archive(folder / "small.tar.gz")
    prepare(folder / "data", folder / "small.tar.gz")
    return folder


# -- archives -------------------------------------------------------------------------------------

HEADERS = st.builds(
    raw_header,
    st.text("aclImdb/.trpos\0\xff", max_size=60),
    st.one_of(st.integers(0, 2000), st.integers(0, 2**63)),
    st.sampled_from([bytes([n]) for n in b"\x000123457LKxgSVDXNM?"]),
)


def usable(path):
    try:
        archives.check_archive(path, False, FEW)
        return True
    except UserError as error:
        return len(str(error)) > 2000


@cases(60, 25_000)
@given(change=damage(), level=st.integers(0, 1))
def test_damaged_archives(place, change, level):
    whole = (place / "small.tar.gz").read_bytes()
    content = change(whole) if level else gzip.compress(change(gzip.decompress(whole)), 1)
    (place / "damaged.tar.gz").write_bytes(content)
    start = time.perf_counter()
    usable(place / "damaged.tar.gz")
    assert time.perf_counter() - start < 5


@cases(40, 15_000)
@given(st.lists(st.one_of(HEADERS, st.binary(max_size=700)), max_size=8), st.booleans())
def test_made_up_archives(place, blocks, ends):
    tar = b"".join(block.ljust(-(-len(block) // 512) * 512, b"\0") for block in blocks)
    (place / "made.tar.gz").write_bytes(gzip.compress(tar + bytes(10_240 * ends), 1))
    assert not usable(place / "made.tar.gz")


# -- the prepared folder and the cache ------------------------------------------------------------


@cases(8, 1500)
@given(change=damage(), which=st.integers(0, 10))
def test_damaged_prepared_folders(place, change, which):
    root = place / "hurt"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(place / "data", root)
    found = sorted(p for p in root.rglob("*") if p.is_file() and "unsup" not in p.name)
    file = found[which % len(found)]
    file.write_bytes(change(file.read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, "REVIEWS", FEW)
        try:
            texts, labels = imdb._read_texts(root, "train", False)
            assert len(texts) == len(labels) == 12
        except UserError:
            pass


@pytest.fixture(scope="module")
def cached(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, "REVIEWS", FEW)
        patch.setenv("LSTMJAX_CACHE_DIR", str(place / "cache"))
        imdb.load_imdb("train", data_dir=place / "data", progress=False)
    (path,) = (place / "cache").iterdir()
    return path


@cases(40, 15_000)
@given(change=damage())
def test_damaged_caches(cached, change):
    path = cached.parent.parent / "hurt.npz"
    path.write_bytes(change(cached.read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, "REVIEWS", FEW)
        found = imdb._read_cache(path, "train")
    if found is not None:
        encoded, vocabulary = found
        imdb._check_encoded(encoded, len(vocabulary))
        assert len(imdb._cut(encoded, 10, 5)) == 12


# -- the run folder -------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=20,
)


@cases(50, 20_000)
@given(st.one_of(st.binary(max_size=300), JSON.map(lambda v: json.dumps(v).encode())), JSON)
def test_any_config_and_environment(place, content, other):
    path = place / "run"
    path.mkdir(exist_ok=True)
    for name in ("config.json", "environment.json"):
        (path / name).write_bytes(content)
    try:
        training.RunFolder.reopen(path, {"a": other if other == other else 0}).close()
    except UserError as error:
        escaped = printable(str(error))
    else:
        escaped = ""
    assert "\n" not in escaped


@cases(50, 20_000)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=80),
            JSON.map(lambda v: json.dumps(v).encode()),
            st.builds(
                lambda kind, step, more: json.dumps(
                    {"kind": kind, "step": step, "epoch": 1, **more}
                ).encode(),
                st.sampled_from(["step", "epoch", "x"]),
                st.one_of(st.integers(-3, 30), JSON),
                st.dictionaries(st.text(max_size=4), JSON, max_size=2),
            ),
        ),
        max_size=8,
    )
)
def test_any_metrics(place, lines):
    run = training.RunFolder(place / "metrics")
    run.path.mkdir(exist_ok=True)
    (run.path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    run.records()
    run.rewind(20, [], [10, 20])
    assert [r["step"] for r in run.records()] == sorted({r["step"] for r in run.records()})


@cases(20, 10_000)
@given(st.binary(max_size=200))
def test_any_sums_of_programs(place, content):
    folder = place / "programs"
    folder.mkdir(exist_ok=True)
    (folder / "a").write_bytes(b"program")
    (folder / compilation.SUMS).write_bytes(content)
    compilation._make_ready(folder)


# -- checkpoints ----------------------------------------------------------------------------------

STATE = TrainState({"w": jnp.arange(300.0)}, (jnp.ones(5),), jnp.int32(3))


@pytest.fixture(scope="module")
def checkpoint(place):
    checkpoints = Checkpoints(place / "checkpoints")
    checkpoints.save(STATE, Position(0, 3))
    checkpoints.close()
    return place / "checkpoints" / "3"


@cases(12, 3000)
@given(change=damage(), which=st.integers(0, 40))
def test_damaged_checkpoints(place, checkpoint, change, which):
    folder = place / "hurt-checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, folder / "3")
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    file = found[which % len(found)]
    file.write_bytes(change(file.read_bytes()))
    checkpoints = Checkpoints(folder)
    try:
        state, position = checkpoints.restore(STATE)
        assert position == Position(0, 3)
        np.testing.assert_array_equal(state.params["w"], STATE.params["w"])
    except StorageError:
        raise
    except UserError:
        pass
    finally:
        checkpoints.close()


# -- texts ----------------------------------------------------------------------------------------

HARD_TEXTS = (
    *("", " ", "word", "word " * 1_000_000, "w" * 1_000_000, "\0\x1b[2J\x7f\u2028 \ud800"),
    *("טוב מאוד \u202e good", b"\xff\xfe bad".decode("utf-8", "replace"), "the of \u00a0 and"),
)


@cases(100, 20_000)
@given(st.one_of(st.text(), st.sampled_from(HARD_TEXTS)))
def test_any_text(text):
    vocabulary = Vocabulary.from_texts(["a good film", text])
    ids = vocabulary.encode(text, top_words=50, max_length=500)
    assert 1 <= len(ids) <= 500
    assert ids.min() >= 1
    assert ids.max() < 50
    vocabulary.decode(ids)
    unknown = Vocabulary(("film",)).encode(text, 50, 500)
    batches = Batches(Dataset([unknown], np.zeros(1, np.int32), vocabulary), 2, boundaries=(500,))
    assert next(batches.in_order()).ids.shape == (2, 500)


def test_nothing_was_written_elsewhere(place):
    made = {p.name for p in place.iterdir()}
    wanted = {"small.tar.gz", "data", "damaged.tar.gz", "made.tar.gz", "hurt", "cache", "hurt.npz"}
    wanted |= {"run", "metrics", "programs", "checkpoints", "hurt-checkpoints"}
    assert made <= wanted


def test_the_number_of_cases():
    """The last test: all before it have passed where they ran in this process."""
    assert sum(_CASES) >= 100_000 or not LONG
    words = "exit 2 and one line, or the right value"
    tell("hostile input to nine readers", "hypothesis: damaged and made-up", sum(_CASES), words)


def test_a_folder_is_locked_by_one(tmp_path):
    with files.locked(tmp_path), pytest.raises(files.Busy):
        files.Lock(tmp_path).take(wait=False)
