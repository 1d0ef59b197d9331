"""Kernels as JAX sees them: an operation that vmaps, partitions, and exports as plain JAX."""

import dataclasses
import functools
import hashlib
import pathlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import llvmlite
import llvmlite.ir as ir
import numpy as np
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh
from jaxtyping import PyTree

from lstmjax.cores import usable_cores
from lstmjax.memory import keep_freed_memory
from lstmjax.recurrence.cpu.backward import emit_backward
from lstmjax.recurrence.cpu.builder import PTR, Builder
from lstmjax.recurrence.cpu.entry import VERSION, emit_nothing
from lstmjax.recurrence.cpu.forward import emit_forward
from lstmjax.recurrence.cpu.machine import Machine, compile_text, load_object
from lstmjax.recurrence.cpu.objects import keep_object, object_path, read_object
from lstmjax.recurrence.cpu.plain import plain_kernel
from lstmjax.recurrence.cpu.plan import Job, Layout, Operand
from lstmjax.recurrence.cpu.rows import row_jaxpr
from lstmjax.traced import Program, vary_alike


class Target(NamedTuple):
    """A function that XLA knows by name; its last result is memory, so many numbers a worker."""

    name: str
    memory: int


_FEWEST = 16
"""Rows of a worker: fewer are multiplied no faster."""

_LEAST = 10**7
"""Multiplications of a worker: a fifth of a millisecond."""

_LOCK = threading.Lock()
_BEGUN: dict[str, "Future[Target]"] = {}
_COMPILER = ThreadPoolExecutor(1, "lstmjax_cpu")
"""LLVM works in a thread of its own, beside what is traced meanwhile; one, as llvmlite lets no two
in."""


@functools.cache
def _keep_memory() -> None:
    """A kernel's results take tens of megabytes, which a fresh page at a time are slow to write."""
    keep_freed_memory(2**30)


@functools.cache
def _sources() -> str:
    """The modules that emit, and those that say what to emit."""
    digest = hashlib.sha256()
    here = pathlib.Path(__file__).parent
    for folder in (here, here.parents[1] / "traced"):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _told(program: Program | None) -> object:
    """A program in words, those of a single row: how many there are, a kernel does not know."""
    if program is None:
        return None
    closed = row_jaxpr(program)
    consts = [np.asarray(const) for const in closed.consts]
    told = [(a.dtype.str, a.shape, a.tobytes()) for a in consts]
    return str(closed.jaxpr), told, program.sums


def check_calls(version: tuple[int, int] = VERSION) -> None:
    """Make a function that does nothing, and ask XLA whether it would call it.

    Args:
        version: of XLA's interface.

    Raises:
        OSError, RuntimeError: memory may not be made executable, say, or the interface is another.
    """
    module, machine = ir.Module("lstmjax"), Machine.host()
    check = ir.Function(module, ir.FunctionType(PTR, [PTR]), "check")
    emit_nothing(Builder(machine, "float32", check), version)
    address = load_object(compile_text(str(module), machine), ["check"])["check"]
    _register(address, f"lstmjax_cpu_check_{address}")


def _register(address: int, name: str) -> None:
    """Tell XLA by which name to call a function."""
    jax.devices("cpu")  # else a refusal is seen only with the first program
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(address), platform="cpu")


def _compile(
    name: str, path: pathlib.Path | None, text: str, memory: int, machine: Machine
) -> Target:
    """Make a kernel of its text, and keep its object with the room that it needs."""
    code = memory.to_bytes(8, "little") + compile_text(text, machine)
    if path is not None:
        keep_object(path, code)
    return _load(name, code)


def _load(name: str, code: bytes) -> Target:
    """Make a kernel of what was kept."""
    _register(load_object(code[8:], ["kernel"])["kernel"], name)
    _keep_memory()
    return Target(name, int.from_bytes(code[:8], "little"))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One of the two kernels of a job.

    Attributes:
        job: what it is for.
        back: the backward one.
        machine: what it is compiled for.
    """

    job: Job
    back: bool
    machine: Machine

    @functools.cached_property
    def layout(self) -> Layout:
        """Of its numbers in memory."""
        return Layout(self.job, self.machine)

    @functools.cached_property
    def arguments(self) -> list[Operand]:
        """What it takes."""
        layout = self.layout
        return layout.backward_arguments() if self.back else layout.forward_arguments()

    @functools.cached_property
    def results(self) -> list[Operand]:
        """What it gives, its own memory left out."""
        layout = self.layout
        return layout.backward_results() if self.back else layout.forward_results()

    @property
    @functools.lru_cache(maxsize=256)  # noqa: B019 (of equal kernels, which a call makes anew)
    def name(self) -> str:
        """What XLA calls it by.

        The persistent cache of programs keeps its name and nothing else of it: so that names what
        is in the kernel, not the occasion on which it was made.
        """
        return f"lstmjax_cpu_{self._digest()}"

    def begin(self) -> "Future[Target]":
        """Have it read or compiled, and loaded, beside what is traced meanwhile.

        What has failed is begun again.
        """
        with _LOCK:
            begun = _BEGUN.get(self.name)
            if begun is None or (begun.done() and begun.exception()):
                begun = _BEGUN[self.name] = self._begun()
            return begun

    def _begun(self) -> "Future[Target]":
        path = object_path(self.name)
        found = None if path is None else read_object(path)
        if found is not None:
            return _COMPILER.submit(_load, self.name, found)
        return _COMPILER.submit(_compile, self.name, path, *self.emitted(), self.machine)

    @property
    def target(self) -> Target:
        """What XLA calls, compiled and loaded."""
        return self.begin().result()

    def emitted(self) -> tuple[str, int]:
        """The function, ``kernel``, in LLVM's language, and how many numbers it needs room for."""
        module = ir.Module("lstmjax")
        memory = (emit_backward if self.back else emit_forward)(module, "kernel", self.layout)
        return str(module), memory

    def _digest(self) -> str:
        """Of all that the function depends on."""
        step, layout, cell = self.job.step, self.layout, self.job.cell
        programs = (step.forward, step.backward, step.recur, step.recur_back)
        told = [
            _sources(),
            *(llvmlite.__version__, jax.__version__, self.machine),
            *(self.arguments, self.results, self.back, self.job[2:]),
            *(layout.kinds, layout.width, cell.hidden_size, cell.uses_h),
            *(len(cell.gates), len(cell.recurrent)),
            *(_told(program) for program in programs),
        ]
        return hashlib.sha256("\n".join(map(repr, told)).encode()).hexdigest()[:32]

    def __call__(self, operands: dict[str, Array]) -> dict[str, Array]:
        """Results by name, from arguments by name."""
        if self.back or self.job.saving:  # the others JAX traces also where it needs none
            self.begin()
        args = [operands[a.name] for a in self.arguments]
        outs = _mappable(self, (False,) * len(args))(*args)
        return dict(zip((a.name for a in self.results), outs, strict=True))

    def shapes(self, args: Sequence[Array | jax.ShapeDtypeStruct]) -> list[jax.ShapeDtypeStruct]:
        """Of the results."""
        steps, batch = self._sizes(args)
        dtype = self.job.dtype
        return [jax.ShapeDtypeStruct(a.sizes(steps, batch), a.dtype(dtype)) for a in self.results]

    def workers(self, args: Sequence[Array | jax.ShapeDtypeStruct]) -> int:
        """Among how many to share the rows: one for each core that no other device has, each with
        `_FEWEST` rows or more and work that is worth a thread's coming."""
        steps, batch = self._sizes(args)
        layout = self.layout
        depth = max(layout.depth(kind) for kind in layout.kinds)
        work = steps * batch * layout.numbers * depth
        cores = usable_cores() // jax.local_device_count("cpu")
        return max(1, min(cores, batch // _FEWEST, work // _LEAST))

    def _sizes(self, args: Sequence[Array | jax.ShapeDtypeStruct]) -> tuple[int, int]:
        first, batch = args[0].shape[:2]
        return first - self.back, batch


_kernel = Primitive("lstmjax_cpu_kernel")
_kernel.multiple_results = True


def _abstract(*args: jax.core.ShapedArray, kernel: Kernel) -> list[jax.core.ShapedArray]:
    def zeros(*arrays: Array) -> list[Array]:
        return [vary_alike(jnp.zeros(a.shape, a.dtype), arrays) for a in kernel.shapes(arrays)]

    return list(jax.make_jaxpr(zeros)(*args).out_avals)


def _call(*args: Array, kernel: Kernel) -> list[Array]:
    name, memory = kernel.target
    own = jax.ShapeDtypeStruct((kernel.workers(args), memory), kernel.job.dtype)
    return list(jax.ffi.ffi_call(name, [*kernel.shapes(args), own])(*args))[:-1]


def _plain(*args: Array, kernel: Kernel) -> list[Array]:
    return plain_kernel(kernel, args)


def _lower(ctx: mlir.LoweringRuleContext, *args: PyTree, kernel: Kernel) -> Sequence[PyTree]:
    exports = ctx.module_context.lowering_parameters.for_export
    return (_lower_plain if exports else _lower_call)(ctx, *args, kernel=kernel)


_lower_call = mlir.lower_fun(_call, multiple_results=True)
_lower_plain = mlir.lower_fun(_plain, multiple_results=True)  # an address means nothing elsewhere
_jitted = jax.jit(_kernel.bind, static_argnames="kernel")


@_kernel.def_impl
def _run(*args: Array, kernel: Kernel) -> list[Array]:
    with jax.disable_jit(False):
        return list(_jitted(*args, kernel=kernel))


_kernel.def_abstract_eval(_abstract)
mlir.register_lowering(_kernel, _lower, platform="cpu")
mlir.register_lowering(_kernel, _lower_plain)


# --- Spread over devices -------------------------------------------------------------------------


_Axes: TypeAlias = str | tuple[str, ...] | None
_Shardings: TypeAlias = tuple[NamedSharding, ...]
Mapped = tuple[bool, ...]
"""Which arguments have a first axis of calls; if any has, all results have it."""


@dataclasses.dataclass(frozen=True)
class _Calls:
    """Calls one after the other, whose rows, or who themselves, may be spread over devices.

    Gradients of weights are summed over rows. Whatever else is spread, over time say, is brought
    together first.
    """

    kernel: Kernel
    mapped: Mapped

    def run(self, *args: Array) -> tuple[Array, ...]:
        """All of them."""

        def one(some: list[Array | None]) -> tuple[Array, ...]:
            full = [b if a is None else a for a, b in zip(some, args, strict=True)]
            return tuple(_kernel.bind(*full, kernel=self.kernel))

        if not any(self.mapped):
            return one(list(args))
        return lax.map(one, [a if m else None for a, m in zip(args, self.mapped, strict=True)])

    def axes(self, shapes: Sequence[jax.ShapeDtypeStruct]) -> tuple[_Axes, _Axes]:
        """Along which axes of the mesh calls and rows are spread, from those of the arguments."""

        def axis(a: jax.ShapeDtypeStruct, place: int) -> _Axes:
            spec = a.sharding.spec if isinstance(a.sharding, NamedSharding) else ()
            return spec[place] if place < len(spec) else None

        calls = axis(shapes[self.mapped.index(True)], 0) if any(self.mapped) else None
        return calls, axis(shapes[0], 1 + self.mapped[0])

    def spread(self, mesh: Mesh, calls: _Axes, rows: _Axes) -> tuple[_Shardings, _Shardings]:
        """Arguments and results along such axes."""

        def sharding(operand: Operand, is_mapped: bool) -> NamedSharding:
            axes = [rows if n == "B" else None for n in operand.shape]
            return NamedSharding(mesh, PartitionSpec(*[calls] * is_mapped, *axes))

        given = tuple(map(sharding, self.kernel.arguments, self.mapped))
        return given, tuple(sharding(a, any(self.mapped)) for a in self.kernel.results)

    def partition(
        self, mesh: Mesh, shapes: Sequence[jax.ShapeDtypeStruct], results: object
    ) -> tuple[Mesh, Callable[..., tuple[Array, ...]], _Shardings, _Shardings]:
        """What each device runs, and on which part."""
        calls, rows = self.axes(shapes)

        def lower(*args: Array) -> tuple[Array, ...]:
            # JAX 0.12 would mark what is one device's as spread over a mesh that is set.
            with use_abstract_mesh(AbstractMesh((), ())):
                outs = self.run(*args)
                if rows is None:
                    return outs
                named = zip(self.kernel.results, outs, strict=True)
                return tuple(a if what.rows else lax.psum(a, rows) for what, a in named)

        given, found = self.spread(mesh, calls, rows)
        return mesh, lower, found, given

    def infer(
        self, mesh: Mesh, shapes: Sequence[jax.ShapeDtypeStruct], results: object
    ) -> _Shardings:
        """How results are spread where arguments are so."""
        return self.spread(mesh, *self.axes(shapes))[1]


@functools.lru_cache(maxsize=256)
def _partitioned(kernel: Kernel, mapped: Mapped) -> Callable[..., tuple[Array, ...]]:
    """`_Calls` as an operation that XLA may spread."""
    calls = _Calls(kernel, mapped)
    call = custom_partitioning(calls.run)
    call.def_partition(
        partition=calls.partition,
        infer_sharding_from_operands=calls.infer,
        sharding_rule=_sharding_rule(kernel, mapped),
    )
    return call


def _sharding_rule(kernel: Kernel, mapped: Mapped) -> str:
    """Calls and rows are axes of all operands that have them, every other is one of its own."""
    numbers = iter(range(10**6))

    def term(operand: Operand, is_mapped: bool) -> str:
        own = ["b" if n == "B" else f"o{next(numbers)}" for n in operand.shape]
        return " ".join(["c"] * is_mapped + own)

    given = map(term, kernel.arguments, mapped)
    found = (term(a, any(mapped)) for a in kernel.results)
    return " -> ".join(map(", ".join, (given, found)))


# --- Mapped --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _mappable(kernel: Kernel, before: Mapped) -> Callable[..., tuple[Array, ...]]:
    """The call, and under `jax.vmap` one with more rows where that is the same, else many."""
    operands, results = kernel.arguments, kernel.results
    call = jax.custom_batching.custom_vmap(lambda *args: _partitioned(kernel, before)(*args))

    @call.def_vmap
    def rule(size: int, mapped: list[bool], *args: Array) -> tuple[tuple[Array, ...], Mapped]:
        everywhere = (True,) * len(results)
        by_row = all(a.rows or not is_mapped for a, is_mapped in zip(operands, mapped, strict=True))
        if not size:
            shapes = jax.eval_shape(call, *(_one(a, m) for a, m in zip(args, mapped, strict=True)))
            return tuple(jnp.zeros((0, *a.shape), a.dtype) for a in shapes), everywhere
        if by_row and all(a.rows for a in results) and not any(before):
            merged = [
                _as_rows(arg, is_mapped, a, size) if a.rows else arg
                for arg, is_mapped, a in zip(args, mapped, operands, strict=True)
            ]
            outs = [_by_place(a, b, size) for a, b in zip(call(*merged), results, strict=True)]
            return tuple(outs), everywhere
        after = tuple(a or b for a, b in zip(mapped, before, strict=True))
        if not any(before):
            return _mappable(kernel, after)(*args), everywhere
        calls = next(a.shape[m] for a, m, b in zip(args, mapped, before, strict=True) if b)
        flat = [
            _as_calls(a, size, calls, m, b) if m or b else a
            for a, m, b in zip(args, mapped, before, strict=True)
        ]
        found = _mappable(kernel, after)(*flat)
        return tuple(a.reshape(size, calls, *a.shape[1:]) for a in found), everywhere

    return call


def _one(a: Array, mapped: bool) -> jax.ShapeDtypeStruct:
    """One of many, as a shape."""
    return jax.ShapeDtypeStruct(a.shape[mapped:], a.dtype)


def _as_calls(a: Array, size: int, calls: int, mapped: bool, before: bool) -> Array:
    """A mapped axis, the first one, and that of the calls there were, as one axis of calls."""
    shape = a.shape[mapped + before :]
    a = a.reshape(size if mapped else 1, calls if before else 1, *shape)
    return jnp.broadcast_to(a, (size, calls, *shape)).reshape(size * calls, *shape)


def _as_rows(a: Array, mapped: bool, operand: Operand, size: int) -> Array:
    """The mapped axis, the first one, as the slower part of the rows."""
    if not mapped:
        a = jnp.broadcast_to(a[None], (size, *a.shape))
    place = operand.shape.index("B")
    a = jnp.moveaxis(a, 0, place)
    return a.reshape(*a.shape[:place], size * a.shape[place + 1], *a.shape[place + 2 :])


def _by_place(a: Array, operand: Operand, size: int) -> Array:
    """And back."""
    place = operand.shape.index("B")
    rows = a.shape[place] // size
    return jnp.moveaxis(a.reshape(*a.shape[:place], size, rows, *a.shape[place + 1 :]), place, 0)
