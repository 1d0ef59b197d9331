"""lstmjax as its users get it: the batch spread over one CPU device a core."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import problems
from benchmarks.contenders import Job, training_job
from benchmarks.problems import Case
from lstmjax import training
from lstmjax.cells import LSTM, Carry
from lstmjax.commands import cumsum as cumsum_experiment
from lstmjax.commands import imdb as imdb_experiment
from lstmjax.data import Batch
from lstmjax.models import Classifier, ClassifierConfig
from lstmjax.precision import Precision
from lstmjax.recurrence import ENGINES, unroll
from lstmjax.training.devices import BATCH
from lstmjax.training.loop import on_device

WHOLE, ROWS, STEP_ROWS = PartitionSpec(), PartitionSpec(BATCH), PartitionSpec(None, BATCH)


def make_mesh(rows: int, devices: int | None = None) -> Mesh:
    """All devices that divide the rows, one a core, or the first few there are."""
    if devices is None:
        return training.make_mesh("cpu", rows=rows)
    some = jax.devices()[:devices]
    return jax.make_mesh((devices,), (BATCH,), devices=some, axis_types=(AxisType.Auto,))


def spread(function: Any, mesh: Mesh, inputs: Any, outputs: Any) -> Any:
    """The function, compiled, each device on its rows."""
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
    )


def recurrence(case: Case, engine: str, **how: Any) -> Job:
    """`unroll` in a user's own program, time-major; ``how`` goes to `recurrence_program`."""
    function, arguments, mesh = recurrence_program(case, engine, **how)
    return jax_job(function, arguments, mesh.size)


def recurrence_program(
    case: Case,
    engine: str,
    precision: Precision = "float32",
    devices: int | None = None,
    **settings: Any,
) -> tuple[Any, tuple[Any, ...], Mesh]:
    """That program, jitted, its arguments and devices; ``settings`` are the engine's."""
    chosen = dataclasses.replace(ENGINES[engine], **settings)
    mesh, cell = make_mesh(case["batch"], devices), LSTM(case["hidden"])
    said = problems.lengths(case, mesh.size)
    how: dict[str, Any] = {"time_major": True, "engine": chosen, "precision": precision}

    def forward(params: Any, x: Array, lengths: Array | None = None) -> Array:
        return unroll(cell, params, x, lengths=lengths, **how)[0]

    def both(params: Any, x: Array, d_hs: Array, *lengths: Array) -> tuple[Array, Any, Array]:
        known = with_gradient(lambda params, x: forward(params, x, *lengths))
        last, d_params, d_x = known(params, x, d_hs)
        return last, lax.psum(d_params, BATCH), d_x

    inputs: Any = (WHOLE, STEP_ROWS, STEP_ROWS, *(ROWS for _ in said))
    if case["mode"] == "forward":
        function, inputs = spread(forward, mesh, inputs[:2], STEP_ROWS), inputs[:2]
    else:
        function = spread(both, mesh, inputs, (ROWS, WHOLE, STEP_ROWS))
    places = tuple(NamedSharding(mesh, spec) for spec in inputs)
    given = (*problems.recurrence(case), *said)[: len(inputs)]
    return function, jax.device_put(given, places), mesh


def with_gradient(forward: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """``(weights, x, d_hs) -> (last output, d_weights, d_x)`` of ``forward(weights, x) -> hs``."""

    def both(weights: Any, x: Any, d_hs: Any) -> Any:
        hs, pull_back = jax.vjp(forward, weights, x)
        return (hs[-1], *pull_back(d_hs))

    return both


def jax_job(
    function: Any, arguments: tuple[Any, ...], devices: int = 1, to_ours: Any = lambda d: d
) -> Job:
    """The job that calls a jitted function; its memory is what the compiled program declares.

    Compared are the last outputs, the gradient of the first inputs, and that of the weights once
    ``to_ours`` has brought it into our layout.
    """

    def check() -> dict[str, np.ndarray]:
        if len(arguments) == 2:
            return {"last": np.asarray(function(*arguments)[-1])}
        last, d_weights, d_x = function(*arguments)
        found = {"last": last, "d x": d_x[0], **to_ours(d_weights)}
        return {name: np.asarray(value) for name, value in found.items()}

    def memory() -> int | None:
        stats = function.lower(*arguments).compile().memory_analysis()
        kinds = ("temp", "argument", "output")
        total = sum(getattr(stats, f"{kind}_size_in_bytes", 0) for kind in kinds)
        return devices * total if stats else None

    return Job(lambda: jax.block_until_ready(function(*arguments)), check, memory=memory)


def chain(case: Case, both: bool) -> Job:
    """The recurrence's sequential products alone, on all devices at once: ``h R`` a step.

    With ``both``, its transpose follows each. R's blocks are orthogonal: nothing overflows.
    """
    mesh, hidden = make_mesh(case["batch"]), case["hidden"]
    kernel = problems.cell_weights(case)["recurrent_kernel"]

    def local(h: Array, kernel: Array, transposed: Array, start: Array) -> Array:
        def step(_: Any, h: Array) -> Array:
            z = h @ kernel
            # A start that the compiler does not know: it must make the whole product.
            return z @ transposed if both else lax.dynamic_slice_in_dim(z, start, hidden, axis=1)

        return lax.fori_loop(0, case["steps"], step, h)

    run = spread(local, mesh, (ROWS, WHOLE, WHOLE, WHOLE), ROWS)
    h = np.random.default_rng(5).standard_normal((case["batch"], hidden), np.float32)
    h, constants = jax.device_put(
        (h, (kernel, kernel.T / 4, np.int32(0))),
        (training.sharded(mesh), training.replicated(mesh)),
    )
    return Job(lambda: jax.block_until_ready(run(h, *constants)))


def steps_alone(case: Case, both: bool) -> Job:
    """The LSTM's ``step`` alone, without any product, on all devices at once.

    With ``both``, its vector-Jacobian product too, as the way back needs it.
    """
    mesh, cell = make_mesh(case["batch"]), LSTM(case["hidden"])
    pre = np.random.default_rng(5).standard_normal((4, case["batch"], case["hidden"]), np.float32)

    def local(pre: Array) -> Any:
        def run(pre: tuple[Array, ...], carry: Carry) -> Carry:
            return cell.apply_step(cell.named(pre), carry, {"units": {}})

        def step(_: Any, loop: tuple[tuple[Array, ...], Carry]) -> Any:
            pre, carry = loop
            if both:
                carry, pull_back = jax.vjp(run, pre, carry)
                return pull_back(carry)
            return tuple(a + carry.h for a in pre), run(pre, carry)

        start = (tuple(pre), Carry(pre[0], cell.State(pre[1])))
        return lax.fori_loop(0, case["steps"], step, start)

    function = spread(local, mesh, PartitionSpec(None, BATCH), ROWS)
    place = NamedSharding(mesh, PartitionSpec(None, BATCH))
    given = jax.device_put(pre, place)
    return Job(lambda: jax.block_until_ready(function(given)))


def large(case: Case, spread: bool) -> Job:
    """A product of large square matrices, by all threads of one device or on all devices."""
    mesh = make_mesh(case["size"], devices=None if spread else 1)
    a = np.random.default_rng(6).standard_normal((case["size"], case["size"]), np.float32)
    pair = jax.device_put((a, a), (training.sharded(mesh), training.replicated(mesh)))
    product = jax.jit(jnp.matmul)
    return Job(lambda: product(*pair).block_until_ready())


def set_weights(model: Classifier, weights: Mapping[str, np.ndarray]) -> None:
    """Give the model the weights of `problems.notebook`."""
    layer: Any = model.recurrent.layers[0]
    head = {"head_kernel": model.head.kernel, "head_bias": model.head.bias}
    variables: Any = {"embedding": model.embedding.embedding, **layer.params, **head}
    for name, value in weights.items():
        variables[name][...] = jnp.asarray(value)


def train_step(case: Case) -> Job:
    """The notebook's whole training step, a batch after the other."""
    weights, ids, labels = problems.notebook(case)
    mesh, rows = make_mesh(case["batch"]), case["batch"]
    config = ClassifierConfig(problems.TOP_WORDS, case["features"], case["hidden"])
    model = Classifier(LSTM(case["hidden"]), config, rngs=nnx.Rngs(0))
    set_weights(model, weights)
    adam = training.make_optimizer(training.OptimizerConfig(), total_steps=1)
    steps = training.make_steps(model, adam, mesh, padding="left", masked=False)
    full, real = np.full(rows, case["steps"], np.int32), np.ones(rows, np.float32)
    cuts = [slice(start, start + rows) for start in range(0, len(ids), rows)]
    batches = [Batch(ids[cut], full, labels[cut], real) for cut in cuts]
    state, key = steps.init(), training.training_key(0)

    def run() -> float:
        nonlocal state
        found = []
        for batch in on_device(batches, mesh):
            state, sums = steps.train(state, batch, key)
            found.append(sums.loss / sums.rows)
        return float(np.mean(jax.device_get(found)))

    return training_job(run)


def epoch(case: Case, one_shape: bool = False) -> Job:
    """The ``notebook`` model on IMDB, padding skipped; each run trains ``share`` batches.

    With ``one_shape`` the same batches are all padded to one length, so that one program serves
    them, and the engine skips the chunks of steps that no row has.
    """
    base = imdb_experiment.NOTEBOOK
    data = dataclasses.replace(base.data, padding="bucketed", data_dir=case["data_dir"])
    mesh = make_mesh(data.batch_size)
    train, _ = imdb_experiment.make_batches(dataclasses.replace(base, data=data))
    model = Classifier(LSTM(base.model.hidden_size), base.model, rngs=nnx.Rngs(0))
    adam = training.make_optimizer(base.optimizer, len(train))
    steps = training.make_steps(model, adam, mesh, padding=train.padding)
    state, key, waiting = steps.init(), training.training_key(0), train.epoch(seed=0, epoch=0)

    def train_on(batches: Iterator[Batch]) -> None:
        nonlocal state
        for batch in on_device(batches, mesh):
            state, sums = steps.train(state, batch, key)
        jax.block_until_ready(sums)

    def blank(rows: int, length: int) -> Batch:
        ones = np.ones(rows, np.int32)
        ids = np.ones((rows, length), np.int32)
        return Batch(ids, ones * length, ones, ones.astype(np.float32))

    def padded(batch: Batch) -> Batch:
        missing = case["steps"] - batch.ids.shape[1]
        sides = (missing, 0) if train.padding == "left" else (0, missing)
        return batch._replace(ids=np.pad(batch.ids, ((0, 0), sides)))

    shapes = sorted(
        {(rows, case["steps"] if one_shape else length) for rows, length in train.shapes}
    )
    batches = map(padded, waiting) if one_shape else waiting
    return Job(
        lambda: train_on(itertools.islice(batches, case["share"])),
        warm_up=lambda: train_on(blank(*shape) for shape in shapes),
    )


def cumsum_program(updates: int) -> Any:
    """The whole experiment of ``experiments/cumsum.py``, its evaluation included, jitted."""
    training.simple_kernels()
    config = dataclasses.replace(cumsum_experiment.RECIPES["notebook"], updates=updates)
    mesh = make_mesh(config.batch_size)
    cell, arguments = LSTM(config.hidden_size), (0, config.learning_rate)
    program = jax.jit(
        functools.partial(cumsum_experiment.experiment, config, cell),
        compiler_options=training.quick_compilation(mesh),
    )
    return lambda: program(*arguments)


def cumsum(case: Case) -> Job:
    """That experiment, on the first device."""
    run = cumsum_program(case["updates"])
    return Job(lambda: jax.device_get(run()))
