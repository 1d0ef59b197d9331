"""Words and their ids, as Keras numbers them, and the encoded data set that every source gives."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from lstmjax.errors import UserError

PAD = 0
START = 1
UNKNOWN = 2
FIRST_WORD = 4  # 3 stays unused: Keras counts words from 1 and adds an offset of 3

_SPECIAL = {PAD: "<pad>", START: "<start>", UNKNOWN: "<unknown>", 3: "<unused>"}
_TABLE = str.maketrans(
    dict.fromkeys('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n', " ")
    | dict(zip(string.ascii_uppercase, string.ascii_lowercase, strict=True))
)


def tokenize(text: str) -> list[str]:
    """Split a text into words as was done for the word index that Keras publishes for IMDB.

    A to Z become lower case (no other letter does: this alone gives the 88,584 words of that
    index), punctuation except the apostrophe, tabs and newlines become blanks, and blanks separate
    words. Other white space, such as a no-break space, does not.

    >>> tokenize("It's NOT good, it's great!")
    ["it's", 'not', 'good', "it's", 'great']
    """
    return [word for word in text.translate(_TABLE).split(" ") if word]


_WORD = re.compile(r"\w+(?:['’]\w+)*")


def words_of(text: str) -> list[str]:
    """Split a text of any language that separates its words: runs of letters, in lower case.

    Unlike `tokenize` it knows the letters and marks of all scripts. Texts are brought to one form
    first (NFC), so that an accent is the same however it was typed.

    >>> words_of("L'ÉTÉ, ça s’achève… Größe 3")
    ["l'été", 'ça', 's’achève', 'größe', '3']
    """
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def check_limits(top_words: int, max_length: int) -> None:
    """Raise :class:`UserError` if no word or no step would be left."""
    if top_words <= FIRST_WORD:
        raise UserError(
            f"top_words is {top_words}, but ids below {FIRST_WORD} are not words: "
            f"give at least {FIRST_WORD + 1}"
        )
    if max_length < 1:
        raise UserError(f"max_length is {max_length}: give at least 1")


@dataclass(frozen=True)
class Vocabulary:
    """The words of a training split by falling frequency; the n-th of them (from 0) has id n + 4.

    >>> vocabulary = Vocabulary.from_texts(["a good film", "a bad film", "a film"])
    >>> vocabulary.words
    ('a', 'film', 'good', 'bad')
    >>> vocabulary.encode("A good play!").tolist()
    [1, 4, 6, 2]
    >>> vocabulary.decode([1, 4, 6, 2, 0])
    'a good <unknown>'
    """

    words: tuple[str, ...]
    tokenizer: Callable[[str], list[str]] = tokenize

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], tokenizer: Callable[[str], list[str]] = tokenize
    ) -> "Vocabulary":
        """Count the words of ``texts``; of equally frequent words, the one seen first is first."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(tokenizer(text))
        return cls(tuple(word for word, _ in counts.most_common()), tokenizer)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: id for id, word in enumerate(self.words, FIRST_WORD)}

    def __repr__(self) -> str:
        first = [*map(repr, self.words[:5]), *["..."] * (len(self.words) > 5)]
        return f"Vocabulary({len(self.words):,} words: {', '.join(first)})"

    def __len__(self) -> int:
        return len(self.words)

    def id(self, word: str) -> int:
        """Return the id of ``word``, or ``UNKNOWN``."""
        return self._ids.get(word, UNKNOWN)

    def word(self, id: int | np.integer) -> str:
        """Return the word with this id, or a name in angle brackets for the ids 0 to 3.

        Raises:
            UserError: there is no such id.
        """
        id = int(id)
        if id in _SPECIAL:
            return _SPECIAL[id]
        if not 0 <= id - FIRST_WORD < len(self.words):
            last = len(self.words) + FIRST_WORD - 1
            raise UserError(f"there is no word with id {id}: this vocabulary has ids 0 to {last}")
        return self.words[id - FIRST_WORD]

    def encode(
        self, text: str, top_words: int | None = None, max_length: int | None = None
    ) -> Int32[np.ndarray, " steps"]:
        """Encode a text as ``START`` followed by the ids of its words.

        Args:
            text: any text.
            top_words: ids from here on become ``UNKNOWN``; by default all words are kept.
            max_length: only this many ids are kept, the *last* ones; by default all.

        Raises:
            UserError: ``top_words`` is below 5 or ``max_length`` below 1.
        """
        check_limits(
            FIRST_WORD + 1 if top_words is None else top_words,
            1 if max_length is None else max_length,
        )
        known = self._ids.get
        ids = [START, *[known(word, UNKNOWN) for word in self.tokenizer(text)]]
        array = np.array(ids if max_length is None else ids[-max_length:], np.int32)
        if top_words is not None:
            array[array >= top_words] = UNKNOWN
        return array

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """Join the words of ``ids`` by blanks; padding and start are left out.

        Raises:
            UserError: there is no word with one of these ids.
        """
        return " ".join(self.word(id) for id in ids if id not in (PAD, START))


class Dataset(NamedTuple):
    """One split of a corpus, encoded.

    Attributes:
        sequences: the ids of each row, each an int32 array of its own length, unpadded.
        labels: (rows,), 1 for positive, 0 for negative; or other classes, or numbers.
        vocabulary: all words of the training split, also those beyond ``top_words``.
    """

    sequences: list[np.ndarray]
    labels: Int32[np.ndarray, " rows"] | Float32[np.ndarray, " rows"]
    vocabulary: Vocabulary


def check_rows(
    dataset: Dataset, num_classes: int | None = None, top_words: int | None = None
) -> None:
    """Raise :class:`UserError`, naming the row, unless every row can be learned from.

    Args:
        dataset: what to look at.
        num_classes: labels are whole numbers from 0 to ``num_classes - 1``; None is any.
        top_words: ids are less than this; None is any.

    >>> check_rows(Dataset([np.array([1, 9])], np.array([1]), Vocabulary(())), 2, top_words=8)
    Traceback (most recent call last):
    lstmjax.errors.UserError: row 0 has the id 9: ids must be at least 0 and less than 8
    """
    rows, labels = dataset.sequences, np.asarray(dataset.labels)
    if labels.shape != (len(rows),):
        raise UserError(
            f"there are {len(rows)} rows, but labels of shape {labels.shape}: give one label a row"
        )
    known = range(0 if num_classes is None else num_classes)
    for row, label in enumerate(labels.tolist()):
        if known and label not in known:
            raise UserError(
                f"row {row} has the label {label!r}: labels must be whole numbers from 0 to "
                f"{known[-1]}"
            )
    for row, ids in enumerate(rows):
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise UserError(f"row {row} is {ids.dtype}{list(ids.shape)}: give a list of whole ids")
    together = np.concatenate([*rows, np.zeros(0, np.int32)])
    wrong = together < 0 if top_words is None else (together < 0) | (together >= top_words)
    if wrong.any():
        at = int(wrong.argmax())
        row = int(np.searchsorted(np.cumsum([len(ids) for ids in rows]), at, side="right"))
        limit = "" if top_words is None else f" and less than {top_words}"
        raise UserError(f"row {row} has the id {together[at]}: ids must be at least 0{limit}")
