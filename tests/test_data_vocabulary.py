import numpy as np
import pytest

from lstmjax.data.vocabulary import FIRST_WORD, PAD, START, UNKNOWN, Vocabulary, tokenize
from lstmjax.errors import UserError

TEXTS = ["The film, the FILM! the end.", "A film\tis a\nfilm", "end"]
#  film 4, the 3, then end and a with 2 (end was seen first), is 1
WORDS = ("film", "the", "end", "a", "is")


@pytest.fixture
def vocabulary():
    return Vocabulary.from_texts(TEXTS)


def test_the_fixed_ids():
    assert (PAD, START, UNKNOWN, FIRST_WORD) == (0, 1, 2, 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("  \t\n ", []),
        ("It's NOT good", ["it's", "not", "good"]),
        ("a--b/c<br />d", ["a", "b", "c", "br", "d"]),
        ('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~', []),
        (
            "caf\u00e9 \u00c9t\u00e9",
            ["caf\u00e9", "\u00c9t\u00e9"],
        ),  # only A to Z become lower case
        ("no\u00a0break well\u0085", ["no\u00a0break", "well\u0085"]),  # only blanks separate
        ("carriage\rreturn", ["carriage\rreturn"]),
    ],
)
def test_tokenize(text, words):
    assert tokenize(text) == words


def test_words_by_falling_frequency_first_seen_first(vocabulary):
    assert vocabulary.words == WORDS
    assert len(vocabulary) == 5


def test_ids_by_hand(vocabulary):
    assert [vocabulary.id(word) for word in (*WORDS, "play")] == [4, 5, 6, 7, 8, UNKNOWN]
    names = ["<pad>", "<start>", "<unknown>", "<unused>", *WORDS]
    assert [vocabulary.word(id) for id in range(9)] == names


@pytest.mark.parametrize("id", [-1, 9, 10**9])
def test_no_such_id(vocabulary, id):
    with pytest.raises(UserError, match=f"no word with id {id}: this vocabulary has ids 0 to 8"):
        vocabulary.word(id)


def test_encode_by_hand(vocabulary):
    ids = vocabulary.encode("The end is a play.")
    assert ids.dtype == np.int32
    assert ids.tolist() == [1, 5, 6, 8, 7, 2]
    assert vocabulary.encode("The end is a play.", top_words=7).tolist() == [1, 5, 6, 2, 2, 2]
    assert vocabulary.encode("").tolist() == [START]


def test_the_last_ids_are_kept(vocabulary):
    assert vocabulary.encode("The end is a film.", max_length=3).tolist() == [8, 7, 4]
    assert vocabulary.encode("The end is a film.", 8, 6).tolist() == [1, 5, 6, 2, 7, 4]


def test_decode_round_trip(vocabulary):
    for text in TEXTS:
        padded = [PAD, *vocabulary.encode(text), PAD]
        assert vocabulary.decode(padded) == " ".join(tokenize(text))
    assert vocabulary.decode(vocabulary.encode("the play")) == "the <unknown>"


@pytest.mark.parametrize(
    ("limits", "match"),
    [((4, 10), "top_words is 4"), ((0, 10), "top_words is 0"), ((10, 0), "max_length is 0")],
)
def test_limits(vocabulary, limits, match):
    with pytest.raises(UserError, match=match):
        vocabulary.encode("a", *limits)
