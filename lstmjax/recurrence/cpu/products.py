"""Matrix products: a tile of sums kept in registers, and the loops around it.

A *panel* is so many vectors of columns as the tile is wide, of all terms of the sum.
"""

import dataclasses

import llvmlite.ir as ir

from lstmjax.recurrence.cpu.builder import I64, PTR, VOID, Builder, Known
from lstmjax.recurrence.cpu.machine import Machine

DEPTH = 256
"""Most terms at a time: what is read again for each block of rows stays near, sums stay short."""


@dataclasses.dataclass(frozen=True)
class Strides:
    """How the left side and the weights lie in memory, in numbers.

    Attributes:
        row: from one row of the left side to the next.
        step: from one term of the sum to the next, in the left side.
        panel: likewise in the weights.
        block: from one block of rows (`row_block`) of the left side to the next, where each of
            them is packed by itself; else 0.
    """

    row: int
    step: int
    panel: int
    block: int = 0


def row_block(e: Builder, rows: Known, blocks: Known, number: Known) -> Known:
    """The first row of one of so many blocks, of about one size."""
    return e.div(e.mul(rows, number), blocks)


class Products:
    """The products of a module, for numbers of one type; functions are made on demand."""

    def __init__(self, module: ir.Module, machine: Machine, dtype: str) -> None:
        self.module, self.machine, self.dtype = module, machine, dtype

    def panel(
        self,
        e: Builder,
        left: ir.Value,
        weights: ir.Value,
        out: ir.Value,
        pitch: Known,
        rows: Known,
        depth: Known,
        vectors: int,
        strides: Strides,
        adding: bool = False,
    ) -> None:
        """``out[r, :] (+)= sum_k left(r, k) weights[k, :]`` for r < rows and k < depth.

        ``left(r, k)`` is ``left[r * strides.row + k * strides.step]``, ``weights[k, :]`` are so
        many vectors from ``weights[k * strides.panel]`` on, ``out[r, :]`` from ``out[r * pitch]``.
        """
        sizes = tuple(range(1, self.machine.tile_rows(vectors) + 1))
        if isinstance(rows, int) and rows:
            blocks = self.machine.row_blocks(rows, vectors)
            sizes = tuple(sorted({rows // blocks, -(-rows // blocks)}))
        numbers = [e.whole(n) for n in (pitch, rows, depth, int(adding))]
        e.b.call(self._panel(vectors, strides, sizes), [left, weights, out, *numbers])

    def _begin(self, name: str) -> tuple[ir.Function, Builder]:
        """A function of ``(left, weights, out, pitch, rows, depth, adding)``."""
        kind = ir.FunctionType(VOID, [PTR] * 3 + [I64] * 4)
        f = ir.Function(self.module, kind, name)
        f.linkage = "internal"
        f.attributes.add("noinline")  # a tile fills all registers
        return f, Builder(self.machine, self.dtype, f)

    def _panel(self, vectors: int, strides: Strides, sizes: tuple[int, ...]) -> ir.Function:
        """Parts of the sum, of about one length; in them blocks of rows, of one of the sizes."""
        name = _name("panel", *sizes, self.dtype, vectors, *dataclasses.astuple(strides))
        if name in self.module.globals:
            return self.module.globals[name]
        most = self.machine.tile_rows(vectors)
        tiles = {n: self._tile(n, vectors, strides) for n in sizes}
        f, e = self._begin(name)
        left, weights, out, pitch, rows, depth, adding = f.args
        parts = e.maximum(e.div(e.add(depth, DEPTH - 1), DEPTH), 1)
        blocks = e.div(e.add(rows, most - 1), most)
        with e.fold(parts, [I64(0), adding]) as (part, (term, more), following):
            after = e.div(e.mul(depth, e.add(part, 1)), parts)
            following += [after, I64(1)]
            terms = e.sub(after, term)
            at_left = e.at(left, e.mul(term, strides.step))
            at_weights = e.at(weights, e.mul(term, strides.panel))
            with e.fold(blocks, [I64(0)]) as (block, (row,), below):
                end = row_block(e, rows, blocks, e.add(block, 1))
                below.append(e.whole(end))
                place = e.mul(block, strides.block) if strides.block else e.mul(row, strides.row)
                from_left = e.at(at_left, place)
                to_out = e.at(out, e.mul(row, pitch))
                size, done = e.sub(end, row), f.append_basic_block("done")
                cases = e.b.switch(size, done)
                for n, tile in tiles.items():
                    case = f.append_basic_block(f"rows{n}")
                    cases.add_case(n, case)
                    e.b.position_at_end(case)
                    e.b.call(tile, [from_left, at_weights, to_out, pitch, size, terms, more])
                    e.b.branch(done)
                e.b.position_at_end(done)
        e.b.ret_void()
        return f

    def _tile(self, rows: int, vectors: int, strides: Strides) -> ir.Function:
        """A sum in registers for each of so many rows and vectors."""
        name = _name("tile", rows, self.dtype, vectors, *dataclasses.astuple(strides))
        if name in self.module.globals:
            return self.module.globals[name]
        f, e = self._begin(name)
        left, weights, out, pitch, _, depth, adding = f.args
        with e.fold(depth, [e.splat(0.0)] * (rows * vectors)) as (k, sums, following):
            row, column = e.at(weights, e.mul(k, strides.panel)), e.at(left, e.mul(k, strides.step))
            terms = [e.load(e.at(row, v * e.lanes)) for v in range(vectors)]
            for r in range(rows):
                x = e.splat(e.load(e.at(column, r * strides.row), e.real))
                for v, term in enumerate(terms):
                    following.append(e.fma(x, term, sums[r * vectors + v]))
        places = [
            e.at(out, e.mul(r, pitch), v * e.lanes) for r in range(rows) for v in range(vectors)
        ]
        # What is there is added last: a long sum is then one of partial sums.
        with e.b.if_else(e.equal(adding, 0)) as (new, old):
            with new:
                for s, p in zip(sums, places, strict=True):
                    e.store(s, p)
            with old:
                for s, p in zip(sums, places, strict=True):
                    e.store(e.b.fadd(e.load(p), s), p)
        e.b.ret_void()
        return f


def _name(*parts: object) -> str:
    return "_".join(map(str, parts))
