"""Which accelerator a run uses, and the mesh its batches are spread over."""

import contextlib
import os
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import PyTree

from lstmjax.cores import usable_cores
from lstmjax.data import Batches, Source
from lstmjax.errors import UserError

Accelerator = Literal["auto", "cpu", "gpu", "tpu"]
"""What a run is asked to use; auto is the best there is."""

AnySource = TypeVar("AnySource", bound=Source)

BATCH = "batch"
"""Name of the mesh axis over which the rows of a batch are spread."""

_INSTALL = {
    "auto": "unset JAX_PLATFORMS",
    "cpu": "unset JAX_PLATFORMS",
    "gpu": "pip install 'lstmjax[gpu]' on a machine with an NVIDIA GPU",
    "tpu": "pip install 'lstmjax[tpu]' on a machine with a TPU",
}


def on_cpu(mesh: Mesh) -> bool:
    """Whether the devices are a CPU's."""
    return next(iter(mesh.devices.flat)).platform == "cpu"


def padded_for(mesh: Mesh, source: AnySource) -> AnySource:
    """The batches, all of one shape where that takes less time: on a GPU or TPU.

    There a fused kernel needs some microseconds for a step of padding, and its compiler many
    seconds for another length. What is learned is the same, up to rounding.
    """
    if on_cpu(mesh) or not isinstance(source, Batches):
        return source
    return cast(AnySource, source.in_one_shape())


def require_room(parameters: int, mesh: Mesh) -> None:
    """Raise `UserError` unless a device could hold so many parameters while Adam trains them.

    That is four times their size: themselves, a gradient, two moments.
    """
    if on_cpu(mesh):
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        room = (next(iter(mesh.devices.flat)).memory_stats() or {}).get("bytes_limit", 2**63)
    needed = 4 * 4 * parameters
    if needed > room:
        raise UserError(
            f"{parameters:,} parameters need {needed / 2**30:,.0f} GiB to be trained, "
            f"{room / 2**30:,.0f} are there: lower --hidden-size, --embedding-size or what else "
            "sets the model's size"
        )


def make_mesh(
    accelerator: Accelerator = "auto", rows: int | None = None, replicas: int = 1
) -> Mesh:
    """A one-dimensional mesh over the devices of the accelerator; on CPU, one a core.

    Call it before anything else touches JAX: the number of CPU devices is fixed by then.

    Args:
        accelerator: the platform; ``"auto"`` takes the best that JAX finds.
        rows: take as many devices as divide this number of rows; all by default.
        replicas: or this number of models trained side by side.

    Raises:
        UserError: no such accelerator here, or rows that the processes cannot share.
    """
    if accelerator in ("auto", "cpu"):
        _one_cpu_device_per_core()
    if accelerator == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # leave an accelerator to other processes
    try:
        found = jax.devices(None if accelerator == "auto" else accelerator)
    except (RuntimeError, AssertionError) as error:
        what = "device" if accelerator == "auto" else accelerator
        raise UserError(
            f"no {what} here; this JAX finds: {', '.join(_platforms())}. "
            f"Choose one of them with --accelerator, or get {what}: {_INSTALL[accelerator]}"
        ) from error
    chosen = _dividing(found, rows, replicas)
    if chosen[0].platform != jax.default_backend():  # engines are chosen for the default device
        jax.config.update("jax_default_device", local_device(chosen))
    return jax.make_mesh((len(chosen),), (BATCH,), devices=chosen, axis_types=(AxisType.Auto,))


def _dividing(found: Sequence[jax.Device], rows: int | None, replicas: int) -> list[jax.Device]:
    """As many of the devices as divide rows or replicas, the same number of each process."""
    by_process: dict[int, list[jax.Device]] = {}
    for device in found:
        by_process.setdefault(device.process_index, []).append(device)
    several, each = len(by_process), min(map(len, by_process.values()))
    if rows is not None and rows % several:
        raise UserError(
            f"--batch-size {rows} is not a multiple of the {several} processes: choose one"
        )
    while rows is not None and rows % (several * each) and replicas % (several * each):
        each -= 1
    return [device for process in sorted(by_process) for device in by_process[process][:each]]


def local_device(devices: Iterable[jax.Device]) -> jax.Device:
    """The first of the devices that this process has."""
    return next(device for device in devices if device.process_index == jax.process_index())


def place(tree: PyTree, sharding: Sharding) -> PyTree:
    """Host arrays on the devices: this process's rows of them, or the whole if it is replicated."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree
    )


def sharded(mesh: Mesh) -> NamedSharding:
    """Rows spread over the mesh."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def accelerator_name(mesh: Mesh) -> str:
    """Platform and kind of the mesh's devices, ``"cpu (cpu)"`` or ``"gpu (NVIDIA H200)"``."""
    device = mesh.devices.flat[0]
    return f"{device.platform} ({device.device_kind})"


def quick_compilation(mesh: Mesh) -> dict[str, str]:
    """Compiler options for the programs of a training run.

    On CPU, LLVM's first level of optimization: for the recipes here half the compile time, the same
    bits and no slower code, since the large products are library calls. Nothing elsewhere, nor
    where ``XLA_FLAGS`` name a level.
    """
    level = "xla_backend_optimization_level"
    if not on_cpu(mesh) or level in os.environ.get("XLA_FLAGS", ""):
        return {}
    return {level: "1"}


def simple_kernels() -> None:
    """Let XLA's CPU compiler make simpler kernels, in this process, from its first program on.

    That halves the time that compiling takes and costs a step about a tenth: good for a program
    that runs for less time than it takes to compile. JAX has no compiler option for it, only the
    environment; a choice that is there already stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_extra_options" not in flags:
        simple = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
        os.environ["XLA_FLAGS"] = f"{flags} {simple}".strip()


def _one_cpu_device_per_core() -> None:
    if os.environ.get("JAX_NUM_CPU_DEVICES"):
        return  # that many
    with contextlib.suppress(RuntimeError):  # JAX is already running: take the devices it has
        jax.config.update("jax_num_cpu_devices", usable_cores())


def _platforms() -> list[str]:
    names = []
    for name in ("cpu", "gpu", "tpu"):
        try:
            jax.devices(name)
        except (RuntimeError, AssertionError):
            continue
        names.append(name)
    return names or ["none"]
