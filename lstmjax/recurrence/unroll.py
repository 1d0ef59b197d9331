"""The one entry to the recurrence: layouts, lengths, masks, resets, direction, engine."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, PyTree

from lstmjax.cells.base import Carry, Cell, Params, start
from lstmjax.cells.contract import layout, transition_program
from lstmjax.errors import ContractError
from lstmjax.precision import PrecisionLike, as_precision
from lstmjax.recurrence.choice import choose_engine
from lstmjax.recurrence.engine import (
    Engine,
    How,
    Inputs,
    Outputs,
    Workload,
    platform,
    step_arguments,
)
from lstmjax.recurrence.noise import Keys, as_keys, noises
from lstmjax.traced import Size, vary_alike

Padding = Literal["left", "right"]


class _Options(TypedDict, total=False):
    """What `unroll` takes by name, for type checkers: what it returns depends on one more."""

    lengths: Int[Array | np.ndarray, " *rows"] | Sequence[int] | None
    padding: Padding
    mask: Bool[Array | np.ndarray, "*B T"] | Sequence[object] | None
    resets: Bool[Array | np.ndarray, "*B T"] | Sequence[object] | None
    inputs: Mapping[str, Array] | None
    keys: Keys | Array | None
    reverse: bool
    time_major: bool
    precision: PrecisionLike
    engine: str | Engine | None


_Found: TypeAlias = tuple[Array, Carry[Any]]
_WithStates: TypeAlias = tuple[Array, Carry[Any], Any]


@overload
def unroll(
    cell: Cell,
    params: Params,
    x: Float[Array | np.ndarray, "*B T D"],
    initial: Carry | None = None,
    *,
    return_states: Literal[False] = False,
    **options: Unpack[_Options],
) -> _Found: ...


@overload
def unroll(
    cell: Cell,
    params: Params,
    x: Float[Array | np.ndarray, "*B T D"],
    initial: Carry | None = None,
    *,
    return_states: Literal[True],
    **options: Unpack[_Options],
) -> _WithStates: ...


@overload
def unroll(
    cell: Cell,
    params: Params,
    x: Float[Array | np.ndarray, "*B T D"],
    initial: Carry | None = None,
    *,
    return_states: bool,
    **options: Unpack[_Options],
) -> _Found | _WithStates: ...


def unroll(
    cell: Cell,
    params: Params,
    x: Float[Array | np.ndarray, "*B T D"],
    initial: Carry | None = None,
    *,
    lengths: Int[Array | np.ndarray, " *rows"] | Sequence[int] | None = None,
    padding: Padding = "right",
    mask: Bool[Array | np.ndarray, "*B T"] | Sequence[object] | None = None,
    resets: Bool[Array | np.ndarray, "*B T"] | Sequence[object] | None = None,
    inputs: Mapping[str, Array] | None = None,
    keys: Keys | Array | None = None,
    reverse: bool = False,
    time_major: bool = False,
    return_states: bool = False,
    precision: PrecisionLike = "float32",
    engine: str | Engine | None = None,
) -> Any:
    """Run ``cell`` over every time step of a batch.

    A masked step passes the carry on unchanged, outputs zeros, and has no influence on any
    value or gradient, whatever its input holds.

    Args:
        cell: the recurrence.
        params: what ``cell.init`` drew.
        x: inputs ``(B, T, D)``; ``(T, D)`` without a batch, or with several axes of it.
        initial: carry before the first step, arrays ``(B, H)``; the cell's own by default.
        lengths: valid steps of each row, ``(B,)``; 0 is legal.
        padding: the side on which rows are padded, for ``lengths``.
        mask: True where a step is valid, ``(B, T)``; combined with ``lengths`` by "and".
        resets: True at the first step of a sequence, ``(B, T)``, in the order of the text in
            either direction: the row's carry is replaced by ``cell.initial_carry`` between that
            step and the one before it, also where one of them is masked. With ``reverse`` it is
            replaced on the way *out* of the marked step.
        inputs: the cell's ``step_inputs`` by name, ``(B, T, width)`` or, of width 1, ``(B, T)``.
        keys: one key, one a row, or `Keys`: draws the cell's noise, and what ``prepare`` draws;
            None evaluates.
        reverse: run from the last step to the first; outputs keep their places.
        time_major: ``x``, ``mask``, ``resets``, ``inputs`` and the outputs are ``(T, B, ...)``.
        return_states: return the states of all steps, too.
        precision: ``"float32"``, or ``"bfloat16"`` products with wide accumulation and state.
        engine: an engine by name or as a value with settings of its own, or None to let
            `choose_engine` decide.

    Returns:
        Hidden states ``(B, T, H)`` and the carry after the last step processed; with
        ``return_states`` also the state after each step, arrays ``(B, T, ...)``.

    Raises:
        ValueError: shapes that do not fit, or an engine that does not exist or cannot run this.
        ContractError: a cell, parameters or a carry that do not fit the contract (a ValueError,
            too).

    Example:
        >>> from lstmjax.cells import GRU
        >>> cell = GRU(5)
        >>> params = cell.init(jax.random.key(0), input_size=3)
        >>> x = jnp.ones((2, 4, 3))
        >>> hs, final = unroll(cell, params, x, lengths=jnp.array([4, 2]))
        >>> bool(jnp.all(hs[1, 2:] == 0)), bool(jnp.all(hs[1, 1] == final.h[1]))
        (True, True)
    """
    if isinstance(cell, type):
        raise ContractError(f"{cell.__name__} is the class; pass an instance, {cell.__name__}(100)")
    given = _Given(
        _as_array(x),
        initial,
        _as_array(lengths),
        _as_array(mask),
        _as_array(resets),
        {name: _as_array(a) for name, a in (inputs or {}).items()},
        keys,
    )
    how = How(reverse, as_precision(precision), return_states)
    settings = _Settings(cell, how, padding, time_major, engine, platform())
    _check(settings, params, given)
    outs, final = _on_mesh(settings, params, given)
    return (outs.h, final, outs.state) if return_states else (outs.h, final)


_Axis = TypeVar("_Axis")
"""Of a shape its size; of a sharding the mesh axis along which it is cut."""


class _Given(NamedTuple):
    """What `unroll` was called with; inside, time-major and with one axis of rows."""

    xs: Array
    initial: Carry | None
    lengths: Array | None
    mask: Array | None
    resets: Array | None
    inputs: dict[str, Array]
    keys: Keys | Array | None


class _Settings(NamedTuple):
    """What is known before anything is traced."""

    cell: Cell
    how: How
    padding: Padding
    time_major: bool
    engine: str | Engine | None
    platform: str

    def batch(self, shape: Sequence[_Axis]) -> tuple[_Axis, ...]:
        """The axes of the batch in the shape of an input."""
        return tuple(shape[1:-1] if self.time_major else shape[:-2])


def _as_array(a: PyTree) -> PyTree:
    """Lists become arrays."""
    return np.asarray(a) if isinstance(a, list) else a


def _on_mesh(settings: _Settings, params: Params, given: _Given) -> tuple[Outputs, Carry]:
    """`_run`, and where types of arrays say how they are spread, results spread like the input."""
    spread = getattr(jax.typeof(given.xs), "sharding", None)
    if spread is None or AxisType.Explicit not in spread.mesh.axis_types:
        return _run(settings, params, given)
    rows = settings.batch((*spread.spec, *[None] * (given.xs.ndim - len(spread.spec))))
    outs = PartitionSpec(None, *rows) if settings.time_major else PartitionSpec(*rows)
    run = functools.partial(_run, settings)
    return jax.sharding.auto_axes(run, out_sharding=(outs, PartitionSpec(*rows)))(params, given)


@functools.partial(jax.jit, static_argnums=0)
def _run(settings: _Settings, params: Params, given: _Given) -> tuple[Outputs, Carry]:
    """Choose the engine and let it run, unless there is nothing to run."""
    cell, how = settings.cell, settings.how
    batch = settings.batch(given.xs.shape)
    given = _one_batch_axis(settings, given, batch)
    inputs = _inputs(settings, params, given)
    steps, rows, features = inputs.xs.shape
    if 0 in (steps, rows):
        return _as_given(settings, _nothing(inputs, how), inputs.initial, batch)
    args = step_arguments(cell, inputs)
    transition_program(cell, args)
    work = Workload(
        settings.platform,
        str(inputs.xs.dtype),
        how.precision,
        steps,
        rows,
        features,
        training=inputs.noises is not None,
        states=how.states,
        resets=inputs.resets is not None,
        args=args,
    )
    chosen, _ = choose_engine(cell, work, settings.engine)
    return _as_given(settings, *chosen(cell, inputs, how), batch)


def _inputs(settings: _Settings, params: Params, given: _Given) -> Inputs:
    """What the engines take."""
    cell, reverse, xs = settings.cell, settings.how.reverse, given.xs
    steps, batch, features = xs.shape
    mask, resets, more = given.mask, given.resets, given.inputs
    if given.lengths is not None:
        valid = length_mask(given.lengths, steps, settings.padding).T
        mask = valid if mask is None else mask & valid
    if mask is not None:
        xs, more = jax.tree.map(lambda a: jnp.where(mask[..., None], a, 0), (xs, more))
    if "x" in cell.step_inputs:
        more = {"x": xs} | more
    keys = as_keys(given.keys, batch)
    params = _prepared(cell, params, keys)
    begun = start(cell, params, batch, features, xs.dtype)
    initial = begun if given.initial is None else given.initial
    _check_carry(cell, initial, begun)
    drawn = noises(keys.rows if keys and cell.noise else None, steps, resets)
    if resets is not None and reverse:
        resets = _reversed(resets)
    params, xs, initial, begun = vary_alike(
        (params, xs, initial, begun), params, xs, initial, more, keys
    )
    return Inputs(params, xs, initial, None if resets is None else begun, more, drawn, mask, resets)


def _prepared(cell: Cell, params: Params, keys: Keys | None) -> Params:
    if type(cell).prepare is Cell.prepare:
        return params
    return cell.prepare(params, None if keys is None else keys.shared)


def _nothing(inputs: Inputs, how: How) -> Outputs:
    """The outputs of no steps, or of no rows."""
    steps, batch = inputs.xs.shape[:2]

    def none(a: Array) -> Array:
        return vary_alike(jnp.zeros((steps, batch, *a.shape[1:]), a.dtype), inputs.xs)

    outs = jax.tree.map(none, inputs.initial)
    return outs if how.states else outs._replace(state=None)


# --- What was given ------------------------------------------------------------------------------


def _one_batch_axis(settings: _Settings, given: _Given, batch: tuple[Size, ...]) -> _Given:
    """Time-major, with one axis of rows in place of none or several."""

    def rows(a: Array) -> Array:
        return a if len(batch) == 1 else a.reshape(math.prod(batch), *a.shape[len(batch) :])

    def over_time(a: Array) -> Array:
        if not settings.time_major:
            return rows(a).swapaxes(0, 1)
        return (
            a
            if len(batch) == 1
            else a.reshape(a.shape[0], math.prod(batch), *a.shape[1 + len(batch) :])
        )

    keys = given.keys
    if isinstance(keys, Array) and keys.ndim == len(batch) > 1:
        keys = rows(keys)
    inputs = {
        name: over_time(a if a.ndim == given.xs.ndim else a[..., None])
        for name, a in given.inputs.items()
    }
    return _Given(
        over_time(given.xs),
        jax.tree.map(rows, given.initial) if isinstance(given.initial, Carry) else given.initial,
        None if given.lengths is None else rows(jnp.asarray(given.lengths)),
        None if given.mask is None else over_time(given.mask),
        None if given.resets is None else over_time(given.resets),
        inputs,
        keys,
    )


def _as_given(
    settings: _Settings, outs: Outputs, final: Carry, batch: tuple[Size, ...]
) -> tuple[Outputs, Carry]:
    """Outputs and carry with the axes that the inputs had."""

    def rows(a: Array) -> Array:
        return a if len(batch) == 1 else a.reshape(*batch, *a.shape[1:])

    def over_time(a: Array) -> Array:
        if not settings.time_major:
            return rows(a.swapaxes(0, 1))
        return a if len(batch) == 1 else a.reshape(a.shape[0], *batch, *a.shape[2:])

    return jax.tree.map(over_time, outs), jax.tree.map(rows, final)


def _check(settings: _Settings, params: Params, given: _Given) -> None:
    """Raise `ValueError` where shapes and types do not fit; nothing is computed."""
    x, cell = given.xs, settings.cell
    shape = np.shape(x)
    if len(shape) < 2:
        raise ValueError(f"x must have shape (B, T, D), or (T, B, D) if time_major; got {shape}")
    batch = settings.batch(shape)
    over_time = shape[:-1]
    for name, flags in (("mask", given.mask), ("resets", given.resets)):
        if flags is not None and np.shape(flags) != over_time:
            raise ValueError(
                f"{name} must cover rows x steps, {over_time} here; got {np.shape(flags)}"
            )
        if flags is not None and flags.dtype != jnp.bool_:
            raise ValueError(f"{name} must be boolean, got {flags.dtype}; pass {name} != 0")
    if given.lengths is not None and np.shape(given.lengths) != batch:
        raise ValueError(f"lengths must have shape {batch}, got {np.shape(given.lengths)}")
    if given.lengths is not None and not jnp.issubdtype(given.lengths.dtype, jnp.integer):
        raise ValueError(f"lengths must be integers, got {given.lengths.dtype}")
    for name, a in given.inputs.items():
        if over_time not in (np.shape(a), np.shape(a)[:-1]):
            raise ValueError(
                f"inputs[{name!r}] must have shape (*{over_time}, width), got {np.shape(a)}"
            )
    if settings.padding not in ("left", "right"):
        raise ValueError(f'padding must be "left" or "right", got {settings.padding!r}')
    _check_parameters(cell, params, shape[-1], x.dtype)
    _check_inputs(cell, given.inputs, over_time, shape[-1])


def _check_parameters(cell: Cell, params: Params, features: int, dtype: DTypeLike) -> None:
    """Raise `ValueError` where parameters and inputs do not fit the cell."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"x must be floating point, got {dtype}")
    kernel = params.get("kernel") if isinstance(params, Mapping) else None
    if kernel is not None and kernel.ndim == 2 and kernel.shape[0] != features:
        raise ContractError(f"x has {features} features, the cell's kernel takes {kernel.shape[0]}")
    if kernel is not None and kernel.dtype != dtype:
        raise ContractError(
            f"x is {dtype}, the cell's kernel {kernel.dtype}: cast one of them "
            '(for fast products keep float32 and pass precision="bfloat16")'
        )
    wanted = _parameter_shapes(cell, features)
    found = {
        jax.tree_util.keystr(p): np.shape(a) for p, a in jax.tree_util.tree_leaves_with_path(params)
    }
    for name, shape in wanted.items():
        if name not in found:
            raise ContractError(
                f"these are no parameters of {cell}: they lack {name} {shape}; draw them with "
                f"cell.init(key, input_size={features})"
            )
        if found[name] != shape:
            raise ContractError(
                f"these are no parameters of {cell}: {name} has shape {found[name]}, not {shape}"
            )


def _check_inputs(
    cell: Cell, inputs: Mapping[str, Array], over_time: tuple[Size, ...], features: int
) -> None:
    declared = cell.step_inputs
    missing = sorted(set(declared) - set(inputs) - {"x"})
    surplus = sorted(set(inputs) - set(declared))
    name = type(cell).__name__
    if missing:
        raise ContractError(f"{name} needs inputs={{{missing[0]!r}: ...}}: its step_inputs")
    if surplus:
        raise ContractError(
            f"{name} has no step input {surplus[0]!r}; "
            f"declared are: {', '.join(declared) or 'none'}"
        )
    if "x" in set(declared) - set(inputs):
        width = cell.width(declared["x"], features)
        if width != features:
            raise ContractError(
                f"{name} takes x itself, too, and {width} features of it, not {features}; or give "
                "it inputs={'x': ...} of that width"
            )
    for key, a in inputs.items():
        width, given = cell.width(declared[key], features), (*np.shape(a), 1)[len(over_time)]
        if given != width:
            raise ContractError(f"inputs[{key!r}] has {given} numbers a row, not {width}")


def _check_carry(cell: Cell, initial: object, begun: Carry) -> None:
    """Raise `ContractError` where an initial carry is not one of this cell and batch."""
    name = type(cell).__name__
    given, wanted = (str(jax.tree.structure(a)) for a in (initial, begun))
    if not isinstance(initial, Carry) or given != wanted:
        fields = ", ".join(begun.state._fields) if hasattr(begun.state, "_fields") else "..."
        raise ContractError(
            f"initial must be Carry(h, {name}.{type(begun.state).__name__}({fields})) (from "
            f"lstmjax.cells), got {_kind(initial)}"
        )
    if layout(initial) != layout(begun):
        raise ContractError(f"initial must be {layout(begun)}, got {layout(initial)}")


def _kind(value: object) -> str:
    if isinstance(value, Carry):
        return f"Carry(h, {_kind(value.state)})"
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return f"a tuple of {len(value)}"
    return type(value).__name__


@functools.lru_cache(maxsize=256)
def _parameter_shapes(cell: Cell, features: int) -> dict[str, tuple[int, ...]]:
    """Of what `Cell.init` draws, by path."""
    shapes = jax.eval_shape(lambda: cell.init(jax.random.key(0), features))
    return {
        jax.tree_util.keystr(path): a.shape
        for path, a in jax.tree_util.tree_leaves_with_path(shapes)
    }


def _reversed(resets: Array) -> Array:
    """Resets for the way back in time.

    Step t is entered from step t + 1, so the boundary in front of t + 1 lies between them.
    """
    return jnp.roll(resets, -1, axis=0).at[-1:].set(False)


def length_mask(
    lengths: Int[Array | np.ndarray, " B"], steps: Size, padding: Padding = "right"
) -> Bool[Array, "B T"]:
    """True on each row's valid steps.

    Example:
        >>> length_mask(jnp.array([1, 3]), 3, "left").tolist()
        [[False, False, True], [True, True, True]]
    """
    t = jnp.arange(steps, dtype=jnp.int32)[None]
    lengths = jnp.asarray(lengths).astype(jnp.int32)
    if padding == "right":
        return t < lengths[:, None]
    if padding == "left":
        return t >= steps - lengths[:, None]
    raise ValueError(f'padding must be "left" or "right", got {padding!r}')
