"""What a CPU kernel is made for, what it takes and gives, and where its numbers stand in memory."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import numpy as np

from lstmjax.cells.base import Cell
from lstmjax.recurrence.cpu.emit import refusal
from lstmjax.recurrence.cpu.machine import Machine
from lstmjax.recurrence.layout import group_width, up
from lstmjax.recurrence.step import Step

ROWS = 64
"""Most rows of the batch that go through time together."""

CHUNK = 256
"""Rows, of whatever steps, whose share in the gradients of the weights is one product."""

_LINE = 64
"""Bytes of a cache line."""


class Job(NamedTuple):
    """What a kernel depends on; steps and rows it reads when it runs.

    Attributes:
        cell: the cell.
        step: its step as programs.
        features: numbers of an input, D.
        dtype: of all numbers, ``"float32"`` or ``"float64"``.
        reverse: from the last step to the first.
        masked: steps may be masked.
        resets: there may be resets.
        states: the states of all steps are asked for.
        saving: forward, that the backward kernel will run; pre-activations are kept for it.
        wanted: backward, what else a gradient is asked for than weights and initial carry:
            ``"x"``, ``"start"``, ``"input <name>"``.
        d_outs: backward, for h and each array of the state: something depends on those of all
            steps, not on the final carry alone.
    """

    cell: Cell
    step: Step
    features: int
    dtype: str
    reverse: bool
    masked: bool
    resets: bool
    states: bool
    saving: bool = False
    wanted: tuple[str, ...] = ()
    d_outs: tuple[bool, ...] = ()


class Operand(NamedTuple):
    """An argument or a result of a kernel; sizes may be ``"T"``, ``"T+1"``, ``"B"``, or of its
    memory ``"W"``, the number of workers.

    What the forward kernel keeps for the backward one counts as bits, not as numbers: parts of it
    are never written, and whoever looks for numbers that are none must not find some there.
    """

    name: str
    shape: tuple[int | str, ...]
    kind: Literal["numbers", "flags", "bits"] = "numbers"

    def dtype(self, numbers: str) -> str:
        """Of the array, where numbers are of the type given."""
        bits = {"float32": "int32", "float64": "int64"}[numbers]
        return {"numbers": numbers, "flags": "bool", "bits": bits}[self.kind]

    @property
    def rows(self) -> bool:
        """Whether each row of the batch has its own."""
        return "B" in self.shape

    def sizes(self, steps: int, batch: int) -> tuple[int, ...]:
        """Its shape."""
        known = {"T": steps, "T+1": steps + 1, "B": batch}
        return tuple(known[n] if isinstance(n, str) else n for n in self.shape)


class Block(NamedTuple):
    """The pre-activations of a gate, or one part of them, and where their weights stand.

    Attributes:
        place: in `lstmjax.recurrence.step.StepArguments.pre`.
        kernel, recurrent: number of the block in that operand; None where it has none.
        bias: operand and number likewise.
    """

    place: int
    kernel: int | None
    recurrent: int | None
    bias: tuple[str, int] | None


class Kind(NamedTuple):
    """Blocks whose products see the same of a row ``[x | 1 | h]``.

    Attributes:
        sees: ``"x"`` is x and the one; ``"h"`` is the one and h; ``"xh"`` all.
        blocks: which.
        before: blocks of other kinds that stand before them.
        panels_before: panels of columns that stand before theirs.
    """

    sees: str
    blocks: tuple[Block, ...]
    before: int
    panels_before: int


class Piece(NamedTuple):
    """Neighbouring numbers of the left side that a kind sees.

    Attributes:
        at: where they stand in a row of it.
        size: how many.
        first: before how many of the kind's rows of weights theirs come.
        grouped: they are h of one group of heads; ``at`` is that of the first group.
    """

    at: int
    size: int
    first: int
    grouped: bool

    @property
    def in_chunk(self) -> "Piece":
        """The same for all kinds that see these numbers."""
        return self._replace(first=0)


class Group(NamedTuple):
    """Equal groups of neighbouring vectors of units: ``number`` of them from ``first`` on."""

    number: int
    first: int
    size: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes that follow from a job.

    A row of the products' left side is ``[x | 1 | h]``, h at the start of a vector. A row of
    pre-activations has the kinds one after the other, and within each, vector of units by vector,
    the blocks: ``N`` numbers.
    """

    job: Job
    machine: Machine

    @property
    def lanes(self) -> int:
        """Numbers in a vector."""
        return self.machine.lanes(self.job.dtype)

    @property
    def features(self) -> int:
        """Numbers of an input, D."""
        return self.job.features

    @property
    def units(self) -> int:
        """H."""
        return self.job.cell.hidden_size

    @property
    def vectors(self) -> int:
        """Vectors of units."""
        return -(-self.units // self.lanes)

    @property
    def padded(self) -> int:
        """Units in whole vectors."""
        return self.vectors * self.lanes

    @property
    def tail(self) -> int:
        """Units in the last vector, if that is not full; else 0."""
        return self.units % self.lanes

    @functools.cached_property
    def width(self) -> int:
        """Units that see each other through the recurrent kernel: all, or those of some heads."""
        width = group_width(self.job.cell, self.lanes)
        return self.units if self.units % width else width

    @property
    def dense(self) -> bool:
        """Whether all units see each other."""
        return self.width == self.units

    @property
    def most(self) -> int:
        """Vectors of a panel: none has units of two groups of heads."""
        return self._within_groups(self.machine.vectors)

    @property
    def chunk_vectors(self) -> int:
        """The same of the gradients of weights, which are products over chunks."""
        return self._within_groups(self.machine.gradient_vectors)

    def _within_groups(self, most: int) -> int:
        if self.dense:
            return most
        return max(n for n in range(1, most + 1) if self.width // self.lanes % n == 0)

    # A row of the left side

    @property
    def x_at(self) -> int:
        """Where x stands in a row of the left side."""
        return self.h_at - 1 - self.features

    @property
    def one_at(self) -> int:
        """Where the one does, that biases are multiplied with."""
        return self.h_at - 1

    @property
    def h_at(self) -> int:
        """Where h does."""
        return up(self.features + 1, self.lanes)

    @property
    def pitch(self) -> int:
        """From one row of the left side to the next."""
        return self._pitched(self.h_at + self.padded)

    def _pitched(self, numbers: int) -> int:
        """An odd number of cache lines: so columns of rows spread over the sets of a cache."""
        line = _LINE // np.dtype(self.job.dtype).itemsize
        lines = -(-numbers // line)
        return line * (lines + 1 - lines % 2)

    # Pre-activations

    @functools.cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """The blocks by what they see: x, all, h; so those that see x come first in a row."""
        by_sight: dict[str, list[Block]] = {"x": [], "xh": [], "h": []}
        for sees, block in _blocks(self.job.cell):
            by_sight[sees].append(block)
        kinds, before, panels = [], 0, 0
        for sees, blocks in by_sight.items():
            if blocks:
                kinds.append(Kind(sees, tuple(blocks), before, panels))
                before += len(blocks)
                panels += -(-len(blocks) * self.vectors // self.chunk_vectors)
        return tuple(kinds)

    @property
    def blocks(self) -> int:
        """Of all kinds."""
        return sum(len(kind.blocks) for kind in self.kinds)

    @property
    def numbers(self) -> int:
        """Of a row of pre-activations, N."""
        return self.blocks * self.padded

    @property
    def pre_pitch(self) -> int:
        """From one row of gradients of pre-activations to the next."""
        return self._pitched(self.numbers)

    @property
    def panel(self) -> int:
        """Columns of a panel of a chunk."""
        return self.chunk_vectors * self.lanes

    @property
    def columns(self) -> int:
        """Those of all kinds in whole panels."""
        last = self.kinds[-1]
        return (last.panels_before + self.panels(last)) * self.panel

    def panels(self, kind: Kind) -> int:
        """Of a kind's columns."""
        return -(-len(kind.blocks) * self.vectors // self.chunk_vectors)

    def pieces(self, kind: Kind) -> list[Piece]:
        """What it sees of a row of the left side."""
        at = self.x_at if "x" in kind.sees else self.one_at
        count, width = self.h_at - at, self.width if "h" in kind.sees else 0
        if self.dense or not width:
            return [Piece(at, count + width, 0, False)]
        return [Piece(at, count, 0, False), Piece(self.h_at, width, count, True)]

    @functools.cached_property
    def packed(self) -> tuple[dict[Piece, int], int]:
        """At which block of a chunk's left sides each piece begins, and how many there are.

        There pieces are cut into blocks of columns as tall as a tile, each a product's left side
        that is read from the first number to the last.
        """
        found, blocks = {}, 0
        for kind in self.kinds:
            for piece in self.pieces(kind):
                if piece.in_chunk not in found:
                    found[piece.in_chunk] = blocks
                    blocks += self.blocks_of(piece.size) * self.repeats(piece)
        return found, blocks

    def repeats(self, piece: Piece) -> int:
        """Groups that have such a piece."""
        return self.units // self.width if piece.grouped else 1

    def blocks_of(self, columns: int) -> int:
        """Blocks that so many columns of a chunk are cut into."""
        return self.machine.row_blocks(columns, self.chunk_vectors)

    @property
    def block_columns(self) -> int:
        """Room for columns in a block: a power of two."""
        return 1 << (self.machine.tile_rows(self.chunk_vectors) - 1).bit_length()

    def depth(self, kind: Kind) -> int:
        """Rows of its weights."""
        return sum(piece.size for piece in self.pieces(kind))

    @property
    def weight_rows(self) -> int:
        """Rows of ``[W; b; R]``."""
        return self.features + 1 + self.width

    # Groups of vectors of units

    def groups(self, size: int) -> list[Group]:
        """All vectors, the last one in a group of its own kind if it is not full."""
        whole, rest = divmod(self.vectors, size)
        if whole and not rest and self.tail:
            whole, rest = whole - 1, size
        found = [Group(whole, 0, size), Group(1, whole * size, rest)]
        return [g for g in found if g.number and g.size]

    @property
    def smallest_group(self) -> int:
        """Vectors of units that fill whole panels."""
        counts = (len(kind.blocks) for kind in self.kinds)
        return self.most // math.gcd(self.most, *counts)

    def split(self, vectors: int) -> list[tuple[int, int]]:
        """(first vector, vectors) of the panels of so many vectors, of about one size."""
        panels = -(-vectors // self.most)
        ends = [vectors * n // max(panels, 1) for n in range(panels + 1)]
        return [(v, end - v) for v, end in itertools.pairwise(ends)]

    @functools.cached_property
    def by_row(self) -> bool:
        """Whether the step mixes the units of a row, and is emitted for whole rows."""
        step = self.job.step
        programs = (step.forward, step.backward, step.recur, step.recur_back)
        return any(p is not None and refusal(p) is not None for p in programs)

    @functools.cached_property
    def constant_places(self) -> tuple[list[int], int]:
        """Where the parameters of the step stand in a room of their own, and its size.

        Of an element-wise step each has room for one number a unit.
        """
        places, size = [], 0
        for operand in self.constants():
            (numbers,) = operand.shape
            assert isinstance(numbers, int)
            places.append(size)
            size += up(numbers, self.lanes) if self.by_row else self.padded
        return places, size

    # Carry

    @property
    def states(self) -> int:
        """Arrays carried beside h."""
        return len(jax.tree.leaves(self.job.step.shapes.carry)) - 1

    @property
    def kept(self) -> int:
        """Arrays carried apart from the left sides: the states, and h where these see another."""
        return self.states + (self.job.step.recur is not None)

    # Operands

    def parameters(self) -> list[Operand]:
        """The weights, then ``unit_params`` and ``step_params``."""
        cell, H = self.job.cell, self.units
        found = [Operand("kernel", (self.features, len(cell.gates) * H))]
        if cell.recurrent:
            found.append(Operand("recurrent", (self.width, len(cell.recurrent) * H)))
        if cell.biased:
            found.append(Operand("bias", (len(cell.biased) * H,)))
        if cell.recurrent_bias_gates:
            found.append(Operand("recurrent_bias", (len(cell.recurrent_bias_gates) * H,)))
        return [*found, *self.constants()]

    def constants(self) -> list[Operand]:
        """``unit_params`` and ``step_params``, in the order in which the step takes them."""
        shapes = self.job.step.shapes
        found = []
        for what, arrays in (("unit", shapes.units), ("param", shapes.others)):
            found += [Operand(f"{what} {n}", (a.size,)) for n, a in sorted(arrays.items())]
        return found

    def extra(self) -> list[Operand]:
        """Step inputs and noise, in the order in which the step takes them."""
        return [*self._over_time("input", self.job.step.shapes.inputs), *self.noise()]

    def noise(self) -> list[Operand]:
        """The noise of the step."""
        return self._over_time("noise", self.job.step.shapes.noise)

    def _over_time(
        self, what: str, arrays: Mapping[str, jax.Array | jax.ShapeDtypeStruct]
    ) -> list[Operand]:
        return [Operand(f"{what} {n}", ("T", "B", a.shape[1])) for n, a in sorted(arrays.items())]

    def _flags(self) -> list[Operand]:
        job = self.job
        names = ["mask"] * job.masked + ["resets"] * job.resets
        return [Operand(name, ("T", "B"), "flags") for name in names]

    def _carry(self, name: str) -> list[Operand]:
        return [Operand(f"{name} {k}", ("B", self.units)) for k in range(1 + self.states)]

    def saved(self) -> list[Operand]:
        """What the forward kernel keeps: left sides, states before each step, pre-activations."""
        found = [Operand("rows", ("T+1", "B", self.pitch), "bits")]
        if self.kept:
            found.append(Operand("kept", ("T+1", "B", self.kept * self.padded), "bits"))
        return [*found, Operand("pre", ("T", "B", self.numbers), "bits")]

    def outputs(self, name: str = "out") -> list[Operand]:
        """h, and the states where they are asked for."""
        count = 1 + self.states * self.job.states
        return [Operand(f"{name} {k}", ("T", "B", self.units)) for k in range(count)]

    def forward_arguments(self) -> list[Operand]:
        """Of the forward kernel."""
        start = self._carry("start") if self.job.resets else []
        x = Operand("x", ("T", "B", self.features))
        carry = [*self._carry("initial"), *start]
        return [x, *self._flags(), *carry, *self.parameters(), *self.extra()]

    def forward_results(self) -> list[Operand]:
        """Of the forward kernel, but for its memory."""
        saved = self.saved() if self.job.saving else []
        return [*self.outputs(), *self._carry("final"), *saved]

    def backward_arguments(self) -> list[Operand]:
        """Of the backward kernel."""
        d_outs = [
            a for a, there in zip(self.outputs("d_out"), self.job.d_outs, strict=False) if there
        ]
        given = [*self.saved(), *self._flags(), *self.parameters(), *self.extra()]
        return [*given, *d_outs, *self._carry("d_final")]

    def backward_results(self) -> list[Operand]:
        """Of the backward kernel, but for its memory."""
        wanted = self.job.wanted
        found = [a._replace(name=f"d {a.name}") for a in self.parameters()]
        found += self._carry("d initial")
        if "x" in wanted:
            found.append(Operand("d x", ("T", "B", self.features)))
        inputs = self._over_time("input", self.job.step.shapes.inputs)
        found += [a._replace(name=f"d {a.name}") for a in inputs if a.name in wanted]
        return found + (self._carry("d start") if "start" in wanted else [])


def _blocks(cell: Cell) -> list[tuple[str, Block]]:
    """What each block of a cell's pre-activations sees, in the order of `StepArguments.pre`."""

    def at(gates: tuple[str, ...], gate: str, name: str) -> tuple[str, int] | None:
        return (name, gates.index(gate)) if gate in gates else None

    found = []
    for number, gate in enumerate(cell.gates):
        bias = at(cell.biased, gate, "bias")
        seen = cell.recurrent.index(gate) if gate in cell.recurrent else None
        both = seen is not None and not cell.parts_apart
        block = Block(number, number, seen if both else None, bias)
        found.append(("xh" if both else "x", block))
    if cell.parts_apart:
        for number, gate in enumerate(cell.recurrent):
            bias = at(cell.recurrent_bias_gates, gate, "recurrent_bias")
            found.append(("h", Block(len(cell.gates) + number, None, number, bias)))
    return found
