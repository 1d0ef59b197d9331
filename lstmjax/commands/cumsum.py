"""Per-step classification: has the running sum of ten random numbers reached ten quarters yet?

    lstmjax cumsum                      # learning rate from 2e-2 down to 0
    lstmjax cumsum --recipe notebook    # Adam(1e-3) throughout
    lstmjax cumsum --seeds 8            # eight runs side by side in one program

LSTM(20) with an output at every step and one dense layer shared by all steps; 1,000 updates on one
fresh sequence each, all of them inside one compiled program; then accuracy on 10,000 fresh
sequences and a table of expected against predicted. The recipes differ in the learning rate alone.

Expect, over seeds 0 to 4 on two x86-64 cores (jax 0.10.2; AVX2, the same with AVX-512), a per-step
accuracy of

    default     98.21 %  (97.20-98.57)
    notebook    93.89 %  (93.69-94.19)

A first run took 4.0 to 4.9 s from start to end with AVX-512, most of it start-up and compilation
(to 7.4 s while others slowed the machine down); a second one, its program compiled already, 3.4 to
4.0 s.
"""

import dataclasses
import functools
import math
import pathlib
import time
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int, PyTree

from lstmjax import stopping, training
from lstmjax.cells import Cell, CellSpec, load_cell
from lstmjax.data import sample_cumsum
from lstmjax.errors import UserError
from lstmjax.models import Tagger, count_parameters, summary
from lstmjax.precision import Precision
from lstmjax.training.command import require_positive, require_rate, require_seed, run_command
from lstmjax.training.devices import BATCH
from lstmjax.training.step import Number
from lstmjax.workbench.config import require_replicas
from lstmjax.workbench.rows import ACCURACY, Replica, Row, outcome_of, replicas_of, table_of


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one run."""

    recipe: Literal["notebook", "default"] = "default"
    """Gives every other flag its default."""
    cell: str = "LSTM"
    """LSTM, GRU, PeepholeLSTM, or your own: path/to/file.py:MyCell; with hyper-parameters, if any:
    "path/to/file.py:MyCell(leak=0.1)"."""
    accelerator: training.Accelerator = "auto"
    """Device to run on; auto takes the best there is."""
    precision: Precision = "float32"
    """bfloat16: products in bfloat16, sums and states in float32."""
    seed: int = 0
    """Of parameters and sequences; with --seeds the first of them."""
    seeds: int = 1
    """Train so many replicas side by side in one program, each equal to its single run."""
    learning_rates: tuple[float, ...] = ()
    """Train every seed with each of these, in the same program."""
    hidden_size: int = 20
    """Units of the cell."""
    steps: int = 10
    """Numbers in a sequence; the label turns 1 once their sum reaches a quarter of this."""
    updates: int = 1000
    """Updates of the parameters."""
    batch_size: int = 1
    """Fresh sequences an update."""
    learning_rate: float = 2e-2
    """Of Adam, at the first update."""
    decay: bool = True
    """Let the learning rate fall to 0 along a cosine."""
    run_dir: pathlib.Path | None = None
    """Where the run is written; without it, a new folder under runs/."""

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """The runs that this one is made of."""
        rates = self.learning_rates or (self.learning_rate,)
        return replicas_of(self.seed, self.seeds, rates)


RECIPES = {
    "default": Config(),
    "notebook": Config(recipe="notebook", learning_rate=1e-3, decay=False),
}
EVALUATION_SEQUENCES = 10_000


def check(config: Config) -> None:
    """Raise `UserError` for settings that cannot work."""
    names = ("hidden_size", "steps", "updates", "batch_size", "seeds")
    require_positive({name: getattr(config, name) for name in names})
    for rate in (config.learning_rate, *config.learning_rates):
        require_rate(rate)
    require_seed(config.seed)
    require_seed(config.seed + config.seeds - 1)
    require_replicas(config.seeds, config.learning_rates)


class Outcome(NamedTuple):
    """What the compiled program returns; once fetched, NumPy arrays, of replicas one axis more.

    Attributes:
        curves: loss and accuracy of every update, each ``(updates,)``.
        test: mean loss and accuracy on fresh sequences.
        example: the first of those: numbers, labels, probabilities, each ``(steps,)``.
    """

    curves: tuple[Number, Number]
    test: tuple[Number, Number]
    example: tuple[Number, Number, Number]


def make_model(config: Config, cell: Cell, seed: int | Array) -> Tagger:
    """The model before the first update."""
    rngs = nnx.Rngs(jax.random.key(seed))
    return Tagger(cell, 1, precision=config.precision, rngs=rngs)


def experiment(config: Config, cell: Cell, seed: int | Array, rate: float | Array) -> Outcome:
    """Draw the parameters, make all updates, examine the result: pure, to be compiled whole."""
    if config.decay:
        rate = optax.cosine_decay_schedule(rate, config.updates)
    optimizer = optax.flatten(optax.adam(rate, eps=1e-7))  # one array: less to compile
    graphdef, params = nnx.split(make_model(config, cell, seed), nnx.Param)
    drawn = config.updates * config.batch_size
    x, y = sample_cumsum(training.training_key(seed), drawn + EVALUATION_SEQUENCES, config.steps)
    batches = jax.tree.map(
        lambda a: a[:drawn].reshape(config.updates, config.batch_size, *a.shape[1:]), (x, y)
    )
    noise = jax.random.fold_in(jax.random.key(seed), 2**31 + 1)  # beside `training_key`

    def loss_of(params: PyTree, x: Array, y: Array, number: Array) -> tuple[Array, Array]:
        keys = jax.random.fold_in(noise, number)
        return losses(nnx.merge(graphdef, params)(x, keys=keys), y)

    def update(
        state: tuple[PyTree, PyTree], batch: tuple[Array, Array, Array]
    ) -> tuple[tuple[PyTree, PyTree], tuple[Array, Array]]:
        params, opt_state = state
        outcome, gradient = jax.value_and_grad(loss_of, has_aux=True)(params, *batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), outcome

    batches = (*batches, jax.numpy.arange(config.updates))
    (params, _), curves = jax.lax.scan(update, (params, optimizer.init(params)), batches)
    x, y = x[drawn:], y[drawn:]
    logits = nnx.merge(graphdef, params)(x)
    return Outcome(curves, losses(logits, y), (x[0, :, 0], y[0], jax.nn.sigmoid(logits[0])))


def losses(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Mean cross-entropy and accuracy over all steps of all sequences."""
    loss = optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype)).mean()
    return loss, ((logits > 0) == (labels == 1)).mean()


def main(config: Config) -> None:
    """Run the experiment."""
    stopping.advise("start it again: it takes seconds")
    started = time.perf_counter()
    check(config)
    replicas = config.replicas
    mesh = training.make_mesh(config.accelerator, rows=1, replicas=len(replicas))
    cell = load_cell(config.cell, config.hidden_size)
    name = training.run_name("cumsum", config.recipe, cell=config.cell, seed=config.seed)
    if len(replicas) > 1:
        name += f"-{len(replicas)}runs"
    model = nnx.eval_shape(lambda: make_model(config, cell, config.seed))
    training.require_room(len(replicas) * count_parameters(model), mesh)
    table = summary(model, jax.ShapeDtypeStruct((1, config.steps, 1), "float32"))
    with training.RunFolder.open(name, training.as_dict(config), path=config.run_dir) as run:
        print(table)
        outcome = compute(config, cell, mesh)
        several = len(replicas) > 1
        print_table(*(a[0] if several else a for a in outcome.example))
        seconds = time.perf_counter() - started
        losses, accuracies = (np.atleast_1d(a).tolist() for a in outcome.test)
        rows = [
            Row(
                seed,
                rate,
                validation=math.nan,
                test={"test": accuracy},
                figures={"test_accuracy": accuracy, "test_loss": loss},
            )
            for (seed, rate), loss, accuracy in zip(replicas, losses, accuracies, strict=True)
        ]
        run.write_result(
            config,
            mesh,
            outcome_of(ACCURACY, rows, several) if several else rows[0].figures,
            parameters=count_parameters(model),
            seconds=seconds,
            data=f"{EVALUATION_SEQUENCES} fresh sequences",
        )
        if several:
            print(f"\n{table_of(ACCURACY, rows)}")
        mean = np.mean([[row.test["test"], row.figures["test_loss"]] for row in rows], axis=0)
        print(
            f"per-step accuracy on {EVALUATION_SEQUENCES:,} fresh sequences {mean[0]:.2%}, "
            f"loss {mean[1]:.4f}, {seconds:.1f} s; everything in {run.path}"
        )
        draw(config, run, *outcome.curves)


def compute(config: Config, cell: Cell, mesh: Mesh) -> Outcome:
    """Compile `experiment` and run it on the first device, replicas on all; NumPy arrays.

    Raises:
        UserError: a loss is not finite.
    """
    replicas = config.replicas
    one = functools.partial(experiment, config, cell)
    if len(replicas) == 1:
        run: Any = functools.partial(one, *replicas[0])
        arguments: tuple[Any, ...] = ()
    else:
        rows = jax.sharding.PartitionSpec(BATCH)
        several = jax.vmap(one)
        run = jax.shard_map(several, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
        seeds, rates = zip(*replicas, strict=True)
        arguments = (np.array(seeds, np.uint32), np.array(rates, np.float32))
    jitted = jax.jit(run, compiler_options=training.quick_compilation(mesh))
    with jax.default_device(mesh.devices.flat[0]):
        lowered = jitted.lower(*arguments)
        training.prepare_drawing()
        outcome = jax.device_get(lowered.compile()(*arguments))
    losses = np.concatenate(
        [np.atleast_2d(outcome.curves[0]), np.reshape(outcome.test[0], (-1, 1))], axis=1
    )
    finite = np.isfinite(losses).all(axis=0)
    if not finite.all():
        raise UserError(
            f"loss is not finite at update {finite.argmin() + 1}; lower --learning-rate"
        )
    return outcome


def print_table(
    numbers: Float[np.ndarray, " T"], labels: Int[np.ndarray, " T"], p: Float[np.ndarray, " T"]
) -> None:
    """One fresh sequence step by step: expected against predicted."""
    print("\nstep  number  running sum  expected  predicted")
    rows = zip(numbers, np.cumsum(numbers), labels, p, strict=True)
    for t, (number, total, label, p_t) in enumerate(rows, 1):
        answer = int(p_t > 0.5)
        print(f"{t:>4}  {number:>6.3f}  {total:>11.3f}  {label:>8}  {answer:>4} ({p_t:.3f})")


def draw(
    config: Config,
    run: training.RunFolder,
    loss: Float[np.ndarray, "*R N"],
    accuracy: Float[np.ndarray, "*R N"],
    every: int = 10,
) -> None:
    """Write the metrics and draw the curves, each point a mean over ``every`` updates."""
    for start in range(0, config.updates, every):
        part = slice(start, start + every)
        means = {
            name: values[..., part].mean(axis=-1).tolist()
            for name, values in (("loss", loss), ("accuracy", accuracy))
        }
        step = min(start + every, config.updates)
        run.log({"kind": "step", "step": step, "epoch": 1, **means})
    cell = CellSpec.parse(config.cell).call
    run.draw_curves(f"{cell} · cumsum · recipe {config.recipe} · seed {config.seed}")


def run() -> None:
    """Parse the command line and run `main`."""
    training.simple_kernels()
    run_command(RECIPES, main, description=__doc__)
