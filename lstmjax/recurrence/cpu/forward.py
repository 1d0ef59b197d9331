"""The forward kernel: a cell over all of time."""

import llvmlite.ir as ir

from lstmjax.recurrence.cpu.builder import Known
from lstmjax.recurrence.cpu.kernel import Kernel, Units
from lstmjax.recurrence.cpu.plan import ROWS, Kind, Layout


def emit_forward(module: ir.Module, name: str, layout: Layout) -> int:
    """Emit the function; returns how much memory it needs, in numbers."""
    kernel = _Forward(module, layout, layout.forward_arguments(), layout.forward_results())
    kernel.emit(name)
    return kernel.memory


class _Forward(Kernel):
    def rooms(self) -> dict[str, int]:
        layout, step = self.layout, self.job.step
        kinds, own = layout.kinds, not self.job.saving
        size = layout.vectors if layout.by_row else layout.smallest_group
        room = 0
        if layout.by_row:
            self.rows = self.by_row(step.forward)
            self.seen = None if step.recur is None else self.by_row(step.recur)
            room = max(1, *(rows.room for rows in (self.rows, self.seen) if rows is not None))
        return {
            "constants": layout.constant_places[1],
            "weights": sum(layout.depth(k) * len(k.blocks) for k in kinds) * layout.padded,
            "rows": own * 2 * ROWS * layout.pitch,
            "kept": own * layout.kept * 2 * ROWS * layout.padded,
            "pre": own * ROWS * size * layout.blocks * layout.lanes,
            "row": room,
        }

    def work(self) -> None:
        e, group = self.e, self.layout.smallest_group
        self.pack_forward("weights", group)
        self.parameters = self.constants()
        for row0, rows in self.row_blocks():
            first, last = self.active_steps(row0, rows)
            self._begin_rows(first, row0, rows)
            for begin, end in ((0, first), (last, self.steps)):
                if self.job.masked:
                    with e.loop(end, start=begin) as s, e.loop(rows) as r:
                        self._clear(s, e.add(row0, r))
            with e.loop(last, start=first) as s:
                self._enter(s, row0, rows)
                valid = self.valid_rows(s, row0, rows)
                for units in self.units(group, "weights"):
                    self._step(s, row0, rows, valid, units)
                if self.layout.by_row:
                    self._step_by_row(s, row0, rows)
            self._end_rows(last, row0, rows)

    # Where things are

    def _left(self, s: Known, row0: Known, r: Known) -> ir.Value:
        """A row of the left side of the s-th step's products."""
        e, layout = self.e, self.layout
        if self.job.saving:
            return self.kept("rows", s, e.add(row0, r), layout.pitch)
        turn = e.add(e.mul(self._odd(s), ROWS), r)
        return e.at(self.reads["rows"], e.mul(turn, layout.pitch))

    def _h(self, s: Known, row0: Known, r: Known) -> ir.Value:
        """h of a row before the s-th step, in whole vectors."""
        layout = self.layout
        if self.job.step.recur is None:
            return self.e.at(self._left(s, row0, r), layout.h_at)
        return self._state(layout.states, s, row0, r)

    def _state(self, k: int, s: Known, row0: Known, r: Known) -> ir.Value:
        """An array of the state likewise."""
        e, layout = self.e, self.layout
        if self.job.saving:
            place = self.kept("kept", s, e.add(row0, r), layout.kept * layout.padded)
            return e.at(place, k * layout.padded)
        turn = e.add(k * 2 * ROWS, e.mul(self._odd(s), ROWS), r)
        return e.at(self.reads["kept"], e.mul(turn, layout.padded))

    def _odd(self, s: Known) -> Known:
        return self.e.b.and_(self.e.whole(s), self.e.whole(1))

    def _carry(self, s: Known, row0: Known, r: Known) -> list[ir.Value]:
        states = [self._state(k, s, row0, r) for k in range(self.layout.states)]
        return [self._h(s, row0, r), *states]

    # Before the steps, and after them

    def _begin_rows(self, first: Known, row0: Known, rows: Known) -> None:
        with self.e.loop(rows) as r:
            self._put("initial", self._carry(first, row0, r), self.e.add(row0, r))

    def _put(self, name: str, carry: list[ir.Value], row: Known) -> None:
        """A carry that was given, in place of a row's."""
        e, layout = self.e, self.layout
        for k, target in enumerate(carry):
            source = e.at(self.reads[f"{name} {k}"], e.mul(row, layout.units))
            if layout.tail:
                whole = layout.padded - layout.lanes
                e.copy(target, source, whole)
                e.store(e.load_part(e.at(source, whole), layout.tail), e.at(target, whole))
            else:
                e.copy(target, source, layout.units)

    def _clear(self, s: Known, row: Known) -> None:
        for operand in self.layout.outputs():
            self.zero(self.place(operand.name, s, row, self.layout.units), self.layout.units)

    def _end_rows(self, last: Known, row0: Known, rows: Known) -> None:
        e, units = self.e, self.layout.units
        with e.loop(rows) as r:
            for k, source in enumerate(self._carry(last, row0, r)):
                into = e.mul(e.add(row0, r), units)
                e.copy(e.at(self.reads[f"final {k}"], into), source, units)

    # A step

    def _enter(self, s: Known, row0: Known, rows: Known) -> None:
        """What the products take, and the carry after a reset."""
        e, layout = self.e, self.layout
        with e.loop(rows) as r:
            row, left = e.add(row0, r), self._left(s, row0, r)
            e.copy(
                e.at(left, layout.x_at), self.place("x", s, row, layout.features), layout.features
            )
            e.store(ir.Constant(e.real, 1.0), e.at(left, layout.one_at))
            if self.job.resets:
                with e.when(self.is_reset(s, row)):
                    self._put("start", self._carry(s, row0, r), row)
            if self.job.step.recur is not None and self.layout.by_row:
                assert self.seen is not None
                drawn = self.read_extra(s, row)[len(self.job.step.shapes.inputs) :]
                into = self.write(e.at(left, layout.h_at))
                self.seen.emit([self.read(self._h(s, row0, r)), *drawn], [into], self.reads["row"])
            elif self.job.step.recur is not None:
                h, seen = self._h(s, row0, r), e.at(left, layout.h_at)
                for units in self.units(1):
                    drawn = self.extra(s, row, units, 0)[len(self.job.step.shapes.inputs) :]
                    found = e.load(e.at(h, units.first))
                    (found,) = self.vectors.run(self.job.step.recur, [found, *drawn])
                    e.store(found, e.at(seen, units.first))

    def _step(
        self, s: Known, row0: Known, rows: Known, valid: tuple[Known, Known], units: Units
    ) -> None:
        """Products and step of some units."""
        e = self.e
        low, high = valid
        out, pitch = self._pre(s, row0, units)
        from_low = {kind: e.at(p, e.mul(low, pitch)) for kind, p in out.items()}
        self.pre_activations(units, self._left(s, row0, low), from_low, pitch, e.sub(high, low))
        if self.layout.by_row:
            return
        with e.loop(rows) as r:
            if not self.job.masked:
                self._new(s, row0, r, out, pitch, units)
            else:
                with e.b.if_else(self.is_valid(s, e.add(row0, r))) as (yes, no):
                    with yes:
                        self._new(s, row0, r, out, pitch, units)
                    with no:
                        self._old(s, row0, r, units)

    def _pre(self, s: Known, row0: Known, units: Units) -> tuple[dict[Kind, ir.Value], int]:
        """Where the pre-activations of some units begin, kind by kind, and from row to row."""
        e, layout = self.e, self.layout
        lanes, found = layout.lanes, {}
        for kind in layout.kinds:
            if self.job.saving:
                begin = self.kept("pre", s, row0, layout.numbers)
                at = e.add(kind.before * layout.padded, e.mul(units.first, len(kind.blocks)))
                found[kind] = e.at(begin, at)
            elif layout.by_row:
                at = e.add(kind.before * layout.padded, e.mul(units.first, len(kind.blocks)))
                found[kind] = e.at(self.reads["pre"], at)
            else:
                found[kind] = e.at(self.reads["pre"], kind.before * units.size * lanes)
        if self.job.saving or layout.by_row:
            return found, layout.numbers
        return found, layout.blocks * units.size * lanes

    def _new(
        self,
        s: Known,
        row0: Known,
        r: Known,
        out: dict[Kind, ir.Value],
        pitch: int,
        units: Units,
    ) -> None:
        """A step that counts."""
        e, layout, job = self.e, self.layout, self.job
        row, after = e.add(row0, r), e.add(s, 1)
        before, later = self._carry(s, row0, r), self._carry(after, row0, r)
        for vector in range(units.size):
            u, lanes = e.add(units.first, vector * layout.lanes), self.lanes(units, vector)
            pre: list[ir.Value | None] = [None] * layout.blocks
            for kind in layout.kinds:
                for j, block in enumerate(kind.blocks):
                    at = (vector * len(kind.blocks) + j) * layout.lanes
                    pre[block.place] = e.load(e.at(out[kind], e.mul(r, pitch), at))
            old = [e.load(e.at(p, u)) for p in before[not job.cell.uses_h :]]
            if not job.cell.uses_h:
                old = [e.splat(0.0), *old]
            constants = [self.constant(p, units, vector) for p in self.parameters]
            extra = self.extra(s, row, units, vector)
            new = self.vectors.run(job.step.forward, [*pre, *old, *constants, *extra])
            for value, target in zip(new, later, strict=True):
                e.store(value, e.at(target, u))
            for operand, value in zip(layout.outputs(), new, strict=False):
                target = self.place(operand.name, s, row, layout.units)
                e.store_part(value, e.at(target, u), lanes)

    def _step_by_row(self, s: Known, row0: Known, rows: Known) -> None:
        """The step of whole rows, their products being there."""
        e, every = self.e, Units(0, self.layout.vectors, None, True)
        with e.loop(rows) as r:
            if not self.job.masked:
                self._new_row(s, row0, r, every)
            else:
                with e.b.if_else(self.is_valid(s, e.add(row0, r))) as (yes, no):
                    with yes:
                        self._new_row(s, row0, r, every)
                    with no:
                        self._old(s, row0, r, every)

    def _new_row(self, s: Known, row0: Known, r: Known, every: Units) -> None:
        """A step that counts."""
        e, layout = self.e, self.layout
        out, pitch = self._pre(s, row0, every)
        pre = self.read_pre({kind: e.at(p, e.mul(r, pitch)) for kind, p in out.items()})
        row = e.add(row0, r)
        old = [self.read(place) for place in self._carry(s, row0, r)]
        constants = [self.read(given.place) for given in self.parameters]
        args = [*pre, *old, *constants, *self.read_extra(s, row)]
        places = [[place] for place in self._carry(e.add(s, 1), row0, r)]
        for operand, some in zip(layout.outputs(), places, strict=False):
            some.append(self.place(operand.name, s, row, layout.units))
        self.rows.emit(args, [self.write(*some) for some in places], self.reads["row"])

    def _old(self, s: Known, row0: Known, r: Known, units: Units) -> None:
        """A step that does not."""
        e, layout = self.e, self.layout
        row, after = e.add(row0, r), e.add(s, 1)
        before, later = self._carry(s, row0, r), self._carry(after, row0, r)
        for vector in range(units.size):
            u, lanes = e.add(units.first, vector * layout.lanes), self.lanes(units, vector)
            for source, target in zip(before, later, strict=True):
                e.store(e.load(e.at(source, u)), e.at(target, u))
            for operand in layout.outputs():
                target = self.place(operand.name, s, row, layout.units)
                e.store_part(e.splat(0.0), e.at(target, u), lanes)
