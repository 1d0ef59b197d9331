"""Which accelerator a run uses, and the mesh its batches are spread over."""

import contextlib
import os
from typing import Any, Literal

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lstmjax.errors import UserError

Accelerator = Literal["auto", "cpu", "gpu", "tpu"]

BATCH = "batch"
"""Name of the mesh axis over which the rows of a batch are spread."""

_INSTALL = {
    "auto": "unset JAX_PLATFORMS",
    "cpu": "unset JAX_PLATFORMS",
    "gpu": ".venv/bin/pip install -e '.[gpu]' on a machine with an NVIDIA GPU",
    "tpu": ".venv/bin/pip install -e '.[tpu]' on a machine with a TPU",
}


def make_mesh(accelerator: Accelerator = "auto", rows: int | None = None) -> Mesh:
    """A one-dimensional mesh over the devices of the accelerator; on CPU, one a core.

    Call it before anything else touches JAX: the number of CPU devices is fixed by then.

    Args:
        accelerator: the platform; ``"auto"`` takes the best that JAX finds.
        rows: take as many devices as divide this number of rows; all by default.

    Raises:
        UserError: no such accelerator here.
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
    count = len(found)
    while rows is not None and rows % count:
        count -= 1
    chosen = found[:count]
    return jax.make_mesh((len(chosen),), (BATCH,), devices=chosen, axis_types=(AxisType.Auto,))


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


def quick_compilation(mesh: Mesh) -> dict[str, Any]:
    """Compiler options for the programs of a training run.

    On CPU, LLVM's first level of optimization: for the recipes here half the compile time, the same
    bits and no slower code, since the large products are library calls. Nothing elsewhere.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return {}
    return {"xla_backend_optimization_level": "1"}


def _one_cpu_device_per_core() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(RuntimeError):  # JAX is already running: take the devices it has
        jax.config.update("jax_num_cpu_devices", cores or 1)


def _platforms() -> list[str]:
    names = []
    for name in ("cpu", "gpu", "tpu"):
        try:
            jax.devices(name)
        except (RuntimeError, AssertionError):
            continue
        names.append(name)
    return names or ["none"]
