"""float32 numbers as sums of bfloat16 numbers, for kernels that multiply no others."""

import jax.numpy as jnp
from jax import Array, lax


def split(x: Array, parts: int) -> list[Array]:
    """bfloat16 arrays that sum up to ``x``, the larger first; inside a kernel only.

    Args:
        x: float32, of any shape.
        parts: how many; three of them hold all of a float32 number.

    Example:
        >>> import jax.numpy as jnp
        >>> [float(part) for part in split(jnp.float32(1.001), 2)]
        [1.0, 0.00099945068359375]
    """
    found = []
    for _ in range(parts):
        found.append(x.astype(jnp.bfloat16))
        x = x - found[-1].astype(x.dtype)
    return found


def split_outside(x: Array, parts: int) -> list[Array]:
    """The same for code that XLA compiles.

    XLA may take a number that is rounded to bfloat16 and back for the number itself (it calls that
    excess precision), whereupon every part but the first would be zero: hence the operation that
    says to round. What compiles the kernels takes no such liberty, and need not know it.

    Example:
        >>> import jax.numpy as jnp
        >>> [float(part) for part in split_outside(jnp.float32(1.001), 2)]
        [1.0, 0.00099945068359375]
    """
    bfloat16 = jnp.finfo(jnp.bfloat16)
    found = []
    for _ in range(parts):
        rounded = lax.reduce_precision(x, bfloat16.nexp, bfloat16.nmant)
        found.append(rounded.astype(jnp.bfloat16))
        x = x - rounded
    return found
