"""The second experiment's data: has the running sum of random numbers reached a limit yet?"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Key, UInt32


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
    return x[:, :, None], jnp.asarray(cumsum_labels(x), jnp.int32)


def cumsum_labels(
    x: Float32[Array | np.ndarray, "batch steps"],
) -> Bool[Array | np.ndarray, "batch steps"]:
    """Whether the sum up to each step has reached a quarter of the number of steps.

    >>> cumsum_labels(np.array([[0.4, 0.3, 0.4, 0.1]], np.float32)).tolist()
    [[False, False, True, True]]
    """
    return x.cumsum(axis=1) >= x.shape[1] / 4
