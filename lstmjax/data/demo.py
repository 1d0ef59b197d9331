"""A synthetic corpus for machines without a network: made-up reports of journeys by night train.

It shares no text and no subject with IMDB. A report holds opinions among neutral sentences, and its
label is the sign of most of them. What makes order matter:

- negation: "the soup was not good" is negative;
- contrast: of "the soup was good but the bed was cold" only the clause after *but* counts;
- one long-range cue: the first sentence says whether the author means what he says. In one report
  of eight he means the opposite, which reverses the label.
"""

import random
from functools import lru_cache
from typing import Literal

import numpy as np

from lstmjax.data.vocabulary import Dataset, Vocabulary, check_limits
from lstmjax.errors import UserError

SIZES = {"train": 8000, "test": 1000}
MEAN_WORDS = 120
SPREAD = 0.5  # standard deviation of the logarithm of the length; of IMDB it is about 0.6
IRONIC = 1 / 8

_THINGS = """bed bench blanket cabin carriage ceiling coffee compartment conductor corridor curtain
dinner door driver floor heating journey ladder lamp locomotive mattress mirror night pillow
platform porter price route seat service sheet sink soup station steward supper table tea ticket
timetable towel view waiter window""".split()
_GOOD = """affordable beautiful bright calm charming clean comfortable cosy delicious elegant excellent
fine fresh friendly generous good gorgeous helpful lovely marvellous neat nice perfect pleasant quiet
reliable roomy smooth soft splendid spotless superb tidy warm wonderful""".split()
_BAD = """annoying awful bad bitter bleak broken cold cramped dark dirty disgusting dreadful dull dusty
filthy grim harsh horrible hostile loud mouldy nasty noisy poor rotten rude shabby sour stale sticky
terrible ugly unfair unpleasant worn""".split()
_PLACES = """Aldermoor Brenn Carrow Dunmere Eastfell Farnholm Gullick Harrowby Ingle Jorvale Kestrel
Lowick Marn Nethertarn Ostrel Pellworth Quarle Ravenby Selmouth Tarrant Ullin Vexmoor Wendle
Yarrowdale""".split()
_SIGHTS = """bridge canal castle chapel cliff dam farm ferry field forest harbour hill lake lighthouse
marsh meadow mill orchard quarry river ruin tunnel valley village""".split()
_TIMES = "dawn dusk eight eleven four midnight nine noon seven six sunrise ten three twelve two".split()
_VERBS = "seemed was felt remained looked".split()
_DEGREES = ["", "", "", "very", "quite", "really", "rather", "truly"]
_NEUTRAL = (
    "we left {place} at {time} and reached {place} by {time}.",
    "after {place} the line follows a {sight} and then a {sight}.",
    "there is a {sight} between {place} and {place}.",
    "somebody in the next compartment was reading about the {sight} of {place}.",
    "the train stops at {place}, at {place} and, on Sundays, at {place}.",
    "at {time} we passed a {sight} near {place}.",
    "two passengers got on at {place} and asked about the {thing}.",
    "I had booked in {place} a month before, by telephone.",
    "the {thing} is next to the {thing}, as on most trains of this line.",
    "my neighbour came from {place} and told us about a {sight}.",
)
_SINCERE = "my {relative} always means exactly what he says, and this is his report."
_OPPOSITE = "my {relative} always means the opposite of what he says, and this is his report."
_RELATIVES = "brother cousin father grandfather nephew uncle".split()


class _Author:
    def __init__(self, seed: str) -> None:
        self._draw = random.Random(seed)

    def _clause(self, good: bool) -> str:
        draw = self._draw
        negated = draw.random() < 0.2
        word = draw.choice(_GOOD if good != negated else _BAD)
        degree = "not" if negated else draw.choice(_DEGREES)
        return " ".join(f"the {draw.choice(_THINGS)} {draw.choice(_VERBS)} {degree} {word}".split())

    def _opinion(self, good: bool) -> str:
        if self._draw.random() < 0.25:
            return f"{self._clause(not good)}, but {self._clause(good)}."
        return f"{self._clause(good)}."

    def _neutral(self) -> str:
        choice = self._draw.choice
        words = {"place": _PLACES, "time": _TIMES, "sight": _SIGHTS, "thing": _THINGS}
        sentence = choice(_NEUTRAL)
        for name, options in words.items():
            while f"{{{name}}}" in sentence:
                sentence = sentence.replace(f"{{{name}}}", choice(options), 1)
        return sentence

    def report(self) -> tuple[str, int]:
        """Write one report; return it with its label."""
        draw = self._draw
        label = draw.randrange(2)
        ironic = draw.random() < IRONIC
        said = bool(label) != ironic
        words = draw.lognormvariate(np.log(MEAN_WORDS) - SPREAD**2 / 2, SPREAD)
        opinions = max(1, round(words / 28))
        against = draw.randint(0, (opinions - 1) // 3)
        sentences = [self._opinion(said != (n < against)) for n in range(opinions)]
        length = sum(sentence.count(" ") + 1 for sentence in sentences) + 13
        while length < words:
            sentences.append(self._neutral())
            length += sentences[-1].count(" ") + 1
        draw.shuffle(sentences)
        first = (_OPPOSITE if ironic else _SINCERE).format(relative=draw.choice(_RELATIVES))
        return " ".join([first, *sentences]), label


@lru_cache(maxsize=4)
def _reports(split: str, size: int, seed: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    author = _Author(f"{split} {seed}")
    texts, labels = zip(*(author.report() for _ in range(size)), strict=True)
    return texts, labels


@lru_cache(maxsize=4)
def _vocabulary(seed: int) -> Vocabulary:
    return Vocabulary.from_texts(_reports("train", SIZES["train"], seed)[0])


def load_demo(
    split: Literal["train", "test"],
    top_words: int = 5000,
    max_length: int = 500,
    size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Write the synthetic corpus and encode it like IMDB.

    The two splits come from different random streams. A smaller ``size`` gives the first rows of a
    larger one, with the same ids: the vocabulary is always that of the default training split.

    >>> load_demo("test", size=10).vocabulary.words[0]
    'the'

    Args:
        split: "train" or "test".
        top_words: ids from here on become ``UNKNOWN``; the corpus has a few hundred words.
        max_length: only the last ``max_length`` ids of a report are kept.
        size: number of reports. Default: 8,000 for train, 1,000 for test.
        seed: another seed gives another corpus from the same grammar.

    Raises:
        UserError: an argument is out of range.
    """
    if split not in SIZES:
        raise UserError(f"there is no split {split!r}: choose train or test")
    if size is not None and size < 1:
        raise UserError(f"size is {size}: give at least 1")
    check_limits(top_words, max_length)
    vocabulary = _vocabulary(seed)
    texts, labels = _reports(split, size or SIZES[split], seed)
    sequences = [vocabulary.encode(text, top_words, max_length) for text in texts]
    return Dataset(sequences, np.array(labels, np.int32), vocabulary)
