"""The one entry to the recurrence: layouts, lengths, masks, resets, direction, engine."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, PyTree

from lstmjax.cells.base import Carry, Cell, Params, start
from lstmjax.cells.contract import layout, transition_program
from lstmjax.errors import ContractError
from lstmjax.precision import as_precision
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
from lstmjax.traced import vary_alike

Padding = Literal["left", "right"]


def unroll(
    cell: Cell,
    params: Params,
    x: Float[Array | np.ndarray, "*B T D"],
    initial: Carry | None = None,
    *,
    lengths: Int[Array | np.ndarray, " *rows"] | Sequence[int] | None = None,
    padding: Padding = "right",
    mask: Bool[Array | np.ndarray, "*B T"] | Sequence[Any] | None = None,
    resets: Bool[Array | np.ndarray, "*B T"] | Sequence[Any] | None = None,
    inputs: Mapping[str, Array] | None = None,
    keys: Keys | Array | None = None,
    reverse: bool = False,
    time_major: bool = False,
    return_states: bool = False,
    precision: Any = "float32",
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
    x = x if hasattr(x, "ndim") else jnp.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"x must have shape (B, T, D), or (T, B, D) if time_major; got {x.shape}")
    given = _Given(x, initial, lengths, mask, resets, dict(inputs or {}), keys)
    given, batch = _one_batch_axis(given, time_major)
    _check(cell, params, given)
    how = How(reverse, as_precision(precision), return_states)
    settings = _Settings(cell, how, padding, engine, platform())
    outs, final = _run(settings, params, given)
    outs, final = _as_given(outs, final, batch, time_major)
    return (outs.h, final, outs.state) if return_states else (outs.h, final)


class _Given(NamedTuple):
    """What `unroll` was called with, time-major and with one axis of rows."""

    xs: Any
    initial: Carry | None
    lengths: Any
    mask: Any
    resets: Any
    inputs: dict[str, Any]
    keys: Any


class _Settings(NamedTuple):
    """What is known before anything is traced."""

    cell: Cell
    how: How
    padding: Padding
    engine: str | Engine | None
    platform: str


@functools.partial(jax.jit, static_argnums=0)
def _run(settings: _Settings, params: Params, given: _Given) -> tuple[Outputs, Carry]:
    """Choose the engine and let it run, unless there is nothing to run."""
    cell, how, (xs, initial) = settings.cell, settings.how, given[:2]
    steps, batch, features = xs.shape
    mask, resets = given.mask, given.resets
    if given.lengths is not None:
        valid = length_mask(given.lengths, steps, settings.padding).T
        mask = valid if mask is None else mask & valid
    more = given.inputs
    if mask is not None:
        xs, more = jax.tree.map(lambda a: jnp.where(mask[..., None], a, 0), (xs, more))
    if "x" in cell.step_inputs:
        more = {"x": xs} | more
    keys = as_keys(given.keys, batch)
    params = _prepared(cell, params, keys)
    begun = start(cell, params, batch, features, xs.dtype)
    if initial is None:
        initial = begun
    drawn = noises(keys.rows if keys and cell.noise else None, steps, resets)
    if resets is not None and how.reverse:
        resets = _reversed(resets)
    params, xs, initial, begun = vary_alike(
        (params, xs, initial, begun), params, xs, initial, more, keys
    )
    inputs = Inputs(
        params, xs, initial, None if resets is None else begun, more, drawn, mask, resets
    )
    _check_carry(cell, initial, begun)
    if 0 in (steps, batch):
        return _nothing(cell, inputs, how), initial
    args = step_arguments(cell, inputs)
    transition_program(cell, args)
    work = Workload(
        settings.platform,
        str(xs.dtype),
        how.precision,
        steps,
        batch,
        features,
        drawn is not None,
        how.states,
        resets is not None,
        args,
    )
    chosen, _ = choose_engine(cell, work, settings.engine)
    return chosen(cell, inputs, how)


def _prepared(cell: Cell, params: Params, keys: Keys | None) -> Params:
    if type(cell).prepare is Cell.prepare:
        return params
    return cell.prepare(params, None if keys is None else keys.shared)


def _nothing(cell: Cell, inputs: Inputs, how: How) -> Outputs:
    """The outputs of no steps, or of no rows."""
    steps, batch = inputs.xs.shape[:2]

    def none(a: Array) -> Array:
        return vary_alike(jnp.zeros((steps, batch, *a.shape[1:]), a.dtype), inputs.xs)

    outs = jax.tree.map(none, inputs.initial)
    return outs if how.states else outs._replace(state=None)


# --- What was given ------------------------------------------------------------------------------


def _one_batch_axis(given: _Given, time_major: bool) -> tuple[_Given, tuple[int, ...]]:
    """Time-major, with one axis of rows in place of none or several, and the axes there were."""
    axes = given.xs.shape
    batch = axes[1:-1] if time_major else axes[:-2]

    def over_time(a: Any) -> Any:
        if time_major or len(batch) == 0:
            a = a if time_major else a[None].swapaxes(0, 1)
            return a.reshape(a.shape[0], -1, *a.shape[1 + len(batch) :]) if len(batch) != 1 else a
        if len(batch) == 1:
            return a.swapaxes(0, 1)
        return a.reshape(-1, *a.shape[len(batch) :]).swapaxes(0, 1)

    def rows(a: Any) -> Any:
        return a if len(batch) == 1 else a.reshape(-1, *a.shape[len(batch) :])

    steps = axes[0] if time_major else axes[-2]
    whole = (steps, *batch) if time_major else (*batch, steps)
    mask = _flags("mask", given.mask, whole)
    resets = _flags("resets", given.resets, whole)
    lengths = given.lengths
    if lengths is not None:
        lengths = jnp.asarray(lengths)
        if lengths.shape != batch:
            raise ValueError(f"lengths must have shape {batch}, got {lengths.shape}")
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(f"lengths must be integers, got {lengths.dtype}")
        lengths = rows(lengths)
    keys = given.keys
    if isinstance(keys, Array) and keys.ndim == len(batch) and keys.ndim > 1:
        keys = rows(keys)
    initial = given.initial
    if isinstance(initial, Carry) and len(batch) != 1:
        initial = jax.tree.map(rows, initial)
    inputs = {}
    for name, a in given.inputs.items():
        a = a if hasattr(a, "ndim") else jnp.asarray(a)
        a = a[..., None] if a.shape == whole else a
        if a.shape[:-1] != whole:
            raise ValueError(f"inputs[{name!r}] must have shape (*{whole}, width), got {a.shape}")
        inputs[name] = over_time(a)
    mask, resets = (None if a is None else over_time(a) for a in (mask, resets))
    return _Given(over_time(given.xs), initial, lengths, mask, resets, inputs, keys), batch


def _flags(name: str, flags: Any, shape: tuple[int, ...]) -> Array | None:
    """A mask as booleans, or `ValueError`."""
    if flags is None:
        return None
    flags = jnp.asarray(flags)
    if flags.shape != shape:
        raise ValueError(f"{name} must cover rows x steps, {shape} here; got {flags.shape}")
    if flags.dtype != jnp.bool_:
        raise ValueError(f"{name} must be boolean, got {flags.dtype}; pass {name} != 0")
    return flags


def _as_given(
    outs: Outputs, final: Carry, batch: tuple[int, ...], time_major: bool
) -> tuple[Outputs, Carry]:
    """Outputs and carry with the axes that the inputs had."""

    def over_time(a: Array) -> Array:
        if len(batch) == 1:
            return a if time_major else a.swapaxes(0, 1)
        rest = a.shape[2:]
        if time_major:
            return a.reshape(a.shape[0], *batch, *rest)
        return a.swapaxes(0, 1).reshape(*batch, a.shape[0], *rest)

    outs = jax.tree.map(over_time, outs)
    if len(batch) != 1:
        final = jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), final)
    return outs, final


def _check(cell: Cell, params: Params, given: _Given) -> None:
    """Raise `ValueError` where parameters and inputs do not fit the cell."""
    features, dtype = given.xs.shape[-1], given.xs.dtype
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
    found = {jax.tree_util.keystr(p): np.shape(a) for p, a in _leaves(params)}
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
    _check_inputs(cell, given.inputs, features)


def _check_inputs(cell: Cell, inputs: Mapping[str, Array], features: int) -> None:
    declared = cell.step_inputs
    missing = sorted(set(declared) - set(inputs) - {"x"})
    surplus = sorted(set(inputs) - set(declared))
    name = type(cell).__name__
    if missing:
        raise ContractError(f"{name} needs inputs={{{missing[0]!r}: ...}}: its step_inputs")
    if surplus:
        raise ContractError(
            f"{name} has no step input {surplus[0]!r}; declared are: {', '.join(declared) or 'none'}"
        )
    for key, a in inputs.items():
        width = cell.width(declared[key], features)
        if a.shape[-1] != width:
            raise ContractError(f"inputs[{key!r}] has {a.shape[-1]} numbers a row, not {width}")


def _check_carry(cell: Cell, initial: Any, begun: Carry) -> None:
    """Raise `ContractError` where an initial carry is not one of this cell and batch."""
    name = type(cell).__name__
    if not isinstance(initial, Carry) or (jax.tree.structure(initial) != jax.tree.structure(begun)):
        fields = ", ".join(begun.state._fields) if hasattr(begun.state, "_fields") else "..."
        raise ContractError(
            f"initial must be Carry(h, {name}.{type(begun.state).__name__}({fields})) (from "
            f"lstmjax.cells), got {_kind(initial)}"
        )
    if layout(initial) != layout(begun):
        raise ContractError(f"initial must be {layout(begun)}, got {layout(initial)}")


def _kind(value: Any) -> str:
    if isinstance(value, Carry):
        return f"Carry(h, {_kind(value.state)})"
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return f"a tuple of {len(value)}"
    return type(value).__name__


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


@functools.lru_cache(maxsize=256)
def _parameter_shapes(cell: Cell, features: int) -> dict[str, tuple[int, ...]]:
    """Of what `Cell.init` draws, by path."""
    shapes = jax.eval_shape(lambda: cell.init(jax.random.key(0), features))
    return {jax.tree_util.keystr(path): a.shape for path, a in _leaves(shapes)}


def _reversed(resets: Array) -> Array:
    """Resets for the way back in time.

    Step t is entered from step t + 1, so the boundary in front of t + 1 lies between them.
    """
    return jnp.roll(resets, -1, axis=0).at[-1:].set(False)


def length_mask(
    lengths: Int[Array, " B"], steps: int, padding: Padding = "right"
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
