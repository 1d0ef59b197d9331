"""The GPU engine's kernels compiled for Hopper by the real compiler, without such a device.

Needs JAX' CUDA plug-in in the version of JAX (`lstmjax.aot.gpu` says which packages).
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lstmjax.aot import gpu
from lstmjax.cells import GRU, LSTM, PeepholeLSTM
from lstmjax.errors import UserError
from lstmjax.recurrence import PallasGPU, Workload, unroll
from lstmjax.recurrence.engine import How
from lstmjax.recurrence.gpu import engine as gpu_engine
from lstmjax.recurrence.gpu.cells import Job
from lstmjax.recurrence.step import step_of
from tests.kernel_cases import LayerNorm, Three

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


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("cell", "precision", "flags", "blocks"),
    [
        (LSTM(100), "bfloat16", False, 1),
        (GRU(20), "float32", True, 1),
        (Three(256), "bfloat16", True, 4),
    ],
    ids=lambda a: type(a).__name__ if isinstance(a, (LSTM, GRU, Three)) else str(a),
)
def test_compiles_without_spills(cell, precision, flags, blocks):
    rows = gpu.cell_rows(cell, steps=WORK.steps, precision=precision, flags=flags)
    name = type(cell).__name__
    assert [row.name for row in rows] == [f"{name}_forward", f"{name}_backward"]
    for row in rows:
        assert row.spilled == 0, row
        assert 0 < row.registers <= 255
        assert 0 < row.shared_memory <= 232_448
        assert (row.blocks, row.rows) == (blocks, 8)


@pytest.mark.usefixtures("compiler")
def test_compiles_under_vmap_and_shard_map():
    """Two sets of parameters, rows spread over a mesh that checks what varies."""
    cell, engine = PeepholeLSTM(20), PallasGPU(attached=False)
    (params, xs, *_), _ = gpu.recurrence_program(cell, WORK, engine)

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


def test_the_report_of_the_assembler_is_read():
    text = (
        "ptxas info    : Function properties for LSTM_forward_mosaic_gpu_kernel\n"
        "    0 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 188 registers, used 3 barriers\n"
    )
    assert gpu._kernels(text * 2) == [gpu.Kernel("LSTM_forward", 188, 12)] * 2
