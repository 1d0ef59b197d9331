"""Interleaved timing of contenders that live in processes of their own."""

import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from benchmarks.contenders import PROCESSES, Contender
from benchmarks.problems import Case
from benchmarks.worker import unpack

T = TypeVar("T")
ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # compilation is measured, too
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
UNSET = (
    *("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "OMP_NUM_THREADS", "KERAS_BACKEND"),
    *("MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"),
)
"""Variables that are taken away: everybody runs with the defaults."""
LEAST = 0.1
"""Seconds that a turn lasts at least; shorter runs are repeated within it."""
PAUSE = 0.02
"""Seconds between turns, in which the threads of the one before go to sleep."""

Row = dict[str, Any]
"""One result: ``column`` (what was measured), ``contender``, ``case``, ``seconds`` (the median of
``turns``), ``first`` (seconds of the first call, compilation included), ``memory`` in bytes."""


class BenchmarkError(Exception):
    """A contender failed, or computes something else than the others."""


def environment(process: str) -> dict[str, str]:
    """The environment variables of a process of `PROCESSES`."""
    kept = {name: value for name, value in os.environ.items() if name not in UNSET}
    return kept | ENVIRONMENT | PROCESSES[process]


class Worker:
    """A process that times on request."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        self._child: Any = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=environment(process),
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """One request, one answer; `BenchmarkError` if contender or process failed."""
        line = ""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"do": do, **request}), file=self._child.stdin, flush=True)
            line = self._child.stdout.readline()
        if not line:
            self._log.seek(0)
            ended = f"process {self._process} ended with {self._child.wait()}"
            raise BenchmarkError(f"{ended}\n{self._log.read()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()
        self._log.close()


Work = list[tuple[Contender, Case, str]]
"""What to measure: a contender on a case, under a column heading."""


class Session:
    """The processes of one part and what was found.

    Attributes:
        rows: results so far.
        skipped: contenders that could not run, with the reason.
        deviations: largest relative deviation from the first contender, by contender.
    """

    def __init__(self, name: str, full: bool = False) -> None:
        self.full = full
        self.rows: list[Row] = []
        self.skipped: dict[str, str] = {}
        self.deviations: dict[str, float] = {}
        self._workers: dict[str, Worker] = {}
        self._bar = tqdm(desc=name, unit="case", disable=None)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.end_processes()
        self._bar.close()

    def over(self, cases: Sequence[T]) -> Iterator[T]:
        """The cases, under the progress bar."""
        self._bar.reset(len(cases))
        for case in cases:
            yield case
            self._bar.update()

    def end_processes(self) -> None:
        """The next measurement starts them afresh."""
        while self._workers:
            self._workers.popitem()[1].close()

    def measure(
        self,
        work: Work,
        seconds: float = 6.0,
        turns: int | None = None,
        per: int = 1,
        memory: bool = False,
    ) -> list[Row]:
        """See that all compute the same, then time them in turn; returns and keeps the rows.

        Args:
            work: what to measure; contenders on one and the same case must agree.
            seconds: what the turns may take together; at least 3 and at most 15 are made.
            turns: the number of turns, if it is given.
            per: what a run consists of; times are divided by it.
            memory: also ask what memory the compiled programs need.
        """
        ready: list[tuple[Worker, int, Row]] = []
        references: dict[str, Mapping[str, np.ndarray]] = {}
        for number, (contender, case, column) in enumerate(work):
            self._bar.set_postfix_str(f"prepares {contender.name}")
            found = self._prepare(number, contender, case, memory)
            if found is not None:
                arrays = unpack(found.pop("check"))
                expected = references.setdefault(json.dumps(case), arrays)
                self._compare(contender, column, expected, arrays)
                row: Row = {"column": column, "contender": contender.name, "case": case}
                row |= {"turns": [], "cpu_turns": []} | found
                ready.append((self._workers[contender.process], number, row))
        for count in itertools.count(1):
            started = time.perf_counter()
            for worker, number, row in ready[count % len(ready) :] + ready[: count % len(ready)]:
                self._bar.set_postfix_str(f"turn {count}: {row['contender']}")
                time.sleep(PAUSE)
                answer = worker.ask("measure", job=number, least=LEAST)
                row["turns"].append(answer["seconds"] / per)
                row["cpu_turns"].append(answer["cpu"] / per)
            each = time.perf_counter() - started
            if count >= (turns or min(max(3, round(seconds / each)), 15)):
                break
        for worker in self._workers.values():
            worker.ask("clear")
        medians = {"seconds": "turns", "cpu": "cpu_turns"}
        rows = [
            row | {name: statistics.median(row[turns]) for name, turns in medians.items()}
            for *_, row in ready
        ]
        self.rows += rows
        return rows

    def _prepare(self, number: int, contender: Contender, case: Case, memory: bool) -> Any:
        """What the worker says of the first run; None where the contender cannot run."""
        missing = [p for p in contender.packages.split() if importlib.util.find_spec(p) is None]
        if contender.slow and not self.full:
            answer = {"unavailable": "slow, runs with --full"}
        elif missing:
            answer = {"unavailable": f"{missing[0]} is not installed"}
        else:
            if contender.process not in self._workers:
                self._workers[contender.process] = Worker(contender.process)
            request = {"source": contender.source, "options": contender.options, "case": case}
            worker = self._workers[contender.process]
            answer = worker.ask("prepare", job=number, memory=memory, **request)
        if "unavailable" in answer:
            self.skipped[contender.name] = answer["unavailable"]
            return None
        return answer

    def _compare(self, contender: Contender, column: str, expected: Any, actual: Any) -> None:
        found = deviation(expected, actual)
        if expected:
            self.deviations[contender.name] = max(found, self.deviations.get(contender.name, 0.0))
        if not found <= contender.tolerance:
            raise BenchmarkError(
                f"{contender.name} deviates from the first contender by {found:.1e}, more than "
                f"{contender.tolerance:g}, in {column}"
            )


def deviation(expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray]) -> float:
    """The largest max |actual - expected| / max |expected| of all arrays; inf or NaN if they do
    not fit."""
    names = sorted(expected)
    if names != sorted(actual) or any(expected[n].shape != actual[n].shape for n in names):
        return float("inf")
    errors = [np.abs(actual[n] - expected[n]).max() / np.abs(expected[n]).max() for n in names]
    return float(max(errors, default=0.0))
