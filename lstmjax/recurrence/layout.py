"""How arrays are laid out for kernels, of whatever device."""

import jax.numpy as jnp
from jax import Array

from lstmjax.cells.base import Cell

MIB = 2**20
"""Bytes."""


def up(number: int, multiple: int) -> int:
    """``number`` rounded up to a multiple.

    Example:
        >>> up(100, 64)
        128
    """
    return -(-number // multiple) * multiple


def dense(cell: Cell, recurrent_kernel: Array) -> Array:
    """The recurrent kernel as ``(H, G H)``: with several heads, with zeros between them."""
    if cell.heads == 1:
        return recurrent_kernel
    block, gates = recurrent_kernel.shape[0], len(cell.gates)
    blocks = recurrent_kernel.reshape(1, block, gates, cell.heads, block)
    own = jnp.eye(cell.heads, dtype=bool).reshape(cell.heads, 1, 1, cell.heads, 1)
    return jnp.where(own, blocks, 0).reshape(cell.hidden_size, -1)
