"""The order of words in the index that Keras publishes for IMDB, to the last tie.

Words are numbered by falling frequency, but most are as frequent as others. Among those the index
has them as a dict of Python 2.7 (64-bit) had them, filled word by word from the positive training
reviews and then the negative ones, each class in the order of its files' names. The order of such a
dict is that of its slots, and where a word goes depends on its hash and on the words before it.

What TFDS prepares holds no names of files, but its order gives them away: records are sorted by the
MD5 of the split's name and the file's, ``aclImdb/train/pos/0_9.txt``. Only the stars in the names
are not to be had from it: those are in ``imdb_stars.bin``, two bits a review.
"""

import hashlib
from collections.abc import Sequence
from importlib.resources import files

import numpy as np
from jaxtyping import Int

_MASK = 2**64 - 1


def python2_hash(word: bytes) -> int:
    """``hash(word)`` of 64-bit Python 2.7, without a sign.

    >>> python2_hash(b"a")
    12416037344
    """
    if not word:
        return 0
    x = word[0] << 7
    for byte in word:
        x = (1000003 * x & _MASK) ^ byte
    x ^= len(word)
    return x if x != _MASK else _MASK - 1


def python2_dict_order(words: Sequence[str]) -> list[int]:
    """Positions of distinct words in the order of a dict of 64-bit Python 2.7 filled with them.

    >>> [("a", "b", "c")[n] for n in python2_dict_order(["a", "b", "c"])]
    ['a', 'c', 'b']
    """
    hashes = [python2_hash(word.encode("utf-8", "surrogatepass")) for word in words]
    slots = [-1] * 8

    def insert(number: int) -> None:
        mask = len(slots) - 1
        perturb = hashes[number]
        slot = perturb & mask
        while slots[slot & mask] >= 0:
            slot = 5 * slot + perturb + 1 & _MASK
            perturb >>= 5
        slots[slot & mask] = number

    for number in range(len(words)):
        insert(number)
        used = number + 1
        if 3 * used >= 2 * len(slots):
            least = used * (2 if used > 50_000 else 4)
            kept = [n for n in slots if n >= 0]
            slots = [-1] * max(8, 1 << least.bit_length())
            for n in kept:
                insert(n)
    return [n for n in slots if n >= 0]


def record_names() -> list[tuple[bool, str]]:
    """Of each record of IMDB's training split as TFDS has them: positive?, and name of its file."""
    packed = np.frombuffer(files("lstmjax.data").joinpath("imdb_stars.bin").read_bytes(), np.uint8)
    bits = np.unpackbits(packed).reshape(2, -1, 2)
    stars = 2 * bits[..., 0] + bits[..., 1] + np.array([[7], [1]])
    names = [
        (number == 0, f"{n}_{star}.txt")
        for number, of_class in enumerate(stars.tolist())
        for n, star in enumerate(of_class)
    ]

    def key(name: tuple[bool, str]) -> bytes:
        folder = "pos" if name[0] else "neg"
        return hashlib.md5(f"trainaclImdb/train/{folder}/{name[1]}".encode()).digest()

    return sorted(names, key=key)


def keras_order(
    rows: Sequence[np.ndarray],
    labels: Int[np.ndarray, " rows"],
    words: Sequence[str],
    first_word: int,
) -> list[int]:
    """Positions of ``words`` in the order of Keras' index.

    Args:
        rows: ids of the training reviews as TFDS has them, all words kept.
        labels: 1 for positive ones.
        words: the n-th has the id ``n + first_word``; others have smaller ids.
        first_word: the smallest id of a word.

    Raises:
        ValueError: these are not the reviews of IMDB in the order of TFDS.
    """
    names = record_names()
    if [positive for positive, _ in names] != (np.asarray(labels) == 1).tolist():
        raise ValueError("these are not the training reviews of IMDB in the order of TFDS")
    as_read = sorted(range(len(rows)), key=lambda row: (not names[row][0], names[row][1]))
    ids = np.concatenate([rows[row] for row in as_read])
    ids = ids[ids >= first_word] - first_word
    found, first = np.unique(ids, return_index=True)
    inserted = found[np.argsort(first)]
    slots = inserted[python2_dict_order([words[n] for n in inserted])]
    counts = np.bincount(ids, minlength=len(words))
    return slots[np.argsort(-counts[slots], kind="stable")].tolist()
