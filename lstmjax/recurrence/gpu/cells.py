"""A cell's step, and its derivative, as the element-wise cells of the GPU kernels."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from lstmjax.cells.base import Cell
from lstmjax.recurrence.gpu.emit import Emission
from lstmjax.recurrence.gpu.plan import TILE, Recurrence, Tiles
from lstmjax.recurrence.layout import groups_of, up
from lstmjax.recurrence.step import Step


class Job(NamedTuple):
    """What the cells of both kernels depend on.

    Attributes:
        cell: the cell.
        step: its step as programs.
        masked: steps may be masked.
        resets: there may be resets.
        reverse: from the last step to the first.
        d_outs: backward, for h and each array of the state: something depends on those of all
            steps, not on the final carry alone.
    """

    cell: Cell
    step: Step
    masked: bool
    resets: bool
    reverse: bool
    d_outs: tuple[bool, ...] = (True,)

    @property
    def groups(self) -> int:
        """Recurrences side by side."""
        return groups_of(self.cell, TILE)

    @property
    def width(self) -> int:
        """Units of each."""
        return self.cell.hidden_size // self.groups

    @property
    def units(self) -> int:
        """The same in whole tiles."""
        return up(self.width, TILE)


class Sizes(NamedTuple):
    """How many arrays a cell's step takes, in the order of `StepArguments`.

    Pre-activations, carry, parameters, ``step_inputs``, noise.
    """

    pre: int
    carry: int
    constants: int
    inputs: int
    noise: int


def sizes_of(step: Step) -> Sizes:
    """Counts the arrays of a step, h being part of the carry."""
    pre, carry, units, others, inputs, noise = (len(jax.tree.leaves(a)) for a in step.shapes)
    return Sizes(pre, carry, units + others, inputs, noise)


def cut(tiles: list[Array], *sizes: int) -> list[list[Array]]:
    """Consecutive parts of a list, and what is left."""
    parts, at = [], 0
    for size in sizes:
        parts.append(tiles[at : at + size])
        at += size
    return [*parts, tiles[at:]]


# --- The step as a program -----------------------------------------------------------------------


def refusal(step: Step) -> str | None:
    """Why a step cannot be emitted."""
    if step.recur is not None:
        return "its recurrent product sees something else than h"
    for name, a in step.shapes.others.items():
        if len(a.shape) > 1 and a.shape[0] != 1:
            return f"its parameter {name} has shape {a.shape}, not one number a unit"
    for emission in (Emission(step.forward), Emission(step.backward)):
        if reason := emission.refusal():
            return f"its step {reason.removeprefix('it ')}"
    return None


# --- Forward -------------------------------------------------------------------------------------


def forward_recurrence(job: Job, steps: int, batch: int) -> Recurrence:
    """The cell over time: exchanges h, puts out the carry after each step."""
    sizes, gates = sizes_of(job.step), len(job.cell.gates)
    bias = gates if job.cell.parts_apart else 0
    return Recurrence(
        name=f"{type(job.cell).__name__}_forward",
        cell=functools.partial(_forward_cell, job),
        steps=steps,
        batch=batch,
        groups=job.groups,
        units=job.units,
        inputs=(gates,) + (1,) * (sizes.inputs + sizes.noise),
        flags=job.masked + job.resets,
        constants=sizes.constants + bias + (sizes.carry if job.resets else 0),
        carry=sizes.carry,
        gates=gates,
        shared=True,
        outputs=(1,) * sizes.carry,
        downward=job.reverse,
    )


def _forward_cell(
    job: Job, products: Tiles, inputs: Tiles, flags: Tiles, constants: Tiles, carry: Tiles
) -> tuple[Tiles, Tiles, Tiles]:
    """Inputs: ``x W + b``, step inputs, noise. Flags: valid, reset before the next step.

    Constants: the step's parameters, recurrent bias, the carry after a reset.
    """
    cell, sizes = job.cell, sizes_of(job.step)
    gates = len(cell.gates)
    units, bias, start = cut(constants, sizes.constants, gates if cell.parts_apart else 0)
    from_x, extra = cut(inputs, gates)
    if cell.parts_apart:
        pre = [*from_x, *_recurrent(cell, _sums(products, bias))]
    else:
        pre = _sums(products, from_x)
    new = Emission(job.step.forward)(*pre, *carry, *units, *extra)
    if job.masked:
        new = _choose(flags[0], new, carry)
    entering = _choose(flags[-1], start, new) if job.resets else new
    return entering, entering[:1], new


def _recurrent(cell: Cell, tiles: Tiles) -> Tiles:
    """Of tiles for all gates, those that the step sees."""
    pairs = zip(cell.gates, tiles, strict=True)
    return [tile for gate, tile in pairs if gate in cell.recurrent]


# --- Backward ------------------------------------------------------------------------------------


def backward_recurrence(job: Job, steps: int, batch: int) -> Recurrence:
    """Its derivative: exchanges and puts out d pre, ends with d carry and d parameters."""
    sizes, gates = sizes_of(job.step), len(job.cell.gates)
    parts = (gates, gates) if job.cell.parts_apart else (gates,)
    carry_seen = sizes.carry if job.cell.uses_h else sizes.carry - 1
    return Recurrence(
        name=f"{type(job.cell).__name__}_backward",
        cell=functools.partial(_backward_cell, job),
        steps=steps,
        batch=batch,
        groups=job.groups,
        units=job.units,
        inputs=parts + (1,) * (carry_seen + sizes.inputs + sizes.noise + sum(job.d_outs)),
        flags=job.masked + job.resets,
        constants=sizes.constants,
        carry=sizes.carry + sizes.constants,
        gates=gates,
        shared=False,
        outputs=parts + (1,) * sizes.inputs,
        downward=not job.reverse,
        finish=_with_products,
    )


def _backward_cell(
    job: Job, products: Tiles, inputs: Tiles, flags: Tiles, constants: Tiles, carry: Tiles
) -> tuple[Tiles, Tiles, Tiles]:
    """Inputs: pre-activations, the carry that entered the step, step inputs, noise, and d carry as
    far as it comes from outside.

    Flags as above. Constants: the step's parameters. The carry is d carry, without what the product
    adds to d h, and d parameters so far.
    """
    cell, sizes = job.cell, sizes_of(job.step)
    gates = len(cell.gates)
    all_pre = gates * (2 if cell.parts_apart else 1)
    pre, old, extra, outside = cut(
        inputs, all_pre, sizes.carry - (not cell.uses_h), sizes.inputs + sizes.noise
    )
    zero = jnp.zeros_like(pre[0])
    zeros = [zero] * sizes.carry
    ct, d_constants = cut(_with_products(products, carry), sizes.carry)
    if job.resets:
        ct = _choose(flags[-1], zeros, ct)
    passing = ct
    more = iter(outside)
    flagged = (*job.d_outs, *[False] * (sizes.carry - len(job.d_outs)))
    ct = [a + next(more) if there else a for a, there in zip(ct, flagged, strict=True)]
    if not cell.uses_h:
        old = [zero, *old]
    if cell.parts_apart:
        pre = [*pre[:gates], *_recurrent(cell, pre[gates:])]
    d_all = Emission(job.step.backward)(*pre, *old, *constants, *extra, *ct)
    d_pre, d_old, d_more, d_inputs = cut(d_all, sizes.pre, sizes.carry, sizes.constants)
    if job.masked:  # what leaves a masked step is replaced: its derivative may be infinite
        d_pre = _choose(flags[0], d_pre, [zero] * sizes.pre)
        d_more = _choose(flags[0], d_more, [zero] * sizes.constants)
        d_inputs = _choose(flags[0], d_inputs, [zero] * sizes.inputs)
        d_old = _choose(flags[0], d_old, passing)
    carry = [*d_old, *_sums(d_constants, d_more)]
    if cell.parts_apart:
        found = dict(zip(cell.recurrent, d_pre[gates:], strict=True))
        d_pre = [*d_pre[:gates], *(found.get(gate, zero) for gate in cell.gates)]
    return carry, d_pre[-gates:], [*d_pre, *d_inputs]


def _with_products(products: Tiles, carry: Tiles) -> Tiles:
    return [sum(products, carry[0]), *carry[1:]]


def _sums(a: Tiles, b: Tiles) -> Tiles:
    return [x + y for x, y in zip(a, b, strict=True)]


def _choose(flag: Array, yes: Tiles, no: Tiles) -> Tiles:
    return [lax.select(flag != 0, x, y) for x, y in zip(yes, no, strict=True)]
