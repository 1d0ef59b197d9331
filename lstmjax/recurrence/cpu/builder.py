"""Numbers, addresses, vectors and loops: what functions in LLVM's IR are written with."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import llvmlite.ir as ir

from lstmjax.recurrence.cpu.machine import Machine

I1, I8, I32, I64 = (ir.IntType(n) for n in (1, 8, 32, 64))
PTR, VOID = ir.PointerType(), ir.VoidType()
NULL = ir.Constant(PTR, None)

FUSED = ("contract",)
"""What arithmetic may do beyond what it says: multiply and add in one, and nothing else."""

REALS = {"float32": ir.FloatType(), "float64": ir.DoubleType()}

Known: TypeAlias = int | ir.Value
"""A whole number: known now, or when the function runs."""


class Builder:
    """An `llvmlite.ir.IRBuilder` at the start of a function, for numbers of one type.

    Attributes:
        b: the IRBuilder.
        machine: what the function is for.
        dtype: of its numbers, ``"float32"`` or ``"float64"``.
        real: the same as LLVM's type.
        lanes: numbers in a vector.
        vector: type of a vector.
    """

    def __init__(self, machine: Machine, dtype: str, function: ir.Function) -> None:
        self.machine, self.dtype, self.function = machine, dtype, function
        self.real = REALS[dtype]
        self.lanes = machine.lanes(dtype)
        self.vector = ir.VectorType(self.real, self.lanes)
        self.b = ir.IRBuilder(function.append_basic_block("entry"))

    @property
    def module(self) -> ir.Module:
        """Where the function is."""
        return self.function.module

    # Whole numbers; what is known now is computed now

    @staticmethod
    def whole(n: Known) -> ir.Value:
        """As a value."""
        return I64(n) if isinstance(n, int) else n

    def add(self, *terms: Known) -> Known:
        """The sum."""
        known = sum(t for t in terms if isinstance(t, int))
        out: Known = 0
        for t in terms:
            if not isinstance(t, int):
                out = t if isinstance(out, int) else self.b.add(out, t, flags=("nsw",))
        if isinstance(out, int):
            return known
        return self.b.add(out, I64(known), flags=("nsw",)) if known else out

    def sub(self, x: Known, y: Known) -> Known:
        """The difference."""
        if isinstance(y, int):
            return self.add(x, -y)
        return self.b.sub(self.whole(x), y, flags=("nsw",))

    def mul(self, x: Known, y: Known) -> Known:
        """The product."""
        if isinstance(x, int):
            x, y = y, x
        if isinstance(x, int) and isinstance(y, int):
            return x * y
        if isinstance(y, int) and y in (0, 1):
            return x if y else 0
        return self.b.mul(self.whole(x), self.whole(y), flags=("nsw",))

    def div(self, x: Known, y: Known) -> Known:
        """The quotient of numbers that are not negative, rounded down."""
        if isinstance(x, int) and isinstance(y, int):
            return x // y
        return x if isinstance(y, int) and y == 1 else self.b.udiv(self.whole(x), self.whole(y))

    def minimum(self, x: Known, y: Known) -> Known:
        """The smaller one."""
        if isinstance(x, int) and isinstance(y, int):
            return min(x, y)
        x, y = self.whole(x), self.whole(y)
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)

    def maximum(self, x: Known, y: Known) -> Known:
        """The larger one."""
        if isinstance(x, int) and isinstance(y, int):
            return max(x, y)
        x, y = self.whole(x), self.whole(y)
        return self.b.select(self.b.icmp_signed(">", x, y), x, y)

    def less(self, x: Known, y: Known) -> ir.Value:
        """Whether x < y."""
        return self.b.icmp_signed("<", self.whole(x), self.whole(y))

    def equal(self, x: Known, y: Known) -> ir.Value:
        """Whether x = y."""
        return self.b.icmp_signed("==", self.whole(x), self.whole(y))

    # Memory

    def at(self, p: ir.Value, *offset: Known) -> ir.Value:
        """The address so many numbers behind ``p``."""
        n = self.add(*offset)
        if isinstance(n, int) and n == 0:
            return p
        return self.b.gep(p, [self.whole(n)], inbounds=True, source_etype=self.real)

    def byte(self, p: ir.Value, *offset: Known) -> ir.Value:
        """The address so many bytes behind ``p``."""
        n = self.whole(self.add(*offset))
        return self.b.gep(p, [n], inbounds=True, source_etype=I8)

    def field(self, p: ir.Value, offset: int, kind: ir.Type = PTR) -> ir.Value:
        """What stands so many bytes behind ``p``."""
        return self.b.load(self.byte(p, offset), typ=kind)

    def load(self, p: ir.Value, kind: ir.Type | None = None) -> ir.Value:
        """A vector, or another type of numbers."""
        return self.b.load(p, typ=kind or self.vector, align=self._align)

    def store(self, v: ir.Value, p: ir.Value) -> None:
        """A vector, or another type of numbers."""
        self.b.store(v, p, align=self._align)

    def room(self, kind: ir.Type, count: int = 1) -> ir.Value:
        """Memory of the function's own for so many values."""
        with self.b.goto_entry_block():
            place = self.b.alloca(ir.ArrayType(kind, count))
        place.type = PTR  # llvmlite still thinks of a pointer to something
        return place

    @property
    def _align(self) -> int:
        return {"float32": 4, "float64": 8}[self.dtype]

    # Vectors

    def splat(self, x: int | float | ir.Value, kind: ir.VectorType | None = None) -> ir.Value:
        """A vector of one number."""
        kind = kind or self.vector
        if isinstance(x, int | float):
            return ir.Constant(kind, [ir.Constant(kind.element, x)] * kind.count)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), x, I32(0))
        first = ir.Constant(ir.VectorType(I32, kind.count), [I32(0)] * kind.count)
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), first)

    def load_part(self, p: ir.Value, lanes: int) -> ir.Value:
        """So many numbers, and copies of the last one to fill the vector."""
        if lanes == self.lanes:
            return self.load(p)
        if lanes == 1:
            return self.splat(self.load(p, self.real))
        part = ir.VectorType(self.real, lanes)
        order = [I32(min(k, lanes - 1)) for k in range(self.lanes)]
        found, undefined = self.load(p, part), ir.Constant(part, ir.Undefined)
        return self.b.shuffle_vector(
            found, undefined, ir.Constant(ir.VectorType(I32, self.lanes), order)
        )

    def store_part(self, v: ir.Value, p: ir.Value, lanes: int) -> None:
        """The first numbers of a vector."""
        if lanes == 1:  # LLVM 22 fails on vectors of one number
            v = self.b.extract_element(v, I32(0))
        elif lanes < self.lanes:
            order = ir.Constant(ir.VectorType(I32, lanes), [I32(k) for k in range(lanes)])
            v = self.b.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), order)
        self.store(v, p)

    def only(self, v: ir.Value, lanes: int) -> ir.Value:
        """Zero but in the first lanes."""
        if lanes == self.lanes:
            return v
        keep = ir.Constant(
            ir.VectorType(I1, self.lanes), [I1(k < lanes) for k in range(self.lanes)]
        )
        return self.b.select(keep, v, self.splat(0.0))

    def intrinsic(self, name: str, *args: ir.Value, flags: Sequence[str] = ()) -> ir.Value:
        """``llvm.<name>``, overloaded on the type of the first argument."""
        kind = args[0].type
        full = f"llvm.{name}.{_code(kind)}"
        callee = self.module.globals.get(full)
        if callee is None:
            callee = ir.Function(self.module, ir.FunctionType(kind, [a.type for a in args]), full)
        return self.b.call(callee, args, fastmath=flags)

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """``x y + z``, in one where the machine can."""
        return self.intrinsic("fmuladd", x, y, z, flags=FUSED)

    # Control

    @contextlib.contextmanager
    def loop(self, stop: Known, start: Known = 0, step: int = 1) -> Iterator[ir.Value]:
        """``for k in range(start, stop, step)``; gives k."""
        with self.fold(stop, (), start, step) as (k, _, _):
            yield k

    @contextlib.contextmanager
    def fold(
        self, stop: Known, carried: Sequence[ir.Value], start: Known = 0, step: int = 1
    ) -> Iterator[tuple[ir.Value, list[ir.Value], list[ir.Value]]]:
        """A loop that carries values: ``(k, values, following)``.

        The body puts the next values into ``following``; after the loop ``values`` are the last.
        """
        b = self.b
        head, body, done = (self.function.append_basic_block(n) for n in ("head", "body", "done"))
        before = b.block
        b.branch(head)
        b.position_at_end(head)
        k = b.phi(I64)
        k.add_incoming(self.whole(start), before)
        values = [b.phi(v.type) for v in carried]
        for phi, v in zip(values, carried, strict=True):
            phi.add_incoming(v, before)
        b.cbranch(self.less(k, stop), body, done)
        b.position_at_end(body)
        following: list[ir.Value] = []
        yield k, values, following
        after = b.add(k, I64(step), flags=("nsw",))
        for phi, v in zip(values, following, strict=True):
            phi.add_incoming(v, b.block)
        k.add_incoming(after, b.block)
        b.branch(head)
        b.position_at_end(done)

    def when(self, condition: ir.Value) -> contextlib.AbstractContextManager[object]:
        """Run the body only if the condition holds."""
        return self.b.if_then(condition)

    # Runs of numbers

    def copy(self, target: ir.Value, source: ir.Value, count: int) -> None:
        """So many numbers, known now."""
        whole = count // self.lanes * self.lanes
        with self.loop(whole, step=self.lanes) as k:
            self.store(self.load(self.at(source, k)), self.at(target, k))
        if rest := count - whole:
            part = self.real if rest == 1 else ir.VectorType(self.real, rest)
            self.store(self.load(self.at(source, whole), part), self.at(target, whole))

    def fill(self, target: ir.Value, count: Known, x: float = 0.0) -> None:
        """So many numbers, in whole vectors, of one value."""
        with self.loop(count, step=self.lanes) as k:
            self.store(self.splat(x), self.at(target, k))


def _code(kind: ir.Type) -> str:
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{_code(kind.element)}"
    if isinstance(kind, ir.IntType):
        return f"i{kind.width}"
    return "f32" if isinstance(kind, ir.FloatType) else "f64"
