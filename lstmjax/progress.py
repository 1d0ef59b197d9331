"""Progress bars: a line in a terminal; in a notebook a widget, or a line where it has none."""

import contextlib
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from lstmjax import stopping
from lstmjax.errors import extra

ENOUGH = 5
"""Steady steps from which an estimate is made."""


def load() -> Any:
    """`tqdm.auto.tqdm`, without its warning where a notebook has no ipywidgets: it gets a line.

    To be called before what else imports it.
    """
    with extra("train"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    return tqdm


def bar(*args: Any, **settings: Any) -> Any:
    """A bar of `tqdm.auto.tqdm`, which takes the same arguments."""
    return load()(*args, **settings)


class Programs(NamedTuple):
    """Compilations so far.

    Attributes:
        begun: how many.
        done: how many of them are done.
    """

    begun: int = 0
    done: int = 0


class StepBar:
    """A bar over steps that says when programs are compiled, and does not reckon with that time.

    What is left, and tokens a second, are told once some steps were steady: from the end of one to
    the end of the next nothing was being compiled.

    Args:
        what: the text in front.
        total: steps.
        programs: says what has been compiled.
        initial: steps done before.
        leave: whether the bar stays when it is complete.
    """

    def __init__(
        self,
        what: str,
        total: int,
        programs: Callable[[], Programs],
        *,
        initial: int = 0,
        leave: bool = True,
    ) -> None:
        self._programs, self._told = programs, ""
        self._seconds, self._steps, self._tokens = 0.0, 0, 0.0
        self._last: tuple[float, int] | None = None  # end of a step, programs begun by then
        self._shown = time.perf_counter()
        self._bar = bar(
            desc=what,
            total=total,
            initial=initial,
            leave=leave,
            dynamic_ncols=True,
            bar_format=_format(", compiling"),
        )
        self._waiting = contextlib.ExitStack()
        self._waiting.enter_context(stopping.while_waiting(self._still_there))

    def __enter__(self) -> "StepBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing more comes."""
        self._waiting.close()
        self._bar.close()

    def advance(self, steps: int, tokens: float = 0.0, text: str = "") -> None:
        """Take in the steps that have been found done since the last call.

        Args:
            steps: how many, 0 included.
            tokens: that they had.
            text: what to show of them; with none, what was shown before.
        """
        now, programs = time.perf_counter(), self._programs()
        if programs.done < programs.begun:
            self._last = None
        elif steps:
            if self._last is not None and self._last[1] == programs.begun:
                self._seconds += now - self._last[0]
                self._steps += steps
                self._tokens += tokens
            self._last = (now, programs.begun)
        if not steps:
            return
        self._told = text or self._told
        self._shown = now
        self._describe(compiling=self._last is None, left=self._bar.total - self._bar.n - steps)
        self._bar.update(steps)

    def _describe(self, compiling: bool, left: int) -> None:
        told = self._told
        if self._steps >= ENOUGH and self._tokens:
            told += f" {self._tokens / self._seconds / 1e3:.0f}k tok/s"
        self._bar.set_postfix_str(told, refresh=False)
        estimate = ""
        if compiling:
            estimate = ", compiling"
        elif self._steps >= ENOUGH:
            estimate = f"<{self._bar.format_interval(left * self._seconds / self._steps)}"
        self._bar.bar_format = _format(estimate)

    def _still_there(self) -> None:
        """Once a second, where a program is waited for."""
        if time.perf_counter() - self._shown > 1:
            self._shown = time.perf_counter()
            self._describe(compiling=True, left=0)
            self._bar.refresh()


def _format(estimate: str) -> str:
    return f"{{l_bar}}{{bar}}| {{n_fmt}}/{{total_fmt}} [{{elapsed}}{estimate}{{postfix}}]"
