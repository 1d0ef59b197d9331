"""The compiled training and evaluation steps, the batch spread over a mesh.

The gradient is taken device by device and summed once a step: left to the compiler, a recurrence
over a sharded batch would sum its weight gradient over the devices at every time step.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Float, PRNGKeyArray, PyTree

from lstmjax import stopping
from lstmjax.data import Batch
from lstmjax.recurrence import length_mask
from lstmjax.recurrence.noise import Keys, as_keys
from lstmjax.training.devices import (
    BATCH,
    place,
    quick_compilation,
    replicated,
    sharded,
    usable_cores,
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam (Kingma & Ba 2015) and what surrounds it."""

    learning_rate: float = 1e-3
    """Learning rate; the peak of it under one-cycle."""
    schedule: Literal["constant", "one-cycle"] = "constant"
    """one-cycle: up over the first quarter, then down to almost 0 (Smith & Topin 2017)."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient (Pascanu et al. 2013); 0 does not clip."""


def training_key(seed: int) -> PRNGKeyArray:
    """The key of everything random in training.

    ``nnx.Rngs(seed)`` hands out ``fold_in(key(seed), 0)``, ``1``, ... to draw parameters; a number
    that it never reaches keeps the two streams apart.
    """
    return jax.random.fold_in(jax.random.key(seed), 2**31)


class TrainState(NamedTuple):
    """What a step changes: parameters, optimizer state, number of steps done."""

    params: PyTree
    opt_state: optax.OptState
    step: Array


Number = Any
"""An array on the devices, or what it holds, on the host."""


class Sums(NamedTuple):
    """Sums over the real rows of a batch: loss, correct answers, rows, valid time steps."""

    loss: Number = 0.0
    correct: Number = 0.0
    rows: Number = 0.0
    tokens: Number = 0.0


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Adam under the schedule and the clipping asked for.

    Its epsilon is Keras' 1e-7; Keras adds it before the bias correction, Optax after.
    """
    rate: float | optax.Schedule = config.learning_rate
    if config.schedule == "one-cycle":
        rate = optax.cosine_onecycle_schedule(max(total_steps, 4), rate, pct_start=0.25)
    adam = optax.adam(rate, eps=1e-7)
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)
    return adam


IN_FLIGHT = 4
"""Calls of a compiled function that may be under way at once."""

_SumsOf = Callable[[PyTree, Batch, Keys | None], tuple[Array, Sums]]
_GradientOf = Callable[[PyTree, Batch, Keys], tuple[PyTree, Sums]]
_EvaluationOf = Callable[[PyTree, Batch], Sums]
_Update = Callable[[TrainState, PyTree, Sums], tuple[TrainState, Sums]]
_Train = Callable[[TrainState, Batch, PRNGKeyArray], tuple[TrainState, Sums]]


class Steps(NamedTuple):
    """The compiled functions of a run.

    ``train`` and ``evaluate`` return before the devices are done, but they begin only once fewer
    than `IN_FLIGHT` of their calls are under way. Once called, they can be compiled for further
    shapes of batches in the background; what was not prepared, the call compiles.

    Attributes:
        init: makes the state before the first step.
        train: ``(state, batch, key) -> (state, sums)``; the state's buffers are donated. It runs
            three programs, of which only the gradient's is compiled for every shape of batch.
        evaluate: ``(params, batch) -> sums``.
        prepare_train: traces ``train`` for batches like this one and begins to compile it, if a
            core is free. What tracing raises it raises.
        prepare_evaluate: the same for ``evaluate``.
    """

    init: Callable[[], TrainState]
    train: _Train
    evaluate: _EvaluationOf
    prepare_train: Callable[[Batch], None]
    prepare_evaluate: Callable[[Batch], None]


def make_steps(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    padding: Literal["left", "right"] = "right",
    masked: bool = True,
) -> Steps:
    """Compile classification of padded id sequences for ``model``.

    Args:
        model: ``model(ids, mask, keys) -> logits``, ``(B,)`` for labels 0 and 1, or ``(B, K)`` for
            labels 0 to K - 1. ``keys`` are `Keys`, or None to evaluate.
        optimizer: what turns gradients into updates.
        mesh: the devices; the number of rows must be a multiple of theirs.
        padding: side on which the batches are padded.
        masked: hide the padding from the model; else it sees zeros as words.
    """
    graphdef, params = nnx.split(model, nnx.Param)
    sums_of = _classification(graphdef, padding if masked else None)
    gradient_of, evaluation_of = _summed_over_devices(sums_of, mesh)

    @jax.jit
    def first_state(params: PyTree) -> TrainState:
        state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
        return jax.tree.map(jnp.copy, state)  # the model keeps its own when the state is donated

    compiled = functools.partial(jax.jit, compiler_options=quick_compilation(mesh))
    places = Keys(sharded(mesh), replicated(mesh))  # type: ignore[arg-type]
    keys_of = compiled(_step_keys, static_argnums=2, out_shardings=places)
    gradient, evaluation = compiled(gradient_of), compiled(evaluation_of)
    update = compiled(_update(optimizer), donate_argnums=0)

    def train(state: TrainState, batch: Batch, key: PRNGKeyArray) -> tuple[TrainState, Sums]:
        keys = keys_of(key, state.step, batch.ids.shape[0])
        return update(state, *gradient(state.params, batch, keys))

    def lower_train(state: TrainState, batch: Batch, key: PyTree) -> jax.stages.Lowered:
        keys = keys_of.eval_shape(key, state.step, batch.ids.shape[0])
        return gradient.lower(state.params, batch, keys)

    train_calls = _Calls(train, lower_train)
    evaluate_calls = _Calls(evaluation, evaluation.lower)
    return Steps(
        lambda: first_state(place(jax.device_get(params), replicated(mesh))),
        train_calls,
        evaluate_calls,
        train_calls.prepare,
        evaluate_calls.prepare,
    )


class _Calls:
    """Calls of a function whose second argument is a batch, few at once, compiled ahead of use.

    Compilation is always in another thread, so that a signal is heard meanwhile.

    A call waits for the result of ``IN_FLIGHT`` calls ago before it begins: with 32 programs
    waiting for one of several CPU devices, XLA stops for good, as handing it another one blocks a
    thread that the programs under way need.

    Args:
        call: the function.
        lower: gives for its arguments, or their shapes, what is to be compiled for them.
    """

    def __init__(
        self, call: Callable[..., PyTree], lower: Callable[..., jax.stages.Lowered]
    ) -> None:
        functools.update_wrapper(self, call)
        self._call, self._lower = call, lower
        self._under_way: collections.deque[Array] = collections.deque()
        self._others: list[PyTree] = []
        self._made: dict[tuple[int, ...], Future[jax.stages.Compiled]] = {}
        self._cores = usable_cores()
        self._threads = ThreadPoolExecutor(self._cores, thread_name_prefix="compile")

    def __call__(self, first: PyTree, batch: Batch, *more: PyTree) -> PyTree:
        self._others = self._others or [jax.tree.map(_shape, a) for a in (first, *more)]
        if batch.ids.shape not in self._made:
            self._make(batch)
        stopping.wait_for(self._made[batch.ids.shape])
        if len(self._under_way) == IN_FLIGHT:
            jax.block_until_ready(self._under_way.popleft())
        result = self._call(first, batch, *more)
        self._under_way.append(jax.tree.leaves(result)[-1])  # of the sums, which nothing donates
        return result

    def prepare(self, batch: Batch) -> None:
        """Compile for the shape of ``batch`` in a thread, unless all cores do so already.

        Nothing queues, for the process cannot end before the threads do.
        """
        if not self._others or batch.ids.shape in self._made:
            return
        if sum(not made.done() for made in self._made.values()) < self._cores:
            self._make(batch)

    def _make(self, batch: Batch) -> None:
        # Traced here, under the caller's settings of JAX, which are a thread's own.
        first, *more = self._others
        lowered = self._lower(first, batch, *more)
        self._made[batch.ids.shape] = self._threads.submit(lowered.compile)


def _shape(a: PyTree) -> PyTree:
    """Of an array on devices; anything else stays."""
    on_devices = isinstance(a, Array)
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) if on_devices else a


def _classification(graphdef: nnx.GraphDef, hidden: Literal["left", "right"] | None) -> _SumsOf:
    """Loss and sums of a batch; padding on the side ``hidden`` is kept from the model."""

    def sums_of(params: PyTree, batch: Batch, keys: Keys | None) -> tuple[Array, Sums]:
        lengths = jnp.asarray(batch.lengths)
        mask = length_mask(lengths, batch.ids.shape[1], hidden) if hidden else None
        losses, right = _answers(nnx.merge(graphdef, params)(batch.ids, mask, keys), batch.labels)
        loss = (losses * batch.weights).sum()
        correct = jnp.where(right, batch.weights, 0).sum()
        tokens = lengths.sum().astype(loss.dtype)
        return loss, Sums(loss, correct, batch.weights.sum(), tokens)

    return sums_of


def _answers(
    logits: Array, labels: Array | np.ndarray
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Cross-entropy of each row, and whether the most probable class is the right one."""
    if logits.ndim == 1:
        losses = optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype))
        return losses, (logits > 0) == (labels == 1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, logits.argmax(axis=-1) == labels


def _summed_over_devices(sums_of: _SumsOf, mesh: Mesh) -> tuple[_GradientOf, _EvaluationOf]:
    """The loss's gradient with the sums, and the sums alone, each added up over the mesh once."""

    def local_gradient(params: PyTree, batch: Batch, keys: Keys) -> tuple[PyTree, Sums]:
        return lax.psum(jax.grad(sums_of, has_aux=True)(params, batch, keys), BATCH)

    def local_evaluation(params: PyTree, batch: Batch) -> Sums:
        return lax.psum(sums_of(params, batch, None)[1], BATCH)

    rows, whole = PartitionSpec(BATCH), PartitionSpec()
    keys = Keys(rows, whole)  # type: ignore[arg-type]
    # check_vma=False: with it, replicated parameters get their sum inside the time loop.
    spread = functools.partial(jax.shard_map, mesh=mesh, out_specs=whole, check_vma=False)
    return (
        spread(local_gradient, in_specs=(whole, rows, keys)),
        spread(local_evaluation, in_specs=(whole, rows)),
    )


def _step_keys(key: PRNGKeyArray, step: Array, rows: int) -> Keys:
    """One key a row, and one for all of them, for one training step."""
    keys = as_keys(jax.random.fold_in(key, step), rows)
    assert keys is not None
    return keys


def _update(optimizer: optax.GradientTransformation) -> _Update:
    """The state after a step, and its sums, from the gradient and the sums over the batch."""

    def update(state: TrainState, gradient: PyTree, totals: Sums) -> tuple[TrainState, Sums]:
        gradient = jax.tree.map(lambda g: g / jnp.maximum(totals.rows, 1), gradient)
        # A finite loss can have a gradient that is not: report it as the loss it will become.
        healthy = jnp.isfinite(optax.tree.norm(gradient))
        totals = totals._replace(loss=jnp.where(healthy, totals.loss, jnp.nan))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), totals

    return update
