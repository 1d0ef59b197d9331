"""Hostile bytes to every reader, guided by coverage: ``make fuzz-guided``.

    python tests/fuzz_guided.py jsonl -runs=20000

Needs atheris, which has wheels for Linux alone. Whatever is raised but for a line to the user ends
it, with the bytes that did it.
"""

import contextlib
import gzip
import io
import json
import pathlib
import sys
import tarfile
import tempfile
from collections.abc import Callable

import atheris
import numpy as np
import safetensors.numpy

with atheris.instrument_imports(include=["lstmjax"]):
    from lstmjax import files
    from lstmjax.commands import imdb
    from lstmjax.data import archive
    from lstmjax.errors import UserError
    from lstmjax.interop import read_safetensors
    from lstmjax.tasks.loading import load_task
    from lstmjax.tasks.rows import read_arrays, read_sequences
    from lstmjax.tasks.text import read_texts
    from lstmjax.training import report
    from lstmjax.training.repeat import filled

PLACE = pathlib.Path(tempfile.mkdtemp()) / "hostile"


def written(content: bytes, name: str = "") -> pathlib.Path:
    path = PLACE.with_suffix(name)
    path.write_bytes(content)
    return path


def config(content: bytes) -> None:
    try:
        filled(imdb.RECIPES["default"], files.as_object(files.parse_json(content)))
    except ValueError as error:
        raise UserError("no config") from error


def arrays(content: bytes) -> None:
    path = written(content, ".npz")
    read_sequences(path, read_arrays(path, ["x"]))


def tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as made:
        for name in ("aclImdb/train/pos/0_9.txt", "aclImdb/test/neg/1_2.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            made.addfile(member, io.BytesIO(b"good"))
    return content.getvalue()


def npz() -> bytes:
    content = io.BytesIO()
    np.savez(content, x=np.zeros((2, 3, 1)), y=np.arange(2), lengths=np.array([3, 1]))
    return content.getvalue()


READERS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "archive": (lambda b: archive.check_archive(written(gzip.compress(b, 1)), False), tar()),
    "arrays": (arrays, npz()),
    "config": (config, json.dumps(report.as_dict(imdb.RECIPES["default"])).encode()),
    "csv": (lambda b: read_texts(written(b, ".csv"), "text", "label"), b'text,label\n"a, b",1\n'),
    "jsonl": (
        lambda b: read_texts(written(b, ".jsonl"), "text", "label"),
        b'{"text": "a", "label": 1}\n',
    ),
    "metrics": (report._record, b'{"kind": "step", "step": 2, "epoch": 1, "loss": [0.5, null]}'),
    "parameters": (
        lambda b: read_safetensors(written(b, ".safetensors")),
        safetensors.numpy.save({"a": np.zeros((2, 3), np.float32)}),
    ),
    "task": (
        lambda b: load_task(b.decode("utf-8", "surrogateescape")),
        b"adding(length=40,updates=50)",
    ),
}
"""Of each what reads, and a sound example."""


def main() -> None:
    reader, example = READERS[sys.argv.pop(1)]
    corpus = PLACE.with_name("corpus")
    corpus.mkdir()
    (corpus / "sound").write_bytes(example)
    with contextlib.suppress(UserError):
        reader(example)

    def one(content: bytes) -> None:
        with contextlib.suppress(UserError):
            reader(content)

    atheris.Setup([*sys.argv, "-max_len=20000", str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
