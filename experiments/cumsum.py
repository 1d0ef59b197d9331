"""Per-step classification: has the running sum of ten random numbers reached ten quarters yet?

    python experiments/cumsum.py                      # under 5 s, compilation included
    python experiments/cumsum.py --recipe notebook    # one sequence an update, Adam(1e-3)

LSTM(20) with an output at every step and one dense layer shared by all steps; 1,000 updates on
fresh sequences, all of them inside one compiled program; then accuracy on 10,000 fresh sequences
and a table of expected against predicted. Results over seeds are in the README.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal

from lstmjax.cells import load_cell
from lstmjax.errors import UserError
from lstmjax.precision import Precision
from lstmjax.training import Accelerator
from lstmjax.training.command import require_positive, run_command


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one run."""

    recipe: Literal["notebook", "default"] = "default"
    """Gives every other flag its default."""
    cell: str = "LSTM"
    """LSTM, GRU, PeepholeLSTM, or your own: path/to/file.py:MyCell."""
    accelerator: Accelerator = "auto"
    """Device to run on; auto takes the best there is."""
    precision: Precision = "float32"
    """bfloat16: products in bfloat16, sums and states in float32."""
    seed: int = 0
    """Of parameters and sequences."""
    hidden_size: int = 20
    """Units of the cell."""
    steps: int = 10
    """Numbers in a sequence; the label turns 1 once their sum reaches a quarter of this."""
    updates: int = 1000
    """Updates of the parameters."""
    batch_size: int = 32
    """Fresh sequences an update."""
    learning_rate: float = 1e-2
    """Of Adam; it falls to 0 along a cosine under the default recipe."""
    decay: bool = True
    """Let the learning rate fall to 0 along a cosine."""
    run_dir: pathlib.Path | None = None
    """Where the run is written (default: a new folder under runs/)."""


RECIPES = {
    "default": Config(),
    "notebook": Config(recipe="notebook", batch_size=1, learning_rate=1e-3, decay=False),
}
EVALUATION_SEQUENCES = 10_000


def check(config: Config) -> None:
    """Raise `UserError` for settings that cannot work."""
    names = ("hidden_size", "steps", "updates", "batch_size")
    require_positive({name: getattr(config, name) for name in names})
    if not config.learning_rate > 0:
        raise UserError(f"--learning-rate must be positive, got {config.learning_rate}")


def train(config: Config, model: Any, mesh: Any) -> tuple[Any, Any, Any]:
    """All updates in one compiled program, on the first device of the mesh.

    Returns:
        The trained model, and loss and accuracy of every update, each ``(updates,)``.
    """
    import jax
    import optax
    from flax import nnx

    from lstmjax.data import sample_cumsum

    graphdef, params = nnx.split(model, nnx.Param)
    rate: Any = config.learning_rate
    if config.decay:
        rate = optax.cosine_decay_schedule(rate, config.updates)
    optimizer = optax.adam(rate, eps=1e-7)

    def loss_of(params: Any, key: Any) -> tuple[Any, Any]:
        x, y = sample_cumsum(key, config.batch_size, config.steps)
        return losses(nnx.merge(graphdef, params)(x), y)

    def update(state: tuple[Any, Any], key: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        params, opt_state = state
        (loss, accuracy), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, key)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (loss, accuracy)

    @jax.jit
    def run(params: Any, key: Any) -> tuple[Any, tuple[Any, Any]]:
        keys = jax.random.split(key, config.updates)
        (params, _), curves = jax.lax.scan(update, (params, optimizer.init(params)), keys)
        return params, curves

    with jax.default_device(mesh.devices.flat[0]):
        params, (loss, accuracy) = run(params, jax.random.key(config.seed))
    return nnx.merge(graphdef, params), loss, accuracy


def losses(logits: Any, labels: Any) -> tuple[Any, Any]:
    """Mean cross-entropy and accuracy over all steps of all sequences."""
    import optax

    loss = optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype)).mean()
    return loss, ((logits > 0) == (labels == 1)).mean()


def main(config: Config) -> dict[str, Any]:
    """Run the experiment; returns what ``result.json`` holds."""
    started = time.perf_counter()
    check(config)
    from lstmjax import training

    mesh = training.make_mesh(config.accelerator)
    cell = load_cell(config.cell, config.hidden_size)
    run = open_run(config)

    import jax
    from flax import nnx

    from lstmjax.data import sample_cumsum
    from lstmjax.models import Tagger, count_parameters, summary

    model = Tagger(cell, 1, precision=config.precision, rngs=nnx.Rngs(config.seed))
    print(summary(model, jax.ShapeDtypeStruct((1, config.steps, 1), "float32")))
    model, loss, accuracy = train(config, model, mesh)
    final = float(loss[-1])
    if final != final:
        raise UserError(f"loss is {final} at update {config.updates}; lower --learning-rate")
    key_evaluation, key_table = jax.random.split(jax.random.key(config.seed + 2**31))
    x, y = sample_cumsum(key_evaluation, EVALUATION_SEQUENCES, config.steps)
    test_loss, test_accuracy = jax.jit(lambda m, x, y: losses(m(x), y))(model, x, y)
    result = {
        "test_accuracy": float(test_accuracy),
        "test_loss": float(test_loss),
        "parameters": count_parameters(model),
        "seconds": time.perf_counter() - started,
        "data": f"{EVALUATION_SEQUENCES} fresh sequences",
        "accelerator": training.accelerator_name(mesh),
        "devices": 1,
        "seed": config.seed,
        "config": training.as_dict(config),
        "versions": training.versions(),
    }
    run.write("result.json", result)
    print_table(model, *sample_cumsum(key_table, 1, config.steps))
    print(
        f"per-step accuracy on {EVALUATION_SEQUENCES:,} fresh sequences "
        f"{100 * result['test_accuracy']:.2f}%, loss {result['test_loss']:.4f}, "
        f"{result['seconds']:.1f} s in all; run folder {run.path}"
    )
    draw(config, run, loss, accuracy)
    return result


def open_run(config: Config) -> Any:
    """A new run folder."""
    from lstmjax.training import RunFolder, as_dict

    path = config.run_dir or RunFolder.free(f"cumsum-{config.recipe}-seed{config.seed}")
    return RunFolder.create(path, as_dict(config))


def print_table(model: Any, x: Any, y: Any) -> None:
    """One fresh sequence step by step: expected against predicted."""
    import jax

    probability = jax.nn.sigmoid(model(x))[0]
    print("\nstep  number  running sum  expected  predicted")
    total = 0.0
    for t, (number, label, p) in enumerate(zip(x[0, :, 0], y[0], probability, strict=True), 1):
        total += float(number)
        print(f"{t:>4}  {number:>6.3f}  {total:>11.3f}  {label:>8}  {int(p > 0.5):>4} ({p:.3f})")


def draw(config: Config, run: Any, loss: Any, accuracy: Any, every: int = 10) -> None:
    """Write the metrics and draw the curves, each point a mean over ``every`` updates."""
    for start in range(0, config.updates - every + 1, every):
        part = slice(start, start + every)
        record = {"loss": float(loss[part].mean()), "accuracy": float(accuracy[part].mean())}
        run.log({"kind": "step", "step": start + every, "epoch": 1, **record})
    run.draw_curves(f"{config.cell} · cumsum · recipe {config.recipe} · seed {config.seed}")


if __name__ == "__main__":
    run_command(RECIPES, main, description=__doc__)
