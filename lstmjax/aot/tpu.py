"""Compile for TPUs that this machine does not have, by their real compiler, `libtpu`.

It reads its settings when it starts: run what is here in a process with `environment`.
"""

import importlib.util
import os
import pathlib
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import PyTree

from lstmjax.aot.bundles import Loop, loops_over, read_dump, read_vmem
from lstmjax.aot.programs import Shape, on_mesh, recurrence_program, train_step_program
from lstmjax.cells.base import Cell
from lstmjax.errors import UserError, first_line
from lstmjax.recurrence import PallasTPU, Scan, Workload
from lstmjax.recurrence.engine import Engine
from lstmjax.recurrence.tpu.plan import tpu_device
from lstmjax.training.devices import BATCH

__all__ = [
    "Compiled",
    "Target",
    "compile_cell",
]

Target = Literal["v4", "v5e", "v5p", "v6e", "tpu7x"]
"""Generations of TPUs that can be compiled for."""

_SLICES: dict[Target, tuple[str, dict[str, str]]] = {
    "v4": ("v4:2x2x1", {"chip_config_name": "megacore"}),
    "v5e": ("v5e:2x2", {}),
    "v5p": ("v5p:2x2x1", {"chip_config_name": "megacore"}),
    "v6e": ("v6e:2x2", {}),
    "tpu7x": ("tpu7x:2x2x1", {}),
}
_DUMP = "LSTMJAX_COMPILER_DUMP"
ENGINES: dict[str, Engine] = {"pallas_tpu": PallasTPU(), "plain scan": Scan(recompute=False)}
"""What is compiled, one beside the other."""


class Compiled(NamedTuple):
    """Outcome of one compilation; figures are those of one device.

    Attributes:
        program: what was compiled.
        engine: the engine that ran the cell.
        seconds: tracing, lowering and compiling.
        interface: bytes of arguments and results, as they lie in memory.
        temporaries: bytes of memory (HBM) beside arguments and results.
        in_vmem: bytes of further temporaries, that the compiler keeps in VMEM throughout.
        vmem: bytes of VMEM of the largest kernel; None without one.
        bundles: static bundles a time step; None where they could not be counted.
    """

    program: str
    engine: str
    seconds: float
    interface: int
    temporaries: int
    in_vmem: int | None
    vmem: int | None
    bundles: float | None


def environment(dump: pathlib.Path | str) -> dict[str, str]:
    """Variables of a process that compiles for TPUs without having one.

    Args:
        dump: a folder of its own, for what the compiler tells of a program.
    """
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
        _DUMP: str(dump),
    }


def dump_folder() -> pathlib.Path | None:
    """The folder of this process's `environment`, which is emptied after every program."""
    named = os.environ.get(_DUMP)
    return pathlib.Path(named) if named else None


def described_mesh(target: Target, devices: int) -> Mesh:
    """A mesh over TPUs that need not be there, of at most four chips.

    Raises:
        UserError: libtpu is not installed, or does not know the target.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for a TPU needs the package libtpu: "
            "pip install 'lstmjax[aot]', or jax[tpu] in the version of jax"
        )
    name, settings = _SLICES[target]
    try:
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=name, **settings)
    except Exception as error:  # of one kind or another, by version
        raise UserError(f"libtpu knows no {name}: {first_line(error)}") from error
    return jax.make_mesh(
        (devices,), (BATCH,), devices=slice_.devices[:devices], axis_types=(AxisType.Auto,)
    )


# --- Programs ------------------------------------------------------------------------------------


def cell_programs(
    cell: Cell, shape: Shape, engine: Engine, mesh: Mesh, masked: bool = False
) -> dict[str, tuple[Callable[..., PyTree], tuple[PyTree, ...]]]:
    """A cell over time, forward, and forward with all gradients: functions and their arguments.

    The rows are spread over the mesh; gradients of parameters are summed over it. ``masked``: with
    a mask and resets.
    """
    given, forward = recurrence_program(cell, shape, engine, flags=masked)

    def gradients(*given: PyTree) -> tuple[PyTree, ...]:
        *moving, mask, resets, d_out = given
        run = lambda *moving: forward(*moving, mask, resets)  # noqa: E731
        d_params, *d_others = jax.vjp(run, *moving)[1](d_out)
        return jax.lax.psum(d_params, BATCH), *d_others

    whole, rows, time_major = PartitionSpec(), PartitionSpec(BATCH), PartitionSpec(None, BATCH)
    moving, outs = (whole, time_major, rows, time_major), (time_major, rows)
    ins = (*moving, time_major, time_major)
    with jax.set_mesh(mesh):  # which says that this is for a TPU
        out = jax.eval_shape(forward, *given)

    def placed(specs: tuple[PartitionSpec, ...], values: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        return tuple(on_mesh(mesh, v, s) for v, s in zip(values, specs, strict=True))

    def spread(
        f: Callable[..., PyTree], in_specs: PyTree, out_specs: PyTree
    ) -> Callable[..., PyTree]:
        return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    args = placed(ins, given)
    return {
        "forward": (spread(forward, ins, outs), args),
        "forward+backward": (
            spread(gradients, (*ins, outs), moving),
            (*args, placed(outs, out)),
        ),
    }


def with_free_layouts(
    f: Callable[..., PyTree], args: tuple[PyTree, ...]
) -> tuple[Callable[..., PyTree], tuple[PyTree, ...]]:
    """``f`` and the shapes of its arguments, how they lie in memory being left to the compiler.

    So they lie inside a larger program. Between a program and its caller JAX lays arrays out in the
    one way that pads least, and the compiler has to copy what it wants otherwise.
    """
    formats = jax.tree.map(lambda a: Format(Layout.AUTO, a.sharding), args)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    return jax.jit(f, in_shardings=formats, out_shardings=Format(Layout.AUTO)), shapes


# --- Compiling -----------------------------------------------------------------------------------


def compile_program(
    program: str,
    engine: str,
    f: Callable[..., PyTree],
    args: tuple[PyTree, ...],
    cell: Cell,
    shape: Shape,
    mesh: Mesh,
) -> Compiled:
    """Compile ``f`` for the devices of ``mesh`` and count what came of it.

    Args:
        program: its name in the result.
        engine: which of `ENGINES` runs the cell in it.
        f: a function, or one that is under `jax.jit` already.
        args: shapes with their shardings.
        cell: that it runs.
        shape: on what.
        mesh: what `described_mesh` returned.

    Raises:
        UserError: the compiler refuses, with its reason.
    """
    jitted = f if hasattr(f, "trace") else jax.jit(f)
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = jitted.trace(*args).lower(lowering_platforms=("tpu",)).compile()
    except Exception as error:  # of one kind or another, by version
        raise UserError(f"{program} by {engine}: {first_line(error)}") from error
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    interface = memory.argument_size_in_bytes + memory.output_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    in_vmem = vmem = bundles = None
    if folder := dump_folder():
        programs, used = read_dump(folder), read_vmem(folder)
        in_vmem = sum(by_use.get("HLO_TEMPORARY", 0) for by_use in used.values())
        if engine == "pallas_tpu":
            bundles = _kernel_bundles(programs, cell, shape, mesh)
            vmem = max((sum(v.values()) for k, v in used.items() if _is_kernel(k)), default=None)
        else:
            bundles = _loop_bundles(programs, compiled.as_text(), shape.steps)
        for path in folder.iterdir():  # the next program writes there, too
            path.unlink()
    sizes = (interface, temporaries, in_vmem, vmem)
    return Compiled(program, engine, seconds, *sizes, bundles)


def _is_kernel(name: str) -> bool:
    return "forward_kernel_" in name or "backward_kernel_" in name  # JAX adds jvp_, transpose_


def _kernel_bundles(
    programs: dict[str, Loop], cell: Cell, shape: Shape, mesh: Mesh
) -> float | None:
    """Bundles a time step of all kernels: of their passes over the grid, prologue left out."""
    with jax.set_mesh(mesh):
        batch = shape.batch // mesh.size
        work = Workload("tpu", "float32", shape.precision, shape.steps, batch, shape.features)
        plan = PallasTPU().plan(cell, work)
        _, cores = tpu_device()
    blocks, chunks = -(-batch // plan.rows), -(-shape.steps // plan.chunk)
    kernels = [program for name, program in programs.items() if _is_kernel(name)]
    if blocks * chunks > 1:  # else there is no loop over the grid
        if not all(kernel.inner for kernel in kernels):
            return None
        kernels = [max(kernel.inner, key=Loop.a_pass) for kernel in kernels]
    passes = -(-blocks // cores) * chunks
    return sum(kernel.a_pass() for kernel in kernels) * passes / shape.steps or None


def _loop_bundles(programs: dict[str, Loop], hlo: str, steps: int) -> float | None:
    """Bundles a time step of the loops over time that XLA made."""
    names = [name for body in loops_over(hlo, steps) for name in body if name in programs]
    return sum(programs[name].a_pass() for name in names) or None


def compile_cell(
    cell: Cell,
    shape: Shape,
    target: Target,
    devices: int = 1,
    train_step: bool = False,
    free_layouts: bool = False,
    masked: bool = False,
) -> list[Compiled]:
    """Compile a cell for a TPU with its kernels, and with the plain scan beside them.

    Args:
        cell: the cell.
        shape: on what it runs; B is that of all devices.
        target: generation of the TPU.
        devices: chips that share the rows, up to 4.
        train_step: the whole training step of a classifier around the cell, too.
        free_layouts: of the cell's arguments and results; see `with_free_layouts`.
        masked: the cell with a mask and resets.

    Raises:
        UserError: the kernels do not run this cell, or the compiler refuses; with the reason.
    """
    if shape.batch % devices:
        raise UserError(f"{shape.batch} rows cannot be spread over {devices} devices alike")
    mesh = described_mesh(target, devices)
    steps, batch, features, precision = shape
    with jax.set_mesh(mesh):
        work = Workload("tpu", "float32", precision, steps, batch // devices, features)
        refusal = PallasTPU().refusal(cell, work)
    if refusal is not None:
        raise UserError(f"no kernel for {cell} on {target}: {refusal}; the derived engine runs it")
    results = []
    for name, engine in ENGINES.items():
        programs = cell_programs(cell, shape, engine, mesh, masked)
        if free_layouts:
            programs = {k: with_free_layouts(*program) for k, program in programs.items()}
        if train_step:
            programs["train step"] = train_step_program(cell, shape, engine, mesh)
        for program, (f, args) in programs.items():
            results.append(compile_program(program, name, f, args, cell, shape, mesh))
    return results
