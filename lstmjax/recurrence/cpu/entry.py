"""What XLA calls: a function that checks its buffers, and shares the work among threads."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import llvmlite.ir as ir

from lstmjax.recurrence.cpu.builder import I1, I8, I32, I64, NULL, PTR, VOID, Builder, Known
from lstmjax.recurrence.cpu.plan import Operand

# Where XLA's C interface has its fields, in bytes (xla/ffi/api/c_api.h).
_EXTENSION, _API, _CONTEXT, _ARGUMENTS, _RESULTS = 8, 16, 24, (56, 72), (96, 112)
_DTYPE, _DATA, _RANK, _DIMS = 16, 24, 32, 40
_CREATE_ERROR, _DESTROY_ERROR, _SCHEDULE, _INTERNAL = 48, 64, 136, 13
_TYPES = {"bool": 1, "int32": 4, "int64": 5, "float32": 11, "float64": 12}

_NEXT, _DONE, _HOLDERS, _FRAME, _WORKERS, _SHARED = 0, 8, 16, 24, 32, 40
"""Of what threads share: which worker is next, how many are done, how many threads may still look,
the call and how many workers there are; and its size, in bytes."""


class Buffers(NamedTuple):
    """What a function takes and gives.

    Attributes:
        dtype: of numbers.
        arguments: the first says how many steps and rows there are.
        results: the last one is memory, ``("W", numbers)``: of each worker its own.
    """

    dtype: str
    arguments: Sequence[Operand]
    results: Sequence[Operand]


class Call(NamedTuple):
    """What was handed over.

    Attributes:
        steps, batch, workers: T, B and W.
        places: addresses of the buffers by name.
    """

    steps: Known
    batch: Known
    workers: Known
    places: Mapping[str, ir.Value]


def function(module: ir.Module, name: str, *kinds: ir.Type, gives: ir.Type = VOID) -> ir.Function:
    """A function of a module, for its own use."""
    made = ir.Function(module, ir.FunctionType(gives, kinds), name)
    made.linkage = "internal"
    return made


def read_call(e: Builder, frame: ir.Value, buffers: Buffers) -> Call:
    """What was handed over, which has been checked."""
    places, sizes = {}, {}
    for (_, list_), operands in _sides(buffers):
        pointers = e.field(frame, list_)
        for number, operand in enumerate(operands):
            buffer = e.field(pointers, 8 * number)
            places[operand.name] = e.field(buffer, _DATA)
            sizes[operand.name] = e.field(buffer, _DIMS)
    x, memory = buffers.arguments[0], buffers.results[-1]
    first, batch = (e.field(sizes[x.name], 8 * k, I64) for k in range(2))
    steps = e.sub(first, 1) if x.shape[0] == "T+1" else first
    return Call(steps, batch, e.field(sizes[memory.name], 0, I64), places)


def emit_entry(
    module: ir.Module, e: Builder, buffers: Buffers, work: ir.Function, end: ir.Function
) -> None:
    """A function of ``XLA_FFI_CallFrame*`` that gives an ``XLA_FFI_Error*``.

    Args:
        module: where it is.
        e: at its beginning.
        buffers: what it takes and gives.
        work: ``work(frame, worker)``, once for each worker, by any thread.
        end: ``end(frame)``, when all have done theirs.
    """
    (frame,) = e.function.args
    _answer_metadata(e, frame)
    _check(e, frame, buffers)
    workers = e.whole(read_call(e, frame, buffers).workers)
    with e.b.if_else(e.equal(workers, 1)) as (alone, together):
        with alone:
            e.b.call(work, [frame, I64(0)])
        with together:
            _share(module, e, frame, workers, work)
    e.b.call(end, [frame])
    e.b.ret(NULL)


def _sides(buffers: Buffers) -> list[tuple[tuple[int, int], Sequence[Operand]]]:
    return [(_ARGUMENTS, buffers.arguments), (_RESULTS, buffers.results)]


# --- What is checked -----------------------------------------------------------------------------


VERSION = (0, 1)
"""Of the interface: the oldest that any JAX takes; no field used here is newer."""


def emit_nothing(e: Builder, version: tuple[int, int]) -> None:
    """A function that XLA may call, and that does nothing."""
    _answer_metadata(e, e.function.args[0], version)
    e.b.ret(NULL)


def _answer_metadata(e: Builder, frame: ir.Value, version: tuple[int, int] = VERSION) -> None:
    """XLA asks each function once for the version of the interface that it was made for."""
    extension = e.field(frame, _EXTENSION)
    asked = e.b.icmp_unsigned("!=", extension, NULL)
    with e.b.if_then(asked, likely=False):
        is_metadata = e.b.icmp_signed("==", e.field(extension, 8, I32), I32(1))
        with e.b.if_then(is_metadata):
            data = e.field(extension, 24)
            major, minor = map(I32, version)
            for offset, value in ((24, major), (28, minor), (32, I32(0)), (40, I64(0))):
                e.b.store(value, e.byte(data, offset))
            e.b.ret(NULL)


def _check(e: Builder, frame: ir.Value, buffers: Buffers) -> None:
    """Return an error unless number, types and shapes are those that were agreed on."""
    over: dict[str, Known] = {}
    for (count, list_), operands in _sides(buffers):
        right = e.equal(e.field(frame, count, I64), len(operands))
        _require(e, frame, right, "another number of operands")
        pointers = e.field(frame, list_)
        for number, operand in enumerate(operands):
            buffer = e.field(pointers, 8 * number)
            kind = I32(_TYPES[operand.dtype(buffers.dtype)])
            right_kind = e.b.icmp_signed("==", e.field(buffer, _DTYPE, I32), kind)
            right_rank = e.equal(e.field(buffer, _RANK, I64), len(operand.shape))
            right = e.b.and_(right_kind, right_rank)
            _require(e, frame, right, f"{operand.name} of another type or rank")
            dims = e.field(buffer, _DIMS)
            sizes = [e.field(dims, 8 * k, I64) for k in range(len(operand.shape))]
            if not over:
                first, batch = sizes[:2]
                steps = e.sub(first, 1) if operand.shape[0] == "T+1" else first
                over = {"T": steps, "T+1": e.add(steps, 1), "B": batch}
            right = I1(1)
            for size, want in zip(sizes, operand.shape, strict=True):
                if want == "W":
                    same = e.less(0, size)
                else:
                    same = e.equal(size, over[want] if isinstance(want, str) else want)
                right = e.b.and_(right, same)
            _require(e, frame, right, f"{operand.name} of another shape")


def _require(e: Builder, frame: ir.Value, condition: ir.Value, found: str) -> None:
    text = f"lstmjax's CPU kernel was called with {found}".encode() + b"\0"
    with e.b.if_then(e.b.not_(condition), likely=False):
        kind = ir.ArrayType(I8, len(text))
        message = ir.GlobalVariable(e.module, kind, e.module.get_unique_name("message"))
        message.initializer = ir.Constant(kind, bytearray(text))
        message.global_constant, message.linkage = True, "internal"
        e.b.ret(_ask(e, frame, _CREATE_ERROR, I64(32), NULL, message, I32(_INTERNAL)))


def _ask(e: Builder, frame: ir.Value, what: int, *values: ir.Value) -> ir.Value:
    """Call one of XLA's functions with a struct of so many fields of eight bytes."""
    room = e.room(I64, len(values))
    for k, value in enumerate(values):
        e.b.store(value, e.byte(room, 8 * k))
    asked = ir.FunctionType(PTR, [PTR]).as_pointer()
    return e.b.call(e.field(e.field(frame, _API), what, asked), [room])


# --- Threads -------------------------------------------------------------------------------------


def _share(
    module: ir.Module, e: Builder, frame: ir.Value, workers: ir.Value, work: ir.Function
) -> None:
    """Let XLA's threads take one worker after the other, and this one as well.

    They may come at any time or never: whoever waits, waits only for what another is doing. So one
    that comes late still finds what they share, and its last holder gives that back.
    """
    outer = {
        "malloc": ir.FunctionType(PTR, [I64]),
        "free": ir.FunctionType(VOID, [PTR]),
        _yield(e): ir.FunctionType(I32, []),
    }
    allocate, free, give_way = (ir.Function(module, kind, name) for name, kind in outer.items())
    take = _taking(module, e, work)
    leave = _leaving(module, e, free)
    task = function(module, "task", PTR)
    inner = Builder(e.machine, e.dtype, task)
    inner.b.call(take, task.args)
    inner.b.call(leave, task.args)
    inner.b.ret_void()

    shared = e.b.call(allocate, [I64(_SHARED)])
    zero, context = I64(0), e.field(frame, _CONTEXT)
    for at, value in (
        (_NEXT, zero), (_DONE, zero), (_HOLDERS, workers), (_FRAME, frame), (_WORKERS, workers),
    ):  # fmt: skip
        e.b.store(value, e.byte(shared, at))
    with e.loop(workers, start=1):
        error = _ask(e, frame, _SCHEDULE, I64(40), NULL, context, task, shared)
        with e.when(e.b.icmp_unsigned("!=", error, NULL)):  # no threads here: this one does it all
            _ask(e, frame, _DESTROY_ERROR, I64(24), NULL, error)
            _count(e, shared, _HOLDERS, "sub")
    e.b.call(take, [shared])
    wait, done = (e.function.append_basic_block(n) for n in ("wait", "done"))
    head = e.function.append_basic_block("head")
    e.b.branch(head)
    e.b.position_at_end(head)
    count = e.b.load_atomic(e.byte(shared, _DONE), "seq_cst", 8, typ=I64)
    e.b.cbranch(e.less(count, workers), wait, done)
    e.b.position_at_end(wait)
    e.b.call(give_way, [])
    e.b.branch(head)
    e.b.position_at_end(done)
    e.b.call(leave, [shared])


def _yield(e: Builder) -> str:
    """What the system calls letting another thread run."""
    return "SwitchToThread" if "windows" in e.machine.triple else "sched_yield"


def _count(e: Builder, shared: ir.Value, at: int, how: str) -> ir.Value:
    """One more or one less; gives what it was."""
    return e.b.atomic_rmw(how, e.byte(shared, at), I64(1), "seq_cst")


def _taking(module: ir.Module, e: Builder, work: ir.Function) -> ir.Function:
    """Do the work of one worker after the other, until none is left."""
    take = function(module, "take", PTR)
    (shared,) = take.args
    e = Builder(e.machine, e.dtype, take)
    head, some, none = (take.append_basic_block(n) for n in ("head", "some", "none"))
    frame, workers = e.field(shared, _FRAME), e.field(shared, _WORKERS, I64)
    e.b.branch(head)
    e.b.position_at_end(head)
    worker = _count(e, shared, _NEXT, "add")
    e.b.cbranch(e.less(worker, workers), some, none)
    e.b.position_at_end(some)
    e.b.call(work, [frame, worker])
    _count(e, shared, _DONE, "add")
    e.b.branch(head)
    e.b.position_at_end(none)
    e.b.ret_void()
    return take


def _leaving(module: ir.Module, e: Builder, free: ir.Function) -> ir.Function:
    """Give back what is shared if nobody else will look at it."""
    leave = function(module, "leave", PTR)
    (shared,) = leave.args
    e = Builder(e.machine, e.dtype, leave)
    with e.when(e.equal(_count(e, shared, _HOLDERS, "sub"), 1)):
        e.b.call(free, [shared])
    e.b.ret_void()
    return leave
