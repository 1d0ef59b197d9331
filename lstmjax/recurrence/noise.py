"""Where a cell's random numbers come from: row keys and places in time, never a device."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Int, Key, PRNGKeyArray

from lstmjax.cells.base import Cell
from lstmjax.cells.noise import Noise
from lstmjax.recurrence.refs import Index
from lstmjax.traced import Size

RowKeys = Key[Array, " B"]
"""One key a row, ``(B,)``; None in its place means evaluation: nothing is drawn."""


class Keys(NamedTuple):
    """Randomness of a batch.

    Attributes:
        rows: one key a row of the global batch, ``(B,)``: noise and dropout.
        shared: one for the whole batch: what `Cell.prepare` draws, the same on every device.
    """

    rows: RowKeys
    shared: PRNGKeyArray | None = None


def row_keys(key: PRNGKeyArray, batch_size: int) -> RowKeys:
    """One key for each row of the global batch, ``(batch_size,)``.

    Example:
        >>> row_keys(jax.random.key(0), batch_size=4).shape
        (4,)
    """
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch_size))


def as_keys(keys: Keys | Array | None, batch_size: Size) -> Keys | None:
    """Row keys as they are; one key as that of a whole batch; None stays None."""
    if keys is None or isinstance(keys, Keys):
        return keys
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    given = keys if typed else jax.random.wrap_key_data(keys)
    if given.ndim == 0:
        return Keys(row_keys(given, batch_size), jax.random.fold_in(given, 2**31))
    if given.shape != (batch_size,):
        raise ValueError(
            f"keys must be one key, or one a row, ({batch_size},); got shape {given.shape}"
        )
    return Keys(given)


class Noises(NamedTuple):
    """The noise of a recurrence, drawn when and where it is needed.

    Attributes:
        keys: one a row, ``(B,)``.
        steps: the place in time of each step, ``(T,)``.
        sequences: how many sequences began before each step, ``(T, B)``; None where nothing resets.
    """

    keys: RowKeys
    steps: Int[Array, " T"]
    sequences: Int[Array, "T B"] | None

    def draw(self, cell: Cell, dtype: DTypeLike, first: Index, count: int) -> dict[str, Array]:
        """The numbers of ``count`` steps from ``first`` on, by name: ``(count, B, width)``."""
        drawn = {}
        steps = jax.lax.dynamic_slice_in_dim(self.steps, first, count)
        steps = jnp.broadcast_to(steps[:, None], (count, *self.keys.shape))
        for number, (name, noise) in enumerate(cell.noise.items()):
            keys = jax.vmap(lambda key, n=number: jax.random.fold_in(key, n))(self.keys)
            width = cell.width(noise.width, 0)

            def one(key: Array, place: Index, noise: Noise = noise, width: int = width) -> Array:
                return noise.draw(jax.random.fold_in(key, place), (width,), dtype)

            if noise.every == "step":
                drawn[name] = jax.vmap(jax.vmap(one), (None, 0))(keys, steps)
            elif self.sequences is None:
                once = jax.vmap(functools.partial(one, place=0))(keys)
                drawn[name] = jnp.broadcast_to(once[None], (count, *once.shape))
            else:
                places = jax.lax.dynamic_slice_in_dim(self.sequences, first, count)
                drawn[name] = jax.vmap(jax.vmap(one), (None, 0))(keys, places)
        return drawn


def noises(keys: RowKeys | None, steps: Size, resets: Bool[Array, "T B"] | None) -> Noises | None:
    """Of a recurrence over so many steps, ``resets`` in the order of time."""
    if keys is None:
        return None
    sequences = None if resets is None else jnp.cumsum(resets, axis=0, dtype=jnp.int32)
    return Noises(keys, jnp.arange(steps, dtype=jnp.int32), sequences)
