"""Tokenizers by name, and a user's own."""

import pathlib
from collections.abc import Callable

from lstmjax.cells.loading import run_file
from lstmjax.data.vocabulary import tokenize, words_of
from lstmjax.errors import UserError


def load_tokenizer(name: str) -> Callable[[str], list[str]]:
    """The tokenizer that a name stands for.

    >>> load_tokenizer("words")("Ça, oui!")
    ['ça', 'oui']

    Args:
        name: ``words``, ``keras``, or ``path/to/file.py:function``.

    Raises:
        UserError: there is none of this name.
    """
    known = {"words": words_of, "keras": tokenize}
    if name in known:
        return known[name]
    path, _, function = name.rpartition(":")
    if not path or not pathlib.Path(path).is_file():
        raise UserError(
            f"no tokenizer {name!r}: choose {', '.join(known)}, or path/to/file.py:function"
        )
    found = vars(run_file(path)).get(function)
    if not callable(found):
        raise UserError(f"no function {function!r} in {path}: name one from a text to its words")
    return found
