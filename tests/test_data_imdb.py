import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from lstmjax import files
from lstmjax.cache import cache_folder
from lstmjax.data import archive as archives
from lstmjax.data import imdb, load_imdb
from lstmjax.data.keras_index import python2_dict_order, python2_hash, record_names
from lstmjax.errors import UserError

ROOT = Path(__file__).parent.parent
EXPERIMENT = ROOT / "experiments" / "imdb.py"
FEW = {"train/neg": 6, "train/pos": 6, "train/unsup": 4, "test/neg": 5, "test/pos": 5}
SENTENCES = {
    "neg": "A dull boat, number {n}; I slept.<br />It sank, it SANK!",
    "pos": "A splendid boat, number {n}; I sang.<br />It's afloat, it floats!",
    "unsup": "Boat {n} was there.",
}


@pytest.fixture(autouse=True)
def no_network_and_a_cache_of_its_own(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("a test must not use the network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("LSTMJAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr(archives, "REVIEWS", FEW)  # of what is prepared, not of what is required


def members():
    """Yield name and text of every file of a small archive; the data are invented."""
    yield "aclImdb/README", "not a review"
    yield "aclImdb/train/urls_pos.txt", "not a review either"
    for folder, count in FEW.items():
        for n in range(count):
            text = SENTENCES[folder.split("/")[1]].format(n=n)
            yield f"aclImdb/{folder}/{n}_7.txt", text + " unseen" * folder.startswith("test")


def add(tar, name, text="x", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(text.encode())
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(text.encode()) if info.isreg() else None)


def write_archive(path, *extra, leave_out=None):
    """Write a small archive to ``path``; each of ``extra`` adds something to it."""
    with tarfile.open(path, "w:gz") as tar:
        for folder in ("aclImdb", "aclImdb/train"):
            add(tar, folder, "", type=tarfile.DIRTYPE)
        for name, text in members():
            if name != leave_out:
                add(tar, name, text)
        for member in extra:
            member(tar)
    return path


def prepare(root, archive):
    imdb._prepare(root, archive, False, FEW)


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder / "data", write_archive(folder / "small.tar.gz"))
    return folder / "data"


@pytest.fixture
def prepared(prepared_once, tmp_path):
    shutil.copytree(prepared_once, tmp_path / "data")
    return tmp_path / "data"


def files_in(folder):
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if "cache" not in path.parts
    }


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# Preparing and reading


def test_what_is_prepared(prepared):
    assert {path.name for path in prepared.iterdir()} == {"imdb_reviews"}
    train = load_imdb("train", data_dir=prepared, progress=False)
    test = load_imdb("test", data_dir=prepared, progress=False)
    assert (len(train.sequences), len(test.sequences)) == (12, 10)
    assert (train.labels.sum(), test.labels.sum()) == (6, 5)
    assert train.vocabulary == test.vocabulary
    assert "unseen" not in train.vocabulary.words
    assert "there" not in train.vocabulary.words  # of the unlabelled reviews
    assert train.vocabulary.words[:4] == ("it", "a", "boat", "number")
    for dataset, split in ((train, "train"), (test, "test")):
        assert dataset.labels.dtype == np.int32
        expected = {
            tuple(train.vocabulary.encode(text, 5000, 500)): int("pos" in name)
            for name, text in members()
            if name.startswith((f"aclImdb/{split}/pos", f"aclImdb/{split}/neg"))
        }
        rows = {tuple(row): label for row, label in zip(*dataset[:2], strict=True)}
        assert rows == expected


def test_no_tensorflow(prepared):
    load_imdb("train", data_dir=prepared, progress=False)
    assert "tensorflow" not in sys.modules


def test_importing_is_cheap():
    heavy = {"tensorflow_datasets", "array_record", "tqdm", "tensorflow"}
    code = f"import lstmjax.data, sys; sys.exit(len({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_reading_needs_no_archive_and_writes_nothing(prepared, tmp_path):
    for folder in [prepared, *prepared.rglob("*")]:
        folder.chmod(0o555 if folder.is_dir() else 0o444)
    before = files_in(tmp_path)
    try:
        load_imdb("train", data_dir=prepared, progress=False)
        load_imdb("test", data_dir=prepared, archive=tmp_path / "absent", progress=False)
        assert files_in(tmp_path) == before
    finally:
        for folder in [prepared, *prepared.rglob("*")]:
            folder.chmod(folder.stat().st_mode | stat.S_IWUSR)


def test_where_the_data_are_looked_for(prepared, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert len(load_imdb("test", progress=False).sequences) == 10
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    prepared.rename(tmp_path / "tensorflow_datasets")
    assert len(load_imdb("test", progress=False).sequences) == 10


def test_limits(prepared):
    whole = load_imdb("train", 10**6, 10**6, data_dir=prepared, progress=False)
    cut = load_imdb("train", 6, 5, data_dir=prepared, progress=False)
    for full, row in zip(whole.sequences, cut.sequences, strict=True):
        last = full[-5:]
        assert row.tolist() == np.where(last < 6, last, 2).tolist()
    assert cut.vocabulary == whole.vocabulary


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("unsupervised",), "no split 'unsupervised': choose train or test"),
        (("train", 4), "top_words is 4"),
        (("train", 5, 0), "max_length is 0"),
    ],
)
def test_wrong_arguments(arguments, match):
    with pytest.raises(UserError, match=match):
        load_imdb(*arguments)


def test_another_form_than_array_record(prepared):
    for path in prepared.rglob("*.array_record-*"):
        path.rename(str(path).replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="not as ArrayRecord") as error:
        load_imdb("train", data_dir=prepared)
    assert "--data-dir" in one_line(error)


def test_a_damaged_prepared_folder(prepared):
    (path,) = prepared.rglob("*-test.array_record-*")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot read IMDB") as error:
        load_imdb("train", data_dir=prepared, progress=False)
    assert "delete that folder" in one_line(error)


def test_two_at_once(prepared, tmp_path, monkeypatch):
    """Another process puts its result in place while this one still prepares."""
    run = imdb._run_tfds

    def slower(root, *arguments):
        run(root, *arguments)
        shutil.copytree(prepared, tmp_path / "shared", dirs_exist_ok=True)

    monkeypatch.setattr(imdb, "_run_tfds", slower)
    prepare(tmp_path / "shared", write_archive(tmp_path / "small.tar.gz"))
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["imdb_reviews"]
    assert len(load_imdb("train", data_dir=tmp_path / "shared", progress=False).sequences) == 12


def test_the_second_waits_for_the_first(prepared, tmp_path, monkeypatch, capsys):
    """Another process holds the lock, and prepares meanwhile."""
    root = tmp_path / "shared"
    files.make_folder(root)
    other = files.Lock(root / ".lstmjax-preparing")
    other.take(wait=False)
    take = files.Lock.take

    def taking(lock, wait):
        if wait:
            shutil.copytree(prepared, root, dirs_exist_ok=True)
            shutil.rmtree(root / ".lstmjax-preparing")
            other.release()
        take(lock, wait)

    monkeypatch.setattr(files.Lock, "take", taking)
    monkeypatch.setattr(imdb, "_run_tfds", None)
    prepare(root, write_archive(tmp_path / "small.tar.gz"))
    assert f"waiting for process {os.getpid()}, which prepares IMDB in" in capsys.readouterr().err
    assert [path.name for path in root.iterdir()] == ["imdb_reviews"]


def test_what_a_killed_preparation_has_left_is_removed(tmp_path):
    root = tmp_path / "data"
    for left in (".lstmjax-preparing-x1", ".lstmjax-preparing/data/imdb_reviews"):
        (root / left).mkdir(parents=True)
        (root / left / "half").write_bytes(b"x")
    prepare(root, write_archive(tmp_path / "small.tar.gz"))
    assert [path.name for path in root.iterdir()] == ["imdb_reviews"]


def test_a_prepared_folder_of_another_size_is_not_taken_for_imdb(prepared, monkeypatch):
    monkeypatch.setattr(archives, "REVIEWS", {**FEW, "test/pos": 6})
    with pytest.raises(UserError, match=r"test has 10 reviews of 11.*delete that folder"):
        load_imdb("train", data_dir=prepared, progress=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_half_prepared_is_left(error, tmp_path, monkeypatch):
    archive = write_archive(tmp_path / "small.tar.gz")
    read = archives.iter_archive

    def interrupted(path):
        for n, member in enumerate(read(path)):
            if n == 12:
                raise error
            yield member

    monkeypatch.setattr(archives, "check_archive", lambda *_: None)
    monkeypatch.setattr(archives, "iter_archive", interrupted)
    with pytest.raises(error):
        prepare(tmp_path / "data", archive)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    archive = write_archive(tmp_path / "small.tar.gz")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot prepare IMDB in .*file") as error:
        prepare(tmp_path / "file", archive)
    assert "--data-dir" in one_line(error)


def test_bars_go_to_stderr(tmp_path, capsys):
    archive = write_archive(tmp_path / "small.tar.gz")
    imdb._prepare(tmp_path / "a", archive, True, FEW)
    load_imdb("train", data_dir=tmp_path / "a")
    shown = capsys.readouterr()
    assert shown.out == ""
    for what in ("Checking the archive", "Generating", "Reading train", "Encoding test"):
        assert what in shown.err
    imdb._prepare(tmp_path / "b", archive, False, FEW)
    load_imdb("train", 7, data_dir=tmp_path / "b", progress=False)
    assert capsys.readouterr() == ("", "")


# Archives


def hard(kind):
    return lambda tar: add(
        tar, "aclImdb/train/pos/link_9.txt", "", type=kind, linkname="../../../../etc/passwd"
    )


HOSTILE = {
    "traversal": (lambda tar: add(tar, "aclImdb/../../escaped.txt"), "points outside"),
    "absolute": (lambda tar: add(tar, "/lstmjax-absolute/escaped.txt"), "points outside"),
    "symlink": (hard(tarfile.SYMTYPE), "is a link or a device"),
    "hardlink": (hard(tarfile.LNKTYPE), "is a link or a device"),
    "device": (hard(tarfile.CHRTYPE), "is a link or a device"),
    "fifo": (hard(tarfile.FIFOTYPE), "is a link or a device"),
    "large": (lambda tar: add(tar, "aclImdb/train/pos/l.txt", "x" * (2**20 + 1)), "1,048,577 byt"),
    "twice": (lambda tar: add(tar, "aclImdb/test/pos/0_7.txt"), "twice"),
    "extra": (lambda tar: add(tar, "aclImdb/test/pos/99_7.txt"), "test/pos 6 of 5"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(name, tmp_path):
    extra, match = HOSTILE[name]
    archive = write_archive(tmp_path / "hostile.tar.gz", extra)
    before = files_in(tmp_path.parent)
    with pytest.raises(UserError, match=match) as error:
        prepare(tmp_path / "data", archive)
    message = one_line(error)
    assert "wrong checksum" in message
    assert hashlib.sha256(archive.read_bytes()).hexdigest() in message
    assert "84,125,825 bytes" in message
    assert archives.ORIGINAL_SHA256 in message
    assert files_in(tmp_path.parent) == before
    assert not Path("/lstmjax-absolute/escaped.txt").exists()


def raw_header(name, size, kind=b"0"):
    """A header that says more than tarfile would write."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = (
        b"%06o\0 " % tarfile.calc_chksums(bytes(block[:148] + b" " * 8 + block[156:]))[0]
    )
    return bytes(block)


def many_members():
    header = raw_header("aclImdb/x", 0)
    return header * 2001


def pax_chain():
    record = b"15 comment=xxxx\n"
    return (raw_header("p", len(record), b"x") + record.ljust(512, b"\0")) * 3000


ENDLESS = {
    "2^62 bytes": (lambda: raw_header("aclImdb/a", 2**62), "is to have 4,611,686,018,427,387,904"),
    "a long name": (lambda: raw_header("n", 3 * 10**8, b"L"), "a header of 300,000,000 bytes"),
    "a large pax header": (lambda: raw_header("n", 60_000, b"x"), "a header of 60,000 bytes"),
    "an unknown kind": (lambda: raw_header("n", 2**40, b"?"), "is to have|a header of|link or a"),
    "many members": (many_members, "more than 2,000 members"),
    "pax headers in a chain": (pax_chain, "RecursionError"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_archives_that_would_take_for_ever(name, tmp_path, monkeypatch):
    make, match = ENDLESS[name]
    monkeypatch.setattr(archives, "MAX_MEMBERS", 2000)
    archive = tmp_path / "endless.tar.gz"
    archive.write_bytes(gzip.compress(make() + bytes(10_240), 1))
    start = time.perf_counter()
    with pytest.raises(UserError, match=match) as error:
        archives.check_archive(archive, False, FEW)
    assert time.perf_counter() - start < 5
    assert len(one_line(error)) < 1000


def test_a_pipe_and_a_device_are_no_archives(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="not a regular file"):
            archives.check_archive(path, False, FEW)


def test_a_huge_archive_is_not_read(tmp_path):
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**31)  # takes no room
    with pytest.raises(UserError, match="2,147,483,648 bytes, more than"):
        archives.check_archive(tmp_path / "huge", False, FEW)


@pytest.mark.parametrize("left", [600, 10_240, 20_000])
def test_a_tar_cut_inside_a_whole_gzip(left, tmp_path):
    archive = write_archive(tmp_path / "cut.tar.gz")
    whole = gzip.decompress(archive.read_bytes()).rstrip(b"\0")
    archive.write_bytes(gzip.compress(whole[:-left] if left > 600 else whole))
    with pytest.raises(UserError, match=r"Error|wrong number of reviews"):
        prepare(tmp_path / "data", archive)


@pytest.mark.parametrize("left", [0.2, 0.9, 0.999])
def test_truncated_archives(left, tmp_path):
    archive = write_archive(tmp_path / "cut.tar.gz")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(UserError, match="EOFError") as error:
        prepare(tmp_path / "data", archive)
    assert "84,125,825 bytes" in one_line(error)
    assert not (tmp_path / "data").exists()


def test_a_flipped_bit(tmp_path):
    archive = write_archive(tmp_path / "flipped.tar.gz")
    content = bytearray(archive.read_bytes())
    content[-6] ^= 1  # in the checksum at the end
    archive.write_bytes(content)
    with pytest.raises(UserError, match="CRC check failed"):
        prepare(tmp_path / "data", archive)


def test_an_archive_that_unpacks_to_too_much(tmp_path, monkeypatch):
    big = [lambda tar, name=name: add(tar, name, "x" * 1_500_000) for name in "ab"]
    archive = write_archive(tmp_path / "bomb.tar.gz", *big)
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 2_000_000)
    with pytest.raises(UserError, match="larger than 2,000,000 bytes"):
        prepare(tmp_path / "data", archive)


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"PK\x03\x04"])
def test_not_an_archive(content, tmp_path):
    (tmp_path / "file.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot use the archive .*wrong checksum") as error:
        load_imdb("train", data_dir=tmp_path / "data", archive=tmp_path / "file.tar.gz")
    one_line(error)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["absent.tar.gz", "."])
def test_no_archive(name, tmp_path):
    with pytest.raises(UserError, match=r"cannot use the archive .*Error") as error:
        load_imdb("train", data_dir=tmp_path / "data", archive=tmp_path / name)
    assert "wrong checksum" not in one_line(error)


def test_missing_reviews_are_counted(tmp_path):
    archive = write_archive(tmp_path / "less.tar.gz", leave_out="aclImdb/train/neg/0_7.txt")
    with pytest.raises(UserError, match="wrong number of reviews: train/neg 5 of 6;"):
        prepare(tmp_path / "data", archive)
    with pytest.raises(UserError, match="train/neg 5 of 12,500, train/pos 6 of 12,500, train/uns"):
        load_imdb("train", data_dir=tmp_path / "data", archive=archive, progress=False)


def test_the_original_is_known_by_its_checksum(tmp_path, monkeypatch):
    archive = write_archive(tmp_path / "small.tar.gz")
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(archives, "ORIGINAL_SHA256", checksum)
    archives.check_archive(archive, False)


def test_the_constants_are_those_of_tfds():
    import tensorflow_datasets as tfds

    ((url, info),) = type(tfds.builder(imdb._NAME, data_dir="/nonexistent")).url_infos.items()
    assert (url, info.size, info.checksum) == (
        imdb.URL,
        archives.ORIGINAL_BYTES,
        archives.ORIGINAL_SHA256,
    )


# The command


def run_experiment(folder, archive, program):
    """``experiments/imdb.py`` as ``program`` starts it, in a process of its own."""
    flags = {"hidden-size": 2, "embedding-size": 2, "top-words": 30, "batch-size": 4, "epochs": 1}
    flags |= {"recipe": "notebook", "max-length": 8, "word-ids": "frequency"}
    flags |= {"archive": archive, "data-dir": "data", "run-dir": "run"}
    return subprocess.run(
        [sys.executable, *program, *(f"--{name}={value}" for name, value in flags.items())],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_from_an_archive_to_a_result(tmp_path):
    archive = write_archive(tmp_path / "small.tar.gz")
    # As a user would run it, but for the number of reviews that makes an archive a whole one.
    program = (
        "import runpy; from lstmjax.data.archive import REVIEWS; "
        f"REVIEWS.update({FEW}); runpy.run_path({str(EXPERIMENT)!r}, run_name='__main__')"
    )
    outcome = run_experiment(tmp_path, archive, ["-c", program])
    assert outcome.returncode == 0, outcome.stderr
    assert "IMDB: 3 batches an epoch" in outcome.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["data"], result["config"]["data"]["archive"]) == ("imdb", str(archive))
    assert [record["step"] for record in result["epochs"]] == [3]
    assert (tmp_path / "data" / "imdb_reviews").is_dir()


def test_another_archive_is_refused_in_one_line(tmp_path):
    archive = write_archive(tmp_path / "small.tar.gz")
    outcome = run_experiment(tmp_path, archive, [EXPERIMENT])
    assert outcome.returncode == 2
    printed = [text for text in outcome.stderr.splitlines() if text.strip()]
    (line,) = (text for text in printed if not text.startswith("Checking the archive: "))
    assert line.startswith(f"error: cannot use the archive {archive}: wrong checksum")
    assert "Traceback" not in outcome.stderr + outcome.stdout
    left = [path for path in tmp_path.rglob("*") if path.is_file()]  # the cache has no file
    assert left == [archive]
    assert {path.name for path in tmp_path.iterdir()} <= {"small.tar.gz", "cache"}


# Download


def test_without_a_network(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    start = time.perf_counter()
    with pytest.raises(UserError, match="Name or service not known") as error:
        load_imdb("train", data_dir=tmp_path / "data")
    assert time.perf_counter() - start < 5
    message = one_line(error)
    for remedy in ("--data-dir", "--archive", "--data demo"):
        assert remedy in message
    assert not (tmp_path / "data").exists()


def test_a_network_that_never_answers(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: released.wait(30))
    start = time.perf_counter()
    try:
        with pytest.raises(UserError, match=r"no answer within 0.2 s"):
            imdb._check_host(seconds=0.2)
    finally:
        released.set()
    assert time.perf_counter() - start < 5


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve a small archive on this machine, as if it were the original's place."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):  # as some proxies
            self.send_error(405)

    (tmp_path / "served").mkdir()
    archive = write_archive(tmp_path / "served" / "aclImdb_v1.tar.gz")
    handler = functools.partial(Quiet, directory=tmp_path / "served")
    monkeypatch.undo()  # let urlopen through
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("LSTMJAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(archives, "REVIEWS", FEW)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield archive, f"http://127.0.0.1:{running.server_port}/aclImdb_v1.tar.gz"
        running.shutdown()
        thread.join()


def redirect(monkeypatch, url, checksum, size):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.checksums import UrlInfo

    builder = type(tfds.builder(imdb._NAME, data_dir="/nonexistent"))
    infos = {url: UrlInfo(size=tfds.core.utils.Size(size), checksum=checksum, filename=None)}
    monkeypatch.setattr(builder, "url_infos", infos)
    monkeypatch.setattr(sys.modules[builder.__module__], "_DOWNLOAD_URL", url)
    monkeypatch.setattr(imdb, "URL", url)


def test_download(server, tmp_path, monkeypatch):
    archive, url = server
    content = archive.read_bytes()
    redirect(monkeypatch, url, hashlib.sha256(content).hexdigest(), len(content))
    dataset = load_imdb("train", data_dir=tmp_path / "data", progress=False)
    assert len(dataset.sequences) == 12
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["imdb_reviews"]


def test_a_download_with_a_wrong_checksum(server, tmp_path, monkeypatch):
    _, url = server
    redirect(monkeypatch, url, archives.ORIGINAL_SHA256, archives.ORIGINAL_BYTES)
    with pytest.raises(UserError, match="has wrong checksum") as error:
        load_imdb("train", data_dir=tmp_path / "data", progress=False)
    assert "--archive" in one_line(error)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_download_that_is_not_there(server, monkeypatch):
    archive, url = server
    archive.unlink()
    monkeypatch.setattr(imdb, "URL", url)
    with pytest.raises(UserError, match="404"):
        load_imdb("train", data_dir=archive.parent, progress=False)


# Keras' word index


def test_word_ids_that_are_not_to_be_had(prepared):
    for split in ("train", "test"):
        with pytest.raises(UserError, match=r'not the training reviews of IMDB.*use "frequency"'):
            load_imdb(split, data_dir=prepared, progress=False, word_ids="keras")


def test_word_ids_of_another_name(prepared, no_type_checks):
    with pytest.raises(UserError, match="no word ids 'tf': choose frequency or keras"):
        load_imdb("train", data_dir=prepared, progress=False, word_ids="tf")


def test_names_of_records_are_those_of_the_archive():
    names = record_names()
    assert len(set(names)) == 25_000
    assert sorted(int(name.split("_")[0]) for positive, name in names if positive) == [
        *range(12_500)
    ]
    stars = {
        positive: {name.split("_")[1] for p, name in names if p is positive}
        for positive in (True, False)
    }
    assert stars[True] == {f"{n}.txt" for n in (7, 8, 9, 10)}
    assert stars[False] == {f"{n}.txt" for n in (1, 2, 3, 4)}


def test_hashes_and_dicts_of_python_2():
    assert (python2_hash(b"a"), python2_hash(b"")) == (12416037344, 0)
    words = ["a", "b", "c", "d", "e"]
    assert [words[n] for n in python2_dict_order(words)] == ["a", "c", "b", "e", "d"]
    many = [f"w{n}" for n in range(1000)]
    assert sorted(python2_dict_order(many)) == [*range(1000)]


# Cache


def cache_files(tmp_path):
    return list((tmp_path / "cache").iterdir())


def test_the_cache_is_used(prepared, tmp_path, monkeypatch):
    first = load_imdb("train", data_dir=prepared, progress=False)
    (path,) = cache_files(tmp_path)
    monkeypatch.setattr(imdb, "_encode", None)
    again = load_imdb("train", data_dir=prepared, progress=False)
    assert again.vocabulary == first.vocabulary
    np.testing.assert_array_equal(again.labels, first.labels)
    for a, b in zip(first.sequences, again.sequences, strict=True):
        np.testing.assert_array_equal(a, b)
    for split, words, length in (("train", 6, 4), ("test", 7, 100)):
        load_imdb(split, words, length, data_dir=prepared, progress=False)
    assert cache_files(tmp_path) == [path]


def test_the_cache_depends_on_the_data(prepared, tmp_path, monkeypatch):
    load_imdb("train", data_dir=prepared, progress=False)
    other = tmp_path / "other"
    extra = {"aclImdb/train/neg/0_7.txt": "quite another text"}
    archive = write_archive(
        tmp_path / "other.tar.gz",
        *(lambda tar, n=n, t=t: add(tar, n, t) for n, t in extra.items()),
        leave_out="aclImdb/train/neg/0_7.txt",
    )
    prepare(other, archive)
    assert "quite" in load_imdb("train", data_dir=other, progress=False).vocabulary.words
    assert len(cache_files(tmp_path)) == 2
    monkeypatch.setattr(imdb, "_ENCODING", imdb._ENCODING + 1)
    load_imdb("train", data_dir=other, progress=False)
    assert len(cache_files(tmp_path)) == 3


def damaged(content):
    yield "empty", b""
    yield "cut", content[: len(content) // 2]
    yield "other", b"something else"
    for place in (0, 30, 60, 200, len(content) // 2, len(content) - 10):
        yield (
            f"byte {place}",
            content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :],
        )


def test_a_damaged_cache_is_rebuilt(prepared, tmp_path):
    first = load_imdb("train", data_dir=prepared, progress=False)
    (path,) = cache_files(tmp_path)
    content = path.read_bytes()
    for name, damage in damaged(content):
        path.write_bytes(damage)
        again = load_imdb("train", data_dir=prepared, progress=False)
        assert again.vocabulary == first.vocabulary, name
        for a, b in zip(first.sequences, again.sequences, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
        assert cache_files(tmp_path) == [path], name


def test_what_killed_writers_have_left_in_the_cache_is_removed(prepared, tmp_path):
    (tmp_path / "cache").mkdir()
    for name in ("tmpabc.tmp", ".imdb-0.npz.tmp"):
        (tmp_path / "cache" / name).write_bytes(b"half")
    load_imdb("train", data_dir=prepared, progress=False)
    assert len(cache_files(tmp_path)) == 1


def test_a_cache_that_announces_more_than_it_holds_is_not_unpacked(prepared, tmp_path):
    load_imdb("train", data_dir=prepared, progress=False)
    (path,) = cache_files(tmp_path)
    np.savez_compressed(path, words=np.zeros(10**8, np.uint8))
    with path.open("rb") as raw, pytest.raises(ValueError, match="announces more"):
        imdb._refuse_bomb(raw)
    assert imdb._read_cache(path, "train") is None


def test_an_empty_cache_variable_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("LSTMJAX_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lstmjax"


def test_a_home_that_is_none(prepared, monkeypatch):
    monkeypatch.setenv("LSTMJAX_CACHE_DIR", "~nosuchuser/c")
    with pytest.raises(UserError, match="'~nosuchuser/c' has no home folder"):
        cache_folder()
    with pytest.warns(UserWarning, match="there is no home folder"):
        assert len(load_imdb("train", data_dir=prepared, progress=False).sequences) == 12
    with pytest.raises(UserError, match="'~nosuchuser/d' has no home folder"):
        load_imdb("train", data_dir="~nosuchuser/d")


def test_a_cache_with_pickled_objects_is_not_opened(prepared, tmp_path):
    load_imdb("train", data_dir=prepared, progress=False)
    (path,) = cache_files(tmp_path)

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    np.savez(path, words=np.array([Payload()], dtype=object), allow_pickle=True)
    load_imdb("train", data_dir=prepared, progress=False)
    assert not (tmp_path / "executed").exists()


def test_a_cache_that_cannot_be_written(prepared, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LSTMJAX_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot write the cache"):
        assert len(load_imdb("train", data_dir=prepared, progress=False).sequences) == 12


def test_where_the_cache_is(prepared, tmp_path, monkeypatch):
    monkeypatch.delenv("LSTMJAX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert imdb._cache_file(prepared).parent == cache_folder() == tmp_path / "xdg" / "lstmjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert imdb._cache_file(prepared).parent == cache_folder() == tmp_path / ".cache" / "lstmjax"
    monkeypatch.setenv("LSTMJAX_CACHE_DIR", "~/c")
    assert imdb._cache_file(prepared).parent == cache_folder() == tmp_path / "c"


# Real data


@pytest.fixture(scope="module")
def real():
    root = Path(__file__).parents[1]
    folders = [
        *([Path(os.environ["TFDS_DATA_DIR"])] if "TFDS_DATA_DIR" in os.environ else []),
        *sorted(root.parent.glob("*/data/tensorflow_datasets")),
        Path("~/tensorflow_datasets").expanduser(),
    ]
    for folder in folders:
        if any((folder / imdb._FOLDER).glob("*-train.array_record-*")):
            return folder
    return pytest.skip(f"real IMDB not found: looked in {', '.join(map(str, folders))}")


@pytest.fixture(scope="module")
def real_splits(real, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSTMJAX_CACHE_DIR", str(tmp_path_factory.mktemp("real_cache")))
        start = time.perf_counter()
        load_imdb("train", data_dir=real, progress=False)
        first = time.perf_counter() - start
        start = time.perf_counter()
        splits = [load_imdb(split, data_dir=real, progress=False) for split in ("train", "test")]
        cache = Path(os.environ["LSTMJAX_CACHE_DIR"])
        return *splits, first, time.perf_counter() - start, cache


def test_real_facts(real_splits):
    train, test, *_ = real_splits
    assert len(train.vocabulary) == 88_584
    assert train.vocabulary.words[:5] == ("the", "and", "a", "of", "to")
    for dataset, mean in ((train, 222.36), (test, 218.39)):
        assert len(dataset.sequences) == 25_000
        assert dataset.labels.mean() == 0.5
        lengths = [len(row) for row in dataset.sequences]
        assert np.mean(lengths) == pytest.approx(mean, abs=0.01)
        assert max(lengths) == 500
        assert max(row.max() for row in dataset.sequences) == 4999


# The beginning of the index as Keras publishes it, and of its first review, without 1, the start.
KERAS_INDEX = {
    **{"fawn": 34701, "tsukino": 52006, "nunnery": 52007, "sonja": 16816, "vani": 63951},
    **{"woods": 1408, "spiders": 16115, "hanging": 2345, "woody": 2289, "trawling": 52008},
    **{"hold's": 52009, "comically": 11307, "localized": 40830, "disobeying": 30568},
    **{"'royale": 52010, "harpo's": 40831, "canet": 52011, "aileen": 19313, "rickman": 25242},
}
KERAS_REVIEW = [14, 22, 16, 43, 530, 973, 1622, 1385, 65, 458, 4468, 66, 3941, 4, 173]


def test_real_word_ids_of_keras(real, real_splits, monkeypatch):
    monkeypatch.setenv("LSTMJAX_CACHE_DIR", str(real_splits[-1]))
    monkeypatch.setattr(archives, "REVIEWS", dict.fromkeys(FEW, 12_500))
    train = load_imdb("train", 10**6, 10**6, real, progress=False, word_ids="keras")
    for word, number in KERAS_INDEX.items():
        assert train.vocabulary.id(word) == number + 3, word
    assert [*train.vocabulary.encode("this film was just brilliant casting")][1:] == [
        *KERAS_REVIEW[:6]
    ]
    assert any(row[1:16].tolist() == KERAS_REVIEW for row in train.sequences)
    plain, test = real_splits[:2]
    assert sorted(train.vocabulary.words) == sorted(plain.vocabulary.words)
    pairs = zip(train.vocabulary.words[:4996], plain.vocabulary.words, strict=False)
    assert sum(a != b for a, b in pairs) == 3679
    (kept,) = real_splits[-1].glob("*-keras.npy")
    again = kept.read_bytes()
    kept.write_bytes(again[:-4] + again[:4])  # no permutation: it is rebuilt
    other = load_imdb("test", 5000, 500, real, progress=False, word_ids="keras")
    assert other.vocabulary == train.vocabulary
    assert kept.read_bytes() == again
    both = zip(other.sequences, test.sequences, strict=True)
    assert [len(a) for a, _ in both] == [len(row) for row in test.sequences]


@pytest.mark.alone
def test_real_speed(real_splits):
    *_, first, second, _ = real_splits
    assert first < 30  # measured 9 s
    assert second < 2  # measured 0.2 s


@pytest.mark.parametrize("length", [400, 500])
def test_real_padding(real_splits, length):
    from lstmjax.data import Batches, bucket_boundaries

    train = real_splits[0]
    lengths = [min(len(row), length) for row in train.sequences]
    batches = Batches(train, 64, boundaries=bucket_boundaries(lengths, count=10))
    assert len(batches) == 391
    assert batches.padding_share < 0.08
