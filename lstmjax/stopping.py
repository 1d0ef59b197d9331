"""SIGINT, SIGTERM and SIGHUP: what they end, and what is saved first.

A program calls `exit_on_signals` before it imports anything slow. From there on a thread hears of
each signal at once, whatever the main thread is busy with: importing, compiling, waiting. It ends
the process, which then has nothing to clean up, unless the main thread is inside `saving`: then
that is told, and saves. A program that has not called it, such as a notebook, keeps its own
handlers outside `saving`.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import FrameType
from typing import NoReturn, TypeVar

ResultT = TypeVar("ResultT")

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
TOGETHER = 1.0
"""Seconds within which signals count as one: a scheduler may send several, a group gets each."""


class Stopping(Exception):
    """Told to stop while waiting: whoever is inside `saving` saves now."""


class Stop:
    """Whether to stop: false until a signal arrives; its number is then in ``signal``."""

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0

    def __bool__(self) -> bool:
        return self.signal != 0

    def hear(self, number: int) -> bool:
        """Take note of a signal; returns whether it is a later one, not to be waited for."""
        if self.signal:
            return time.monotonic() - self._since > TOGETHER
        self._since = time.monotonic()
        self.signal = number
        say("\nstopping after this step; once more to stop without saving\n")
        return False


class _Program:
    """What the process is doing, for the thread that hears of signals."""

    exits = False  # whether exit_on_signals was called
    stop: Stop | None = None  # of the `saving` that is entered
    advice = ""  # how to go on, once that can be told
    folders: set[pathlib.Path] = set()  # to be removed on the way out
    waiting: Callable[[], object] = staticmethod(lambda: None)  # called while one waits
    together = False  # whether it stops only when other processes do


def exit_on_signals() -> None:
    """From now on a signal ends the process with 128 + its number, as shells expect.

    What was to be ignored when the process began, as under ``nohup``, is ignored further.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _nothing)
    _Program.exits = True
    threading.Thread(target=_listen, args=(ours,), name="signals", daemon=True).start()


def _nothing(number: int, frame: FrameType | None) -> None:
    """The interpreter tells the thread; but only of signals that have a handler."""


def _listen(pipe: socket.socket) -> None:
    while number := pipe.recv(1):
        if number[0] in SIGNALS and (_Program.stop is None or _Program.stop.hear(number[0])):
            _exit(number[0])


def _exit(number: int) -> NoReturn:
    for folder in list(_Program.folders):
        shutil.rmtree(folder, ignore_errors=True)
    say(f"\nstopped by {signal.Signals(number).name}; {_Program.advice or 'nothing was begun'}\n")
    os._exit(128 + number)


def leave(status: int) -> NoReturn:
    """End the process now; compilations that run in threads are not waited for."""
    if not _Program.exits:
        raise SystemExit(status)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


def advise(how: str) -> None:
    """From now on, say this when a signal ends the process: how to go on."""
    _Program.advice = how


def tell_saved() -> None:
    """Print that all is saved, and the advice; a notebook has an exception that says so."""
    if _Program.exits:
        print(f"\nstopped and saved; {_Program.advice}")


def say(text: str) -> None:
    """Write to standard error from wherever a signal is heard, if it can be written to."""
    if not _Program.exits:  # a notebook's own stream; where it is being written to, nothing is said
        with contextlib.suppress(OSError, RuntimeError, ValueError, AttributeError):
            sys.stderr.write(text)
            sys.stderr.flush()
        return
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


@contextlib.contextmanager
def removed_on_exit(folder: pathlib.Path) -> Iterator[None]:
    """Remove this folder, too, if a signal ends the process inside the block."""
    _Program.folders.add(folder)
    try:
        yield
    finally:
        _Program.folders.discard(folder)


@contextlib.contextmanager
def saving() -> Iterator[Stop]:
    """Inside the block a signal is only noted, for the block to save and to leave by itself.

    A second one, more than `TOGETHER` later, acts as it would have without the block. In a program
    that has not called `exit_on_signals`, they are heard in the main thread only.
    """
    _Program.stop = stop = Stop()
    try:
        if _Program.exits or threading.current_thread() is not threading.main_thread():
            yield stop
        else:
            with _handlers(stop):
                yield stop
    finally:
        _Program.stop = None


@contextlib.contextmanager
def _handlers(stop: Stop) -> Iterator[None]:
    before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def put_back() -> None:
        for number, handler in before.items():
            if handler is not None:  # None: installed by another language than Python
                signal.signal(number, handler)

    def remember(number: int, frame: FrameType | None) -> None:
        if stop.hear(number):
            put_back()
            signal.raise_signal(number)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, remember)
    try:
        yield
    finally:
        put_back()


def stop_together() -> None:
    """From now on this process does not leave by itself what it does with others: who waits for it
    in a collective would wait for ever. They agree on when to stop."""
    _Program.together = True


def check() -> None:
    """Between two steps of what can be left at once, once a signal was noted.

    Raises:
        Stopping: it was, and no other process needs this one.
    """
    if _Program.stop and not _Program.together:
        raise Stopping from None


def wait_for(future: "Future[ResultT]") -> ResultT:
    """The result of work in another thread.

    Raises:
        Stopping: as `check`, meanwhile; the work goes on.
    """
    while True:
        try:
            return future.result(timeout=0.1)
        except TimeoutError:
            if future.done():  # its own
                raise
            check()
            _Program.waiting()


@contextlib.contextmanager
def while_waiting(tell: Callable[[], object]) -> Iterator[None]:
    """In this block `wait_for` calls ``tell`` ten times a second."""
    before, _Program.waiting = _Program.waiting, tell
    try:
        yield
    finally:
        _Program.waiting = before
