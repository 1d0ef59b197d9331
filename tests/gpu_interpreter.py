"""Pallas' interpreter for Mosaic GPU, from where JAX keeps it: a private place."""

import contextlib
import dataclasses

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params

INTERPRET = params.InterpretGPUParams()
"""Warpgroups as threads, shared memory, barriers and copies, on a CPU."""

_OPTIONS = {field.name for field in dataclasses.fields(INTERPRET)}
RACES = dataclasses.replace(
    INTERPRET, detect_races=True, **dict.fromkeys(_OPTIONS & {"on_race"}, "warn")
)
"""The same, looking out for accesses to memory that nothing puts in order."""

AS_DEVICE = "inline_mgpu" in _OPTIONS
"""Whether it multiplies as a device does (since JAX 0.12), or is bare (`GPUPlan.bare`)."""


@contextlib.contextmanager
def all_races():
    """Yields what says whether any kernel that ran meanwhile had a race, as a set."""
    (name,) = (name for name in vars(gpu_callbacks) if name.endswith("RaceDetectionState"))
    state, found = getattr(gpu_callbacks, name), []

    def kept(*args, **kwargs):
        found.append(state(*args, **kwargs))
        return found[-1]

    setattr(gpu_callbacks, name, kept)
    try:
        yield lambda: {"race" for each in found if each.races_found}
    finally:
        setattr(gpu_callbacks, name, state)
        gpu_callbacks.reset_gpu_interpret_mode_state()  # of use where it gave up
