"""The backward kernel: the derivative of a cell over all of time."""

from collections.abc import Iterator

import llvmlite.ir as ir

from lstmjax.recurrence.cpu.builder import I32, I64, Known
from lstmjax.recurrence.cpu.kernel import Kernel, Units
from lstmjax.recurrence.cpu.plan import CHUNK, ROWS, Kind, Layout
from lstmjax.recurrence.cpu.products import Strides, row_block
from lstmjax.recurrence.cpu.rows import Write
from lstmjax.recurrence.layout import up


def emit_backward(module: ir.Module, name: str, layout: Layout) -> int:
    """Emit the function; returns how much memory it needs, in numbers."""
    kernel = _Backward(module, layout, layout.backward_arguments(), layout.backward_results())
    kernel.emit(name)
    return kernel.memory


def _seeing_x(layout: Layout) -> int:
    """Pre-activations that x has a part in: the first of each row."""
    return sum(len(kind.blocks) for kind in layout.kinds if "x" in kind.sees) * layout.padded


class _Backward(Kernel):
    def rooms(self) -> dict[str, int]:
        layout, step = self.layout, self.job.step
        from_h = sum(len(kind.blocks) for kind in layout.kinds if "h" in kind.sees)
        from_x = up(layout.features, layout.lanes) * _seeing_x(layout)
        room, tile = 0, max(layout.most * layout.lanes, layout.padded * layout.by_row)
        if layout.by_row:
            self.rows = self.by_row(step.backward)
            self.seen = None if step.recur_back is None else self.by_row(step.recur_back)
            room = max(1, *(rows.room for rows in (self.rows, self.seen) if rows is not None))
        return {
            "constants": layout.constant_places[1],
            "d constants": layout.constant_places[1],
            "recurrent back": layout.padded * from_h * up(layout.width, layout.lanes),
            "kernel back": from_x * ("x" in self.job.wanted),
            "d pre": 2 * ROWS * layout.pre_pitch,
            "tile": ROWS * tile,
            "chunk rows": layout.packed[1] * CHUNK * layout.block_columns,
            "chunk d pre": CHUNK * layout.columns,
            "d carry": (1 + layout.states) * ROWS * layout.padded,
            "d weights": layout.weight_rows * layout.columns,
            "row": room,
            "d row": (1 + layout.states) * layout.padded * layout.by_row,
        }

    def work(self) -> None:
        e, layout = self.e, self.layout
        self.parameters = self.constants()
        self._prepare()
        self.slots = self._number()
        if self.job.masked:
            self.slot_of = e.room(I64, ROWS)
        for row0, rows in self.row_blocks():
            first, last = self.active_steps(row0, rows)
            with e.loop(rows) as r:
                if "start" in self.job.wanted:
                    for k in range(1 + layout.states):
                        line = e.mul(e.add(row0, r), layout.units)
                        self.zero(e.at(self.reads[f"d start {k}"], line), layout.units)
                for k in range(1 + layout.states):
                    source = e.at(self.reads[f"d_final {k}"], e.mul(e.add(row0, r), layout.units))
                    target = self._d_carry(k, r)
                    e.fill(e.at(target, layout.padded - layout.lanes), layout.lanes)
                    e.copy(target, source, layout.units)
            if self.job.masked:
                for begin, end in ((0, first), (last, self.steps)):
                    with e.loop(end, start=begin) as s, e.loop(rows) as r:
                        self._clear(s, e.add(row0, r))
            with e.fold(e.sub(last, first), [I64(0), I64(0)]) as (j, later, following):
                s = e.sub(e.sub(last, 1), j)
                valid = self.valid_rows(s, row0, rows)
                self._enter(s, row0, rows)
                for units in self.units(layout.most):
                    self._chain(e.add(s, 1), row0, rows, (later[0], later[1]), units)
                    if not layout.by_row:
                        with e.loop(rows) as r:
                            self._row(s, row0, r, units)
                if layout.by_row:
                    self._unsee_rows(e.add(s, 1), row0, (later[0], later[1]))
                    with e.loop(rows) as r:
                        self._row(s, row0, r, Units(0, layout.vectors, None, True))
                self._input_gradient(s, row0, rows, valid)
                full = e.less(CHUNK - ROWS, e.b.load(self.slots, typ=I64))
                with e.when(e.b.or_(full, e.equal(s, first))):
                    self._add_chunk()
                following += [e.whole(n) for n in valid]
            for units in self.units(layout.most):
                self._chain(first, row0, rows, (later[0], later[1]), units)
                if not layout.by_row:
                    with e.loop(rows) as r:
                        self._finish(first, row0, r, units)
            if layout.by_row:
                self._unsee_rows(first, row0, (later[0], later[1]))
                with e.loop(rows) as r:
                    self._finish(first, row0, r, Units(0, layout.vectors, None, True))

    def end(self) -> None:
        self._add_up()
        self._unpack()

    # Before and after the loops

    def _prepare(self) -> None:
        """Weights for the way back, and zeros where sums begin."""
        e, layout = self.e, self.layout
        for kind in layout.kinds:
            if "h" in kind.sees:
                self._pack_recurrent(kind)
            if layout.panels(kind) * layout.chunk_vectors > len(kind.blocks) * layout.vectors:
                last = kind.panels_before + layout.panels(kind) - 1
                end = e.at(self.reads["chunk d pre"], last * CHUNK * layout.panel)
                e.fill(end, CHUNK * layout.panel)
        if "x" in self.job.wanted and layout.features:
            self._pack_kernel()
        e.fill(self.reads["d weights"], layout.weight_rows * layout.columns)
        if "d constants" in self.reads:
            e.fill(self.reads["d constants"], layout.constant_places[1])

    def _pack_recurrent(self, kind: Kind) -> None:
        """R transposed: for a panel of units, the pre-activations that saw them, row by row."""
        e, layout = self.e, self.layout
        self.back_depth = (layout.padded if layout.dense else layout.width) * len(kind.blocks)
        e.fill(self.reads["recurrent back"], self.back_depth * layout.padded)
        pitch = len(self.job.cell.recurrent) * layout.units
        for units in self.units(layout.most):
            target = self._back_weights(units)
            group = self.own_group(units.first)
            count = units.size * layout.lanes
            if units.last and layout.tail:
                count += layout.tail - layout.lanes
            with e.loop(count) as i, e.loop(layout.width) as k:
                row = e.mul(e.add(e.sub(units.first, group), i), pitch)
                for j, block in enumerate(kind.blocks):
                    assert block.recurrent is not None
                    place = e.add(row, block.recurrent * layout.units, group, k)
                    number = self._number_of(k, j, len(kind.blocks))
                    value = e.load(e.at(self.reads["recurrent"], place), e.real)
                    into = e.add(e.mul(number, units.size * layout.lanes), i)
                    e.store(value, e.at(target, into))

    def _number_of(self, unit: Known, block: int, blocks: int) -> Known:
        """The place of a pre-activation among those of its kind."""
        e, lanes = self.e, self.layout.lanes
        vector = e.div(unit, lanes)
        lane = e.sub(unit, e.mul(vector, lanes))
        return e.add(e.mul(vector, blocks * lanes), block * lanes, lane)

    def _back_weights(self, units: Units) -> ir.Value:
        return self.e.at(self.reads["recurrent back"], self.e.mul(units.first, self.back_depth))

    def _pack_kernel(self) -> None:
        """W transposed: for a panel of features, the pre-activations that saw them, row by row."""
        e, layout, depth = self.e, self.layout, _seeing_x(self.layout)
        e.fill(self.reads["kernel back"], up(layout.features, layout.lanes) * depth)
        gates = len(self.job.cell.gates)
        for v0, vectors in layout.split(-(-layout.features // layout.lanes)):
            target = e.at(self.reads["kernel back"], v0 * layout.lanes * depth)
            first, step = v0 * layout.lanes, vectors * layout.lanes
            count = min(step, layout.features - first)
            for kind in layout.kinds:
                if "x" not in kind.sees:
                    continue
                with e.loop(count) as i, e.loop(layout.units) as k:
                    for j, block in enumerate(kind.blocks):
                        assert block.kernel is not None
                        line = e.add(e.mul(e.add(i, first), gates * layout.units), k)
                        place = e.add(line, block.kernel * layout.units)
                        value = e.load(e.at(self.reads["kernel"], place), e.real)
                        number = self._number_of(k, j, len(kind.blocks))
                        number = e.add(number, kind.before * layout.padded)
                        e.store(value, e.at(target, e.add(e.mul(number, step), i)))

    def _number(self) -> ir.Value:
        """A whole number in memory, zero at first."""
        place = self.e.room(I64)
        self.e.b.store(I64(0), place)
        return place

    def _add_up(self) -> None:
        """All workers' sums, in their order, to those of the first."""
        e, layout = self.e, self.layout
        sums = {
            "d weights": layout.weight_rows * layout.columns,
            "d constants": layout.constant_places[1],
        }
        for name, count in sums.items():
            if count:
                place = self.reads[name]
                with e.loop(self.workers, start=1) as worker, e.loop(count, step=e.lanes) as k:
                    so_far = e.at(place, k)
                    more = e.load(e.at(so_far, e.mul(worker, self.memory)))
                    e.store(e.b.fadd(e.load(so_far), more), so_far)

    def _unpack(self) -> None:
        """Gradients in the order of the parameters."""
        e, layout, cell = self.e, self.layout, self.job.cell
        x_rows, one, h_rows = 0, layout.features, layout.features + 1
        for kind in layout.kinds:
            for j, block in enumerate(kind.blocks):
                if block.kernel is not None:
                    gates = len(cell.gates)
                    self._unpack_block(kind, j, "kernel", block.kernel, gates, x_rows, one)
                if block.recurrent is not None:
                    gates, rows = len(cell.recurrent), layout.width
                    self._unpack_block(kind, j, "recurrent", block.recurrent, gates, h_rows, rows)
                if block.bias is not None:
                    self._unpack_block(kind, j, *block.bias, 0, one, 1)
        for given in self.parameters:
            source = e.at(self.reads["d constants"], given.at)
            target = self.reads[f"d {given.name}"]
            if given.size > 1 or layout.by_row:
                e.copy(target, source, given.size)
                continue
            with e.fold(layout.padded, [ir.Constant(e.real, 0.0)]) as (k, total, following):
                following.append(e.b.fadd(total[0], e.load(e.at(source, k), e.real)))
            e.store(total[0], target)

    def _unpack_block(
        self, kind: Kind, j: int, name: str, number: int, blocks: int, first: int, rows: int
    ) -> None:
        """``rows`` rows of a block's weights, from a row of those of all on."""
        e, layout = self.e, self.layout
        lanes, count = layout.lanes, len(kind.blocks)
        begin = kind.panels_before * layout.panel + j * lanes
        with e.loop(rows) as k:
            row = e.at(self.reads["d weights"], e.mul(e.add(k, first), layout.columns), begin)
            target = e.at(self.reads[f"d {name}"], e.mul(k, blocks * layout.units))
            target = e.at(target, number * layout.units)
            whole = layout.vectors - bool(layout.tail)
            with e.loop(whole) as v:
                value = e.load(e.at(row, e.mul(v, count * lanes)))
                e.store(value, e.at(target, e.mul(v, lanes)))
            if layout.tail:
                value = e.load(e.at(row, whole * count * lanes))
                e.store_part(value, e.at(target, whole * lanes), layout.tail)

    # Where things are

    def _d_carry(self, k: int, r: Known) -> ir.Value:
        e = self.e
        return e.at(self.reads["d carry"], e.mul(e.add(k * ROWS, r), self.layout.padded))

    def _d_pre(self, s: Known, r: Known) -> ir.Value:
        e = self.e
        odd = e.b.and_(e.whole(s), I64(1))
        return e.at(self.reads["d pre"], e.mul(e.add(e.mul(odd, ROWS), r), self.layout.pre_pitch))

    def _old_h(self, s: Known, row: Known) -> ir.Value:
        e, layout = self.e, self.layout
        if self.job.step.recur is None:
            return e.at(self.kept("rows", s, row, layout.pitch), layout.h_at)
        return self._old_state(layout.states, s, row)

    def _old_state(self, k: int, s: Known, row: Known) -> ir.Value:
        layout = self.layout
        place = self.kept("kept", s, row, layout.kept * layout.padded)
        return self.e.at(place, k * layout.padded)

    def _slot(self, r: Known) -> ir.Value:
        """A row's place in the chunk."""
        e = self.e
        if self.job.masked:
            return e.b.load(e.b.gep(self.slot_of, [e.whole(r)], source_etype=I64), typ=I64)
        return e.add(e.b.load(self.slots_before, typ=I64), r)

    def _input_gradients(self) -> list[tuple[str, int]]:
        """Step inputs whose gradient is asked for, and their widths."""
        found = []
        for name, a in sorted(self.job.step.shapes.inputs.items()):
            if f"input {name}" in self.job.wanted:
                found.append((f"d input {name}", a.shape[1]))
        return found

    def _clear(self, s: Known, row: Known) -> None:
        """No gradient of the inputs at a step."""
        features = [("d x", self.layout.features)] if "x" in self.job.wanted else []
        for name, width in (*features, *self._input_gradients()):
            self.zero(self.place(name, s, row, width), width)

    # A step

    def _enter(self, s: Known, row0: Known, rows: Known) -> None:
        """The left sides of the step's rows, into the chunk."""
        e = self.e
        self.slots_before = self._before()
        with e.loop(rows) as r:
            row = e.add(row0, r)
            for name, width in self._input_gradients():
                self.zero(self.place(name, s, row, width), width)
            if self.job.masked:
                with e.when(self.is_valid(s, row)):
                    self._take(s, row, r)
            else:
                self._take(s, row, r)

    def _before(self) -> ir.Value:
        place = self.e.room(I64)
        self.e.b.store(self.e.b.load(self.slots, typ=I64), place)
        return place

    def _take(self, s: Known, row: Known, r: Known) -> None:
        e, layout = self.e, self.layout
        slot = e.b.load(self.slots, typ=I64)
        if self.job.masked:
            e.b.store(slot, e.b.gep(self.slot_of, [e.whole(r)], source_etype=I64))
        source = self.kept("rows", s, row, layout.pitch)
        columns = layout.block_columns
        some = ir.VectorType(e.real, columns)
        for piece, first in layout.packed[0].items():
            blocks = layout.blocks_of(piece.size)
            with e.loop(layout.repeats(piece)) as group, e.loop(blocks) as k:
                begin = e.add(e.mul(group, piece.size), row_block(e, piece.size, blocks, k))
                block = e.add(e.mul(group, blocks), k, first)
                target = e.at(self._block(block), e.mul(slot, columns))
                # Behind the last number of all rows there is another step's.
                e.store(e.load(e.at(source, piece.at, begin), some), target)
        e.b.store(e.add(slot, 1), self.slots)

    def _block(self, number: Known) -> ir.Value:
        """A block of columns of the chunk's left sides."""
        size = CHUNK * self.layout.block_columns
        return self.e.at(self.reads["chunk rows"], self.e.mul(number, size))

    def _chain(
        self, s: Known, row0: Known, rows: Known, valid: tuple[ir.Value, ir.Value], units: Units
    ) -> None:
        """What the products of step ``s`` hand to h before it, for some units of all rows."""
        e, layout = self.e, self.layout
        tile, pitch = self._tile(units)
        width, (low, high) = units.size * layout.lanes, valid
        kinds = [kind for kind in layout.kinds if "h" in kind.sees]
        if not kinds:
            return
        for begin, end in ((0, low), (high, rows)):
            with e.loop(end, start=begin) as r:
                e.fill(e.at(tile, e.mul(r, pitch)), width)
        (kind,) = kinds
        group = e.mul(self.own_group(units.first), len(kind.blocks))
        left = e.at(self._d_pre(s, low), kind.before * layout.padded, group)
        out, strides = e.at(tile, e.mul(low, pitch)), Strides(layout.pre_pitch, 1, width)
        weights, count = self._back_weights(units), e.sub(high, low)
        self.products.panel(
            e, left, weights, out, pitch, count, self.back_depth, units.size, strides
        )
        if self.job.step.recur_back is not None and not layout.by_row:
            for row, r in self._valid(s, row0, valid):
                self._unsee(s, row, r, units)

    def _tile(self, units: Units) -> tuple[ir.Value, int]:
        """Where some units stand in the tile, and from one row of it to the next."""
        layout = self.layout
        if layout.by_row:
            return self.e.at(self.reads["tile"], units.first), layout.padded
        return self.reads["tile"], units.size * layout.lanes

    def _valid(
        self, s: Known, row0: Known, valid: tuple[Known, Known]
    ) -> Iterator[tuple[Known, Known]]:
        """The rows of a block whose step counts: their numbers in the batch and in the block."""
        e, (low, high) = self.e, valid
        with e.loop(high, start=low) as r:
            row = e.add(row0, r)
            if self.job.masked:
                with e.when(self.is_valid(s, row)):
                    yield row, r
            else:
                yield row, r

    def _unsee_rows(self, s: Known, row0: Known, valid: tuple[Known, Known]) -> None:
        """`_unsee` for whole rows."""
        if self.seen is None:
            return
        e, layout, step = self.e, self.layout, self.job.step
        for row, r in self._valid(s, row0, valid):
            tile = e.at(self.reads["tile"], e.mul(r, layout.padded))
            e.copy(self.reads["d row"], tile, layout.padded)
            drawn = self.read_extra(s, row)[len(step.shapes.inputs) :]
            args = [self.read(self._old_h(s, row)), *drawn, self.read(self.reads["d row"])]
            self.seen.emit(args, [self.write(tile)], self.reads["row"])

    def _unsee(self, s: Known, row: Known, r: Known, units: Units) -> None:
        """From the gradient of what the product saw to that of h, in the tile."""
        e, layout, step = self.e, self.layout, self.job.step
        assert step.recur_back is not None
        for vector in range(units.size):
            tile, pitch = self._tile(units)
            place = e.at(tile, e.mul(r, pitch), vector * layout.lanes)
            drawn = self.extra(s, row, units, vector)[len(step.shapes.inputs) :]
            h = e.load(e.at(self._old_h(s, row), units.first, vector * layout.lanes))
            (d,) = self.vectors.run(step.recur_back, [h, *drawn, e.load(place)])
            e.store(d, place)

    def _totals(self, s: Known, row: Known, r: Known, units: Units) -> list[list[ir.Value]]:
        """The gradient of the carry before step ``s``: for each vector of units, each array.

        A reset at that step takes it, for what it put in place.
        """
        e, layout = self.e, self.layout
        has_h = any("h" in kind.sees for kind in layout.kinds)
        found = []
        for vector in range(units.size):
            u = e.add(units.first, vector * layout.lanes)
            d = [e.load(e.at(self._d_carry(k, r), u)) for k in range(1 + layout.states)]
            if has_h:
                tile, pitch = self._tile(units)
                d[0] = e.b.fadd(d[0], e.load(e.at(tile, e.mul(r, pitch), vector * layout.lanes)))
            found.append(d)
        if not self.job.resets:
            return found
        within = e.less(s, self.steps)
        flag = self.is_reset(e.minimum(s, e.sub(self.steps, 1)), row)
        reset = e.b.and_(within, flag)
        if "start" in self.job.wanted:
            with e.when(reset):
                for vector, d in enumerate(found):
                    lanes = self.lanes(units, vector)
                    for k, value in enumerate(d):
                        line = e.at(self.reads[f"d start {k}"], e.mul(row, layout.units))
                        place = e.at(line, units.first, vector * layout.lanes)
                        so_far = e.load_part(place, lanes)
                        e.store_part(e.b.fadd(so_far, value), place, lanes)
        zero = e.splat(0.0)
        return [[e.b.select(reset, zero, value) for value in d] for d in found]

    def _row(self, s: Known, row0: Known, r: Known, units: Units) -> None:
        """One row of some units at a step."""
        e, row = self.e, self.e.add(row0, r)
        totals = self._totals(e.add(s, 1), row, r, units)
        moved = self._moved_row if self.layout.by_row else self._moved
        if not self.job.masked:
            moved(s, row, r, units, totals)
            return
        with e.b.if_else(self.is_valid(s, row)) as (yes, no):
            with yes:
                moved(s, row, r, units, totals)
            with no:
                self._unmoved(s, r, units, totals)

    def _moved(
        self, s: Known, row: Known, r: Known, units: Units, totals: list[list[ir.Value]]
    ) -> None:
        """A step that counts."""
        e, layout, job = self.e, self.layout, self.job
        cell, lanes_ = job.cell, layout.lanes
        slot = self._slot(r)
        pre_row, d_row = self.kept("pre", s, row, layout.numbers), self._d_pre(s, r)
        for vector in range(units.size):
            lanes, u = self.lanes(units, vector), e.add(units.first, vector * lanes_)
            places: dict[int, tuple[Kind, Known, Known]] = {}
            for kind in layout.kinds:
                count = len(kind.blocks)
                begin = e.add(kind.before * layout.padded, e.mul(units.first, count))
                for j, block in enumerate(kind.blocks):
                    q = vector * count + j
                    in_kind = e.add(e.mul(e.div(units.first, lanes_), count), q)
                    places[block.place] = kind, in_kind, e.add(begin, q * lanes_)
            pre = [e.load(e.at(pre_row, places[k][2])) for k in range(layout.blocks)]
            h = e.load(e.at(self._old_h(s, row), u)) if cell.uses_h else e.splat(0.0)
            states = [e.load(e.at(self._old_state(k, s, row), u)) for k in range(layout.states)]
            constants = [self.constant(p, units, vector) for p in self.parameters]
            extra = self.extra(s, row, units, vector)
            ct = list(totals[vector])
            for k, there in enumerate(job.d_outs):
                if there:
                    place = self.place(f"d_out {k}", s, row, layout.units)
                    ct[k] = e.b.fadd(ct[k], e.load_part(e.at(place, u), lanes))
            args = [*pre, h, *states, *constants, *extra, *ct]
            found = self.vectors.run(job.step.backward, args)
            d_pre, found = found[: layout.blocks], found[layout.blocks :]
            d_old, found = found[: 1 + layout.states], found[1 + layout.states :]
            d_constants, d_inputs = found[: len(constants)], found[len(constants) :]
            for number, value in enumerate(d_pre):
                kind, q, at = places[number]
                value = e.only(value, lanes)
                e.store(value, e.at(d_row, at))
                e.store(value, self._in_chunk(kind, q, slot))
            for k, value in enumerate(d_old):
                e.store(value, e.at(self._d_carry(k, r), u))
            for given, value in zip(self.parameters, d_constants, strict=True):
                place = e.at(self.reads["d constants"], given.at, u)
                e.store(e.b.fadd(e.load(place), e.only(value, lanes)), place)
            self._add_inputs(s, row, u, lanes, d_inputs)

    def _moved_row(
        self, s: Known, row: Known, r: Known, every: Units, totals: list[list[ir.Value]]
    ) -> None:
        """The same for a whole row."""
        e, layout, job = self.e, self.layout, self.job
        slot, pre_row, d_row = (
            self._slot(r),
            self.kept("pre", s, row, layout.numbers),
            self._d_pre(s, r),
        )
        for vector, d in enumerate(totals):
            u, lanes = vector * layout.lanes, self.lanes(every, vector)
            for k, value in enumerate(d):
                if k < len(job.d_outs) and job.d_outs[k]:
                    place = self.place(f"d_out {k}", s, row, layout.units)
                    value = e.b.fadd(value, e.load_part(e.at(place, u), lanes))
                e.store(value, e.at(self.reads["d row"], k * layout.padded, u))
        begins = {kind: kind.before * layout.padded for kind in layout.kinds}
        pre = self.read_pre({kind: e.at(pre_row, at) for kind, at in begins.items()})
        old = [self._old_h(s, row), *(self._old_state(k, s, row) for k in range(layout.states))]
        constants = [given.place for given in self.parameters]
        ct = [e.at(self.reads["d row"], k * layout.padded) for k in range(1 + layout.states)]
        args = [*pre, *map(self.read, (*old, *constants)), *self.read_extra(s, row)]
        writes: list[Write | None] = [None] * layout.blocks
        for kind, at in begins.items():
            for j, block in enumerate(kind.blocks):
                writes[block.place] = self._write_d_pre(kind, j, e.at(d_row, at), slot)
        carry = [self.write(self._d_carry(k, r)) for k in range(1 + layout.states)]
        sums = [self._add_to(e.at(self.reads["d constants"], c.at)) for c in self.parameters]
        self.rows.emit(
            [*args, *map(self.read, ct)],
            [*(w for w in writes if w), *carry, *sums, *self._write_inputs(s, row)],
            self.reads["row"],
        )

    def _write_d_pre(self, kind: Kind, j: int, place: ir.Value, slot: Known) -> Write:
        e, layout, blocks = self.e, self.layout, len(kind.blocks)

        def write(first: Known, lanes: int, value: ir.Value) -> None:
            value = e.only(value, lanes)
            e.store(value, e.at(place, e.mul(first, blocks), j * layout.lanes))
            q = e.add(e.mul(e.div(first, layout.lanes), blocks), j)
            e.store(value, self._in_chunk(kind, q, slot))

        return write

    def _add_to(self, place: ir.Value) -> Write:
        e = self.e

        def write(first: Known, lanes: int, value: ir.Value) -> None:
            here = e.at(place, first)
            e.store(e.b.fadd(e.load(here), e.only(value, lanes)), here)

        return write

    def _write_inputs(self, s: Known, row: Known) -> list[Write]:
        """To the gradients of step inputs; to nowhere where nobody asks."""
        widths, found = dict(self._input_gradients()), []
        for name in sorted(self.job.step.shapes.inputs):
            if (width := widths.get(f"d input {name}")) is None:
                found.append(self.write())
            else:
                place = self.place(f"d input {name}", s, row, width)
                found.append(self.write(place, whole=False))
        return found

    def _in_chunk(self, kind: Kind, q: Known, slot: Known) -> ir.Value:
        """Where the chunk has the q-th vector of a kind's pre-activations."""
        e, layout = self.e, self.layout
        panel = e.div(q, layout.chunk_vectors)
        column = e.sub(q, e.mul(panel, layout.chunk_vectors))
        line = e.add(e.mul(e.add(panel, kind.panels_before), CHUNK), slot)
        at = e.add(e.mul(line, layout.panel), e.mul(column, layout.lanes))
        return e.at(self.reads["chunk d pre"], at)

    def _add_inputs(
        self, s: Known, row: Known, u: Known, lanes: int, d_inputs: list[ir.Value]
    ) -> None:
        """The gradients of step inputs, of one a row a sum over units."""
        e = self.e
        names = sorted(self.job.step.shapes.inputs)
        widths = dict(self._input_gradients())
        for name, value in zip(names, d_inputs, strict=True):
            width = widths.get(f"d input {name}")
            if width not in (1, self.layout.units):  # nobody asks, or the step does not read it
                continue
            place = self.place(f"d input {name}", s, row, width)
            if width > 1:
                e.store_part(value, e.at(place, u), lanes)
                continue
            total = e.load(place, e.real)
            for lane in range(lanes):
                total = e.b.fadd(total, e.b.extract_element(value, I32(lane)))
            e.store(total, place)

    def _unmoved(self, s: Known, r: Known, units: Units, totals: list[list[ir.Value]]) -> None:
        """A step that does not count."""
        e, layout = self.e, self.layout
        for vector, total in enumerate(totals):
            u = e.add(units.first, vector * layout.lanes)
            for k, value in enumerate(total):
                e.store(value, e.at(self._d_carry(k, r), u))
            for kind in layout.kinds:
                count = len(kind.blocks)
                at = e.add(kind.before * layout.padded, e.mul(units.first, count))
                for j in range(count):
                    place = e.at(self._d_pre(s, r), at, (vector * count + j) * layout.lanes)
                    e.store(e.splat(0.0), place)

    def _input_gradient(
        self, s: Known, row0: Known, rows: Known, valid: tuple[Known, Known]
    ) -> None:
        """The gradient of x at a step."""
        if "x" not in self.job.wanted:
            return
        e, layout, depth = self.e, self.layout, _seeing_x(self.layout)
        features, (low, high) = layout.features, valid
        if self.job.masked:
            for begin, end in ((0, low), (high, rows)):
                with e.loop(end, start=begin) as r:
                    self.zero(self.place("d x", s, e.add(row0, r), features), features)
        for v0, vectors in layout.split(-(-features // layout.lanes)):
            first, width = v0 * layout.lanes, vectors * layout.lanes
            weights = e.at(self.reads["kernel back"], first * depth)
            strides, count = Strides(layout.pre_pitch, 1, width), e.sub(high, low)
            tile, left = self.reads["tile"], self._d_pre(s, low)
            self.products.panel(e, left, weights, tile, width, count, depth, vectors, strides)
            with e.loop(count) as r:
                row = e.add(row0, low, r)
                into = e.at(self.place("d x", s, row, features), first)
                for v in range(vectors):
                    lanes = min(layout.lanes, features - first - v * layout.lanes)
                    value = e.load(e.at(tile, e.mul(r, width), v * layout.lanes))
                    e.store_part(value, e.at(into, v * layout.lanes), lanes)

    def _add_chunk(self) -> None:
        """The chunk's share in the gradients of the weights: ``[x | 1 | h]^T d pre``."""
        e, layout = self.e, self.layout
        slots = e.b.load(self.slots, typ=I64)
        columns, vectors = layout.block_columns, layout.chunk_vectors
        strides = Strides(1, columns, layout.panel, CHUNK * columns)
        for kind in layout.kinds:
            with e.loop(layout.panels(kind)) as p:
                panel = e.add(p, kind.panels_before)
                weights = e.at(self.reads["chunk d pre"], e.mul(panel, CHUNK * layout.panel))
                out = e.at(self.reads["d weights"], e.mul(panel, layout.panel))
                unit = e.mul(e.div(e.mul(p, vectors), len(kind.blocks)), layout.lanes)
                for piece in layout.pieces(kind):
                    block: Known = layout.packed[0][piece.in_chunk]
                    if piece.grouped:
                        group = e.div(unit, layout.width)
                        block = e.add(block, e.mul(group, layout.blocks_of(piece.size)))
                    left = self._block(block)
                    into = e.at(out, (piece.at - layout.x_at) * layout.columns)
                    self.products.panel(
                        e, left, weights, into, layout.columns, piece.size, slots, vectors,
                        strides, adding=True,
                    )  # fmt: skip
        e.b.store(I64(0), self.slots)

    def _finish(self, s: Known, row0: Known, r: Known, units: Units) -> None:
        """The gradient of the initial carry."""
        e, layout, row = self.e, self.layout, self.e.add(row0, r)
        for vector, total in enumerate(self._totals(s, row, r, units)):
            for k, value in enumerate(total):
                line = e.at(self.reads[f"d initial {k}"], e.mul(row, layout.units))
                place = e.at(line, units.first, vector * layout.lanes)
                e.store_part(value, place, self.lanes(units, vector))
