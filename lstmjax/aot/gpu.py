"""Compile for a Hopper GPU that this machine does not have, by the real compiler.

Needs the packages of JAX' CUDA plug-in, in the version of JAX, NVIDIA's disassembler, and nothing
else of NVIDIA's::

    pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvdisasm    (or jax-cuda13-..., both)
"""

import contextlib
import functools
import importlib.metadata
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import topologies
from jaxtyping import PyTree

from lstmjax.aot.assembly import counts, hazards
from lstmjax.aot.programs import Shape, recurrence_program, train_step_program
from lstmjax.cells.base import Cell
from lstmjax.errors import UserError, first_line
from lstmjax.precision import Precision
from lstmjax.recurrence.engine import Workload
from lstmjax.recurrence.gpu.cells import Job, backward_recurrence, forward_recurrence
from lstmjax.recurrence.gpu.engine import PallasGPU
from lstmjax.recurrence.gpu.plan import TILE, GPUPlan, shared_memory
from lstmjax.recurrence.layout import groups_of, up
from lstmjax.recurrence.step import step_of
from lstmjax.training.devices import BATCH

__all__ = [
    "CellReport",
    "Compiled",
    "Kernel",
    "compile_cell",
    "compile_for_hopper",
]

HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 80000000000
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
"""
"""An H100: what the compiler is told of the device."""


_OPTIONS: dict[str, str | bool] = {
    "xla_gpu_autotune_level": "0"
}  # tuning would run what it compiles


class Kernel(NamedTuple):
    """What the assembler says of one kernel.

    Attributes:
        name: of the kernel.
        registers: of a thread, of which there are at most 255.
        spilled: bytes that a thread moves to memory for want of registers.
        hazards: what `assembly.hazards` found, a clause each.
        barriers: of a warpgroup, in the loop over time.
        fences: between its memory and the tensor cores or copies, in the loop over time.
    """

    name: str
    registers: int
    spilled: int
    hazards: tuple[str, ...]
    barriers: int
    fences: int


class Compiled(NamedTuple):
    """Outcome of one compilation.

    Attributes:
        seconds: lowering and compiling.
        temporaries: bytes of device memory beside arguments and results.
        kernels: those of Mosaic GPU that were compiled for the first time in this process.
    """

    seconds: float
    temporaries: int
    kernels: list[Kernel]


def compile_for_hopper(f: Callable[..., PyTree], *arguments: PyTree) -> Compiled:
    """Compile ``f`` for one Hopper GPU.

    Args:
        f: the function.
        arguments: shapes (`jax.ShapeDtypeStruct`) or arrays, as pytrees.

    Raises:
        UserError: the CUDA plug-in is not installed, or the compiler refuses, with its reason.
    """
    start = time.perf_counter()
    with _printed() as printed:
        compiled = executable_for_hopper(f, *arguments)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Compiled(seconds, getattr(memory, "temp_size_in_bytes", 0), _kernels(printed()))


def executable_for_hopper(f: Callable[..., PyTree], *arguments: PyTree) -> jax.stages.Compiled:
    """What JAX has to say of a compilation: its ``as_text()`` is what the compiler made of ``f``.

    Arguments and errors as of `compile_for_hopper`.
    """
    mesh = jax.sharding.Mesh(devices(), "device")
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), arguments
    )
    lowered = jax.jit(f).lower(*shapes)
    try:
        return lowered.compile(compiler_options=_OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the compiler refuses: {first_line(error)}") from error


@functools.cache
def devices() -> list[jax.Device]:
    """The one device of the described topology.

    Raises:
        UserError: the CUDA plug-in is not installed.
    """
    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology="1x1x1", target_config=HOPPER
        ).devices
    except Exception as error:  # a RuntimeError of one kind or another, by version
        raise UserError(
            f"cannot compile for CUDA: {first_line(error)}; install jax-cuda12-plugin and "
            f"jax-cuda12-pjrt, both {jax.__version__}"
        ) from error


@contextlib.contextmanager
def _printed() -> Iterator[Callable[[], str]]:
    """What the compiler writes to standard output: programs, and the assembler's report."""
    from jax.experimental.pallas import mosaic_gpu  # noqa: F401  (sets where tools are, itself)

    wanted = dict.fromkeys(_DUMPS, "1") | {"MOSAIC_GPU_CUDA_ROOT": _tools()}
    before = {name: os.environ.get(name) for name in wanted}
    sys.stdout.flush()
    kept, text = os.dup(1), ""
    with tempfile.TemporaryFile() as file:
        os.environ.update(wanted)
        os.dup2(file.fileno(), 1)
        try:
            yield lambda: text
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            file.seek(0)
            text = file.read().decode(errors="replace")


_DUMPS = ("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_SASS")


def _tools() -> str:
    """The folder whose ``bin`` holds NVIDIA's disassembler.

    Raises:
        UserError: it is not installed.
    """
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError("no disassembler for CUDA; install nvidia-cuda-nvdisasm") from None
    return str(next(pathlib.Path(f.locate()) for f in files if f.name == "nvdisasm").parents[1])


_KERNEL = re.compile(
    r"(?P<ptx>^\.version.*?)"
    r"(?P<report>^ptxas info.*?Function properties for (?P<name>\S+?)(?:_mosaic_gpu_kernel)?\n"
    r".*?(?P<spilled>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers.*?)"
    r"(?P<sass>^\s*\.target.*?)(?=^\.version|\Z)",
    re.DOTALL | re.MULTILINE,
)


def _kernels(text: str) -> list[Kernel]:
    """All of which there are the program, the report and what was made of it, in this order."""
    found = []
    for kernel in _KERNEL.finditer(text):
        faults = hazards(kernel["ptx"], kernel["sass"], kernel["report"])
        loop = counts(kernel["sass"], "BAR.SYNC", "FENCE.VIEW.ASYNC")
        figures = int(kernel["registers"]), int(kernel["spilled"])
        found.append(Kernel(kernel["name"], *figures, tuple(faults), *loop.values()))
    return found


class CellReport(NamedTuple):
    """How a cell compiles for Hopper.

    Attributes:
        forward: its compilation.
        gradient: that of values and gradients.
        plans: layouts of the two kernels.
        shared_memory: bytes of a block, of each.
    """

    forward: Compiled
    gradient: Compiled
    plans: tuple[GPUPlan, GPUPlan]
    shared_memory: tuple[int, int]


@functools.cache
def compile_cell(
    cell: Cell,
    *,
    steps: int = 500,
    batch: int = 64,
    features: int = 32,
    precision: Precision = "bfloat16",
    flags: bool = False,
    engine: PallasGPU | None = None,
) -> CellReport:
    """Compile a cell's recurrence for Hopper, forward, and forward with its gradient.

    Results are kept, as the assembler reports on a kernel once in a process.

    Args:
        cell: the cell.
        steps: T.
        batch: B.
        features: size of an input.
        precision: of the products.
        flags: with a mask and resets.
        engine: with settings of its own; by default that of the shape.

    Raises:
        UserError: the engine refuses the cell, with the reason, or the CUDA plug-in is missing.
    """
    engine = engine or PallasGPU(attached=False)
    work = Workload("gpu", "float32", precision, steps, batch, features)
    refusal = engine.refusal(cell, work)
    if refusal is not None:
        raise UserError(f"engine {engine.name} cannot run {cell}: {refusal}")
    shape = Shape(steps, batch, features, precision)
    shapes, run = recurrence_program(cell, shape, engine, flags=flags)
    plans = engine.plans(cell, work)
    assert plans is not None
    job = Job(cell, step_of(cell, work), flags, flags, reverse=False)
    sizes = (
        shared_memory(forward_recurrence(job, steps, batch), plans[0]),
        shared_memory(backward_recurrence(job, steps, batch), plans[1]),
    )
    there, back = compile_for_hopper(run, *shapes), compile_for_hopper(_gradient(run), *shapes)
    return CellReport(there, back, plans, sizes)


def _gradient(run: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The gradient of a function of all outputs with respect to the first four arguments."""

    def total(*arguments: PyTree) -> Array:
        sums = [jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(run(*arguments))]
        return functools.reduce(jnp.add, sums)

    return jax.grad(total, (0, 1, 2, 3))


def compile_train_step(cell: Cell, shape: Shape) -> Compiled:
    """Compile the training step of the IMDB notebook's model around a cell for one Hopper GPU.

    Args:
        cell: the cell.
        shape: of the batch.

    Raises:
        UserError: as `compile_cell`.
    """
    engine = PallasGPU(attached=False)
    work = Workload("gpu", "float32", shape.precision, *shape[:3])
    refusal = engine.refusal(cell, work)
    if refusal is not None:
        raise UserError(f"engine {engine.name} cannot run {cell}: {refusal}")
    mesh = jax.sharding.Mesh(devices(), BATCH)
    program, arguments = train_step_program(cell, shape, engine, mesh)
    return compile_for_hopper(program, *arguments)


class Row(NamedTuple):
    """What there is to say of one kernel.

    Attributes:
        name: of the kernel.
        seconds: to compile the program that it was compiled in.
        temporaries: bytes of device memory of that program, beside arguments and results.
        shared_memory: bytes of a block.
        registers: of a thread.
        spilled: bytes that a thread moves to memory for want of registers.
        blocks: in a cluster; 1 where no block waits for another.
        rows: of the batch in a block.
        barriers, fences: as of `Kernel`.
        hazards: as of `Kernel`, in one line.
    """

    name: str
    seconds: float
    temporaries: int
    shared_memory: int
    registers: int
    spilled: int
    blocks: int
    rows: int
    barriers: int
    fences: int
    hazards: str


class _Options(TypedDict, total=False):
    """Of `compile_cell`."""

    steps: int
    batch: int
    features: int
    precision: Precision
    flags: bool
    engine: PallasGPU | None


def cell_rows(cell: Cell, **options: Unpack[_Options]) -> list[Row]:
    """A row for the forward kernel and one for the backward kernel of a cell.

    Args:
        cell: the cell.
        options: of `compile_cell`.

    Raises:
        UserError: as `compile_cell`.
    """
    report = compile_cell(cell, **options)
    rows = []
    for k, compiled in enumerate((report.forward, report.gradient)):
        if not compiled.kernels:
            raise UserError(
                f"{cell} has the kernels of a cell compiled before, on which the assembler does "
                "not report again: compile it in a process of its own"
            )
        plan, kernel = report.plans[k], compiled.kernels[-1]
        figures = report.shared_memory[k], kernel.registers, kernel.spilled
        width = cell.hidden_size // groups_of(cell, TILE)
        blocks = up(width, TILE) // TILE if plan.cluster else 1
        sizes = compiled.seconds, compiled.temporaries
        loop = kernel.barriers, kernel.fences
        text = "; ".join(kernel.hazards)
        rows.append(Row(kernel.name, *sizes, *figures, blocks, plan.rows, *loop, text))
    return rows
