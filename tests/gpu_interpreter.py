"""Pallas' interpreter for Mosaic GPU, from where JAX keeps it: a private place."""

from jax._src.pallas.mosaic_gpu.interpret import params

INTERPRET = params.InterpretGPUParams()
"""Warpgroups as threads, shared memory, barriers and copies, on a CPU."""
