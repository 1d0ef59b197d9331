"""The second experiment's data: has the running sum of random numbers reached a limit yet?"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Key, UInt32


def sample_cumsum(
    key: Key[Array, ""] | UInt32[Array, "2"], batch: int, steps: int = 10
) -> tuple[Float32[Array, "batch steps 1"], Int32[Array, "batch steps"]]:
    """Draw x from U[0, 1); the label of step t is 1 once x_1 + ... + x_t has reached steps / 4.

    >>> x, y = sample_cumsum(jax.random.key(0), batch=2)
    >>> x.shape, y.shape
    ((2, 10, 1), (2, 10))

    Args:
        key: a JAX random key; the same key gives the same sequences.
        batch: number of sequences.
        steps: length of each.

    Returns:
        The numbers (batch, steps, 1) and the labels (batch, steps).
    """
    x = jax.random.uniform(key, (batch, steps), jnp.float32)
    y = (jnp.cumsum(x, axis=1) >= steps / 4).astype(jnp.int32)
    return x[:, :, None], y
