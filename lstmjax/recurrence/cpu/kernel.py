"""What both kernels are made of: arguments from XLA, memory, packed weights, products, flags."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import llvmlite.ir as ir

from lstmjax.recurrence.cpu.builder import I8, I32, I64, NULL, PTR, Builder, Known
from lstmjax.recurrence.cpu.emit import Vectors
from lstmjax.recurrence.cpu.plan import ROWS, Block, Kind, Layout, Operand
from lstmjax.recurrence.cpu.products import Products, Strides
from lstmjax.recurrence.cpu.rows import Read, Rows, Write, row_jaxpr
from lstmjax.recurrence.layout import up
from lstmjax.traced import Program

# Where XLA's C interface has its fields, in bytes (xla/ffi/api/c_api.h).
_EXTENSION, _API, _ARGUMENTS, _RESULTS = 8, 16, (56, 72), (96, 112)
_DTYPE, _DATA, _RANK, _DIMS = 16, 24, 32, 40
_CREATE_ERROR, _INTERNAL = 48, 13
_TYPES = {"bool": 1, "int32": 4, "int64": 5, "float32": 11, "float64": 12}


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
    """A function ``name(XLA_FFI_CallFrame*) -> XLA_FFI_Error*`` at its beginning.

    Attributes:
        e: what emits it.
        memory: numbers that it needs room for.
        steps, batch: T and B.
        reads: addresses of arguments, results and rooms of its memory, by name.
    """

    def __init__(
        self,
        module: ir.Module,
        name: str,
        layout: Layout,
        arguments: Sequence[Operand],
        results: Sequence[Operand],
    ) -> None:
        self.layout, self.job = layout, layout.job
        function = ir.Function(module, ir.FunctionType(PTR, [PTR]), name)
        self.e = Builder(layout.machine, layout.job.dtype, function)
        self.vectors = Vectors(self.e)
        self.products = Products(module, layout.machine, layout.job.dtype)
        self._frame = function.args[0]
        _answer_metadata(self.e, self._frame)
        places, self.memory = _places(self.rooms())
        self.steps: Known = -1
        self.batch: Known = -1
        self.reads: dict[str, ir.Value] = {}
        self._receive(_ARGUMENTS, arguments)
        self._receive(_RESULTS, [*results, Operand("memory", (self.memory,))])
        own = self.reads["memory"]
        self.reads |= {name: self.e.at(own, place) for name, place in places.items()}

    def rooms(self) -> dict[str, int]:
        """What it needs memory for, in numbers, by name."""
        raise NotImplementedError

    # What XLA hands over

    def _receive(self, where: tuple[int, int], operands: Sequence[Operand]) -> None:
        """Addresses of operands, once all that is known of them has been checked."""
        e, (count, list_) = self.e, where
        right_count = e.equal(e.field(self._frame, count, I64), len(operands))
        self._require(right_count, "another number of operands")
        pointers = e.field(self._frame, list_)
        for number, operand in enumerate(operands):
            buffer = e.field(pointers, 8 * number)
            kind = _TYPES[operand.dtype(self.job.dtype)]
            right_kind = e.b.icmp_signed("==", e.field(buffer, _DTYPE, I32), I32(kind))
            right_rank = e.equal(e.field(buffer, _RANK, I64), len(operand.shape))
            right = e.b.and_(right_kind, right_rank)
            self._require(right, f"{operand.name} of another type or rank")
            dims = e.field(buffer, _DIMS)
            sizes = [e.field(dims, 8 * k, I64) for k in range(len(operand.shape))]
            if isinstance(self.steps, int):  # the first says how many steps and rows there are
                first, self.batch = sizes[:2]
                self.steps = e.sub(first, 1) if operand.shape[0] == "T+1" else first
            over = {"T": self.steps, "T+1": e.add(self.steps, 1), "B": self.batch}
            right = ir.Constant(ir.IntType(1), 1)
            for size, want in zip(sizes, operand.shape, strict=True):
                right = e.b.and_(
                    right, e.equal(size, over[want] if isinstance(want, str) else want)
                )
            self._require(right, f"{operand.name} of another shape")
            self.reads[operand.name] = e.field(buffer, _DATA)

    def _require(self, condition: ir.Value, found: str) -> None:
        """Return an error, before anything is touched, unless the condition holds."""
        e, text = self.e, f"lstmjax's CPU kernel was called with {found}".encode() + b"\0"
        with e.b.if_then(e.b.not_(condition), likely=False):
            kind = ir.ArrayType(I8, len(text))
            message = ir.GlobalVariable(e.module, kind, e.module.get_unique_name("message"))
            message.initializer = ir.Constant(kind, bytearray(text))
            message.global_constant, message.linkage = True, "internal"
            room = e.room(I64, 4)
            for k, value in enumerate((I64(32), NULL, message, I32(_INTERNAL))):
                e.b.store(value, e.byte(room, 8 * k))
            create = ir.FunctionType(PTR, [PTR]).as_pointer()
            create = e.field(e.field(self._frame, _API), _CREATE_ERROR, create)
            e.b.ret(e.b.call(create, [room]))

    # Places of rows

    def row_blocks(self) -> tuple[Known, Known]:
        """How many blocks of at most `ROWS` rows, and rows of each but the last."""
        e = self.e
        blocks = e.div(e.add(self.batch, ROWS - 1), ROWS)
        return blocks, e.div(e.add(self.batch, e.sub(blocks, 1)), e.maximum(blocks, 1))

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


def _answer_metadata(e: Builder, frame: ir.Value) -> None:
    """XLA asks each function once for the version of the interface that it was made for."""
    extension = e.field(frame, _EXTENSION)
    asked = e.b.icmp_unsigned("!=", extension, NULL)
    with e.b.if_then(asked, likely=False):
        is_metadata = e.b.icmp_signed("==", e.field(extension, 8, I32), I32(1))
        with e.b.if_then(is_metadata):
            data = e.field(extension, 24)
            # Version 0.1 is the oldest that any JAX takes; no field used here is newer.
            for offset, value in ((24, I32(0)), (28, I32(1)), (32, I32(0)), (40, I64(0))):
                e.b.store(value, e.byte(data, offset))
            e.b.ret(NULL)
