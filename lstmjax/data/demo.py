"""A synthetic corpus for machines without a network: made-up reports of journeys by night train.

It shares no text and no subject with IMDB. A report holds opinions among neutral sentences, and its
label is the sign of most of them. What makes order matter:

- negation: "the soup was not good" is negative;
- contrast: of "the soup was good but the bed was cold" only the clause after *but* counts;
- one long-range cue: the first sentence says whether the author means what he says. In one report
  of eight he means the opposite, which reverses the label.
"""

import math
import random
import re
from functools import lru_cache

import numpy as np

from lstmjax.data.vocabulary import Dataset, Vocabulary, check_limits
from lstmjax.errors import UserError

SIZES = {"train": 8000, "test": 1000}
MEAN_WORDS = 120
SPREAD = 0.4  # standard deviation of the logarithm of the length; of IMDB's it is 0.64
IRONIC = 1 / 8

_WORDS = {
    kind: words.split()
    for kind, words in {
        "thing": """bed bench blanket cabin carriage ceiling coffee compartment conductor corridor
            curtain dinner door driver floor heating journey ladder lamp locomotive mattress mirror
            night pillow platform porter price route seat service sheet sink soup station steward
            supper table tea ticket timetable towel view waiter window""",
        "good": """affordable beautiful bright calm charming clean comfortable cosy delicious
            elegant excellent fine fresh friendly generous good gorgeous helpful lovely marvellous
            neat nice perfect pleasant quiet reliable roomy smooth soft splendid spotless superb
            tidy warm wonderful""",
        "bad": """annoying awful bad bitter bleak broken cold cramped dark dirty disgusting dreadful
            dull dusty filthy grim harsh horrible hostile loud mouldy nasty noisy poor rotten rude
            shabby sour stale sticky terrible ugly unfair unpleasant worn""",
        "place": """Aldermoor Brenn Carrow Dunmere Eastfell Farnholm Gullick Harrowby Ingle Jorvale
            Kestrel Lowick Marn Nethertarn Ostrel Pellworth Quarle Ravenby Selmouth Tarrant Ullin
            Vexmoor Wendle Yarrowdale""",
        "sight": """bridge canal castle chapel cliff dam farm ferry field forest harbour hill lake
            lighthouse marsh meadow mill orchard quarry river ruin tunnel valley village""",
        "time": """dawn dusk eight eleven four midnight nine noon seven six sunrise ten three twelve
            two""",
        "was": "seemed was felt remained looked",
        "very": "very quite really rather truly",
        "relative": "brother cousin father grandfather nephew uncle",
    }.items()
}
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
_IRONIC = "my {relative} always means the opposite of what he says, and this is his report."


def _opinions(meant: str, opposite: str) -> list[str]:
    """Return templates to draw from: 20 % of the clauses are negated, 25 % follow a contrast."""

    def clauses(word: str, reverse: str) -> list[str]:
        start = "the {thing} {was} "
        plain, strong = start + f"{{{word}}}", start + f"{{very}} {{{word}}}"
        return [plain, plain, strong, strong, start + f"not {{{reverse}}}"]

    last, first = clauses(meant, opposite), clauses(opposite, meant)
    contrasts = [f"{one}, but {other}." for one in first for other in last]
    return [f"{clause}." for clause in last] * (3 * len(first)) + contrasts


_OPINIONS = {True: _opinions("good", "bad"), False: _opinions("bad", "good")}


def _report(draw: random.Random) -> tuple[str, int]:
    """Write one report; return it with its label."""
    label = draw.randrange(2)
    ironic = draw.random() < IRONIC
    for_good = bool(label) != ironic
    words = draw.lognormvariate(math.log(MEAN_WORDS) - SPREAD**2 / 2, SPREAD)
    opinions = max(1, round(words / 28))
    against = draw.randint(0, (opinions - 1) // 3)
    sentences = draw.choices(_OPINIONS[for_good], k=opinions - against)
    sentences += draw.choices(_OPINIONS[not for_good], k=against)
    first = _IRONIC if ironic else _SINCERE
    length = sum(sentence.count(" ") + 1 for sentence in [first, *sentences])
    while length < words:
        sentences.append(draw.choice(_NEUTRAL))
        length += sentences[-1].count(" ") + 1
    draw.shuffle(sentences)
    template = " ".join([first, *sentences])
    return re.sub(r"{(\w+)}", lambda kind: draw.choice(_WORDS[kind[1]]), template), label


@lru_cache(maxsize=4)
def reports(split: str, size: int, seed: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and labels of a split."""
    draw = random.Random(f"{split} {seed}")
    texts, labels = zip(*(_report(draw) for _ in range(size)), strict=True)
    return texts, labels


@lru_cache(maxsize=4)
def _vocabulary(seed: int) -> Vocabulary:
    return Vocabulary.from_texts(reports("train", SIZES["train"], seed)[0])


def load_demo(
    split: str,
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
    texts, labels = reports(split, size or SIZES[split], seed)
    sequences = [vocabulary.encode(text, top_words, max_length) for text in texts]
    return Dataset(sequences, np.array(labels, np.int32), vocabulary)
