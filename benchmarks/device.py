"""What the benchmarks of a GPU and of a TPU have in common: contenders, measuring, the sign-off."""

import argparse
import functools
import gzip
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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.signoff import Item, Results, environment, on_the_host_of_a_tpu, run_all, work
from lstmjax.cells import GRU, LSTM, SLSTM, Cell, PeepholeLSTM
from lstmjax.layers import Bidirectional, bidirectional
from lstmjax.precision import Precision
from lstmjax.recurrence import Workload, choose_engine, unroll
from lstmjax.recurrence.engine import Engine, platform

RESULTS = pathlib.Path(__file__).parent / "results"

PRECISIONS: tuple[Precision, ...] = ("bfloat16", "float32")

TURNS, LEAST = 7, 0.02
"""Turns of a measurement, and the seconds that each takes at least."""

PEAKS = {
    "H200": {"bandwidth": 4.8e12, "bfloat16": 989e12, "tf32": 494e12, "float32": 67e12},
    "H100": {"bandwidth": 3.35e12, "bfloat16": 989e12, "tf32": 494e12, "float32": 67e12},
} | {
    kind: {"bandwidth": bandwidth, "bfloat16": peak, "float32": peak / 6}  # six products for one
    for kind, bandwidth, peak in (
        ("TPU v4", 1.2e12, 275e12),
        ("TPU v5 lite", 0.82e12, 197e12),
        ("TPU v5", 2.77e12, 459e12),
        ("TPU v6 lite", 1.64e12, 918e12),
        ("TPU7x", 7.4e12, 2307e12),
    )
}
"""Bytes and operations a second, from the makers' data sheets, dense."""


class Shape(NamedTuple):
    """T, B, H and the size of an input."""

    steps: int
    batch: int
    hidden: int
    features: int


FIRST = 3
"""How many shapes are measured with every cell before the others are."""


class Leaky(Cell):
    """A cell as a user would write it: coupled gates, a peephole, a leak."""

    gates = ("f", "g", "o")
    unit_params = {"p": 0.0}
    uses_h = True
    leak: float = 0.1

    def step(self, pre: Any, state: Any, params: Any, h: jax.Array) -> tuple[jax.Array, Any]:
        """One time step."""
        f = jax.nn.sigmoid(pre.f + params.p * h)
        new = f * h + (1 - f) * jax.nn.gelu(pre.g)
        return (1 - self.leak) * jax.nn.sigmoid(pre.o) * jnp.tanh(new) + self.leak * h, state


CELLS: dict[str, Callable[[int], Cell]] = {
    "LSTM": LSTM,
    "PeepholeLSTM": PeepholeLSTM,
    "GRU": GRU,
    "Leaky": Leaky,
    "sLSTM, 4 heads": functools.partial(SLSTM, heads=4),
}


class Problem(NamedTuple):
    """NumPy arrays: parameters, inputs ``(B, T, D)``, and the cotangent of the hidden states."""

    cell: Cell
    params: dict[str, Any]
    x: np.ndarray
    d_hs: np.ndarray


class Runs(NamedTuple):
    """What a contender does: each call starts the work, ``wait`` ends when all of it is done.

    Attributes:
        forward: returns the hidden states ``(B, T, H)``.
        gradient: returns them, the gradient of the inputs, and the others.
        wait: takes what either returned.
        numpy: turns an array of its own into NumPy.
        clock: seconds that a device takes for something that is done so many times.
    """

    forward: Callable[[], Any]
    gradient: Callable[[], Any]
    wait: Callable[[Any], Any]
    numpy: Callable[[Any], np.ndarray]
    clock: "Clock"


Clock = Callable[[Callable[[], Any], int], float]


class CannotRunError(Exception):
    """A contender has not what it needs: a reason, in one clause."""


class Contender(NamedTuple):
    """One way to compute it.

    Attributes:
        name: as printed.
        precision: of its products, a key of `PEAKS`.
        cells: those that it has.
        make: ``Problem -> Runs``.
        needs: the package without which it is skipped.
        late: whether all others are measured first.
    """

    name: str
    precision: str
    cells: tuple[str, ...]
    make: Callable[[Problem], Runs]
    needs: str = "jax"
    late: bool = False


@functools.lru_cache(maxsize=2)
def make_problem(name: str, shape: Shape, seed: int = 0) -> Problem:
    """Draw one, alike for every contender."""
    rng = np.random.default_rng(seed)
    cell = CELLS[name](shape.hidden)
    params = jax.tree.map(np.asarray, cell.init(jax.random.key(seed), shape.features))
    x, d_hs = (
        rng.standard_normal((shape.batch, shape.steps, size), dtype="float32")
        for size in (shape.features, shape.hidden)
    )
    return Problem(cell, params, x, d_hs)


# --- Contenders ----------------------------------------------------------------------------------


def jax_runs(f: Callable[[Any, Any], Any], params: Any, problem: Problem) -> Runs:
    """``f(params, x) -> hs`` under JAX."""
    params, x, d_hs = jax.device_put((params, problem.x, problem.d_hs))

    def gradient(params: Any, x: Any, d_hs: Any) -> tuple[Any, Any, Any]:
        hs, pull_back = jax.vjp(f, params, x)
        d_params, d_x = pull_back(d_hs)
        return hs, d_x, d_params

    forward, gradient = jax.jit(f), jax.jit(gradient)
    return Runs(
        lambda: forward(params, x),
        lambda: gradient(params, x, d_hs),
        jax.block_until_ready,
        np.asarray,
        profiled if platform() != "cpu" else on_the_host(jax.block_until_ready),
    )


def on_the_host(wait: Callable[[Any], Any]) -> Clock:
    """Where there is no device whose clock could be read."""

    def clock(run: Callable[[], Any], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            out = run()
        wait(out)
        return time.perf_counter() - start

    return clock


def profiled(run: Callable[[], Any], repeats: int) -> float:
    """From the first to the last thing that JAX' profiler saw on the device."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                out = run()
            jax.block_until_ready(out)
        return device_seconds(pathlib.Path(folder))


def device_seconds(folder: pathlib.Path) -> float:
    """What a trace says that devices were at work for."""
    (path,) = folder.rglob("*.trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    named = [event for event in events if event.get("name") == "process_name"]
    devices = {e["pid"] for e in named if e["args"]["name"].startswith("/device:")}
    spans = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("ph") == "X" and event["pid"] in devices
    ]
    if not spans:
        raise RuntimeError("the profiler saw nothing on the device")
    return 1e-6 * (max(end for _, end in spans) - min(start for start, _ in spans))


def lstmjax_runs(
    engine: Any, precision: Precision, problem: Problem, *, flags: bool = False
) -> Runs:
    """One of lstmjax' engines; ``flags``: with a mask and resets, of which none says anything."""

    batch, steps, features = problem.x.shape
    work = Workload(platform(), str(problem.x.dtype), precision, steps, batch, features)
    try:
        choose_engine(problem.cell, work, engine)
    except ValueError as refusal:
        raise CannotRunError(str(refusal)) from refusal

    said = {"mask": np.ones((batch, steps), bool), "resets": np.zeros((batch, steps), bool)}
    options: dict[str, Any] = {"precision": precision, "engine": engine} | (said if flags else {})

    def f(params: Any, x: Any) -> Any:
        return unroll(problem.cell, params, x, **options)[0]

    return jax_runs(f, problem.params, problem)


def flax_runs(problem: Problem) -> Runs:
    """`nnx.RNN` around `nnx.OptimizedLSTMCell`."""
    from flax import nnx

    batch, _, features = problem.x.shape
    hidden = problem.cell.hidden_size
    cell = nnx.OptimizedLSTMCell(features, hidden, rngs=nnx.Rngs(0))
    split: Any = nnx.split(nnx.RNN(cell), nnx.Param, ...)
    graph, parameters, rest = split
    ours = problem.params
    state = nnx.to_pure_dict(parameters)
    state["cell"]["dense_i"]["kernel"] = ours["kernel"]
    state["cell"]["dense_h"]["kernel"] = ours["recurrent_kernel"]
    state["cell"]["dense_h"]["bias"] = ours["bias"]
    nnx.replace_by_pure_dict(parameters, state)
    zeros = jnp.zeros((batch, hidden))

    def f(parameters: Any, x: Any) -> Any:
        return nnx.merge(graph, parameters, rest)(x, initial_carry=(zeros, zeros))

    return jax_runs(f, parameters, problem)


def kernel_contenders(engine: Engine) -> Iterator[Contender]:
    """A fused kernel, in both precisions, with and without a mask."""
    for precision in PRECISIONS:
        make = functools.partial(lstmjax_runs, engine, precision)
        yield Contender("lstmjax kernel", precision, tuple(CELLS), make)
        masked = functools.partial(lstmjax_runs, engine, precision, flags=True)
        yield Contender("lstmjax kernel, mask", precision, ("LSTM",), masked)


def jax_contenders(default: str) -> Iterator[Contender]:
    """What runs on any device; ``default``: the precision that Flax' users get there."""
    for engine, cells in (("derived", tuple(CELLS)), ("scan", ("LSTM",))):
        for precision in PRECISIONS:
            make = functools.partial(lstmjax_runs, engine, precision)
            yield Contender(f"lstmjax {engine}", precision, cells, make, late=True)
    default = "float32" if platform() == "cpu" else default
    yield Contender("Flax nnx.RNN", default, ("LSTM",), flax_runs, "flax", late=True)


# --- Measuring -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def reference(name: str, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states and gradient of the inputs, by the plain scan in float64."""
    problem = make_problem(name, shape)
    with jax.enable_x64(True), on_the_host_of_a_tpu():
        wide: Any = jax.tree.map(lambda a: np.asarray(a, "float64"), problem[1:])
        runs = lstmjax_runs("scan", "float32", Problem(problem.cell, *wide))
        hs, d_x, *_ = runs.gradient()
        return np.asarray(hs), np.asarray(d_x)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """max |got - expected| / max |expected|; NaN if anything is not finite."""
    return float(np.max(np.abs(got - expected)) / np.max(np.abs(expected)))


def tolerance(name: str, shape: Shape, precision: str, *, gradient: bool) -> float:
    """As in the project's tests; for TF32, with 10 bits, what bfloat16 may have, divided by 4."""
    terms = shape.steps * (shape.features + shape.hidden)
    if gradient:
        gates = len(CELLS[name](shape.hidden).gates)
        terms += shape.steps * gates * shape.hidden + shape.batch * shape.steps
    unit = {"bfloat16": 2.0**-8, "tf32": 2.0**-10, "float32": 16 * 2.0**-24}[precision]
    return float(unit * np.sqrt(terms))


def seconds(
    run: Callable[[], Any],
    wait: Callable[[Any], Any],
    clock: Clock,
    turns: int = TURNS,
    least: float = LEAST,
) -> float:
    """Median time of one run, the first ones left out."""
    wait(run())
    start = time.perf_counter()
    wait(run())
    repeats = min(100, max(1, round(least / (time.perf_counter() - start))))
    return statistics.median(clock(run, repeats) / repeats for _ in range(turns))


def bound(name: str, shape: Shape, precision: str, device: str, *, gradient: bool) -> float | None:
    """Seconds that no implementation can undercut on this device, if it is a known one."""
    peaks = next((peaks for known, peaks in PEAKS.items() if known in device), None)
    if peaks is None:
        return None
    steps, batch, hidden, features = shape
    cell = CELLS[name](hidden)
    terms = features + hidden // cell.heads
    products = 2 * steps * batch * terms * len(cell.gates) * hidden
    traffic = 4 * steps * batch * (features + hidden)
    if gradient:  # two more products for each; x and d hs are read, hs and d x written
        products, traffic = 3 * products, 2 * traffic
    return max(products / peaks[precision], traffic / peaks["bandwidth"])


def measure(
    name: str, shape: Shape, contender: Contender, device: str, **how: Any
) -> dict[str, Any]:
    """One row of the results; ``how`` is for `seconds`."""
    row = header(name, shape, contender)
    if importlib.util.find_spec(contender.needs) is None:
        return row | {"skipped": f"{contender.needs} is not installed"}
    try:
        return row | _measured(name, shape, contender, device, **how)
    except CannotRunError as reason:
        return row | {"skipped": str(reason)[:200]}
    except Exception as error:  # of any kind: the others go on
        lines = f"{type(error).__name__}: {error}".splitlines()
        return row | {"failed": lines[0][:200]}


def header(name: str, shape: Shape, contender: Contender) -> dict[str, Any]:
    """What every row of the results begins with."""
    row = {"cell": name, "shape": shape._asdict(), "contender": contender.name}
    return row | {"precision": contender.precision}


def _measured(
    name: str, shape: Shape, contender: Contender, device: str, **how: Any
) -> dict[str, Any]:
    start = time.perf_counter()
    runs = contender.make(make_problem(name, shape))
    runs.wait(runs.forward())
    out = runs.gradient()
    runs.wait(out)
    hs, d_x, *_ = out
    first = time.perf_counter() - start
    result: dict[str, Any] = {"first_seconds": first}
    checks = zip(("forward", "gradient"), (hs, d_x), reference(name, shape), strict=True)
    for what, got, expected in checks:
        error = relative_error(runs.numpy(got), expected)
        allowed = tolerance(name, shape, contender.precision, gradient=what == "gradient")
        result[f"{what}_error"] = error
        if not error <= allowed:
            raise ValueError(f"{what} is off by {error:.1e}, allowed are {allowed:.1e}")
    for what, run in (("forward", runs.forward), ("gradient", runs.gradient)):
        result[f"{what}_us_per_step"] = (
            1e6 * seconds(run, runs.wait, runs.clock, **how) / shape.steps
        )
        least = bound(name, shape, contender.precision, device, gradient=what == "gradient")
        if least is not None:
            result[f"{what}_bound_us_per_step"] = 1e6 * least / shape.steps
    return result


# --- Report --------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    steps, batch, hidden, _ = row["shape"].values()
    head = f"{row['cell']:12} T{steps:5} B{batch:4} H{hidden:5}  "
    head += f"{row['contender']:20} {row['precision']:9}"
    for outcome in ("skipped", "failed"):
        if outcome in row:
            return f"{head} {outcome}: {row[outcome]}"
    cells = []
    for what in ("forward", "gradient"):
        taken, least = row[f"{what}_us_per_step"], row.get(f"{what}_bound_us_per_step")
        share = "" if least is None else f" ({100 * least / taken:3.0f} %)"
        cells.append(f"{taken:9.3f}{share}")
    return f"{head} {cells[0]} {cells[1]}  {row['forward_error']:.0e} {row['gradient_error']:.0e}"


class Bench(NamedTuple):
    """What differs between two kinds of devices.

    Attributes:
        platform: as JAX names it; the module is `benchmarks.<platform>`.
        contenders: all of them, the most telling first.
        checks: what the sign-off finds out before it takes the time; interpreted, little of it.
        shapes: that are timed.
        processes: side by side, for what takes no time: most of it goes into compiling.
        seconds: after which nothing new is begun.
        limit: seconds after which an item that takes the time hangs.
        exclusive: whether a device serves one process at a time.
    """

    platform: str
    contenders: Callable[[], Iterator[Contender]]
    checks: Callable[[bool], dict[str, Item]]
    shapes: tuple[Shape, ...]
    processes: int
    seconds: float
    limit: float = 60.0
    exclusive: bool = False


def jobs(bench: Bench, shapes: tuple[Shape, ...]) -> Iterator[tuple[str, Shape, Contender]]:
    """LSTM at the first shapes, then the other cells, then both at the others; fused code first."""

    def turn(one: tuple[int, str, Contender]) -> tuple[bool, bool, bool]:
        number, name, contender = one
        return contender.late, number >= FIRST, name != "LSTM"

    every = itertools.product(range(len(shapes)), CELLS, bench.contenders())
    for number, name, contender in sorted(every, key=turn):
        if name in contender.cells:
            yield name, shapes[number], contender


TINY = Shape(5, 3, 8, 4)
"""Of ``--check``."""


def check(bench: Bench) -> int:
    """Every contender on every cell that it has, in tiny; 1 if one failed."""
    device, failed = environment()["device"], 0
    for name, shape, contender in jobs(bench, (TINY,)):
        row = measure(name, shape, contender, device, turns=1, least=0.0)
        failed |= "failed" in row
        print(line(row), flush=True)
    return failed


def run(bench: Bench, shapes: tuple[Shape, ...], path: pathlib.Path, limit: float) -> None:
    """Measure, print, and write after each row."""
    found, rows, start = environment(), [], time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    print("us per step, forward and forward+gradient (share of the bound), errors against float64")
    for name, shape, contender in jobs(bench, shapes):
        if time.perf_counter() - start > limit:
            rows.append(header(name, shape, contender) | {"skipped": "no time left"})
        else:
            rows.append(measure(name, shape, contender, found["device"]))
        print(line(rows[-1]), flush=True)
        path.write_text(json.dumps({"environment": found, "rows": rows}, indent=1) + "\n")
    plot(rows, path.with_suffix(".png"))
    print(f"{time.perf_counter() - start:.0f} s, written to {path}")


# --- All that only a device can say --------------------------------------------------------------


def items(bench: Bench, interpreted: bool) -> dict[str, Item]:
    """What ``--all`` finds out, in this order; interpreted, without a device, little of each."""
    found = {"environment": Item(environment)} | bench.checks(interpreted)
    how = {"turns": 1, "least": 0.0} if interpreted else {}
    shapes = (TINY,) if interpreted else bench.shapes
    beside = functools.partial(side_by_side, shapes[0], how)
    found["time, seeds and directions side by side"] = Item(beside, bench.limit, alone=True)
    for name, shape, contender in jobs(bench, shapes):
        steps, batch, hidden, _ = shape
        title = f"time, {name}, T {steps}, B {batch}, H {hidden}, {contender.name}"
        what = functools.partial(_timed, name, shape, contender, how)
        found[f"{title}, {contender.precision}"] = Item(what, bench.limit, alone=True)
    return found


def side_by_side(shape: Shape, how: dict[str, Any]) -> dict[str, Any]:
    """What seeds cost in one `jax.vmap`, and both directions in one launch or two: us a step.

    Of an LSTM with its gradient.
    """
    from flax import nnx

    problem, found = make_problem("LSTM", shape), {}

    def time_of(f: Callable[[Any, Any], Any], params: Any, d_hs: np.ndarray) -> float:
        runs = jax_runs(f, params, problem._replace(d_hs=d_hs))
        return 1e6 * seconds(runs.gradient, runs.wait, runs.clock, **how) / shape.steps

    def hidden(params: Any, x: Any) -> Any:
        return unroll(problem.cell, params, x, precision="bfloat16")[0]

    for seeds in (1, 2, 4, 8, 16):
        params, d_hs = jax.tree.map(
            lambda a, n=seeds: np.stack([a] * n), (problem.params, problem.d_hs)
        )
        found[f"{seeds} seeds"] = time_of(jax.vmap(hidden, (0, None)), params, d_hs)
    layer = Bidirectional(problem.cell, shape.features, precision="bfloat16", rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    for launches, where in (("one launch", "gpu"), ("two launches", "cpu")):
        with mock.patch.object(bidirectional, "platform", lambda where=where: where):
            both = time_of(
                lambda params, x: nnx.merge(graph, params)(x)[0],
                params,
                np.concatenate([problem.d_hs] * 2, axis=-1),
            )
        found[f"both directions, {launches}"] = both
    return found


def _timed(name: str, shape: Shape, contender: Contender, how: dict[str, Any]) -> dict[str, Any]:
    return measure(name, shape, contender, jax.devices()[0].device_kind, **how)


def show(name: str, said: dict[str, Any]) -> None:
    """One line of an item's outcome."""
    if "contender" in said and "failed" not in said:
        print(line(said), flush=True)
    else:
        rest = {k: v for k, v in said.items() if k not in ("seconds", "result")}
        outcome = f"FAILED: {said['failed']}" if "failed" in said else f"ok {rest or ''}"
        print(f"{name:60} {said.get('seconds', 0):6.1f} s  {outcome}", flush=True)


def plot(rows: Iterable[dict[str, Any]], path: pathlib.Path) -> None:
    """Times a step of all contenders with an LSTM, at every shape that was measured."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row.get("cell") == "LSTM" and "gradient_us_per_step" in row]
    shapes = list(dict.fromkeys(tuple(row["shape"].values()) for row in rows))
    if not shapes:
        return
    figure, panels = plt.subplots(1, len(shapes), figsize=(6 * len(shapes), 4), squeeze=False)
    for panel, shape in zip(panels[0], shapes, strict=True):
        here = [row for row in rows if tuple(row["shape"].values()) == shape]
        names = [f"{row['contender']}, {row['precision']}" for row in here]
        for what, colour in (("gradient", "lightgrey"), ("forward", "C0")):
            times = [row[f"{what}_us_per_step"] for row in here]
            label = {"gradient": "forward and gradient"}.get(what, what)
            panel.barh(names, times, color=colour, label=label)
        panel.set(title="LSTM, T {}, B {}, H {}, D {}".format(*shape), xlabel="µs a step")
        panel.invert_yaxis()
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def sign_off(bench: Bench, interpreted: bool, path: pathlib.Path, limit: float) -> int:
    """``--all``; 0 once everything is done and nothing failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"benchmarks.{bench.platform}", "--work"]
    command += ["--interpreted"] if interpreted else []
    results, processes = Results(path, show), 1 if interpreted else bench.processes
    done = run_all(items(bench, interpreted), command, results, limit, processes)
    plot(results.known.values(), path.with_suffix(".png"))
    failed = [name for name, said in results.known.items() if "failed" in said]
    print(f"{len(failed)} failed; {'all is' if done else 'not all is'} done; written to {path}")
    return int(bool(failed) or not done)


def _device(bench: Bench) -> tuple[str, str]:
    """Platform and kind; where a device serves one process, another one asks and ends."""
    if not bench.exclusive:
        return platform(), jax.devices()[0].device_kind
    ask = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep=',')"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    kind, _, name = done.stdout.strip().rpartition("\n")[2].partition(",")
    return kind, name


def main(bench: Bench, documentation: str, arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    what, shapes = bench.platform.upper(), bench.shapes
    parser = argparse.ArgumentParser(
        f"python -m benchmarks.{bench.platform}", description=documentation.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="tiny shapes, on any platform")
    parser.add_argument("--all", action="store_true", help="all that only a device can say")
    parser.add_argument("--interpreted", action="store_true", help="with --all: without a device")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--seconds", type=float, default=bench.seconds, help="begin nothing after that"
    )
    parser.add_argument(
        "--shapes", type=int, nargs="*", choices=range(len(shapes)), help="by number; default: all"
    )
    parser.add_argument("--output", type=pathlib.Path, help="JSON; by default named by the device")
    options = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # not all of it for the first
    if options.interpreted:  # warpgroups are threads of XLA's, which has as many as it has devices
        jax.config.update("jax_num_cpu_devices", 8)
    if options.check:
        return check(bench)
    if options.work:
        work(items(bench, options.interpreted), json.load(sys.stdin))
        return 0
    if options.interpreted and options.output is None:
        parser.error("--interpreted tells nothing of a device: say where to write it by --output")
    if options.interpreted:
        return sign_off(bench, True, options.output, options.seconds)
    found, name = _device(bench)
    if found != bench.platform:
        remedy = "--check and --all --interpreted run anywhere"
        parser.error(f"JAX has no {what} here, its backend is {found}; {remedy}")
    results, name = RESULTS / bench.platform, name.lower().replace(" ", "-")
    if options.all:
        path = options.output or results / f"{name}-all.json"
        return sign_off(bench, False, path, options.seconds)
    if options.shapes is not None:
        shapes = tuple(shapes[k] for k in options.shapes)
    run(bench, shapes, options.output or results / f"{name}.json", options.seconds)
    return 0
