"""What is compiled for devices that need not be there, on shapes alone."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from lstmjax.cells.base import Carry, Cell, Params, start
from lstmjax.data import Batch
from lstmjax.models import Classifier, ClassifierConfig
from lstmjax.precision import Precision
from lstmjax.recurrence import Engine, unroll
from lstmjax.training.devices import BATCH
from lstmjax.training.step import OptimizerConfig, TrainState, make_optimizer, make_steps


class Shape(NamedTuple):
    """What a cell is run on: T, B (of all devices), D and the precision of the products."""

    steps: int
    batch: int
    features: int
    precision: Precision


def on_mesh(mesh: Mesh, tree: PyTree, spec: PartitionSpec) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes of ``tree`` as they lie on ``mesh``."""
    place = NamedSharding(mesh, spec)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)


def step_inputs(
    cell: Cell, steps: int, batch: int, features: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what a cell declares as ``step_inputs``, time-major."""
    return {
        name: jax.ShapeDtypeStruct((steps, batch, cell.width(width, features)), jnp.float32)
        for name, width in cell.step_inputs.items()
    }


def recurrence_program(
    cell: Cell, shape: Shape, engine: Engine, *, flags: bool = False
) -> tuple[tuple[PyTree, ...], Callable[..., PyTree]]:
    """A recurrence as a function of parameters, inputs, carry, step inputs, mask and resets.

    Args:
        cell: the cell.
        shape: on what it runs.
        engine: runs it.
        flags: with a mask and resets; else both are None.

    Returns:
        The shapes of its arguments, and the function.
    """
    steps, batch, features, precision = shape
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), features))
    xs = jax.ShapeDtypeStruct((steps, batch, features), jnp.float32)
    initial = jax.eval_shape(lambda: start(cell, None, batch, features, jnp.float32))
    more = step_inputs(cell, steps, batch, features)
    flag = jax.ShapeDtypeStruct((steps, batch), jnp.bool_) if flags else None

    def run(
        params: Params,
        xs: Array,
        initial: Carry,
        more: dict[str, Array],
        mask: Array | None,
        resets: Array | None,
    ) -> tuple[Array, Carry]:
        return unroll(
            cell,
            params,
            xs,
            initial,
            inputs=more,
            mask=mask,
            resets=resets,
            time_major=True,
            engine=engine,
            precision=precision,
        )

    return (params, xs, initial, more, flag, flag), run


def train_step_program(
    cell: Cell, shape: Shape, engine: Engine, mesh: Mesh
) -> tuple[Callable[..., PyTree], tuple[PyTree, ...]]:
    """The notebook model's training step around ``cell`` as one program; its arguments' shapes.

    Args:
        cell: the cell.
        shape: of the batch; D is the size of the embedding.
        engine: runs the cell.
        mesh: the devices, over which the rows are spread.
    """
    steps, rows, features, precision = shape
    config = ClassifierConfig(embedding_size=features, hidden_size=cell.hidden_size)
    model = nnx.eval_shape(
        lambda: Classifier(cell, config, precision=precision, engine=engine, rngs=nnx.Rngs(0))
    )
    optimizer = make_optimizer(OptimizerConfig(), total_steps=1)
    train = make_steps(model, optimizer, mesh, padding="left", masked=False).train

    def first(params: PyTree) -> TrainState:
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def numbers(dtype: str, *axes: int) -> PyTree[jax.ShapeDtypeStruct]:
        return jax.ShapeDtypeStruct((rows, *axes), dtype)

    state = jax.eval_shape(first, nnx.split(model, nnx.Param)[1])
    batch = Batch(
        ids=numbers("int32", steps),
        lengths=numbers("int32"),
        labels=numbers("int32"),
        weights=numbers("float32"),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    whole = PartitionSpec()
    args = (
        on_mesh(mesh, state, whole),
        on_mesh(mesh, batch, PartitionSpec(BATCH)),
        on_mesh(mesh, key, whole),
    )
    return jax.jit(inspect.unwrap(train), donate_argnums=0), args
