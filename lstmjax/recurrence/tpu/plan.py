"""The sizes of the TPU kernels: blocks of rows, chunks of time, and the VMEM that they take.

Pallas is not imported unless there is a TPU. `tpu.kernel` says what the letters in shapes mean.
"""

import dataclasses
import math
from typing import NamedTuple

from lstmjax.cells.base import Cell
from lstmjax.precision import Precision
from lstmjax.recurrence.layout import MIB, group_width, up
from lstmjax.recurrence.refs import Index
from lstmjax.recurrence.step import Step

LANES = 128
"""Columns of a tile."""

ROWS = 16
"""Rows of a bfloat16 tile; the rows of a block are a multiple of it."""

DEFAULT_VMEM = 16 * MIB
"""VMEM that the compiler grants without being asked; all that a TPU v4 has."""

UNROLL = 4
"""Steps written out in a loop, unless a step is long: the end of one overlaps the next."""

FITTING = 1280
"""Rows times steps of a chunk, where memory allows: enough for the matrix unit, and little."""


class Group(NamedTuple):
    """Heads whose units no others reach.

    Attributes:
        units: of all H.
        columns: of the G*L, a slice in each gate; from and to whole groups of lanes.
    """

    units: slice
    columns: tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class TPUPlan:
    """What a kernel is specialised to.

    Attributes:
        cell: whose step it runs.
        step: the programs of that step.
        reverse: from the last step to the first.
        parts: P, 3 for float32 products, 1 for bfloat16.
        rows: R.
        chunk: C.
        unroll: steps written out in a loop over time; divides ``chunk``.
        group: steps of one product for the weight gradients; divides ``chunk``.
        vmem: bytes of VMEM that the backward kernel takes at most.
        vmem_forward: likewise the forward kernel.
        interpret: run by the Pallas interpreter, on any platform; see `PallasTPU`.
    """

    cell: Cell
    step: Step
    reverse: bool
    parts: int
    rows: int
    chunk: int
    unroll: int
    group: int
    vmem: int
    vmem_forward: int
    interpret: object

    @property
    def lanes(self) -> int:
        """L."""
        return up(self.cell.hidden_size, LANES)

    @property
    def width(self) -> int:
        """W."""
        return group_width(self.cell, LANES)

    @property
    def groups(self) -> list[Group]:
        """All groups of heads; one where nothing is to be gained by more."""
        size, width, gates = self.cell.hidden_size, self.width, len(self.cell.gates)
        found = []
        for first in range(0, size, width):
            starts = [g * self.lanes for g in range(gates)]
            behind = min(first + width, size)
            columns = tuple(slice(a + first, a + up(behind, LANES)) for a in starts)
            found.append(Group(slice(first, behind), columns))
        return found

    @property
    def keeps_h(self) -> bool:
        """Whether the backward pass needs h_{t-1} beside the products'."""
        return self.cell.uses_h or self.step.recur is not None

    def place(self, k: Index) -> Index:
        """Where in its chunk the step lies that is processed k-th."""
        return self.chunk - 1 - k if self.reverse else k


def tpu_device() -> tuple[int, int]:
    """Bytes of VMEM and number of cores of the TPU that is compiled for."""
    from jax.experimental.pallas import tpu as pltpu

    try:
        info = pltpu.get_tpu_info()
    except ValueError:  # no TPU: the interpreter runs what the smallest one would
        return DEFAULT_VMEM, 1
    return info.vmem_capacity_bytes, info.num_cores


def parts_of(precision: Precision) -> int:
    """bfloat16 parts of an operand, P."""
    return 3 if precision == "float32" else 1


def divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` up to ``most``."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)


def chunk_near(steps: int, most: int) -> int:
    """Steps of a chunk: a divisor of ``steps`` where one is near ``most``, easy to unroll."""
    near = [c for c in range(-(-most // 2), most + 1) if steps % c == 0]
    return max(near or [most], key=lambda c: (math.gcd(c, UNROLL), c))


def vmem_bytes(
    cell: Cell,
    rows: int,
    chunk: int,
    features: int,
    precision: Precision,
    *,
    forward: bool = False,
) -> int:
    """Bytes of VMEM that the backward kernel takes, which is the larger one, or the forward one.

    Blocks that move with the grid, and weights, are there twice. To their sum a tenth and 2 MiB are
    added for what the compiler spills.
    """
    parts, states = parts_of(precision), len(cell.State._fields)
    size, wide = up(cell.hidden_size, LANES), up(features, LANES)
    width, reach = len(cell.gates) * size, group_width(cell, LANES)
    weights = 2 * 2 * parts * width * (up(features, ROWS) + up(reach, ROWS))
    flags = 2 * 2 * 4 * up(chunk, LANES) * rows
    carries = 9 * 4 * rows * size * (1 + states)
    moving = 2 * 4 * (wide + size)  # xs and hs
    moving += 2 * 4 * sum(up(cell.width(n, features), LANES) for n in cell.step_inputs.values())
    moving += 2 * 4 * size * len(cell.noise)
    if forward:
        total = weights + flags + carries + chunk * rows * moving
    else:  # sums of the weights' gradients; gradients of xs and hs; scratch
        sums = 2 * 4 * width * (up(features, 8) + up(reach, 8))
        pre = (4 + 2 * parts) * width * (1 + cell.parts_apart)
        kept = 2 * parts * (wide + size) + 4 * size * (states + cell.uses_h)
        total = weights + sums + flags + carries + chunk * rows * (2 * moving + pre + kept)
    return total + total // 10 + 2 * MIB
