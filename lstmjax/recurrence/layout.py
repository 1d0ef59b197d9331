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
    return grouped(cell, recurrent_kernel, 1).reshape(cell.hidden_size, -1)


def groups_of(cell: Cell, tile: int) -> int:
    """Recurrences that know nothing of each other: of a head each, or of as many as fill a tile.

    Example:
        >>> from lstmjax.cells import SLSTM
        >>> groups_of(SLSTM(512, heads=4), 64), groups_of(SLSTM(64, heads=8), 64)
        (4, 1)
    """
    width = cell.hidden_size // cell.heads
    together = range(1, max(1, tile // width) + 1)
    return cell.heads // max(n for n in together if cell.heads % n == 0)


def grouped(cell: Cell, recurrent_kernel: Array, groups: int) -> Array:
    """The recurrent kernel as ``(groups, H / groups, G, H / groups)``.

    Dense in a group: with several heads in one, with zeros between them.
    """
    heads, gates = cell.heads // groups, len(cell.gates)
    if heads == 1 and groups == 1:
        return recurrent_kernel.reshape(1, cell.hidden_size, gates, -1)
    block, width = recurrent_kernel.shape[0], cell.hidden_size // groups
    blocks = recurrent_kernel.reshape(block, gates, groups, heads, block).transpose(2, 0, 1, 3, 4)
    own = jnp.eye(heads, dtype=bool).reshape(heads, 1, 1, heads, 1)
    return jnp.where(own, blocks[:, None], 0).reshape(groups, width, gates, width)
