"""All that only a device can say of the fused kernels, item by item.

`python -m benchmarks.gpu --all` runs it. Items run one after the other in a process of their own,
which tells what came of each. One that does not answer in its time hangs: the process is ended,
that is written down, and a new one goes on behind it. Results are written after each item, and
whoever starts again goes on where the last run stopped, and tries again what failed.
"""

import contextlib
import functools
import importlib.util
import json
import pathlib
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lstmjax.cells import GRU, LSTM, PeepholeLSTM
from lstmjax.recurrence.engine import Engine

STARTING = 90.0
"""Seconds that a new process may take before its first item."""


class Item(NamedTuple):
    """One thing to find out.

    Attributes:
        run: returns what there is to say; an exception is a failure.
        limit: seconds after which it hangs.
    """

    run: Callable[[], dict[str, Any]]
    limit: float = 60.0


Items = Mapping[str, Item]


# --- What is checked -----------------------------------------------------------------------------


def checks(engine: Engine, cases: Mapping[str, Any], repeats: int) -> dict[str, Item]:
    """Every case of the tests, and more that a device may take amiss, against float64.

    Args:
        engine: that computes them.
        cases: name -> `tests.kernel_cases.Case`.
        repeats: times that results must be the same to the bit.
    """
    found = {
        f"check, {name}": Item(functools.partial(_check, engine, cases[name])) for name in cases
    }
    found |= {
        f"masked, {cell}": Item(functools.partial(_check_masked, engine, cell))
        for cell in (LSTM(5), GRU(70))
    }
    return found | {
        f"{repeats} times, {case.cell}, {case.precision}": Item(
            functools.partial(_check_repeats, engine, case, repeats), limit=90.0
        )
        for case in cases.values()
        if case.steps > 4
    }


def more_cases(largest: int) -> dict[str, Any]:
    """Clusters of every size, odd T, T 1, B 65; up to so many units."""
    from tests.kernel_cases import Case, Three

    both = ("mask", "resets")
    cases = [Case(LSTM(64 * n), steps=33, batch=16, precision="bfloat16") for n in range(1, 7)]
    cases += [Case(GRU(64 * n), steps=33, batch=16, precision="bfloat16") for n in (7, 8)]
    cases += [Case(LSTM(n), steps=33, batch=16, flags=both) for n in (64, 100, 192)]
    cases += [Case(GRU(256), steps=33, batch=16, flags=both, reverse=True)]
    cases += [Case(PeepholeLSTM(100), steps=37, batch=65, flags=both)]
    cases += [Case(Three(256), steps=37, batch=65, precision="bfloat16", flags=both)]
    cases += [Case(LSTM(256), steps=1, batch=65, precision="bfloat16", flags=both)]
    fit = [case for case in cases if case.cell.hidden_size <= largest]
    return {f"{case.cell}, T {case.steps}, B {case.batch}, {case.precision}": case for case in fit}


def _results(engine: Engine, case: Any, **change: Any) -> Any:
    from tests.kernel_cases import draw, values_and_gradients

    args, options = draw(case)
    options |= change

    @jax.jit
    def run(*args: Any) -> Any:
        return values_and_gradients(engine, case.cell, *args, **options)

    return args, options, run


def _check(engine: Engine, case: Any) -> dict[str, Any]:
    from tests.kernel_cases import compare, expected
    from tests.tolerances import relative_error

    args, options, run = _results(engine, case)
    got, wanted = jax.device_get(run(*args)), jax.device_get(expected(case, args, options))
    compare(case, got, wanted)
    return {"error": max(jax.tree.leaves(jax.tree.map(relative_error, got, wanted)))}


def _check_masked(engine: Engine, cell: Any) -> dict[str, Any]:
    """Without a single valid step the carry passes by, and its gradient, and there is no other."""
    from tests.kernel_cases import Case

    case = Case(cell, steps=7, flags=("mask",))
    nothing = jnp.zeros((case.batch, case.steps), bool)
    args, _, run = _results(engine, case, mask=nothing)
    (hs, final), (d_params, d_x, d_initial) = run(*args)
    _, _, initial, _, d_final = args
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), (final, d_initial), (initial, d_final))
    none = jax.tree.map(lambda a: not jnp.any(a), (hs, d_params, d_x))
    if not all(jax.tree.leaves((same, none))):
        raise ValueError("masked steps leave something behind")
    return {}


def _check_repeats(engine: Engine, case: Any, repeats: int) -> dict[str, Any]:
    args, _, run = _results(engine, case)
    first = run(*args)

    @jax.jit
    def differ(a: Any, b: Any) -> Any:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return jnp.any(jnp.stack([jnp.any(x != y) for x, y in pairs]))

    wrong = [differ(first, run(*args)) for _ in range(repeats)]
    if any(wrong):
        raise ValueError(f"{sum(map(int, wrong))} of {repeats} runs differ from the first")
    return {}


def training(engine: str, *options: str) -> dict[str, Item]:
    """An epoch of imdb on the demo corpus, masked."""
    return {"training of imdb on the demo corpus": Item(lambda: _train(engine, options), 180.0)}


def _train(engine: str, options: tuple[str, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = pathlib.Path(folder) / "run"
        command = [sys.executable, "experiments/imdb.py", "--recipe", "default", "--data", "demo"]
        command += ["--epochs", "1", "--engine", engine, "--run-dir", str(run), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if re.search(r"\w", line)]
            raise RuntimeError(said[-1][:200] if said else f"exit status {done.returncode}")
        return {"result": json.loads((run / "result.json").read_text())}


# --- Running -------------------------------------------------------------------------------------


def work(items: Items, names: list[str]) -> None:
    """Run items, and say what came of each in a line; what else is printed goes elsewhere."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for name in names:
            start = time.perf_counter()
            try:
                said = items[name].run()
            except Exception as error:  # of any kind: the others go on
                said = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            said["seconds"] = time.perf_counter() - start
            print(json.dumps(said), file=answers, flush=True)


def run_all(
    items: Items,
    command: list[str],
    path: pathlib.Path,
    seconds: float,
    show: Callable[[str, dict[str, Any]], None],
) -> bool:
    """Run what ``path`` has no answer to yet, then what failed; True if all is done.

    Args:
        items: by name.
        command: starts a process that does `work`, given names (JSON) on its standard input.
        path: of the results, JSON.
        seconds: after which nothing goes on.
        show: called with each item's name and outcome.
    """
    kept = json.loads(path.read_text()) if path.exists() else {}
    todo = [name for name in items if name not in kept]
    todo += [name for name in items if "failed" in kept.get(name, {})]
    until = time.monotonic() + seconds
    while todo and time.monotonic() < until:
        spare = STARTING
        with _worker(command, todo) as answers:
            while todo and (left := until - time.monotonic()) > 0:
                limit = items[todo[0]].limit + spare
                said = _answer(answers, min(limit, left))
                if said is None and left < limit:
                    break
                kept[todo[0]] = said or {"failed": f"no answer in {limit:.0f} s: it hangs"}
                show(todo[0], kept[todo.pop(0)])
                path.write_text(json.dumps(kept, indent=1) + "\n")
                spare = 0.0
                if said is None or "ended" in said:
                    break
    return not todo


def _answer(answers: "queue.Queue[str | None]", limit: float) -> dict[str, Any] | None:
    try:
        line = answers.get(timeout=limit)
    except queue.Empty:
        return None
    return json.loads(line) if line else {"failed": "its process ended", "ended": True}


@contextlib.contextmanager
def _worker(command: list[str], names: list[str]) -> Iterator["queue.Queue[str | None]"]:
    """The lines that a process answers, and None once it has ended."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()

    def read(stream: Any) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(json.dumps(names))
    try:
        yield lines
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


def environment() -> dict[str, str]:
    """What the results are from; no host name."""
    device = jax.devices()[0]
    found = {"device": device.device_kind, "python": sys.version.split()[0], "jax": jax.__version__}
    for name in ("core_count", "compute_capability", "num_cores"):
        if hasattr(device, name):
            found[name] = str(getattr(device, name))
    found["runtime"] = device.client.platform_version.splitlines()[0]
    for package in ("flax", "torch"):
        if importlib.util.find_spec(package) is not None:
            found[package] = __import__(package).__version__
    return found
