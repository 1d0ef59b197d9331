"""How arrays are laid out for kernels, of whatever device."""

import math

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


def groups_of(cell: Cell, tile: int) -> int:
    """Recurrences that know nothing of each other, all of one width: of a head, or of as many as
    fit into a tile.

    Example:
        >>> from lstmjax.cells import SLSTM
        >>> groups_of(SLSTM(512, heads=4), 64), groups_of(SLSTM(64, heads=8), 64)
        (4, 1)
    """
    width = cell.hidden_size // cell.heads
    together = range(1, max(1, tile // width) + 1)
    return cell.heads // max(n for n in together if cell.heads % n == 0)


def group_width(cell: Cell, tile: int) -> int:
    """Units of the fewest heads that fill whole tiles, H at most: no other units reach them.

    Example:
        >>> from lstmjax.cells import SLSTM
        >>> [group_width(SLSTM(768, heads=heads), 128) for heads in (1, 3, 8, 24)]
        [768, 256, 384, 128]
    """
    return min(math.lcm(cell.hidden_size // cell.heads, tile), cell.hidden_size)


def grouped(cell: Cell, recurrent_kernel: Array, width: int) -> Array:
    """The recurrent kernel as ``(width, n H)``: the rows of each unit's own group of heads.

    Between the heads of a group stand zeros, and behind those of the last one, if it is smaller.

    Args:
        cell: whose it is.
        recurrent_kernel: ``(H/heads, n H)``, of all gates or of those that have one.
        width: units of a group, a multiple of those of a head.
    """
    block, columns = recurrent_kernel.shape
    gates = columns // cell.hidden_size
    if block == width:
        return recurrent_kernel
    heads = width // block
    blocks = recurrent_kernel.reshape(1, block, gates, cell.heads, block)
    own = jnp.arange(heads)[:, None] == (jnp.arange(cell.heads) % heads)[None]
    return jnp.where(own.reshape(heads, 1, 1, -1, 1), blocks, 0).reshape(width, -1)
