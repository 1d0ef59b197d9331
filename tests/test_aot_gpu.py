"""The GPU engine's kernels compiled for Hopper by the real compiler, without such a device.

Needs JAX' CUDA plug-in in the version of JAX (`lstmjax.aot.gpu` says which packages), and the
disassembler.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from lstmjax.aot import assembly, gpu
from lstmjax.aot.programs import Shape, recurrence_program
from lstmjax.cells import GRU, LSTM, Cell, PeepholeLSTM
from lstmjax.errors import UserError
from lstmjax.layers import Bidirectional, bidirectional
from lstmjax.recurrence import PallasGPU, Workload, unroll
from lstmjax.recurrence.engine import How
from lstmjax.recurrence.gpu import engine as gpu_engine
from lstmjax.recurrence.gpu import exchange
from lstmjax.recurrence.gpu.cells import Job
from lstmjax.recurrence.step import step_of
from tests.kernel_cases import LayerNorm, Three, TwoHeads
from tests.test_emit import FUNCTIONS

SHAPE = Shape(50, 64, 32, "bfloat16")
WORK = Workload("gpu", "float32", "bfloat16", steps=50, batch=64, features=32)


@functools.cache
def missing():
    """Why nothing can be compiled for CUDA here, or None."""
    try:
        gpu.devices()
    except UserError as error:
        return str(error)
    return None


@pytest.fixture
def compiler():
    if missing():
        pytest.skip(missing())


class Many(LSTM):
    """A step of several functions."""

    names: tuple[str, ...] = ()

    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return sum(FUNCTIONS[name][0](h) for name in self.names), state


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("first", range(0, len(FUNCTIONS), 10))
def test_whatever_is_emitted_compiles(first):
    """The interpreter knows operations that the compiler does not."""
    cell = Many(8, names=(*FUNCTIONS,)[first : first + 10])
    gpu.compile_cell(cell, steps=4, batch=16, features=4)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("cell", "precision", "flags", "blocks"),
    [
        (LSTM(100), "bfloat16", False, 1),
        (GRU(20), "float32", True, 1),
        (LSTM(100), "float32", True, 2),
        (Three(256), "bfloat16", True, 4),
        (TwoHeads(256), "bfloat16", True, 1),
    ],
    ids=lambda a: type(a).__name__ if isinstance(a, Cell) else str(a),
)
def test_compiles_without_spills_and_hazards(cell, precision, flags, blocks):
    """And nobody waits in a step but for what is exchanged."""
    rows = gpu.cell_rows(cell, steps=WORK.steps, precision=precision, flags=flags)
    name = type(cell).__name__
    assert [row.name for row in rows] == [f"{name}_forward", f"{name}_backward"]
    for row in rows:
        assert row.spilled == 0, row
        assert row.hazards == ""
        assert row.barriers == 0
        assert row.fences == (1 if blocks == 1 else 2)
        assert 0 < row.registers <= 255
        assert 0 < row.shared_memory <= 232_448
        assert (row.blocks, row.rows) == (blocks, 8)


def tensors_for_flags(monkeypatch):
    copy = plgpu.copy_gmem_to_smem
    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", lambda *refs, oob_mode=None: copy(*refs))


def a_fence_of_the_whole_gpu(monkeypatch):
    fence = "fence.proxy.async.shared::cta; fence.acq_rel.gpu;"
    monkeypatch.setattr(exchange, "fence", lambda: exchange._ptx(fence))


def no_fence(monkeypatch):
    monkeypatch.setattr(exchange, "fence", lambda: None)


def no_wait_for_copies(monkeypatch):
    monkeypatch.setattr(exchange, "wait_for_copies", lambda: None)


def a_barrier(monkeypatch):
    monkeypatch.setattr(exchange, "fence", plgpu.commit_smem)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("mutate", "hidden", "seen"),
    [
        (tensors_for_flags, 21, "a tensor is copied at a multiple of 32 bytes, not of 128"),
        (a_fence_of_the_whole_gpu, 22, "1 fences of the whole GPU in the loop over time"),
        (no_fence, 23, "products read memory that no fence has shown them"),
        (no_wait_for_copies, 24, "memory that is copied from is written again without a wait"),
        (a_barrier, 25, "1 barriers"),
    ],
    ids=lambda a: getattr(a, "__name__", ""),
)
def test_what_kernels_once_were_or_might_be_is_seen(mutate, hidden, seen, monkeypatch):
    mutate(monkeypatch)
    engine = PallasGPU(attached=False)
    shapes, run = recurrence_program(LSTM(hidden), SHAPE, engine, flags=True)
    (kernel,) = gpu.compile_for_hopper(run, *shapes).kernels
    assert seen in f"{'; '.join(kernel.hazards)}; {kernel.barriers} barriers"


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("cell", [PeepholeLSTM(20), TwoHeads(384)], ids=["block", "clusters"])
def test_compiles_under_vmap_and_shard_map(cell):
    """Two sets of parameters, rows spread over a mesh that checks what varies."""
    engine = PallasGPU(attached=False)
    (params, xs, *_), _ = recurrence_program(cell, SHAPE, engine)

    def loss(params, xs):
        return jnp.sum(unroll(cell, params, xs, time_major=True, engine=engine)[0] ** 2)

    program = jax.shard_map(
        lambda params, xs: jax.vmap(lambda p: jax.grad(loss)(p, xs))(params),
        mesh=jax.sharding.Mesh(gpu.devices(), "device"),
        in_specs=(P(), P(None, "device")),
        out_specs=P(),
    )
    pair = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype), params)
    compiled = gpu.compile_for_hopper(program, pair, xs)
    assert len(compiled.kernels) == 2
    assert not any(kernel.spilled for kernel in compiled.kernels)


@pytest.mark.usefixtures("compiler")
def test_both_directions_are_one_launch(monkeypatch):
    monkeypatch.setattr(bidirectional, "platform", lambda: "gpu")
    layer = Bidirectional(LSTM(30), 4, engine=PallasGPU(attached=False), rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    x = jax.ShapeDtypeStruct((16, 5, 4), jnp.float32)

    def loss(params, x):
        return jnp.sum(nnx.merge(graph, params)(x)[0] ** 2)

    compiled = gpu.compile_for_hopper(jax.grad(loss), params, x)
    assert len(compiled.kernels) == 2


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("hidden", [64, 100], ids=["three parts", "two parts"])
@pytest.mark.parametrize("backward", [False, True])
def test_all_parts_of_the_weights_are_kept(hidden, backward):
    """With its excess precision XLA takes a number rounded to bfloat16 and back for the number."""
    cell = LSTM(hidden)
    work = WORK._replace(precision="float32")
    plans = PallasGPU(attached=False).plans(cell, work)
    job = Job(cell, step_of(cell, work), False, False, False)
    how = gpu_engine._How(job, How(), *plans)

    def weights(params):
        return gpu_engine._weights(how, params, backward=backward)

    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), WORK.features))
    text = gpu.executable_for_hopper(weights, params).as_text()
    differences = re.findall(r" subtract\((.*?), (.*?)\)", text)
    assert len(differences) >= plans[0].parts - 1
    assert not [(a, b) for a, b in differences if a == b]


@pytest.mark.usefixtures("compiler")
def test_the_whole_training_step_compiles():
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes integers and floats
        compiled = gpu.compile_train_step(LSTM(100), gpu.Shape(50, 64, 32, "float32"))
    assert compiled.temporaries > 0
    assert not any(kernel.spilled for kernel in compiled.kernels)


def test_what_does_not_run_is_refused_with_the_reason():
    with pytest.raises(UserError, match=r"cannot run LayerNorm.*its step uses reduce_sum"):
        gpu.compile_cell(LayerNorm(20))
    with pytest.raises(UserError, match="1024 units with 4 gates do not fit"):
        gpu.compile_cell(LSTM(1024))


PTX = """.version 9.0
\tmov.b64 \t%rd1, __dynamic_shmem__0;
\tmov.b64 \t%rd2, 0;
\tmov.u32 \t%r1, %tid.x;
$L__BB0_1:
\tcp.async.bulk.wait_group.read 0;
\tfence.proxy.async.shared::cta;
\t{ wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r90}, %rd91, %rd92, p, 1; }
\tmul.wide.s32 \t%rd3, %r1, 64;
\tadd.s64 \t%rd4, %rd1, %rd3;
\tadd.s64 \t%rd5, %rd1, %rd2;
\tcvt.u32.u64 \t%r3, %rd4;
\tcvt.u32.u64 \t%r4, %rd5;
\t@%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r3], [%rd9], 32, [%r9];
\t@%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [%r4+512], [%rd9, {%r2}], [%r9];
\t@%p1 cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%rd9, {%r17}], [%r4];
\tadd.s64 \t%rd2, %rd2, 128;
\t@%p2 bra \t$L__BB0_1;
\tret;
"""
REPORT = """ptxas info    : Function properties for LSTM_forward_mosaic_gpu_kernel
    0 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 188 registers, used 3 barriers
"""
SASS = """\t.target\tsm_90a
        /*0000*/                   MEMBAR.ALL.GPU ;
.L_x_1:
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x1, 0x80 ;
        /*0020*/              @!P1 BRA `(.L_x_2) ;
        /*0030*/                   FENCE.VIEW.ASYNC.S ;
        /*0040*/               @P2 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   MEMBAR.ALL.GPU ;
        /*0080*/                   BRA `(.L_x_3) ;
"""


def test_what_the_compiler_says_is_read():
    found = gpu._kernels("elsewhere\n" + 2 * (PTX + REPORT + SASS))
    assert found == [gpu.Kernel("LSTM_forward", 188, 12, (), barriers=1, fences=1)] * 2


@pytest.mark.parametrize(
    ("was", "now", "hazard"),
    [
        ("%r1, 64", "%r1, 8", "an array is copied at a multiple of 8 bytes, not of 16"),
        ("%rd2, 128", "%rd2, 96", "a tensor is copied at a multiple of 32 bytes, not of 128"),
        ("+512", "+64", "a tensor is copied at a multiple of 64 bytes, not of 128"),
        ("mul.wide", "mul.hi", "an array is copied at a multiple of 1 bytes, not of 16"),
        ("cp.async.bulk.wait_group", "nop", "is written again without a wait"),
        ("fence.proxy", "nop", "products read memory that no fence has shown them"),
        ("FENCE.VIEW", "MEMBAR.ALL.GPU ; FENCE.VIEW", "1 fences of the whole GPU"),
        ("used 3 barriers", "wgmma.mma_async instructions are serialized", "wait for one another"),
    ],
)
def test_hazards_are_named(was, now, hazard):
    ptx, report, sass = (text.replace(was, now) for text in (PTX, REPORT, SASS))
    assert assembly.hazards(PTX, SASS, REPORT) == []
    assert hazard in "; ".join(assembly.hazards(ptx, sass, report))


@pytest.mark.parametrize("wait", [False, True])
def test_registers_of_products_under_way_stay_as_they_are(wait):
    ptx = f"""
$L__BB0_1:
\tmov.b32 \t%r5, %r1;
\t{{ wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r9}}, {{%r5,%r6}}, %rd1, p, 1; }}
\t{"wgmma.wait_group.sync.aligned 0;" if wait else ""}
\t@%p1 bra \t$L__BB0_1;
"""
    found = [*assembly._rewritten(ptx)]
    assert found == [] if wait else ["1 registers of products under way are written again"]
