"""The keys of a call, and dropout: random bits are drawn row by row."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, PyTree

from lstmjax.recurrence.noise import Keys, as_keys
from lstmjax.traced import Size

AnyKeys = Keys | Array | None
"""`Keys`, one key a row, or one key for a whole batch; None evaluates."""
AnyRngs = nnx.Rngs | nnx.RngStream | Array | None
"""Where Flax' own layers take their randomness from."""


def keys_of_call(
    keys: AnyKeys, rngs: AnyRngs, deterministic: bool | None, rows: Size
) -> Keys | None:
    """The keys that a call means, said in our way or in Flax'; None evaluates.

    Args:
        keys: `Keys`, one key a row, or one for a whole batch.
        rngs: `nnx.Rngs`, of which the stream ``dropout`` is used, a stream, or a key.
        deterministic: True evaluates whatever else is given; False needs one of the others.
        rows: of the batch.

    Raises:
        ValueError: both are given, or none where one is needed.
    """
    if deterministic:
        return None
    if keys is not None and rngs is not None:
        raise ValueError("keys and rngs are given: leave out one of them")
    if rngs is not None:
        stream = rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
        keys = stream() if isinstance(stream, nnx.RngStream) else stream
    if keys is None and deterministic is False:
        raise ValueError("deterministic=False needs keys=jax.random.key(0), say, or rngs=")
    return as_keys(keys, rows)


def fold_keys(keys: AnyKeys, uses: int) -> tuple[PyTree, ...]:
    """Fresh keys for each of several uses, all derived at once; of None, as many None.

    Args:
        keys: one key a row, `Keys`, or None.
        uses: how many of the same kind are wanted.

    Example:
        >>> from lstmjax.recurrence.noise import row_keys
        >>> [k.shape for k in fold_keys(row_keys(jax.random.key(0), 4), uses=2)]
        [(4,), (4,)]
    """
    if keys is None:
        return (None,) * uses
    if isinstance(keys, Keys):
        shared = (None,) * uses if keys.shared is None else fold_keys(keys.shared[None], uses)
        return tuple(
            Keys(rows, one if one is None else one[0])
            for rows, one in zip(fold_keys(keys.rows, uses), shared, strict=True)
        )
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
    return tuple(fold(keys, jnp.arange(uses)))


def dropout(x: Float[Array, "B ..."], rate: float, keys: AnyKeys) -> Float[Array, "B ..."]:
    """Zero each element with probability ``rate``, scale the rest (Srivastava et al. 2014).

    Args:
        x: values, the rows first.
        rate: at least 0 and less than 1.
        keys: one key a row, or one for all, or None to return ``x`` as it is.

    Raises:
        ValueError: a rate out of range.

    Example:
        >>> from lstmjax.recurrence.noise import row_keys
        >>> x = jnp.ones((2, 1000))
        >>> kept = dropout(x, 0.25, row_keys(jax.random.key(0), 2)) != 0
        >>> bool(abs(kept.mean() - 0.75) < 0.03)
        True
    """
    check_rates(rate=rate)
    found = as_keys(keys, x.shape[0])
    if found is None or rate == 0:
        return x
    share = np.float32(1 - rate)  # of 32 bits with 64-bit numbers, too: the same draws
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, share, x.shape[1:]))(found.rows)
    return jnp.where(keep, x / (1 - rate), 0)


def check_rates(**rates: float) -> None:
    """Raise `ValueError` for a share dropped that is no number in [0, 1)."""
    for name, rate in rates.items():
        if not (isinstance(rate, int | float | np.number) and 0 <= rate < 1):
            raise ValueError(f"{name} must be a number, at least 0 and less than 1; got {rate!r}")
