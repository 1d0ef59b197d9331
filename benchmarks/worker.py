"""A process that prepares contenders and times them when told to: ``python -m benchmarks.worker``.

Requests come as lines of JSON on stdin, answers go out the same way; what the libraries print goes
to stderr.
"""

import base64
import gc
import importlib
import io
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.contenders import Job, Unavailable
from benchmarks.problems import Case

JOBS: dict[int, Job] = {}


def prepare(job: int, source: str, options: dict[str, Any], case: Case, memory: bool) -> Any:
    """Build a job and run it for the first time."""
    module, function = source.split(":")
    make = getattr(importlib.import_module(f"benchmarks.contenders.{module}"), function)
    JOBS[job] = made = make(case, **options)
    first = _seconds(made.warm_up or made.run)
    needed = made.memory() if memory else None
    return {"first": first, "memory": needed, "check": pack(made.check())}


def measure(job: int, least: float) -> Any:
    """Repeat a job for ``least`` seconds, at least once; the mean of a repetition, of wall time and
    of the time of all cores together, in processes that were started and have ended, too."""
    times: list[float] = []
    before = _of_all_cores()
    while not times or sum(times) < least:
        times.append(_seconds(JOBS[job].run))
    cpu = (_of_all_cores() - before) / len(times)
    return {"seconds": sum(times) / len(times), "cpu": cpu}


def clear() -> Any:
    """Forget all jobs and what was compiled for them."""
    JOBS.clear()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()
    return {}


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _of_all_cores() -> float:
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def pack(arrays: Mapping[str, np.ndarray]) -> str:
    """Arrays as text."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return base64.b64encode(buffer.getvalue()).decode()


def unpack(text: str) -> dict[str, np.ndarray]:
    """The inverse of `pack`."""
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as file:
        return dict(file)


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            serve: Any = {"prepare": prepare, "measure": measure, "clear": clear}[request.pop("do")]
            answer = serve(**request)
        except Unavailable as reason:
            answer = {"unavailable": str(reason)}
        except Exception:  # whatever a peer raises: its whole traceback goes to who asked
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
