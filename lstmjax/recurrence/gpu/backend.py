"""Whether the JAX that is installed still has what the GPU kernels are made of."""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp

from lstmjax.errors import first_line
from lstmjax.recurrence.gpu.plan import TILE, GPUPlan, Recurrence, Tiles


@functools.cache
def backend_refusal() -> str | None:
    """Why no kernel can be made, in one clause, or None.

    Mosaic GPU promises nothing from one version of JAX to the next. So two small kernels, in a
    block and in a cluster, are brought as far as that goes without a compiler, in a fraction of a
    second. That takes a thread of its own, which knows nothing of the meshes and transformations
    that the caller may be in the middle of.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(_lower).result()
        except Exception as error:  # whatever a call that has changed may lead to
            said = f"{type(error).__name__}: {first_line(error)}"
            return f"its kernels are not made for the Mosaic GPU of JAX {jax.__version__} ({said})"
    return None


def _lower() -> None:
    from lstmjax.recurrence.gpu.kernel import recurrence_kernel

    for tiles in (1, 2):
        what = Recurrence(
            "probe",
            _probe,
            steps=1,
            batch=8,
            groups=1,
            units=tiles * TILE,
            inputs=(1,),
            flags=1,
            constants=0,
            carry=1,
            gates=1,
            shared=True,
            outputs=(1,),
            downward=False,
        )
        kernel = jax.jit(recurrence_kernel(what, GPUPlan(cluster=tiles > 1, resident=1)))
        weights = jax.ShapeDtypeStruct((1, 1, 1, what.units, what.units), jnp.bfloat16)
        shapes = ((1, 8, what.units), (1, 8), (8, what.units), (8, what.units))
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        kernel.trace(weights, *arrays).lower(lowering_platforms=("cuda",))


def _probe(
    products: Tiles, inputs: Tiles, flags: Tiles, constants: Tiles, carry: Tiles
) -> tuple[Tiles, Tiles, Tiles]:
    new = [products[0] + inputs[0] * flags[0] + carry[0]]
    return new, new, new
