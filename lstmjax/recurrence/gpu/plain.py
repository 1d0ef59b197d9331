"""What a GPU kernel computes, in plain JAX, for any device: ``PallasGPU(interpret=plain_kernel)``.

The same step, the same numbers in parts, the same padding; no blocks, barriers or copies. Pallas'
interpreter has those and takes a second a step.
"""

import functools
import itertools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from lstmjax.recurrence.gpu.cells import cut
from lstmjax.recurrence.gpu.plan import GPUPlan, Recurrence
from lstmjax.recurrence.split import split_outside

_Loop = tuple[list[Array], list[Array]]
"""Carry, and what is exchanged."""


def plain_kernel(what: Recurrence, plan: GPUPlan) -> Callable[..., list[Array]]:
    """`gpu.kernel.recurrence_kernel` as a scan over whole arrays.

    Of the plan only ``parts`` counts; the approximate functions of the hardware are not imitated.
    """
    every = itertools.product(range(plan.parts), repeat=2)
    pairs = [pair for pair in every if sum(pair) < plan.parts]  # no two small parts

    def run(weights: Array, *arrays: Array) -> list[Array]:
        sizes = len(what.inputs), what.flags, what.constants, what.carry
        inputs, flags, constants, carry, exchanged = cut(list(arrays), *sizes)
        weights = weights.astype(jnp.float32)

        def of_groups(right: Array, left: Array) -> Array:
            cut = right.reshape(-1, what.groups, what.units)
            product = jnp.einsum("bku,kvu->bkv", cut, left, precision="highest")
            return product.reshape(right.shape)

        def multiply(exchanged: list[Array]) -> list[Array]:
            parts = [
                [part.astype(jnp.float32) for part in split_outside(a, plan.parts)]
                for a in exchanged
            ]

            def product(gate: int) -> Array:
                rights = parts[0 if what.shared else gate]
                found = (of_groups(rights[k], weights[:, i, gate]) for i, k in pairs)
                return functools.reduce(jnp.add, found)

            return [*map(product, range(what.gates))]

        def step(loop: _Loop, now: tuple[list[Array], list[Array]]) -> tuple[_Loop, list[Array]]:
            carry, exchanged = loop
            tiles = [
                tile
                for a, n in zip(now[0], what.inputs, strict=True)
                for tile in jnp.split(a, n, axis=-1)
            ]
            rows = [jnp.broadcast_to(flag[:, None], carry[0].shape) for flag in now[1]]
            carry, exchanged, out = what.cell(multiply(exchanged), tiles, rows, constants, carry)
            outputs = cut(out, *what.outputs)[:-1]
            return (carry, exchanged), [jnp.concatenate(tiles, axis=-1) for tiles in outputs]

        loop = (carry, exchanged)
        loop, outs = lax.scan(step, loop, (inputs, flags), reverse=what.downward)
        carry, exchanged = loop
        return [*outs, *(what.finish(multiply(exchanged), carry) if what.finish else carry)]

    return run
