"""The parts of the benchmark: which cases, which contenders, and what follows from the times."""

import argparse
import itertools
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from tqdm import tqdm

from benchmarks import contenders, problems
from benchmarks.contenders import (
    BFLOAT16,
    CHAINS,
    CPU,
    DERIVED,
    LARGE,
    LINEN,
    ONE_HEAP,
    SCAN,
    STEPS,
    TORCH,
    Contender,
)
from benchmarks.harness import ROOT, Row, Session, Work, environment
from benchmarks.problems import Case, S

MODES = ("forward", "forward+backward")
AXES = {"steps": (100, 500, 2000), "batch": (16, 64, 256), "hidden": (32, 100, 256, 512)}
TINY = {"steps": 6, "batch": 4, "features": 3, "hidden": 5, "size": 16, "updates": 3}
TARGET = 0.874
"""Test accuracy that ``to_accuracy`` waits for: the notebook's."""
KERAS_EPOCHS = "6"
"""Epochs in which Keras may reach it: twice the notebook's."""

Facts = dict[str, float]
"""Figures that follow from the rows of a part, by what they say."""


def size(case: Case, options: argparse.Namespace) -> Case:
    """The case, or with ``--tiny`` one that only shows that everything runs."""
    return case | {k: v for k, v in TINY.items() if k in case} if options.tiny else case


def work(who: Iterable[Contender], case: Case, column: str) -> Work:
    """All these contenders on one case."""
    return [(contender, case, column) for contender in who]


def heading(case: Case) -> str:
    """Mode and sizes of a case."""
    return f"{case['mode']}, T {case['steps']}, B {case['batch']}, H {case['hidden']}"


def median(rows: Sequence[Row], contender: Contender, column: str) -> float | None:
    """Median seconds of a contender in a column."""
    here = (r["seconds"] for r in rows if (r["contender"], r["column"]) == (contender.name, column))
    return next(here, None)


def against_peers(rows: Sequence[Row], column: str) -> Facts:
    """Our time as a share of the fastest peer's in one column; ours is the first of lstmjax."""
    here = [row for row in rows if row["column"] == column]
    ours = [row for row in here if row["contender"].startswith("lstmjax")]
    peers = [row for row in here if row not in ours]
    if not ours or not peers:
        return {}
    fastest = min(peers, key=lambda row: row["seconds"])
    what = f"{column}: {ours[0]['contender']} / {fastest['contender']} (fastest peer)"
    return {what: ours[0]["seconds"] / fastest["seconds"]}


def recurrence(session: Session, options: argparse.Namespace) -> Facts:
    """Forward, and forward and backward, over a grid around the notebook's shape."""
    shapes = [S, *(S | {axis: n} for axis, values in AXES.items() for n in values if n != S[axis])]
    shapes[-1] |= {"steps": 100}  # H 512
    if options.full:
        shapes = [S | dict(zip(AXES, n, strict=True)) for n in itertools.product(*AXES.values())]
    facts: Facts = {}
    for sizes, mode in session.over(
        [*itertools.product(shapes[: 1 if options.tiny else None], MODES)]
    ):
        case = size(sizes, options) | {"mode": mode}
        column = heading(case)
        who = [c for c in contenders.RECURRENCE if sizes == S or "one device" not in c.name]
        who = [c for c in who if c != ONE_HEAP or mode == MODES[1]]
        session.measure(work(who, case, column), seconds=10 if sizes == S else 2.5)
        facts |= against_peers(session.rows, column)
        ours = (median(session.rows, who, column) for who in (CPU, ONE_HEAP, DERIVED, BFLOAT16))
        function, kept, exact, fast = ours
        if exact and fast:
            facts[f"{column}: bfloat16 / float32"] = fast / exact
        if exact and function:
            facts[f"{column}: cpu / derived"] = function / exact
        if exact and kept:
            facts[f"{column}: cpu, one heap / derived"] = kept / exact
    return facts


def floor(session: Session, options: argparse.Namespace) -> Facts:
    """The matrix products alone, and how near to them the engines and PyTorch come."""
    sizes, big = size(S, options), size({"size": 2048}, options)
    for _ in session.over([sizes]):
        engines = [
            work((CPU, DERIVED, SCAN, TORCH), sizes | {"mode": mode}, mode) for mode in MODES
        ]
        alone = work(CHAINS, sizes, "products") + work(LARGE, big, "products")
        alone += work(STEPS, sizes, "element-wise")
        session.measure([*alone, *itertools.chain(*engines)], seconds=20)
    turns = {(r["contender"], r["column"]): np.array(r["turns"]) for r in session.rows}
    once, both = (turns[who.name, "products"] for who in CHAINS)
    steps, batch, features, hidden = sizes.values()
    rate = 2 * big["size"] ** 3 / min((turns[who.name, "products"] for who in LARGE), key=np.median)
    one = 2 * steps * batch * 4 * hidden / rate  # one feature's share of a large product
    floors = {  # x W; the gradient adds dz Wᵀ, xᵀ dz and hᵀ dz
        "forward": once + one * features,
        "forward+backward": both + one * (3 * features + hidden),
    }
    facts = {"large products, GFLOP/s": float(np.median(rate)) / 1e9}
    facts |= {f"{mode}: floor, ms": 1e3 * float(np.median(floors[mode])) for mode in MODES}
    # What the engine does besides: the step, its gradient, the pre-activations once more.
    step, gradient = (turns[who.name, "element-wise"] for who in STEPS)
    besides = {"forward": step, "forward+backward": step + gradient + once + one * features}
    for mode, extra in besides.items():
        least = 1e3 * float(np.median(floors[mode] + extra))
        facts[f"{mode}: floor and what else must be computed, ms"] = least
    for mode, who in itertools.product(floors, (CPU, DERIVED, SCAN, TORCH)):
        if (who.name, mode) in turns:  # turn by turn, so that the machine's drift does not enter
            ratio = float(np.median(turns[who.name, mode] / floors[mode]))
            facts[f"{mode}: {who.name} / floor"] = ratio
    return facts


def lengths(session: Session, options: argparse.Namespace) -> Facts:
    """Rows of 1 to T steps, half of a full batch, as they come, and sorted on each device."""
    facts: Facts = {}
    sizes = size(S | {"batch": 256}, options) | {"mode": MODES[1]}
    columns = ("full", "as they come", "sorted")
    for _ in session.over([sizes]):
        jobs = [work((CPU, DERIVED), sizes | {"lengths": name}, name) for name in columns]
        session.measure([*itertools.chain(*jobs)], seconds=20)
    turns = {(r["contender"], r["column"]): np.array(r["turns"]) for r in session.rows}
    for who, column in itertools.product((CPU, DERIVED), columns[1:]):
        if (who.name, column) in turns:
            ratio = np.median(turns[who.name, column] / turns[who.name, "full"])
            facts[f"{who.name}: {column} / full"] = float(ratio)
    return facts


def train_step(session: Session, options: argparse.Namespace) -> Facts:
    """The notebook's model at 500 steps: whole training step with Adam, the time of one."""
    case = size(S, options) | {"batches": 4}
    for _ in session.over([case]):
        who = work(contenders.TRAIN_STEP, case, "train step")
        session.measure(who, seconds=30, per=case["batches"])
    return against_peers(session.rows, "train step")


def epoch(session: Session, options: argparse.Namespace) -> Facts:
    """One epoch on IMDB as a user of each would run it; of the peers a sixteenth, times 16."""
    if not _have_imdb(session, options):
        return {}
    batches, turns = -(-25_000 // 64), 4
    case = {"steps": 500, "data_dir": options.data_dir}
    parts = [
        (who, case | {"share": math.ceil(batches / turns / (1 if whole else 16))}, "epoch")
        for who in contenders.EPOCH
        for whole in [options.full or who.process == "lstmjax"]
    ]
    for _ in session.over([case]):
        session.measure(parts, turns=turns)
    for row in session.rows:
        times = max(1, batches / (turns * row["case"]["share"]))
        row |= {"seconds": times * sum(row["turns"]), "cpu": times * sum(row["cpu_turns"])}
    compiling = {
        f"{row['contender']}: compilation and one batch a shape, s": row["first"]
        for row in session.rows
        if row["contender"].startswith("lstmjax")
    }
    return against_peers(session.rows, "epoch") | compiling


def cumsum(session: Session, options: argparse.Namespace) -> Facts:
    """The 1,000 updates of the cumulative sum, in a fresh process each time."""
    case = size({"updates": 1000}, options)
    for _ in session.over(range(1 if options.tiny else 3)):
        session.measure(work(contenders.CUMSUM, case, "again"), turns=1)
        session.end_processes()
    measured, session.rows = session.rows, []
    kinds = {"again": "1,000 updates", "first": "1,000 updates and compilation"}
    for kind, column in kinds.items():
        for name in dict.fromkeys(row["contender"] for row in measured):
            mine = [row for row in measured if row["contender"] == name]
            turns = [row["first"] if kind == "first" else row["turns"][0] for row in mine]
            middle = sorted(turns)[len(turns) // 2]
            row = {"column": column, "contender": name, "case": case}
            session.rows.append(row | {"turns": turns, "seconds": middle})
    facts = [against_peers(session.rows, column) for column in kinds.values()]
    return facts[0] | facts[1]


def growth(session: Session, options: argparse.Namespace) -> Facts:
    """Time and memory of forward and backward against T, B and H."""
    axes = {
        "steps": (125, 250, 500, 1000, 2000, 4000),
        "batch": (16, 256),
        "hidden": (32, 256, 512),
    }
    for axis, values in session.over([*axes.items()][: 1 if options.tiny else None]):
        cases = [size(S | {axis: n}, options) | {"mode": MODES[1]} for n in values]
        each = [work((CPU, DERIVED, SCAN, LINEN), case, heading(case)) for case in cases]
        # All sizes take turns: growth cannot be told from the machine's own changes otherwise.
        turns = 5 if axis == "steps" else 3
        session.measure([*itertools.chain(*each)], turns=turns, memory=True)
    facts: Facts = {}
    for who in (CPU, DERIVED, SCAN, LINEN):
        columns = [heading(S | {"mode": MODES[1], "steps": steps}) for steps in (500, 4000)]
        short, long = (median(session.rows, who, column) for column in columns)
        if short and long:
            facts[f"{who.name}: time at T 4000 / (8 x time at T 500)"] = long / (8 * short)
    return facts


def to_accuracy(session: Session, options: argparse.Namespace) -> Facts:
    """From the start of the process to 87.4 % test accuracy, seen after an epoch; mean of seeds.

    A run that ends without having reached it counts with the time it took.
    """
    if not _have_imdb(session, options):
        return {}
    data_dir, column = str(problems.imdb_folder(options.data_dir)), "to 87.4 %"
    imdb = ["experiments/imdb.py", "--recipe", "default", "--data-dir", data_dir, "--seed"]
    keras = ["-m", "benchmarks.contenders.keras_peers"]
    runs: dict[str, list[tuple[float, bool]]] = {}
    for seed in map(str, session.over(range(options.seeds))):
        with tempfile.TemporaryDirectory() as folder:
            run = f"{folder}/ours"
            commands = {
                "lstmjax, default recipe": ("lstmjax", [*imdb, seed, "--run-dir", run], run),
                "Keras on TensorFlow": (
                    "keras-tensorflow",
                    [*keras, folder, seed, KERAS_EPOCHS, data_dir],
                    folder,
                ),
            }
            for name, command in commands.items():
                seconds, reached = time_to_accuracy(*command)
                runs.setdefault(name, []).append((seconds, reached))
                tqdm.write(f"{name}, seed {seed}: {'' if reached else 'not in '}{seconds:.0f} s")
    facts: Facts = {}
    for name, found in runs.items():
        turns = [seconds for seconds, _ in found]
        facts[f"{name}: seeds of {options.seeds} that reached it"] = sum(ok for _, ok in found)
        row = {"column": column, "contender": name, "case": {}, "turns": turns}
        session.rows.append(row | {"seconds": sum(turns) / len(turns)})
    return against_peers(session.rows, column) | facts


def time_to_accuracy(process: str, command: list[str], run_dir: str) -> tuple[float, bool]:
    """Seconds until the command's ``metrics.jsonl`` holds the target, when the command is stopped;
    with False, the seconds to its end, the target not reached.
    """
    metrics, started = pathlib.Path(run_dir, "metrics.jsonl"), time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(process) | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            ended = child.poll() is not None
            seconds = time.perf_counter() - started
            lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
            records = [json.loads(line) for line in lines if line.endswith("\n")]
            if any(record.get("test_accuracy", 0) >= TARGET for record in records):
                return seconds, True
            if ended:
                return seconds, False
            time.sleep(0.1)
    finally:
        child.terminate()
        child.wait()


def _have_imdb(session: Session, options: argparse.Namespace) -> bool:
    """Whether IMDB is there; encodes it once, so that no contender has to."""
    if not (problems.imdb_folder(options.data_dir) / "imdb_reviews" / "plain_text").is_dir():
        session.skipped["all"] = "no prepared IMDB; name its TFDS folder by --data-dir"
        return False
    problems.imdb({"steps": 500, "data_dir": options.data_dir})
    return True


PARTS: dict[str, Callable[[Session, argparse.Namespace], Facts]] = {
    part.__name__: part
    for part in (recurrence, train_step, epoch, cumsum, floor, lengths, growth, to_accuracy)
}
DEFAULT = tuple(name for name in PARTS if name != "to_accuracy")
"""What runs when no part is named."""
