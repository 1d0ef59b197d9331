"""The one entry to the recurrence: layouts, lengths, masks, resets, direction, engine."""

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from lstmjax.cells.base import Carry, Cell, Params
from lstmjax.precision import Precision
from lstmjax.recurrence.choice import choose_engine
from lstmjax.recurrence.engine import Engine, Workload, platform, vary_alike


def unroll(
    cell: Cell,
    params: Params,
    x: Float[Array, "B T D"],
    initial: Carry | None = None,
    *,
    lengths: Int[Array, " rows"] | None = None,
    padding: Literal["left", "right"] = "right",
    mask: Bool[Array, "B T"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
    reverse: bool = False,
    time_major: bool = False,
    precision: Precision = "float32",
    engine: str | Engine | None = None,
) -> tuple[Float[Array, "B T H"], Carry]:
    """Run ``cell`` over every time step of a batch.

    A masked step passes the carry on unchanged, outputs zeros, and has no influence on any
    value or gradient, whatever its input holds.

    Args:
        cell: the recurrence.
        params: what ``cell.init`` drew.
        x: inputs ``(B, T, D)``.
        initial: carry before the first step, arrays ``(B, H)``; the cell's own by default.
        lengths: valid steps of each row, ``(B,)``; 0 is legal.
        padding: the side on which rows are padded, for ``lengths``.
        mask: True where a step is valid, ``(B, T)``; combined with ``lengths`` by "and".
        resets: True where a new sequence begins: the row's carry is replaced by
            ``cell.initial_carry`` on the way into it, in either direction, also on a masked step.
        reverse: run from the last step to the first; outputs keep their places.
        time_major: ``x``, ``mask``, ``resets`` and the outputs are ``(T, B, ...)``.
        precision: ``"float32"``, or ``"bfloat16"`` products with wide accumulation and state.
        engine: an engine by name or as a value with settings of its own, or None to let
            `choose_engine` decide.

    Returns:
        Hidden states ``(B, T, H)`` and the carry after the last step processed.

    Raises:
        ValueError: shapes that do not fit, or an engine that does not exist or cannot run this.

    Example:
        >>> from lstmjax.cells import GRU
        >>> cell = GRU(5)
        >>> params = cell.init(jax.random.key(0), input_size=3)
        >>> x = jnp.ones((2, 4, 3))
        >>> hs, final = unroll(cell, params, x, lengths=jnp.array([4, 2]))
        >>> bool(jnp.all(hs[1, 2:] == 0)), bool(jnp.all(hs[1, 1] == final.h[1]))
        (True, True)
    """
    if x.ndim != 3:
        raise ValueError(f"x must have shape (B, T, D), or (T, B, D) if time_major; got {x.shape}")
    xs, mask, resets = (x, mask, resets) if time_major else _swapped(x, mask, resets)
    _check(params, xs, mask, resets, lengths)
    if lengths is not None:
        valid = length_mask(lengths, len(xs), padding).T
        mask = valid if mask is None else mask & valid
    if mask is not None:
        xs = jnp.where(mask[..., None], xs, 0)
    if resets is not None and reverse:
        resets = _reversed(resets)
    if initial is None:
        initial = cell.initial_carry(xs.shape[1], xs.dtype)
    hs, final = _run(cell, params, xs, initial, mask, resets, reverse, precision, engine)
    return (hs if time_major else hs.swapaxes(0, 1)), final


def _run(
    cell: Cell,
    params: Params,
    xs: Array,
    initial: Carry,
    mask: Array | None,
    resets: Array | None,
    reverse: bool,
    precision: Precision,
    engine: str | Engine | None,
) -> tuple[Array, Carry]:
    """Choose the engine and let it run, unless there is nothing to run."""
    steps, batch, features = xs.shape
    params, xs, initial = vary_alike((params, xs, initial), params, xs, initial)
    work = Workload(platform(), str(xs.dtype), precision, steps, batch, features)
    chosen, _ = choose_engine(cell, work, engine)
    if steps and batch:
        return chosen(cell, params, xs, initial, mask, resets, reverse, precision)
    return vary_alike(jnp.zeros((steps, batch, cell.hidden_size), xs.dtype), xs), initial


def _check(
    params: Params, xs: Array, mask: Array | None, resets: Array | None, lengths: Array | None
) -> None:
    """Raise `ValueError` where the arguments do not fit ``xs (T, B, D)``."""
    steps, batch, features = xs.shape
    for name, a in (("mask", mask), ("resets", resets)):
        if a is not None and a.shape != (steps, batch):
            raise ValueError(f"{name} must cover {batch} rows x {steps} steps, got {a.shape}")
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape ({batch},), got {lengths.shape}")
    kernel = params.get("kernel")
    if kernel is not None and kernel.shape[0] != features:
        raise ValueError(f"x has {features} features, the cell's kernel takes {kernel.shape[0]}")
    if kernel is not None and kernel.dtype != xs.dtype:
        raise ValueError(
            f"x is {xs.dtype}, the cell's kernel {kernel.dtype}: cast one of them "
            '(for fast products keep float32 and pass precision="bfloat16")'
        )


def _swapped(
    x: Array, mask: Array | None, resets: Array | None
) -> tuple[Array, Array | None, Array | None]:
    """Batch-major to time-major."""
    return (
        x.swapaxes(0, 1),
        None if mask is None else mask.T,
        None if resets is None else resets.T,
    )


def _reversed(resets: Array) -> Array:
    """Resets for the way back in time.

    Step t is entered from step t + 1, so the boundary in front of t + 1 lies between them.
    """
    return jnp.roll(resets, -1, axis=0).at[-1:].set(False)


def length_mask(
    lengths: Int[Array, " B"], steps: int, padding: Literal["left", "right"] = "right"
) -> Bool[Array, "B T"]:
    """True on each row's valid steps.

    Example:
        >>> length_mask(jnp.array([1, 3]), 3, "left").tolist()
        [[False, False, True], [True, True, True]]
    """
    t = jnp.arange(steps)[None]
    if padding == "right":
        return t < lengths[:, None]
    if padding == "left":
        return t >= steps - lengths[:, None]
    raise ValueError(f'padding must be "left" or "right", got {padding!r}')
