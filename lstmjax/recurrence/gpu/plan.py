"""What a kernel of the GPU engine computes, how it is laid out, and whether that fits.

Nothing here needs a GPU, nor the part of JAX that compiles for one.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from jax import Array

from lstmjax.recurrence.layout import up

TILE = 64
"""Units of a tile."""

SHARED_MEMORY = 232_448
"""Bytes of shared memory that a block may have on Hopper."""

_MOST_RESIDENT = 9
"""Tiles of all W_g in registers: 144 of the 255 that a thread has."""

_MOST_ARRAYS = 20
"""Arrays of a step beside as many tiles of W_g as there may be, without spills."""

_MOST_WARPGROUPS = 2
"""In a block: each of its 128 threads gets 255 registers."""

_MOST_BLOCKS = 8
"""In a cluster, on every Hopper GPU."""

_CORES = 16
"""Of the multiprocessors that one cluster may be spread over: there are groups of 16 and of 18."""

Tiles = list[Array]
"""Each ``(TILE, rows)`` float32."""

TileStep = Callable[[Tiles, Tiles, Tiles, Tiles, Tiles], tuple[Tiles, Tiles, Tiles]]
"""``(products, inputs, flags, constants, carry) -> (carry, exchanged, outputs)``."""


@dataclasses.dataclass(frozen=True)
class GPUPlan:
    """How a kernel is laid out on the device.

    Attributes:
        rows: of the batch in a block: 8, or a multiple of it.
        cluster: a block for each tile instead of a warpgroup.
        resident: tiles of each W_g, out of those that one warpgroup multiplies, that stay in its
            registers: 16 a thread and tile. The others stay in shared memory.
        buffers: steps for which inputs are in shared memory, or on their way.
        parts: bfloat16 numbers that stand for an operand of the products: 1, or for float32 2, and
            3 up to 64 units.
        fast_math: the approximate functions of the hardware.
        interpret: parameters of Pallas' interpreter, or what takes the kernel's place, or None.
    """

    rows: int = 8
    cluster: bool = False
    resident: int = 2
    buffers: int = 3
    parts: int = 1
    fast_math: bool = False
    interpret: object = None

    @property
    def bare(self) -> bool:
        """Runs in an interpreter that does not do as a device does, that of JAX before 0.12."""
        return self.interpret is not None and not hasattr(self.interpret, "inline_mgpu")


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """What a kernel computes. All sizes are padded: units to tiles, rows to those of a block.

    Attributes:
        name: of the kernel, for tools.
        cell: element-wise function of one step.
        steps, batch: T, B.
        groups: recurrences side by side, heads say, that know nothing of each other.
        units: of each; H is both together.
        inputs: how many tiles of each array of inputs ``(T, B, n H)``.
        flags: number of arrays ``(T, B)``.
        constants: number of arrays ``(B, H)`` that do not change over time.
        carry: number of arrays ``(B, H)`` carried over time, in registers.
        gates: number of W_g.
        shared: the gates multiply the same exchanged tile.
        outputs: how many tiles of each array of outputs ``(T, B, n H)``.
        downward: from the last step to the first.
        finish: ``(products, carry) -> carry`` after the last step, with one more product.
    """

    name: str
    cell: TileStep
    steps: int
    batch: int
    groups: int
    units: int
    inputs: tuple[int, ...]
    flags: int
    constants: int
    carry: int
    gates: int
    shared: bool
    outputs: tuple[int, ...]
    downward: bool
    finish: Callable[[Tiles, Tiles], Tiles] | None = None


def buffers(what: Recurrence, plan: GPUPlan) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shared memory of a block, as shapes and bytes of an element; each warpgroup owns a part."""
    tiles, owners, weights = _counts(what, plan)
    exchanged = (1 if what.shared else what.gates) * plan.parts
    tile = (plan.rows, TILE)
    found = {
        "exchanged": ((2, tiles, exchanged, *tile), 2),
        "inputs": ((plan.buffers, owners, sum(what.inputs), *tile), 4),
        "outputs": ((2, owners, sum(what.outputs), *tile), 4),
        "flags": ((plan.buffers, owners, what.flags, plan.rows), 4),
        "constants": ((owners, what.constants, *tile), 4),
        "weights": ((owners, weights, TILE, TILE), 2),
        "signals": ((2 if plan.cluster else 0, 2), 4),
    }
    return {name: buffer for name, buffer in found.items() if math.prod(buffer[0])}


def barriers(what: Recurrence, plan: GPUPlan) -> dict[str, tuple[int, int]]:
    """What is waited for, as arrivals and number of barriers."""
    tiles, owners, weights = _counts(what, plan)
    found = {
        "inputs_here": (sum(what.inputs) + what.flags, plan.buffers * owners),
        "exchanged_here": (0 if plan.cluster else tiles, 2),  # a cluster has signals of its own
        "constants_here": (what.constants + weights, owners),
    }
    return {name: (arrivals, number) for name, (arrivals, number) in found.items() if arrivals}


def _counts(what: Recurrence, plan: GPUPlan) -> tuple[int, int, int]:
    """Tiles of units, warpgroups of a block, and tiles of all W_g that are in shared memory."""
    tiles = what.units // TILE
    weights = what.gates * (plan.parts * tiles - plan.resident)
    return tiles, 1 if plan.cluster else tiles, weights


def shared_memory(what: Recurrence, plan: GPUPlan) -> int:
    """Bytes of shared memory of a block."""
    sizes = [math.prod(shape) * width for shape, width in buffers(what, plan).values()]
    signals = [8 * number for _, number in barriers(what, plan).values()]
    return sum(up(size, 1024) for size in sizes) + sum(signals)


def at_once(cores: int, blocks: int) -> int:
    """Clusters of so many blocks that a device of so many multiprocessors has room for.

    Example:
        >>> at_once(132, 1), at_once(132, 5)
        (132, 24)
    """
    return cores if blocks == 1 else cores // _CORES * (_CORES // blocks)


def choose_plan(what: Recurrence, wanted: GPUPlan, depths: tuple[int, ...]) -> GPUPlan | None:
    """The first layout that fits: one block rather than a cluster, inputs fetched well ahead.

    Numbers in parts are better off in a cluster: there is more of W in registers, and each
    multiprocessor reads less of it from shared memory.

    Args:
        what: the recurrence.
        wanted: all that is not chosen here.
        depths: values of `GPUPlan.buffers`, the most wanted first.
    """
    tiles = what.units // TILE
    orders = [(False, _MOST_WARPGROUPS), (True, _MOST_BLOCKS)]
    if wanted.parts > 1 and tiles > 1:
        orders.reverse()
    if wanted.interpret is not None and not callable(wanted.interpret):
        # The interpreter has no clusters, but all the memory that one may want. It multiplies what
        # is there, too, unless it is bare, when it multiplies whatever one likes.
        plan = next(_plans(what, wanted, depths, False))
        return plan if plan.bare else dataclasses.replace(plan, resident=0)
    plans = (_plans(what, wanted, depths, cluster) for cluster, most in orders if tiles <= most)
    every = itertools.chain.from_iterable(plans)
    return next((plan for plan in every if shared_memory(what, plan) <= SHARED_MEMORY), None)


def _arrays(what: Recurrence) -> int:
    """Tiles that a step begins with."""
    return sum(what.inputs) + what.flags + what.constants + what.carry + what.gates


def _plans(
    what: Recurrence, wanted: GPUPlan, depths: tuple[int, ...], cluster: bool
) -> Iterator[GPUPlan]:
    tiles = what.units // TILE
    resident = min(tiles, _MOST_RESIDENT // what.gates)
    # Numbers in parts, and steps with many arrays, need registers; there memory comes first.
    in_parts = cluster and wanted.parts > 1 and tiles > 2
    crowded = in_parts or _arrays(what) * wanted.rows // 8 > _MOST_ARRAYS
    few = (max(1, resident // 2), resident) if crowded else (resident,)
    for in_registers, depth in itertools.product(few, depths):
        yield dataclasses.replace(wanted, cluster=cluster, resident=in_registers, buffers=depth)
