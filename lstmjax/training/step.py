"""The compiled training and evaluation steps, the batch spread over a mesh.

The gradient is taken device by device and summed once a step: left to the compiler, a recurrence
over a sharded batch would sum its weight gradient over the devices at every time step.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.tree_util import KeyPath
from jaxtyping import PRNGKeyArray, PyTree

from lstmjax import stopping
from lstmjax.cores import usable_cores
from lstmjax.data import Batch
from lstmjax.progress import Programs
from lstmjax.recurrence import length_mask
from lstmjax.recurrence.noise import Keys, as_keys
from lstmjax.recurrence.refs import Index
from lstmjax.training.devices import (
    BATCH,
    local_device,
    on_cpu,
    place,
    quick_compilation,
    replicated,
)
from lstmjax.training.objective import CROSS_ENTROPY, Objective

ModelT = TypeVar("ModelT", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam (Kingma & Ba 2015) and what surrounds it."""

    learning_rate: float = 1e-3
    """Learning rate; the peak of it under one-cycle."""
    schedule: Literal["constant", "one-cycle"] = "constant"
    """one-cycle: up over the first quarter, then down to almost 0 (Smith & Topin 2017)."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient (Pascanu et al. 2013); 0 does not clip."""


def training_key(seed: int | Array) -> PRNGKeyArray:
    """The key of everything random in training.

    ``nnx.Rngs(seed)`` hands out ``fold_in(key(seed), 0)``, ``1``, ... to draw parameters; a number
    that it never reaches keeps the two streams apart.
    """
    return jax.random.fold_in(jax.random.key(seed), 2**31)


class TrainState(NamedTuple):
    """What a step changes: parameters, optimizer state, number of steps done, carried state.

    Of replicas, every array but ``step`` has them as its first axis. ``carry`` has no arrays unless
    the recurrence goes on from batch to batch.
    """

    params: PyTree
    opt_state: optax.OptState
    step: Array
    carry: PyTree = ()


Number = Any
"""An array on the devices, or what it holds, on the host."""


class Sums(NamedTuple):
    """Sums over what counts in a batch: loss, score, how much counts, valid time steps.

    Of a classification with a label a row these are loss, correct answers, rows, valid steps. Of
    replicas, each is an array ``(replicas,)``.
    """

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


def draw_models(make: Callable[[Index], ModelT], seeds: int | Sequence[int], mesh: Mesh) -> ModelT:
    """A model before the first step, drawn by one program: quicker to start than one a draw.

    Args:
        make: makes the model of a seed, an integer or an array of one.
        seeds: one; or of several replicas, whose parameters come stacked, ``(replicas, ...)``.
        mesh: the devices.
    """
    first = seeds if isinstance(seeds, int) else seeds[0]
    graphdef = nnx.split(nnx.eval_shape(lambda: make(first)))[0]

    def draw(seed: Index) -> PyTree:
        return nnx.split(make(seed))[1]

    options = quick_compilation(mesh)
    with jax.default_device(local_device(mesh.devices.flat)):
        if isinstance(seeds, int):
            return nnx.merge(graphdef, jax.jit(lambda: draw(seeds), compiler_options=options)())
        drawn = jax.jit(jax.vmap(draw), compiler_options=options)
        return nnx.merge(graphdef, drawn(np.array(seeds, np.uint32)))


def without_gradient(parts: Sequence[str]) -> optax.GradientTransformation:
    """Takes the gradient of parts of a model as zero, so that they stay as they are.

    Args:
        parts: names of attributes of the model.
    """

    def cleared(path: KeyPath, gradient: Array) -> Array:
        return jnp.zeros_like(gradient) if getattr(path[0], "key", None) in parts else gradient

    return optax.stateless(lambda g, _: jax.tree_util.tree_map_with_path(cleared, g))


IN_FLIGHT = 4
"""Calls of a compiled function that may be under way at once."""

_SumsOf = Callable[[PyTree, Batch, Keys | None, PyTree], tuple[Array, tuple[Sums, PyTree]]]
_GradientOf = Callable[[PyTree, Batch, Keys, PyTree], tuple[PyTree, Sums, PyTree]]
_EvaluationOf = Callable[[PyTree, Batch], Sums]
_OutputsOf = Callable[[PyTree, Batch], Array]
_Update = Callable[[TrainState, Array | None, PyTree, Sums, PyTree], tuple[TrainState, Sums]]
_Key: TypeAlias = Any
"""A key, of replicas one each; or its shape."""
_Train = Callable[[TrainState, Batch, _Key], tuple[TrainState, Sums]]


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
        outputs: ``(params, batch) -> outputs``, what the model says of an evaluation batch.
        train_rows: how the arrays of a training batch lie on the devices; None: the loop's mesh.
        evaluation_rows: the same of an evaluation batch.
        states: the same of parameters and keys.
        programs: how many have been compiled for shapes of batches, for both functions.
    """

    init: Callable[[], TrainState]
    train: _Train
    evaluate: _EvaluationOf
    prepare_train: Callable[[Batch], None]
    prepare_evaluate: Callable[[Batch], None]
    outputs: _OutputsOf | None = None
    train_rows: Sharding | None = None
    evaluation_rows: Sharding | None = None
    states: Sharding | None = None
    programs: Callable[[], Programs] = Programs


def make_steps(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    padding: Literal["left", "right"] = "right",
    masked: bool = True,
    objective: Objective = CROSS_ENTROPY,
    carried_rows: int = 0,
    replicas: Sequence[float] = (),
) -> Steps:
    """Compile training and evaluation of ``model`` on padded sequences.

    Args:
        model: ``model(ids, mask, keys) -> outputs``, as ``objective`` wants them; ``keys`` are
            `Keys`, or None to evaluate.
        optimizer: what turns gradients into updates.
        mesh: the devices; the number of rows, or of replicas, must be a multiple of theirs.
        padding: side on which the batches are padded.
        masked: hide the padding from the model; else it sees zeros as words.
        objective: loss and score of the outputs.
        carried_rows: if not 0, the recurrence goes on from batch to batch, truncated
            backpropagation, and this is the number of rows; then
            ``model(ids, mask, keys, carry=..., resets=...) -> (outputs, carry)``, and
            ``model.initial_carry(rows)``.
        replicas: train several models side by side in one program, mapped: of each, its learning
            rate as a multiple of the optimizer's. ``model`` then holds their parameters stacked,
            ``(replicas, ...)``, and so are training batches and keys, ``(replicas, rows, ...)``;
            evaluation batches are shared. They are spread over the devices by replicas if
            those divide them, else by rows.
    """
    graphdef, params = nnx.split(model, nnx.Param)
    lay = _layout(mesh, len(replicas))
    outputs_of = _outputs(graphdef, padding if masked else None, bool(carried_rows))
    sums_of = _objective_sums(outputs_of, objective)
    compiled = functools.partial(jax.jit, compiler_options=quick_compilation(mesh))
    gradient, evaluation, answers = map(compiled, _spread(sums_of, outputs_of, mesh, lay))
    train_calls = _training(gradient, optimizer, mesh, lay, replicas)
    evaluate_calls = _Calls(evaluation, evaluation.lower)
    return Steps(
        _start(graphdef, params, optimizer, mesh, lay, carried_rows),
        train_calls,
        evaluate_calls,
        train_calls.prepare,
        evaluate_calls.prepare,
        answers,
        NamedSharding(mesh, lay.train),
        NamedSharding(mesh, lay.evaluation),
        NamedSharding(mesh, lay.state),
        lambda: _sum_of(train_calls.programs, evaluate_calls.programs),
    )


def _sum_of(*programs: Programs) -> Programs:
    return Programs(*map(sum, zip(*programs, strict=True)))


class _Layout(NamedTuple):
    """How replicas and rows lie over the mesh.

    Attributes:
        replicas: how many models there are side by side; 0: one alone, without an axis for it.
        state: where parameters lie, and one number a replica.
        train, evaluation: where the arrays of batches lie.
        outputs: where the outputs for an evaluation batch lie.
        summed: whether rows are spread, so that what comes of them has to be added up.
    """

    replicas: int
    state: PartitionSpec
    train: PartitionSpec
    evaluation: PartitionSpec
    outputs: PartitionSpec
    summed: bool

    def mapped(
        self, function: Callable[..., PyTree], in_axes: PyTree = 0, out_axes: PyTree = 0
    ) -> Callable[..., PyTree]:
        """``function`` of every replica; of a model alone, ``function``."""
        return jax.vmap(function, in_axes, out_axes) if self.replicas else function

    def in_turn(self, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """The same, one replica after the other, which takes the memory of one."""
        if not self.replicas:
            return function
        return lambda *args: lax.map(lambda one: function(*one), args)

    @property
    def state_axes(self) -> TrainState:
        """Which axes of a `TrainState` are the replicas'."""
        return TrainState(0, 0, None, 0)  # type: ignore[arg-type]


def _layout(mesh: Mesh, replicas: int) -> _Layout:
    rows, whole = PartitionSpec(BATCH), PartitionSpec()
    if not replicas:
        return _Layout(0, whole, rows, rows, rows, True)
    if replicas % mesh.size == 0:
        return _Layout(replicas, rows, rows, whole, rows, False)
    inner = PartitionSpec(None, BATCH)
    return _Layout(replicas, whole, inner, rows, inner, True)


def _start(
    graphdef: nnx.GraphDef,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    lay: _Layout,
    carried_rows: int,
) -> Callable[[], TrainState]:
    """Makes the state before the first step, on the devices."""

    def carry_of(params: PyTree) -> PyTree:
        stateful: Any = nnx.merge(graphdef, params)
        return stateful.initial_carry(carried_rows) if carried_rows else ()

    @jax.jit
    def first_state(params: PyTree) -> TrainState:
        opt_state, carry = lay.mapped(optimizer.init)(params), lay.mapped(carry_of)(params)
        state = TrainState(params, opt_state, jnp.zeros((), jnp.int32), carry)
        return jax.tree.map(jnp.copy, state)  # the model keeps its own when the state is donated

    def init() -> TrainState:
        on_devices = place(jax.device_get(params), NamedSharding(mesh, lay.state))
        state = first_state(on_devices)
        if lay.replicas:
            state = state._replace(step=jax.device_put(state.step, replicated(mesh)))
        if carried_rows:
            rows = NamedSharding(mesh, lay.train)
            state = state._replace(carry=jax.device_put(state.carry, rows))
        return state

    return init


def _training(
    gradient: jax.stages.Wrapped,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    lay: _Layout,
    replicas: Sequence[float],
) -> "_Calls":
    """Steps of training: keys, gradient, update, three programs."""
    rows, states = NamedSharding(mesh, lay.train), NamedSharding(mesh, lay.state)
    compiled = functools.partial(jax.jit, compiler_options=quick_compilation(mesh))
    keys_of = compiled(
        lay.mapped(_step_keys, (0, None, None)),
        static_argnums=2,
        out_shardings=Keys(rows, states),  # type: ignore[arg-type]
    )
    update_of = lay.mapped(_update(optimizer), (lay.state_axes, 0, 0, 0, 0), (lay.state_axes, 0))
    update = compiled(update_of, donate_argnums=0)
    rates = place(np.asarray(replicas, np.float32), states) if replicas else None
    axis = 1 if replicas else 0

    def train(state: TrainState, batch: Batch, key: _Key) -> tuple[TrainState, Sums]:
        keys = keys_of(key, state.step, batch.ids.shape[axis])
        return update(state, rates, *gradient(state.params, batch, keys, state.carry))

    def lower(state: TrainState, batch: Batch, key: _Key) -> jax.stages.Lowered:
        keys = keys_of.eval_shape(key, state.step, batch.ids.shape[axis])
        return gradient.lower(state.params, batch, keys, state.carry)

    return _Calls(train, lower)


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

    @property
    def programs(self) -> Programs:
        """Compilations so far."""
        return Programs(len(self._made), sum(made.done() for made in self._made.values()))

    def _make(self, batch: Batch) -> None:
        # Traced here, under the caller's settings of JAX, which are a thread's own.
        first, *more = self._others
        lowered = self._lower(first, batch, *more)
        self._made[batch.ids.shape] = self._threads.submit(lowered.compile)


def _shape(a: PyTree) -> PyTree:
    """Of an array on devices; anything else stays."""
    on_devices = isinstance(a, Array)
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) if on_devices else a


def _outputs(
    graphdef: nnx.GraphDef, hidden: Literal["left", "right"] | None, carried: bool
) -> Callable[[PyTree, Batch, Keys | None, PyTree], tuple[Array, PyTree]]:
    """Outputs and carry for a batch; padding on the side ``hidden`` is kept from the model."""

    def outputs_of(
        params: PyTree, batch: Batch, keys: Keys | None, carry: PyTree
    ) -> tuple[Array, PyTree]:
        lengths = jnp.asarray(batch.lengths)
        mask = length_mask(lengths, batch.ids.shape[1], hidden) if hidden else None
        model = nnx.merge(graphdef, params)
        if not carried or carry is None:
            return model(batch.ids, mask, keys), ()
        return model(batch.ids, mask, keys, carry=carry, resets=batch.resets)

    return outputs_of


def _objective_sums(
    outputs_of: Callable[[PyTree, Batch, Keys | None, PyTree], tuple[Array, PyTree]],
    objective: Objective,
) -> _SumsOf:
    """Loss and sums of a batch."""

    def sums_of(
        params: PyTree, batch: Batch, keys: Keys | None, carry: PyTree
    ) -> tuple[Array, tuple[Sums, PyTree]]:
        outputs, carry = outputs_of(params, batch, keys, carry)
        losses, scores = objective(outputs, jnp.asarray(batch.labels))
        loss = (losses * batch.weights).sum()
        score = jnp.where(batch.weights > 0, scores * batch.weights, 0).sum()
        tokens = jnp.asarray(batch.lengths).sum().astype(loss.dtype)
        return loss, (Sums(loss, score, batch.weights.sum(), tokens), carry)

    return sums_of


def _spread(
    sums_of: _SumsOf, outputs_of: Callable[..., tuple[Array, PyTree]], mesh: Mesh, lay: _Layout
) -> tuple[_GradientOf, _EvaluationOf, _OutputsOf]:
    """The loss's gradient with the sums, the sums alone, and the outputs, over the mesh.

    Where rows are spread, gradient and sums are added up over the devices once.
    """

    def total(tree: PyTree) -> PyTree:
        return lax.psum(tree, BATCH) if lay.summed else tree

    def local_gradient(
        params: PyTree, batch: Batch, keys: Keys, carry: PyTree
    ) -> tuple[PyTree, Sums, PyTree]:
        # A CPU's core is busy with one of them, whose arrays then stay in its cache.
        each = lay.in_turn if on_cpu(mesh) else lay.mapped
        gradient_of = each(jax.grad(sums_of, has_aux=True))
        gradient, (sums, carry) = gradient_of(params, batch, keys, carry)
        return *total((gradient, sums)), carry

    # Evaluation takes large batches.
    def local_evaluation(params: PyTree, batch: Batch) -> Sums:
        return total(lay.in_turn(lambda p: sums_of(p, batch, None, None)[1][0])(params))

    def local_outputs(params: PyTree, batch: Batch) -> Array:
        return lay.in_turn(lambda p: outputs_of(p, batch, None, None)[0])(params)

    # check_vma=False: with it, replicated parameters get their sum inside the time loop.
    spread = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    keys = Keys(lay.train, lay.state)  # type: ignore[arg-type]
    return (
        spread(
            local_gradient,
            in_specs=(lay.state, lay.train, keys, lay.train),
            out_specs=(lay.state, lay.state, lay.train),
        ),
        spread(local_evaluation, in_specs=(lay.state, lay.evaluation), out_specs=lay.state),
        spread(local_outputs, in_specs=(lay.state, lay.evaluation), out_specs=lay.outputs),
    )


def _step_keys(key: PRNGKeyArray, step: Array, rows: int) -> Keys:
    """One key a row, and one for all of them, for one training step."""
    keys = as_keys(jax.random.fold_in(key, step), rows)
    assert keys is not None
    return keys


def _update(optimizer: optax.GradientTransformation) -> _Update:
    """The state after a step, and its sums, from the gradient and the sums over the batch."""

    def update(
        state: TrainState, rate: Array | None, gradient: PyTree, totals: Sums, carry: PyTree
    ) -> tuple[TrainState, Sums]:
        gradient = jax.tree.map(lambda g: g / jnp.maximum(totals.rows, 1), gradient)
        # A finite loss can have a gradient that is not: report it as the loss it will become.
        healthy = jnp.isfinite(optax.tree.norm(gradient))
        totals = totals._replace(loss=jnp.where(healthy, totals.loss, jnp.nan))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        if rate is not None:
            updates = jax.tree.map(lambda u: u * rate.astype(u.dtype), updates)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1, carry), totals

    return update
