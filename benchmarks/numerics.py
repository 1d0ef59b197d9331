"""How far every engine is from float64: ``python -m benchmarks.numerics``; renews docs/numerics.md.

Runs every engine that serves an LSTM on this platform, in both precisions. Where there is no TPU,
its kernel is interpreted; where there is no GPU, plain JAX computes what its kernel would.
"""

import argparse
import datetime
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from tqdm import tqdm

from benchmarks.harness import ROOT, deviation
from benchmarks.report import BEGIN, END, device_name, machine, merge, versions
from lstmjax.cells import LSTM
from lstmjax.precision import Precision
from lstmjax.recurrence import ENGINES, Engine, PallasGPU, PallasTPU, Scan, Workload, unroll
from lstmjax.recurrence.gpu.plain import plain_kernel

FOLDER, PAGE = ROOT / "benchmarks" / "results" / "numerics", ROOT / "docs" / "numerics.md"
UPDATES, RATE = 100, 1e-3
ELSEWHERE: dict[Engine, tuple[str, Engine]] = {
    PallasTPU(): ("interpreted", PallasTPU(interpret=True)),
    PallasGPU(): ("in plain JAX", PallasGPU(interpret=plain_kernel)),
}
"""How a kernel runs where its platform is not."""
COLUMNS = {
    "last output": "h after the last step",
    "gradients": "worst gradient",
    "loss": f"loss after {UPDATES} updates",
}


class Sizes(NamedTuple):
    """Of the recurrence (T, B, D, H) and of the sequences trained on (T)."""

    steps: int = 500
    batch: int = 8
    features: int = 32
    hidden: int = 100
    trained_steps: int = 20


Run = Callable[[Any, Array], Array]
"""``(params, x (T, B, D)) -> hs (T, B, H)`` of an LSTM."""


def contestants(sizes: Sizes) -> Iterator[tuple[str, Engine, Precision]]:
    """Name, engine and precision of everything that can run here."""
    cell, platform = LSTM(sizes.hidden), jax.default_backend()
    for engine in ENGINES.values():
        for precision in get_args(Precision):
            work = Workload(
                platform, "float32", precision, sizes.steps, sizes.batch, sizes.features
            )
            if engine.refusal(cell, work) is None:
                yield engine.name, engine, precision
            elif engine in ELSEWHERE:
                how, stand_in = ELSEWHERE[engine]
                if stand_in.refusal(cell, work) is None:
                    yield f"{engine.name}, {how}", stand_in, precision


def problem(sizes: Sizes) -> tuple[Any, Array, Array]:
    """Float32 parameters, inputs and cotangents of all outputs."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[1], (sizes.steps, sizes.batch, sizes.features))
    d_hs = jax.random.normal(keys[2], (sizes.steps, sizes.batch, sizes.hidden))
    return LSTM(sizes.hidden).init(keys[0], sizes.features), x, d_hs


def recurrence(run: Run, params: Any, x: Array, d_hs: Array) -> Mapping[str, Mapping[str, Any]]:
    """The last output, and the gradients of parameters and inputs, as NumPy arrays."""

    @jax.jit
    def both(params: Any, x: Array, d_hs: Array) -> tuple[Array, Any]:
        hs, pull_back = jax.vjp(run, params, x)
        return hs[-1], pull_back(d_hs)

    last, gradients = jax.device_get(both(params, x, d_hs))
    named = {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(gradients)
    }
    return {"last output": {"h": last}, "gradients": named}


def final_loss(run: Run, sizes: Sizes, params: Any, x: Array) -> float:
    """Cross-entropy after updates of Adam on one batch: is a sum over time of x positive?

    The logit is the mean of the last output.
    """
    steps = sizes.trained_steps
    labels = (x[:steps, :, 0].sum(0) > 0).astype(x.dtype)
    optimizer = optax.adam(RATE)

    def loss_of(params: Any) -> Array:
        logits = run(params, x[:steps])[-1].mean(-1)
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    def update(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        params, moments = state
        changes, moments = optimizer.update(jax.grad(loss_of)(params), moments, params)
        return (optax.apply_updates(params, changes), moments), None

    @jax.jit
    def train(params: Any) -> Array:
        (params, _), _ = lax.scan(update, (params, optimizer.init(params)), length=UPDATES)
        return loss_of(params)

    return float(train(params))


def make_run(hidden: int, engine: Engine, precision: Precision) -> Run:
    """The LSTM by that engine."""

    def run(params: Any, x: Array) -> Array:
        cell = LSTM(hidden)
        return unroll(cell, params, x, time_major=True, engine=engine, precision=precision)[0]

    return run


def measure(sizes: Sizes) -> dict[str, Any]:
    """Deviations from the plain scan in float64, by engine and precision, and that one's loss."""
    given = problem(sizes)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), given)
        exact = make_run(sizes.hidden, Scan(), "float32")
        expected, loss = recurrence(exact, *wide), final_loss(exact, sizes, *wide[:2])
    rows = []
    for name, engine, precision in tqdm([*contestants(sizes)], desc="engines", disable=None):
        run = make_run(sizes.hidden, engine, precision)
        found = recurrence(run, *given)
        row = {what: deviation(expected[what], found[what]) for what in expected}
        row["loss"] = abs(final_loss(run, sizes, *given[:2]) - loss) / loss
        rows.append({"engine": name, "precision": precision, **row})
    return {"sizes": sizes._asdict(), "loss": loss, "rows": rows}


def table(found: Mapping[str, Any]) -> str:
    """The measurement in Markdown."""
    facts, sizes = found["machine"], found["sizes"]
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        f"`python -m benchmarks.numerics`, {found['date']}, on {found['platform']}; "
        f"{facts['processor']}, {facts['cores']} cores; Python {facts['python']}, {packages}. "
        f"LSTM, T {sizes['steps']}, B {sizes['batch']}, D {sizes['features']}, "
        f"H {sizes['hidden']}; trained at T {sizes['trained_steps']}, where float64 ends at a loss "
        f"of {found['loss']:.4f}. Seed 0.\n",
        f"| engine | precision | {' | '.join(COLUMNS.values())} |",
        f"|{'---|' * (2 + len(COLUMNS))}",
    ]
    for row in found["rows"]:
        cells = " | ".join(f"{row[what]:.1e}" for what in COLUMNS)
        lines.append(f"| `{row['engine']}` | {row['precision']} | {cells} |")
    return "\n".join(lines) + "\n"


def write_page(folder: pathlib.Path = FOLDER, page: pathlib.Path = PAGE) -> None:
    """Renew the measured part of the page."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    block = "\n".join(f"## {name}\n\n{table(part['numerics'])}" for name, part in results.items())
    before, rest = page.read_text().split(BEGIN)
    text = f"{before}{BEGIN}\n\n{block}\n{END}{rest.split(END)[1]}"
    temporary = page.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, page)


def main(arguments: list[str]) -> None:
    """Measure, print, keep, renew the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.numerics", description=__doc__)
    parser.add_argument("--report", action="store_true", help="only renew docs/numerics.md")
    options = parser.parse_args(arguments)
    if not options.report:
        facts, platform = machine(), jax.default_backend()
        found = measure(Sizes()) | {"platform": platform, "machine": facts, "versions": versions()}
        found["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        print(table(found))
        name = device_name(facts) if platform == "cpu" else jax.devices()[0].device_kind
        merge(FOLDER / f"{name.lower().replace(' ', '-')}.json", "numerics", found)
    write_page()


if __name__ == "__main__":
    main(sys.argv[1:])
