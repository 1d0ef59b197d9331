"""What both kernels are made of: workers, their memory, packed weights, products, flags."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import llvmlite.ir as ir

from lstmjax.recurrence.cpu.builder import I8, I64, PTR, Builder, Known
from lstmjax.recurrence.cpu.emit import Vectors
from lstmjax.recurrence.cpu.entry import Buffers, emit_entry, function, read_call
from lstmjax.recurrence.cpu.plan import ROWS, Block, Kind, Layout, Operand
from lstmjax.recurrence.cpu.products import Products, Strides
from lstmjax.recurrence.cpu.rows import Read, Rows, Write, row_jaxpr
from lstmjax.recurrence.layout import up
from lstmjax.traced import Program


class Units(NamedTuple):
    """Some neighbouring vectors of units.

    Attributes:
        first: the first unit.
        size: how many vectors.
        weights: the address of their packed weights.
        last: no others come behind them.
    """

    first: Known
    size: int
    weights: ir.Value | None
    last: bool


class Constant(NamedTuple):
    """A parameter of the step.

    Attributes:
        name: of its operand.
        at: where it, and its gradient, stand in their rooms.
        size: numbers; one, or one a unit, or where steps run by row, any.
        place: its address.
    """

    name: str
    at: int
    size: int
    place: ir.Value


class Kernel:
    """What one worker does, and what is left to do when all have done theirs.

    Each has its own rows, and memory of its own.

    Attributes:
        e: what emits the function at hand.
        steps, batch, workers: T, B and how many workers there are.
        worker: which one it is.
        reads: addresses of arguments, results and rooms of its memory, by name.
        memory: numbers that each needs room for.
    """

    e: Builder
    steps: Known
    batch: Known
    workers: Known
    worker: Known
    memory: int

    def __init__(
        self,
        module: ir.Module,
        layout: Layout,
        arguments: Sequence[Operand],
        results: Sequence[Operand],
    ) -> None:
        self.module, self.layout, self.job = module, layout, layout.job
        self.arguments, self.results = arguments, results
        self.products = Products(module, layout.machine, layout.job.dtype)
        self.reads: dict[str, ir.Value] = {}

    def emit(self, name: str) -> None:
        """Emit the function that XLA calls."""
        work = self._begin(function(self.module, "work", PTR, I64))
        self._places, self.memory = _places(self.rooms())
        memory = Operand("memory", ("W", self.memory))
        self._buffers = Buffers(self.job.dtype, self.arguments, [*self.results, memory])
        self._receive(work.args[0], work.args[1])
        self.work()
        self.e.b.ret_void()
        end = self._begin(function(self.module, "end", PTR))
        self._receive(end.args[0], I64(0))
        self.end()
        self.e.b.ret_void()
        kind = ir.FunctionType(PTR, [PTR])
        self._begin(ir.Function(self.module, kind, name))
        emit_entry(self.module, self.e, self._buffers, work, end)

    def _begin(self, function: ir.Function) -> ir.Function:
        self.e = Builder(self.layout.machine, self.job.dtype, function)
        self.vectors = Vectors(self.e)
        return function

    def _receive(self, frame: ir.Value, worker: ir.Value) -> None:
        call = read_call(self.e, frame, self._buffers)
        self.steps, self.batch, self.workers, self.worker = *call[:3], worker
        own = self.e.at(call.places["memory"], self.e.mul(worker, self.memory))
        rooms = {name: self.e.at(own, place) for name, place in self._places.items()}
        self.reads = {**call.places, **rooms}

    def work(self) -> None:
        """Emit what a worker does."""
        raise NotImplementedError

    def end(self) -> None:
        """Emit what is left to do; `worker` is the first one."""

    def rooms(self) -> dict[str, int]:
        """What it needs memory for, in numbers, by name."""
        raise NotImplementedError

    # Places of rows

    def row_blocks(self) -> Iterator[tuple[ir.Value, ir.Value]]:
        """The worker's blocks of at most `ROWS` rows: the first row, and how many there are."""
        e = self.e
        each = e.div(
            e.add(self.batch, e.sub(e.mul(self.workers, ROWS), 1)), e.mul(self.workers, ROWS)
        )
        blocks = e.mul(each, self.workers)
        most = e.div(e.sub(e.add(self.batch, blocks), 1), e.maximum(blocks, 1))
        with e.loop(each) as k:
            block = e.add(e.mul(k, self.workers), self.worker)
            row0 = e.whole(e.minimum(e.mul(block, most), self.batch))
            yield row0, e.whole(e.minimum(e.sub(self.batch, row0), most))

    def _line(self, s: Known, row: Known, in_time: bool) -> Known:
        e = self.e
        if in_time and self.job.reverse:
            s = e.sub(e.sub(self.steps, 1), s)
        return e.add(e.mul(s, self.batch), row)

    def place(self, name: str, s: Known, row: Known, width: int) -> ir.Value:
        """A row of an operand ``(T, B, width)`` in order of time, at the s-th step of the run."""
        return self.e.at(self.reads[name], self.e.mul(self._line(s, row, True), width))

    def kept(self, name: str, s: Known, row: Known, width: int) -> ir.Value:
        """The same of one in the order of the run."""
        return self.e.at(self.reads[name], self.e.mul(self._line(s, row, False), width))

    def zero(self, target: ir.Value, count: int) -> None:
        """So many numbers, known now."""
        e, whole = self.e, count // self.e.lanes * self.e.lanes
        e.fill(target, whole)
        if rest := count - whole:
            e.store_part(e.splat(0.0), e.at(target, whole), rest)

    # Flags

    def _flag(self, name: str, s: Known, row: Known) -> ir.Value:
        return self.e.b.load(self.e.byte(self.reads[name], self._line(s, row, True)), typ=I8)

    def is_valid(self, s: Known, row: Known) -> ir.Value:
        """Whether a row's step counts."""
        return self.e.b.icmp_signed("!=", self._flag("mask", s, row), I8(0))

    def is_reset(self, s: Known, row: Known) -> ir.Value:
        """Whether a row's carry is replaced on the way into a step."""
        return self.e.b.icmp_signed("!=", self._flag("resets", s, row), I8(0))

    def active_steps(self, row0: Known, rows: Known) -> tuple[Known, Known]:
        """The first step of the run with anything to do for a block, and the one after the last."""
        if not self.job.masked:
            return 0, self.steps
        e, names = self.e, ["mask"] + ["resets"] * self.job.resets
        with e.fold(self.steps, [e.whole(self.steps), I64(0)]) as (s, ends, following):
            with e.fold(rows, [I8(0)]) as (r, any_, more):
                found = any_[0]
                for name in names:
                    found = e.b.or_(found, self._flag(name, s, e.add(row0, r)))
                more.append(found)
            is_any = e.b.icmp_signed("!=", any_[0], I8(0))
            following.append(e.b.select(is_any, e.minimum(ends[0], s), ends[0]))
            following.append(e.b.select(is_any, e.whole(e.add(s, 1)), ends[1]))
        return e.minimum(ends[0], ends[1]), ends[1]

    def valid_rows(self, s: Known, row0: Known, rows: Known) -> tuple[Known, Known]:
        """The first row of a block whose step counts, and the one after the last."""
        if not self.job.masked:
            return 0, rows
        e = self.e
        with e.fold(rows, [e.whole(rows), I64(0)]) as (r, ends, following):
            valid = self.is_valid(s, e.add(row0, r))
            following.append(e.b.select(valid, e.minimum(ends[0], r), ends[0]))
            following.append(e.b.select(valid, e.whole(e.add(r, 1)), ends[1]))
        return e.minimum(ends[0], ends[1]), ends[1]

    # Units

    def units(self, size: int, weights: str | None = None) -> Iterator[Units]:
        """All vectors of units in groups of ``size``: what is emitted for each is emitted once.

        Args:
            size: vectors in a group.
            weights: the room of the weights that `pack_forward` packed for such groups.
        """
        e, layout, at = self.e, self.layout, 0
        for number, first, count in layout.groups(size):
            width, floats = count * layout.lanes, self._weights_of(count)
            base = None if weights is None else e.at(self.reads[weights], at)
            last = first + number * count == layout.vectors
            if number == 1:
                yield Units(first * layout.lanes, count, base, last)
            else:
                with e.loop(number) as g:
                    here = None if base is None else e.at(base, e.mul(g, floats))
                    yield Units(e.add(first * layout.lanes, e.mul(g, width)), count, here, False)
            at += number * floats

    def lanes(self, units: Units, vector: int) -> int:
        """Units in one of the vectors."""
        layout = self.layout
        return (
            layout.tail if layout.tail and units.last and vector == units.size - 1 else layout.lanes
        )

    def _weights_of(self, vectors: int) -> int:
        """Numbers of the packed weights of so many vectors of units."""
        layout = self.layout
        return sum(
            layout.depth(kind) * len(kind.blocks) * vectors * layout.lanes for kind in layout.kinds
        )

    def own_group(self, units: Known) -> Known:
        """The first of the units that see these, and that these see."""
        layout = self.layout
        return 0 if layout.dense else self.e.mul(self.e.div(units, layout.width), layout.width)

    # Weights

    def pack_forward(self, target: str, size: int) -> None:
        """``[W; b; R]`` for groups of ``size`` vectors: by kind, by panel, by row."""
        e, layout = self.e, self.layout
        lanes = layout.lanes
        for units in self.units(size, target):
            at = 0
            assert units.weights is not None
            for kind in layout.kinds:
                depth = layout.depth(kind)
                for v0, vectors in layout.split(units.size * len(kind.blocks)):
                    panel = e.at(units.weights, at)
                    for v in range(vectors):
                        unit, block = divmod(v0 + v, len(kind.blocks))
                        here = e.add(units.first, unit * lanes)
                        count = self.lanes(units, unit)
                        self._pack_column(
                            kind, kind.blocks[block], here, count, e.at(panel, v * lanes), vectors
                        )
                    at += depth * vectors * lanes

    def _pack_column(
        self, kind: Kind, block: Block, first: Known, count: int, target: ir.Value, vectors: int
    ) -> None:
        """One vector of columns of a panel, all rows that its kind sees."""
        e, layout = self.e, self.layout
        step, at = vectors * layout.lanes, 0

        def rows(name: str, number: int, blocks: int, count_rows: int) -> None:
            with e.loop(count_rows) as k:
                place = e.add(e.mul(k, blocks * layout.units), number * layout.units, first)
                found = e.only(e.load_part(e.at(self.reads[name], place), count), count)
                e.store(found, e.at(target, e.mul(e.add(at, k), step)))

        if "x" in kind.sees and layout.features:
            assert block.kernel is not None
            rows("kernel", block.kernel, len(self.job.cell.gates), layout.features)
        at += layout.features if "x" in kind.sees else 0
        if block.bias is None:
            e.store(e.splat(0.0), e.at(target, at * step))
        else:
            rows(*block.bias, 1, 1)
        at += 1
        if "h" in kind.sees:
            assert block.recurrent is not None
            rows("recurrent", block.recurrent, len(self.job.cell.recurrent), layout.width)

    def constants(self) -> list[Constant]:
        """``unit_params`` and ``step_params``, copied to where whole vectors can be read."""
        e, layout, found = self.e, self.layout, []
        places, _ = layout.constant_places
        for operand, at in zip(layout.constants(), places, strict=True):
            (size,), target = operand.shape, e.at(self.reads["constants"], at)
            assert isinstance(size, int)
            whole = up(size, layout.lanes) - layout.lanes
            e.fill(e.at(target, whole), layout.lanes, 1.0)
            e.copy(target, self.reads[operand.name], size)
            found.append(Constant(operand.name, at, size, target))
        return found

    def by_row(self, program: Program) -> Rows:
        """A program that mixes the units of a row."""
        return Rows(self.e, self.vectors, row_jaxpr(program))

    # Products

    def pre_activations(
        self,
        units: Units,
        left: ir.Value,
        out: Mapping[Kind, ir.Value],
        pitch: Known,
        rows: Known,
    ) -> None:
        """Those of some units: ``rows`` rows from ``left`` to ``out``."""
        e, layout, at = self.e, self.layout, 0
        for kind in layout.kinds:
            depth = layout.depth(kind)
            for v0, vectors in layout.split(units.size * len(kind.blocks)):
                assert units.weights is not None
                panel, step = e.at(units.weights, at), vectors * layout.lanes
                target = e.at(out[kind], v0 * layout.lanes)
                for piece in layout.pieces(kind):
                    group = self.own_group(units.first) if piece.grouped else 0
                    self.products.panel(
                        e,
                        e.at(left, piece.at, group),
                        e.at(panel, piece.first * step),
                        target,
                        pitch,
                        rows,
                        piece.size,
                        vectors,
                        Strides(layout.pitch, 1, step),
                        adding=piece.first > 0,
                    )
                at += depth * step

    # Reading what a step takes

    def extra(self, s: Known, row: Known, units: Units, vector: int) -> list[ir.Value]:
        """Step inputs and noise of a row, for one of the vectors of units."""
        e, layout, found = self.e, self.layout, []
        at = e.add(units.first, vector * layout.lanes)
        for operand in layout.extra():
            width = operand.shape[2]
            assert isinstance(width, int)
            place = self.place(operand.name, s, row, width)
            if width not in (1, layout.units):  # the step does not read it
                found.append(e.splat(0.0))
            elif width == 1:
                found.append(e.splat(e.load(place, e.real)))
            else:
                found.append(e.load_part(e.at(place, at), self.lanes(units, vector)))
        return found

    def constant(self, given: Constant, units: Units, vector: int) -> ir.Value:
        """One of `constants`, for one of the vectors of units."""
        e = self.e
        if given.size == 1:
            return e.splat(e.load(given.place, e.real))
        return e.load(e.at(given.place, units.first, vector * self.layout.lanes))

    # The same for a whole row

    def read_pre(self, rows: Mapping[Kind, ir.Value]) -> list[Read]:
        """Pre-activations of a row, from where each kind's begin."""
        found: list[Read | None] = [None] * self.layout.blocks
        for kind, place in rows.items():
            for j, block in enumerate(kind.blocks):
                found[block.place] = self._read_block(place, j, len(kind.blocks))
        return [read for read in found if read is not None]

    def _read_block(self, place: ir.Value, j: int, blocks: int) -> Read:
        e, lanes = self.e, self.layout.lanes
        return lambda first, _: e.load(e.at(place, e.mul(first, blocks), j * lanes))

    def read(self, place: ir.Value) -> Read:
        """An array in whole vectors."""
        return lambda first, _: self.e.load(self.e.at(place, first))

    def read_extra(self, s: Known, row: Known) -> list[Read]:
        """Step inputs and noise."""
        found: list[Read] = []
        for operand in self.layout.extra():
            width = operand.shape[2]
            assert isinstance(width, int)
            found.append(self._read_part(self.place(operand.name, s, row, width)))
        return found

    def _read_part(self, place: ir.Value) -> Read:
        return lambda first, lanes: self.e.load_part(self.e.at(place, first), lanes)

    def write(self, *places: ir.Value, whole: bool = True) -> Write:
        """To an array in whole vectors, the first of the places; to others as far as it goes."""
        e = self.e

        def write(first: Known, lanes: int, value: ir.Value) -> None:
            for number, place in enumerate(places):
                if whole and number == 0:
                    e.store(value, e.at(place, first))
                else:
                    e.store_part(value, e.at(place, first), lanes)

        return write


def _places(rooms: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where rooms begin in a kernel's own memory, in numbers, and its size."""
    places, size = {}, 0
    for name, numbers in rooms.items():
        if numbers:
            places[name] = size
            size += up(numbers, 16)
    return places, max(size, 1)
