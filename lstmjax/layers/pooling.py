"""One vector a row from the outputs of a recurrence."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from lstmjax.cells.base import Carry
from lstmjax.layers.base import Carries, Options, cleared
from lstmjax.recurrence.unroll import Padding

Pooling = Literal["last", "mean", "max"]


def last_valid(
    hs: Float[Array, "*B T H"],
    lengths: Int[Array | np.ndarray, "..."] | Sequence[int] | None = None,
    *,
    padding: Padding = "right",
    mask: Bool[Array | np.ndarray, "..."] | None = None,
) -> Float[Array, "*B H"]:
    """The output of each row's last valid step, where ``hs[:, -1]`` would be that of padding.

    Args:
        hs: outputs of a recurrence.
        lengths: valid steps of each row.
        padding: the side on which rows are padded, for ``lengths``.
        mask: True where a step is valid; combined with ``lengths`` by "and".

    Returns:
        One vector a row; zeros for a row without a valid step.

    Example:
        >>> hs = jnp.arange(6.0).reshape(2, 3, 1)
        >>> last_valid(hs, jnp.array([3, 1]))[:, 0].tolist()
        [2.0, 3.0]
    """
    valid = Options(lengths, padding, mask).valid(hs.shape)
    if valid is None:
        return hs[..., -1, :]
    at = valid.shape[-1] - 1 - jnp.argmax(valid[..., ::-1], axis=-1)
    found = jnp.take_along_axis(hs, at[..., None, None], axis=-2)[..., 0, :]
    return cleared(found, valid.any(axis=-1))


def pool(
    hs: Float[Array, "B T H"],
    final: Carries,
    mask: Bool[Array, "B T"] | None,
    kinds: Pooling | Sequence[Pooling],
) -> Float[Array, "B F"]:
    """One vector a row from the outputs of a recurrence, the kinds side by side.

    Args:
        hs: outputs, zero on masked steps.
        final: final carry, or the pair of both directions; of a stack's list the top one counts.
        mask: valid steps; None means all.
        kinds: ``"last"`` (the final hidden state), ``"mean"``, ``"max"`` over valid steps, one or
            several; a row with no valid step pools to zeros.

    Raises:
        ValueError: another kind.

    Example:
        >>> hs = jnp.arange(6.0).reshape(1, 3, 2)
        >>> pool(hs, None, None, ("max", "mean")).tolist()
        [[4.0, 5.0, 2.0, 3.0]]
    """
    steps = jnp.ones(hs.shape[:2], bool) if mask is None else mask
    parts = []
    for kind in pooling_kinds(kinds):
        if kind == "last":
            while isinstance(final, list):
                final = final[-1]
            carries = [final] if isinstance(final, Carry) else list(final)
            parts.append(jnp.concatenate([carry.h for carry in carries], axis=-1))
        elif kind == "mean":
            count = jnp.maximum(steps.sum(axis=1), 1).astype(hs.dtype)
            parts.append(jnp.where(steps[..., None], hs, 0).sum(axis=1) / count[:, None])
        else:
            top = jnp.where(steps[..., None], hs, jnp.finfo(hs.dtype).min).max(axis=1)
            parts.append(jnp.where(steps.any(axis=1)[:, None], top, 0))
    return jnp.concatenate(parts, axis=-1)


def pooling_kinds(kinds: Pooling | Sequence[Pooling]) -> tuple[Pooling, ...]:
    """One kind or several, as a tuple; `ValueError` for what is none."""
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not kinds:
        raise ValueError('pooling needs at least one of "last", "mean", "max"')
    for kind in kinds:
        if kind not in ("last", "mean", "max"):
            raise ValueError(f'pooling must be "last", "mean" or "max", got {kind!r}')
    return kinds
