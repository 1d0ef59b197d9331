"""The bar over steps: compilation is told as such, and no estimate knows of it."""

import itertools
import re
from concurrent.futures import Future

import pytest

from lstmjax import progress, stopping
from lstmjax.progress import Programs, StepBar


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


class Compiler:
    begun = done = 0

    def __call__(self):
        return Programs(self.begun, self.done)


def shown(capsys):
    """The last state of the bar."""
    (*_, last) = [a for a in re.split(r"[\r\n]", capsys.readouterr().err) if a.strip()]
    return last


def test_the_first_thing_that_is_told_is_compilation(capsys):
    StepBar("epoch 1/3", 125, Compiler())
    assert re.fullmatch(r"epoch 1/3:   0%\| +\| 0/125 \[00:00, compiling\]", shown(capsys))


def test_what_compiles_is_no_part_of_the_estimate(capsys, clock):
    compiler = Compiler()
    bar = StepBar("epoch 1/1", 110, compiler)
    for programs in range(3):  # a minute each, and steps done meanwhile
        compiler.begun = programs + 1
        clock.now += 30
        bar.advance(1, 100.0, "loss 0.7")
        bar._bar.refresh()
        assert "compiling, loss 0.7" in shown(capsys)
        clock.now += 30
        compiler.done = programs + 1
        bar.advance(1, 100.0, "loss 0.7")
    for step in range(4):
        clock.now += 2
        bar.advance(1, 100.0, "loss 0.6")
        bar._bar.refresh()
        assert re.search(r"\[\d\d:\d\d, loss 0\.6\]", shown(capsys)), step
    clock.now += 2
    bar.advance(1, 100_000.0, "loss 0.5")
    bar._bar.refresh()
    # 99 steps of 2 s; 100,400 tokens in 10 s
    assert re.search(r"\[\d\d:\d\d<03:18, loss 0\.5 10k tok/s\]", shown(capsys))


def test_a_program_that_came_and_went_between_two_steps_is_noticed(clock):
    compiler = Compiler()
    bar = StepBar("", 10, compiler)
    bar.advance(1)
    clock.now += 1
    bar.advance(1)
    compiler.begun = compiler.done = 1
    clock.now += 60
    bar.advance(1)
    assert (bar._steps, bar._seconds) == (1, 1)


def test_steps_that_are_found_done_together_share_the_time(clock):
    bar = StepBar("", 10, Compiler())
    bar.advance(2)
    clock.now += 1
    bar.advance(0)
    clock.now += 1
    bar.advance(4)
    assert (bar._steps, bar._seconds) == (4, 2)


def test_the_clock_goes_on_while_a_program_is_waited_for(capsys, clock):
    class Compiling(Future):
        def result(self, timeout):
            clock.now += 0.6
            if next(answers) == 5:
                self.set_result("compiled")
            return super().result(0)

    answers, compiler = itertools.count(), Compiler()
    compiler.begun = 1
    with StepBar("epoch 1/1", 10, compiler):
        shown(capsys)
        assert stopping.wait_for(Compiling()) == "compiled"
    lines = [a for a in re.split(r"[\r\n]", capsys.readouterr().err) if a.strip()]
    assert sum("0/10" in line and "compiling" in line for line in lines) >= 2
    assert stopping._Program.waiting() is None
