"""A cell's step, and its derivative, as the element-wise cells of the GPU kernels."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from lstmjax.cells.base import Cell, Parts, _record
from lstmjax.recurrence.gpu.emit import Program, trace
from lstmjax.recurrence.gpu.plan import TILE, Recurrence, Tiles
from lstmjax.recurrence.layout import up


class Job(NamedTuple):
    """What the cells of both kernels depend on.

    Attributes:
        cell: the cell.
        masked: steps may be masked.
        resets: there may be resets.
        reverse: from the last step to the first.
        d_hs: backward, something depends on h of each step, not on the final carry alone.
    """

    cell: Cell
    masked: bool
    resets: bool
    reverse: bool
    d_hs: bool = True


class Sizes(NamedTuple):
    """How many arrays a cell's step takes: pre-activations, carry, per-unit parameters."""

    pre: int
    carry: int
    units: int


def sizes_of(cell: Cell) -> Sizes:
    """Counts the arrays of ``cell.step``, h being part of the carry."""
    pre = len(cell.gates) * (2 if cell.parts_apart else 1)
    return Sizes(pre, 1 + len(cell.State._fields), len(cell.unit_params))


def cut(tiles: list[Array], *sizes: int) -> list[list[Array]]:
    """Consecutive parts of a list, and what is left."""
    parts, at = [], 0
    for size in sizes:
        parts.append(tiles[at : at + size])
        at += size
    return [*parts, tiles[at:]]


# --- The step as a program -----------------------------------------------------------------------


def _flat_step(cell: Cell, pre: Tiles, carry: Tiles, units: Tiles) -> Tiles:
    """``cell.step`` on lists of arrays, per-unit parameters being as wide as the rest."""
    gates = len(cell.gates)
    named = [_record("Pre", cell.gates)(*pre[k : k + gates]) for k in range(0, len(pre), gates)]
    parameters = _record("Units", tuple(cell.unit_params))(*units)
    h, state = carry[0], cell.State(*carry[1:])
    arguments = (Parts(*named) if cell.parts_apart else named[0], state, parameters)
    new_h, new_state = cell.step(*arguments, *((h,) if cell.uses_h else ()))
    return [new_h, *new_state]


@functools.cache
def forward_program(cell: Cell) -> Program:
    """``pre, carry, units -> carry``."""
    sizes = sizes_of(cell)

    def f(*arrays: Array) -> list[Array]:
        return _flat_step(cell, *cut(list(arrays), sizes.pre, sizes.carry))

    return trace(f, (2, cell.hidden_size), sum(sizes))


@functools.cache
def backward_program(cell: Cell) -> Program:
    """``pre, carry, units, d carry -> d pre, d carry, d units``."""
    sizes = sizes_of(cell)

    def f(*arrays: Array) -> list[Array]:
        pre, carry, units, ct = cut(list(arrays), *sizes)
        _, pull_back = jax.vjp(functools.partial(_flat_step, cell), pre, carry, units)
        d_pre, d_carry, d_units = pull_back(ct)
        return [*d_pre, *d_carry, *d_units]

    return trace(f, (2, cell.hidden_size), sum(sizes) + sizes.carry)


# --- Forward -------------------------------------------------------------------------------------


def forward_recurrence(job: Job, steps: int, batch: int) -> Recurrence:
    """The cell over time: exchanges h, puts out the carry after each step."""
    sizes, gates = sizes_of(job.cell), len(job.cell.gates)
    bias = gates if job.cell.parts_apart else 0
    return Recurrence(
        name=f"{type(job.cell).__name__}_forward",
        cell=functools.partial(_forward_cell, job),
        steps=steps,
        batch=batch,
        units=up(job.cell.hidden_size, TILE),
        inputs=(gates,),
        flags=job.masked + job.resets,
        constants=sizes.units + bias + (sizes.carry if job.resets else 0),
        carry=sizes.carry,
        gates=gates,
        shared=True,
        outputs=(1,) * sizes.carry,
        downward=job.reverse,
    )


def _forward_cell(
    job: Job, products: Tiles, inputs: Tiles, flags: Tiles, constants: Tiles, carry: Tiles
) -> tuple[Tiles, Tiles, Tiles]:
    """Inputs: ``x W + b``. Flags: valid, reset before the next step.

    Constants: per-unit parameters, recurrent bias, the carry after a reset.
    """
    cell, sizes = job.cell, sizes_of(job.cell)
    units, bias, start = cut(constants, sizes.units, len(cell.gates) if cell.parts_apart else 0)
    if cell.parts_apart:
        pre = [*inputs, *_sums(products, bias)]
    else:
        pre = _sums(products, inputs)
    new = forward_program(cell)(*pre, *carry, *units)
    if job.masked:
        new = _choose(flags[0], new, carry)
    entering = _choose(flags[-1], start, new) if job.resets else new
    return entering, entering[:1], new


# --- Backward ------------------------------------------------------------------------------------


def backward_recurrence(job: Job, steps: int, batch: int) -> Recurrence:
    """Its derivative: exchanges and puts out d pre, ends with d carry and d units."""
    sizes, gates = sizes_of(job.cell), len(job.cell.gates)
    parts = (gates, gates) if job.cell.parts_apart else (gates,)
    carry_seen = sizes.carry if job.cell.uses_h else sizes.carry - 1
    return Recurrence(
        name=f"{type(job.cell).__name__}_backward",
        cell=functools.partial(_backward_cell, job),
        steps=steps,
        batch=batch,
        units=up(job.cell.hidden_size, TILE),
        inputs=parts + (1,) * (carry_seen + job.d_hs),
        flags=job.masked + job.resets,
        constants=sizes.units,
        carry=sizes.carry + sizes.units,
        gates=gates,
        shared=False,
        outputs=parts,
        downward=not job.reverse,
        finish=_with_products,
    )


def _backward_cell(
    job: Job, products: Tiles, inputs: Tiles, flags: Tiles, constants: Tiles, carry: Tiles
) -> tuple[Tiles, Tiles, Tiles]:
    """Inputs: pre-activations, the carry that entered the step, d h from outside if there is one.

    Flags as above. Constants: per-unit parameters. The carry is d carry, without what the product
    adds to d h, and d units so far.
    """
    cell, sizes = job.cell, sizes_of(job.cell)
    pre, old, d_h = cut(inputs, sizes.pre, sizes.carry - (not cell.uses_h))
    zero = jnp.zeros_like(pre[0])
    zeros = [zero] * sizes.carry
    ct, d_units = cut(_with_products(products, carry), sizes.carry)
    if job.resets:
        ct = _choose(flags[-1], zeros, ct)
    ct = [sum(d_h, ct[0]), *ct[1:]]
    passing = zeros
    if job.masked:
        ct, passing = _choose(flags[0], ct, zeros), _choose(flags[0], zeros, ct)
    if not cell.uses_h:
        old = [zero, *old]
    d_all = backward_program(cell)(*pre, *old, *constants, *ct)
    d_pre, d_old, more = cut(d_all, sizes.pre, sizes.carry)
    carry = [*_sums(d_old, passing), *_sums(d_units, more)]
    return carry, d_pre[-len(cell.gates) :], d_pre


def _with_products(products: Tiles, carry: Tiles) -> Tiles:
    return [sum(products, carry[0]), *carry[1:]]


def _sums(a: Tiles, b: Tiles) -> Tiles:
    return [x + y for x, y in zip(a, b, strict=True)]


def _choose(flag: Array, yes: Tiles, no: Tiles) -> Tiles:
    return [lax.select(flag != 0, x, y) for x, y in zip(yes, no, strict=True)]
