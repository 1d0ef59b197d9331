"""How the blocks of a cluster hand tiles on, and what else Pallas has only with a barrier more.

Pallas' own way to write into another block's memory announces each tile there by an arrival, which
the assembler turns into a fence of the whole GPU. Here blocks only write. What is written carries
its number of bytes to the *signal* in the block that it is for, and each block tells its own signal
how many bytes to wait for. So nothing has to be put in order beyond a block.

A signal is an mbarrier of PTX at which each of the 128 threads arrives once in a phase. Bytes may
come before a thread arrives: until it has, the phase does not end, and the count of bytes may be
negative meanwhile. Nor is a phase overtaken: whoever writes for the next one has waited for all
bytes of the step between (of the other signal), and threads send those once they have waited here.

All of this is what threads do, one by one; the interpreter knows none of it.
"""

import types
from typing import cast

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from lstmjax.recurrence.refs import Index, Ref

THREADS = 128
"""Of a warpgroup."""

_NUMBER = plgpu.Layout.WG_SPLAT
_TILE = plgpu.RefType((plgpu.TilingTransform((64, 8)), plgpu.SwizzleTransform(128)))


def set_up(signals: Ref) -> None:
    """Make signals of memory ``(n, 2) int32``, and wait until all blocks of the cluster have."""
    for slot in range(signals.shape[0]):
        _with_signal(
            signals.at[slot],
            "{ .reg .pred first; .reg .b32 thread; mov.u32 thread, %tid.x; "
            "setp.eq.u32 first, thread, 0; "
            f"@first mbarrier.init.shared::cta.b64 [$0], {THREADS}; }}",
        )
    _ptx(
        "fence.mbarrier_init.release.cluster; "
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
    )


def send(tile: Array, target: Ref, signal: Ref, block: Index) -> None:
    """Write a tile to where ``target`` is in another block's memory, and its bytes to its signal.

    Args:
        tile: ``(TILE, rows)`` bfloat16 in registers.
        target: of the same shape, in tiles of 64 by 8, swizzled.
        signal: one of those that were set up.
        block: which of the cluster.
    """
    types_ = (plgpu.Layout.WGMMA_TRANSPOSED, _TILE, plgpu.RefType(), _NUMBER)

    @plgpu.inline_mgpu(arg_types=types_)
    def write(
        _: object,
        tile: mosaic.FragmentedArray,
        target: ir.Value,
        signal: ir.Value,
        block: mosaic.FragmentedArray,
    ) -> None:
        pointer = mosaic.utils.memref_ptr(signal)
        tile.store_tiled_async(
            target,
            cast(mosaic.BarrierRef, types.SimpleNamespace(get_ptr=lambda: pointer)),
            cluster_dim=gpu.Dimension.x,
            cluster_idx=arith.index_cast(ir.IndexType.get(), block.registers.item()),
            swizzle=128,
            tiling_rank=2,
        )

    write(tile, target, signal, jnp.int32(block))


def expect(signal: Ref, number: int) -> None:
    """Say once in a phase that ``number`` bytes are to come, and that this thread is done."""
    share, rest = divmod(number, THREADS)
    assert not rest
    _with_signal(
        signal,
        "{ .reg .b64 state; "
        f"mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 state, [$0], {share}; }}",
    )


def wait(signal: Ref, phase: Index) -> None:
    """Until phase ``phase``, counted from 0, has ended; what came is then seen by tensor cores."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _NUMBER))
    def wait(_: object, signal: ir.Value, parity: mosaic.FragmentedArray) -> None:
        _inline(
            "{ .reg .pred ended; AGAIN: "
            "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 ended, [$0], $1; "
            "@!ended bra AGAIN; } fence.proxy.async.shared::cta;",
            [mosaic.utils.memref_ptr(signal), parity.registers.item()],
        )

    wait(signal, phase & 1)


def fence() -> None:
    """Make what this thread wrote to shared memory seen by tensor cores and copies."""
    _ptx("fence.proxy.async.shared::cta;")


def wait_for_copies() -> None:
    """Until copies out of shared memory that this thread began have read it."""
    _ptx("cp.async.bulk.wait_group.read 0;")


def _ptx(text: str) -> None:
    @plgpu.inline_mgpu()
    def run(_: object) -> None:
        _inline(text, [])

    run()


def _with_signal(signal: Ref, text: str) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_: object, signal: ir.Value) -> None:
        _inline(text, [mosaic.utils.memref_ptr(signal)])

    run(signal)


def _inline(text: str, operands: list[ir.Value]) -> None:
    constraints = ",".join("r" for _ in operands)
    nothing = ir.Type.parse("!llvm.void")
    llvm.inline_asm(nothing, operands, text, constraints, has_side_effects=True)
