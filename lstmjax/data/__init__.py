"""Data sets, their vocabulary, and batches."""

from lstmjax.data.batches import (
    Batch,
    Batches,
    Sequences,
    SideBySide,
    Source,
    bucket_boundaries,
    hold_out,
)
from lstmjax.data.cumsum import sample_cumsum
from lstmjax.data.demo import load_demo
from lstmjax.data.imdb import load_imdb
from lstmjax.data.stream import StreamedBatches, row_lengths, write_rows
from lstmjax.data.vocabulary import Dataset, Vocabulary, tokenize, words_of

__all__ = [
    "Batch",
    "Batches",
    "Dataset",
    "Sequences",
    "SideBySide",
    "Source",
    "StreamedBatches",
    "Vocabulary",
    "bucket_boundaries",
    "hold_out",
    "load_demo",
    "load_imdb",
    "row_lengths",
    "sample_cumsum",
    "tokenize",
    "words_of",
    "write_rows",
]
