"""Kernels as JAX sees them: an operation that vmaps, partitions, and exports as plain JAX."""

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import llvmlite
import llvmlite.ir as ir
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lstmjax.recurrence.cpu.backward import emit_backward
from lstmjax.recurrence.cpu.forward import emit_forward
from lstmjax.recurrence.cpu.machine import Machine, compile_text, load_object
from lstmjax.recurrence.cpu.objects import kept_object
from lstmjax.recurrence.cpu.plain import plain_kernel
from lstmjax.recurrence.cpu.plan import Job, Layout, Operand
from lstmjax.traced import vary_alike

_LOCK = threading.Lock()
_REGISTERED: set[str] = set()


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

    @functools.cached_property
    def emitted(self) -> tuple[str, int]:
        """The function, ``kernel``, in LLVM's language, and how many numbers it needs room for."""
        module = ir.Module("lstmjax")
        emit = emit_backward if self.back else emit_forward
        memory = emit(module, "kernel", self.layout)
        return str(module), memory

    @functools.cached_property
    def target(self) -> str:
        """The name under which XLA knows it, compiled and loaded.

        The persistent cache of programs keeps that name and nothing else of it: so it names what
        is in the kernel, not the occasion on which it was made.
        """
        text, _ = self.emitted
        key = f"{llvmlite.__version__} {self.machine} {text}"
        name = f"lstmjax_cpu_{hashlib.sha256(key.encode()).hexdigest()[:32]}"
        with _LOCK:
            if name not in _REGISTERED:
                code = kept_object(name, functools.partial(compile_text, text, self.machine))
                address = load_object(code, ["kernel"])["kernel"]
                jax.devices("cpu")  # else a refusal is seen only with the first program
                jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(address), platform="cpu")
                _REGISTERED.add(name)
        return name

    def __call__(self, operands: dict[str, Array]) -> dict[str, Array]:
        """Results by name, from arguments by name."""
        args = [operands[a.name] for a in self.arguments]
        outs = _mappable(self)(*args)
        return dict(zip((a.name for a in self.results), outs, strict=True))

    def shapes(self, args: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
        """Of the results."""
        first, batch = args[0].shape[:2]
        steps = first - 1 if self.back else first
        return [jax.ShapeDtypeStruct(a.sizes(steps, batch), args[0].dtype) for a in self.results]


_kernel = Primitive("lstmjax_cpu_kernel")
_kernel.multiple_results = True


def _abstract(*args: jax.core.ShapedArray, kernel: Kernel) -> list[jax.core.ShapedArray]:
    def zeros(*arrays: Array) -> list[Array]:
        return [vary_alike(jnp.zeros(a.shape, a.dtype), arrays) for a in kernel.shapes(arrays)]

    return list(jax.make_jaxpr(zeros)(*args).out_avals)


def _call(*args: Array, kernel: Kernel) -> list[Array]:
    own = jax.ShapeDtypeStruct((kernel.emitted[1],), args[0].dtype)
    return list(jax.ffi.ffi_call(kernel.target, [*kernel.shapes(args), own])(*args))[:-1]


def _plain(*args: Array, kernel: Kernel) -> list[Array]:
    return plain_kernel(kernel, args)


def _lower(ctx: Any, *args: Any, kernel: Kernel) -> Any:
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


@functools.lru_cache(maxsize=256)
def _partitioned(kernel: Kernel) -> Callable[..., tuple[Array, ...]]:
    """The call for arrays whose rows may be spread over devices; gradients of weights are summed.

    Whatever else is spread, over time say, is brought together first.
    """

    @custom_partitioning
    def call(*args: Array) -> tuple[Array, ...]:
        return tuple(_kernel.bind(*args, kernel=kernel))

    def shardings(operands: Sequence[Operand], mesh: Mesh, rows: Any) -> tuple[NamedSharding, ...]:
        return tuple(
            NamedSharding(mesh, PartitionSpec(*(rows if n == "B" else None for n in a.shape)))
            for a in operands
        )

    def rows_of(shapes: Sequence[jax.ShapeDtypeStruct]) -> Any:
        sharding = shapes[0].sharding
        spec = (*sharding.spec, None, None) if isinstance(sharding, NamedSharding) else (None, None)
        return spec[1]

    def partition(
        mesh: Mesh, shapes: Sequence[jax.ShapeDtypeStruct], results: Any
    ) -> tuple[Mesh, Callable[..., tuple[Array, ...]], Any, Any]:
        rows = rows_of(shapes)

        def lower(*args: Array) -> tuple[Array, ...]:
            outs = tuple(_kernel.bind(*args, kernel=kernel))
            if rows is None:
                return outs
            named = zip(kernel.results, outs, strict=True)
            return tuple(a if what.rows else lax.psum(a, rows) for what, a in named)

        return (
            mesh,
            lower,
            shardings(kernel.results, mesh, rows),
            shardings(kernel.arguments, mesh, rows),
        )

    def infer(
        mesh: Mesh, shapes: Sequence[jax.ShapeDtypeStruct], results: Any
    ) -> tuple[NamedSharding, ...]:
        return shardings(kernel.results, mesh, rows_of(shapes))

    call.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=_sharding_rule(kernel),
    )
    return call


def _sharding_rule(kernel: Kernel) -> str:
    """Rows are one axis in all operands, every other axis is one of its own."""
    numbers = iter(range(10**6))

    def term(operand: Operand) -> str:
        return " ".join("b" if n == "B" else f"o{next(numbers)}" for n in operand.shape)

    sides = (", ".join(map(term, side)) for side in (kernel.arguments, kernel.results))
    return " -> ".join(sides)


# --- Mapped --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _mappable(kernel: Kernel) -> Callable[..., tuple[Array, ...]]:
    """The call, and under `jax.vmap` one with more rows where that is the same, else many."""
    operands, results = kernel.arguments, kernel.results
    call = jax.custom_batching.custom_vmap(lambda *args: _partitioned(kernel)(*args))

    @call.def_vmap
    def rule(
        size: int, mapped: Sequence[bool], *args: Array
    ) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
        by_row = all(a.rows or not is_mapped for a, is_mapped in zip(operands, mapped, strict=True))
        if by_row and all(a.rows for a in results):
            merged = [
                _as_rows(arg, is_mapped, a, size) if a.rows else arg
                for arg, is_mapped, a in zip(args, mapped, operands, strict=True)
            ]
            outs = [_by_place(a, b, size) for a, b in zip(call(*merged), results, strict=True)]
            return tuple(outs), (True,) * len(outs)

        def one(some: list[Array | None]) -> tuple[Array, ...]:
            full = [b if a is None else a for a, b in zip(some, args, strict=True)]
            return call(*full)

        outs = lax.map(one, [a if m else None for a, m in zip(args, mapped, strict=True)])
        return tuple(outs), (True,) * len(outs)

    return call


def _as_rows(a: Array, mapped: bool, operand: Operand, size: int) -> Array:
    """The mapped axis, the first one, as the slower part of the rows."""
    if not mapped:
        a = jnp.broadcast_to(a[None], (size, *a.shape))
    place = operand.shape.index("B")
    a = jnp.moveaxis(a, 0, place)
    return a.reshape(*a.shape[:place], -1, *a.shape[place + 2 :])


def _by_place(a: Array, operand: Operand, size: int) -> Array:
    """And back."""
    place = operand.shape.index("B")
    return jnp.moveaxis(a.reshape(*a.shape[:place], size, -1, *a.shape[place + 1 :]), place, 0)
