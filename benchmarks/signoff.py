"""All that only a device can say of the fused kernels, item by item.

`python -m benchmarks.gpu --all` and `python -m benchmarks.tpu --all` run it. Items run in processes
of their own, which tell what came of each: several side by side first, then those that want a
process to themselves, then those that take the time, one after the other. One that does not answer
in its time hangs: its process is ended, that is written down, and a new one goes on
behind it; so it does after whatever the device itself refused, which may have taken the process'
device along. Results are written after each item, and whoever starts again goes on where the last
run stopped, and tries again what failed.
"""

import concurrent.futures
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
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lstmjax.cells import GRU, LSTM, SLSTM, PeepholeLSTM
from lstmjax.recurrence.engine import Engine, platform

STARTING = 90.0
"""Seconds that a new process may take before its first item."""


class Item(NamedTuple):
    """One thing to find out.

    Attributes:
        run: returns what there is to say; an exception is a failure.
        limit: seconds after which it hangs.
        alone: whether nothing may run beside it, as it takes the time.
        fresh: whether it wants a process in which nothing else has run, and none beside it: it
            starts one of its own, and a TPU serves one at a time.
    """

    run: Callable[[], dict[str, Any]]
    limit: float = 60.0
    alone: bool = False
    fresh: bool = False


Items = Mapping[str, Item]

KEPT = ("accelerator", "devices", "versions", "epochs", "seconds")
"""Of a training run's result."""


# --- What is checked -----------------------------------------------------------------------------


def checks(engine: Engine, cases: Mapping[str, Any], repeats: int) -> dict[str, Item]:
    """Every case of the tests, and more that a device may take amiss, against float64.

    Args:
        engine: that computes them.
        cases: name -> `tests.kernel_cases.Case`.
        repeats: times that results of more than four steps must be the same to the bit.
    """
    found = {
        f"check, {name}": Item(
            functools.partial(_check, engine, case, repeats if case.steps > 4 else 0), limit=120.0
        )
        for name, case in cases.items()
    }
    return found | {
        f"masked, {cell}": Item(functools.partial(_check_masked, engine, cell))
        for cell in (LSTM(5), GRU(70))
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
    for heads in (SLSTM(512, heads=4), SLSTM(320, heads=4)):  # divides by what it begins with
        precision = "bfloat16" if heads.hidden_size > 320 else "float32"
        cases += [Case(heads, 16, 33, precision=precision, flags=both, initial=False)]
    cases += [Case(LSTM(256), steps=1, batch=65, precision="bfloat16", flags=both)]
    cases += [Case(LSTM(192), steps=1, batch=65), Case(GRU(256), steps=1, batch=65)]
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


def _check(engine: Engine, case: Any, repeats: int) -> dict[str, Any]:
    from tests.kernel_cases import compare, expected
    from tests.tolerances import relative_error

    args, options, run = _results(engine, case)
    first = run(*args)
    got = jax.device_get(first)
    with on_the_host_of_a_tpu():
        wanted = jax.device_get(expected(case, args, options))
    compare(case, got, wanted)
    error = max(jax.tree.leaves(jax.tree.map(relative_error, got, wanted)))

    @jax.jit
    def differ(a: Any, b: Any) -> Any:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return jnp.any(jnp.stack([jnp.any(x != y) for x, y in pairs]))

    wrong = [differ(first, run(*args)) for _ in range(repeats)]
    if any(wrong):
        raise ValueError(f"{sum(map(int, wrong))} of {repeats} runs differ from the first")
    return {"error": error, "repeats": repeats}


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


@contextlib.contextmanager
def on_the_host_of_a_tpu() -> Iterator[None]:
    """Where there is a TPU, which has no float64, the CPU beside it computes; else nothing new."""
    if platform() == "tpu":
        with jax.default_device(jax.devices("cpu")[0]):
            yield
    else:
        yield


def training(engine: str, *options: str, fresh: bool = False) -> dict[str, Item]:
    """Two epochs of imdb on the demo corpus, masked: the first compiles."""
    return {
        "training of imdb on the demo corpus": Item(
            lambda: _train(engine, options), 180.0, alone=True, fresh=fresh
        )
    }


def _train(engine: str, options: tuple[str, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = pathlib.Path(folder) / "run"
        command = [sys.executable, "experiments/imdb.py", "--recipe", "default", "--data", "demo"]
        command += ["--epochs", "2", "--engine", engine, "--run-dir", str(run), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if re.search(r"\w", line)]
            raise RuntimeError(said[-1][:200] if said else f"exit status {done.returncode}")
        result = json.loads((run / "result.json").read_text())
        return {"result": {name: result[name] for name in KEPT}}


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
                said |= {"ended": True} if isinstance(error, jax.errors.JaxRuntimeError) else {}
                traceback.print_exc()
            said["seconds"] = time.perf_counter() - start
            print(json.dumps(said), file=answers, flush=True)


class Results:
    """What is known so far, by item, in a file that is written after each.

    Args:
        path: JSON; what processes print beside it is added to a file of that name with ``.log``.
        show: called with each item's name and outcome.
    """

    def __init__(self, path: pathlib.Path, show: Callable[[str, dict[str, Any]], None]) -> None:
        self.path, self.show = path, show
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self._lock = threading.Lock()

    def open(self, items: Items) -> list[str]:
        """Names of those of which nothing is known, then of those that failed."""
        new = [name for name in items if name not in self.known]
        return new + [name for name in items if "failed" in self.known.get(name, {})]

    def add(self, name: str, said: dict[str, Any]) -> None:
        """Keep what came of an item."""
        with self._lock:
            self.known[name] = said
            self.show(name, said)
            self.path.write_text(json.dumps(self.known, indent=1) + "\n")


def run_all(
    items: Items, command: list[str], results: Results, seconds: float, side_by_side: int = 1
) -> bool:
    """Run what ``results`` has no answer to yet, then what failed; True if all is done.

    Args:
        items: by name.
        command: starts a process that does `work`, given names (JSON) on its standard input.
        results: so far.
        seconds: after which nothing goes on.
        side_by_side: processes for the items that need not be alone.
    """
    todo, until = results.open(items), time.monotonic() + seconds
    shared = [name for name in todo if not items[name].alone]
    turns = [[shared[k::side_by_side] for k in range(side_by_side)]]
    alone = [name for name in todo if items[name].alone]
    turns += [[[name]] for name in alone if items[name].fresh]
    turns += [[[name for name in alone if not items[name].fresh]]]
    done: list[bool] = []
    for turn in turns:
        with concurrent.futures.ThreadPoolExecutor(len(turn)) as threads:
            run = functools.partial(_run, items, command, results, until)
            done += threads.map(run, turn)
    return all(done)


def _run(items: Items, command: list[str], results: Results, until: float, todo: list[str]) -> bool:
    """One after the other, in a new process after each that hung or ended."""
    while todo and time.monotonic() < until:
        spare = STARTING
        with _worker(command, todo, results.path.with_suffix(".log")) as answers:
            while todo and (left := until - time.monotonic()) > 0:
                limit = items[todo[0]].limit + spare
                said = _answer(answers, min(limit, left))
                if said is None and left < limit:
                    break
                ended = said is None or bool(said.pop("ended", False))
                results.add(
                    todo.pop(0), said or {"failed": f"no answer in {limit:.0f} s: it hangs"}
                )
                spare = 0.0
                if ended:
                    break
    return not todo


def _answer(answers: "queue.Queue[str | None]", limit: float) -> dict[str, Any] | None:
    try:
        line = answers.get(timeout=limit)
    except queue.Empty:
        return None
    return json.loads(line) if line else {"failed": "its process ended", "ended": True}


@contextlib.contextmanager
def _worker(
    command: list[str], names: list[str], log: pathlib.Path
) -> Iterator["queue.Queue[str | None]"]:
    """The lines that a process answers, and None once it has ended."""
    with log.open("a") as printed:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed, text=True
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
