"""The TPU engine on a CPU: its kernels in Pallas' interpreter, against the plain scan in float64.

The interpreter knows neither the sizes of a TPU's tiles nor its memory: those only compiling shows
(`test_aot.py`).
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lstmjax.cells import GRU, LSTM, SLSTM, Cell, PeepholeLSTM
from lstmjax.recurrence import CPU, Derived, PallasTPU, Workload, choose_engine, unroll
from lstmjax.recurrence.layout import grouped
from tests.kernel_cases import (
    Case,
    LayerNorm,
    Narrow,
    Projected,
    Ratio,
    Rebound,
    Three,
    TwoHeads,
    TwoHeadsApart,
    compare,
    compare_final_gradients,
    compare_second_derivatives,
    compare_vmapped,
    draw,
    expected,
    values_and_gradients,
)
from tests.tolerances import assert_close

ENGINE = PallasTPU(chunk=3, unroll=1, interpret=True)
BOTH = ("mask", "resets")

# Four steps are no multiple of the chunk, three rows none of a block, five units none of the lanes.
CASES = {
    "LSTM, three chunks": Case(LSTM(5), steps=7),
    "LSTM, flags, bfloat16": Case(LSTM(5), precision="bfloat16", flags=BOTH),
    "LSTM, mask, reverse": Case(LSTM(5), flags=("mask",), reverse=True),
    "LSTM, two groups of lanes, wide inputs": Case(LSTM(130), steps=3, features=130),
    "LSTM, whole lanes": Case(LSTM(128), steps=3, precision="bfloat16", flags=("resets",)),
    "LSTM, two blocks of rows, unrolled": Case(LSTM(5), batch=20, flags=BOTH),
    "LSTM, one step of one row, default sizes": Case(LSTM(5), batch=1, steps=1),
    "GRU, flags, reverse": Case(GRU(6), flags=BOTH, reverse=True),
    "GRU, bfloat16, default sizes": Case(GRU(70), steps=2, precision="bfloat16"),
    "PeepholeLSTM, flags": Case(PeepholeLSTM(5), flags=BOTH),
    "PeepholeLSTM, bfloat16, reverse": Case(PeepholeLSTM(5), precision="bfloat16", reverse=True),
    "Three, flags, reverse": Case(Three(6), flags=BOTH, reverse=True),
    "Three, bfloat16, a start of its own": Case(
        Three(6), precision="bfloat16", flags=("resets",), initial=False
    ),
    "Ratio, resets, rows of padding": Case(Ratio(6), flags=("resets",)),
    "LayerNorm, flags": Case(LayerNorm(6), flags=BOTH),
    "LayerNorm, bfloat16, reverse": Case(LayerNorm(6), precision="bfloat16", reverse=True),
    "sLSTM of two heads": Case(SLSTM(6, heads=2), flags=("resets",), initial=False),
    "heads": Case(TwoHeads(6)),
    "heads, two in a group, the last one alone": Case(SLSTM(192, heads=3), reverse=True),
    "heads, parts apart, bfloat16": Case(TwoHeadsApart(6), precision="bfloat16"),
    "heads of whole lanes, flags": Case(SLSTM(256, heads=2), flags=BOTH),
    "heads of whole lanes, parts apart, bfloat16": Case(TwoHeadsApart(256), precision="bfloat16"),
}
SETTINGS = {
    "LSTM, two blocks of rows, unrolled": PallasTPU(rows=16, chunk=2, interpret=True),
    "LSTM, one step of one row, default sizes": PallasTPU(interpret=True),
    "GRU, bfloat16, default sizes": PallasTPU(interpret=True),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
def test_values_and_all_gradients(name):
    case, engine = CASES[name], SETTINGS.get(name, ENGINE)
    args, options = draw(case)
    got = jax.jit(lambda *a: values_and_gradients(engine, case.cell, *a, **options))(*args)
    compare(case, got, expected(case, args, options))


@pytest.mark.parametrize(("batch", "steps"), [(0, 4), (3, 0)], ids=["no rows", "no steps"])
def test_an_empty_batch_or_sequence(batch, steps):
    case = Case(LSTM(5), batch=batch, steps=steps)
    args, options = draw(case)
    (hs, final), (d_params, _, d_initial) = values_and_gradients(
        ENGINE, case.cell, *args, **options
    )
    assert hs.shape == (batch, steps, 5)
    jax.tree.map(np.testing.assert_array_equal, (final, d_initial), (args[2], args[4]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(d_params))


def test_garbage_in_the_padding_has_no_influence():
    case = Case(LSTM(5), flags=("lengths",))
    (params, x, *rest), options = draw(case)
    padded = jnp.arange(case.steps)[None] >= options["lengths"][:, None]
    garbage = jnp.where(padded[..., None], jnp.nan, x)
    args = (params, garbage, *rest)
    got = jax.jit(lambda *a: values_and_gradients(ENGINE, case.cell, *a, **options))(*args)
    compare(case, got, expected(case, (params, x, *rest), options))


# --- Only what is asked for ----------------------------------------------------------------------


def test_gradients_of_the_parameters_alone_from_the_final_carry_alone():
    compare_final_gradients(ENGINE)


# --- Under the transformations of JAX ------------------------------------------------------------


def test_vmap_over_parameters_is_the_loop():
    compare_vmapped(ENGINE)


def test_under_shard_map():
    """Rows over two devices, parameters on both.

    The interpreter cannot do it with ``check_vma=True``; a compiled kernel can (`test_aot.py`).
    """
    case = Case(PeepholeLSTM(5), batch=4, flags=BOTH)
    (params, x, initial, d_hs, d_final), options = draw(case)
    mask, resets = options["mask"], options["resets"]
    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))

    def local(params, x, initial, d_hs, d_final, mask, resets):
        values, (d_params, d_x, d_initial) = values_and_gradients(
            ENGINE, case.cell, params, x, initial, d_hs, d_final, mask=mask, resets=resets
        )
        return values, (jax.lax.psum(d_params, "rows"), d_x, d_initial)

    rows = P("rows")
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), rows, rows, rows, rows, rows, rows),
        out_specs=(rows, (P(), rows, rows)),
        check_vma=False,
    )
    got = jax.jit(run)(params, x, initial, d_hs, d_final, mask, resets)
    compare(case, got, expected(case, (params, x, initial, d_hs, d_final), options))


@pytest.mark.slow
def test_second_derivatives_are_those_of_the_scan():
    compare_second_derivatives(ENGINE)


def test_forward_mode_is_that_of_the_scan():
    case = Case(LSTM(5))
    (params, x, *_), _ = draw(case)

    def run(engine):
        hs = lambda x: unroll(case.cell, params, x, engine=engine)[0]  # noqa: E731
        return jax.jvp(hs, (x,), (x,))

    for got, wanted in zip(run(ENGINE), run("scan"), strict=True):
        assert_close(got, wanted, reduction=100)


# --- Choice, refusals, sizes ---------------------------------------------------------------------

WORK = Workload("tpu", "float32", "float32", steps=500, batch=64, features=32)


class Special(LSTM):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return jax.lax.digamma(h), state


@pytest.mark.parametrize(
    ("cell", "change", "reason"),
    [
        (LSTM(100), {"platform": "cpu"}, "it needs a TPU, this is a cpu"),
        (LSTM(100), {"dtype": "float64"}, "a TPU computes in float32, the inputs are float64"),
        (Projected(100), {}, "Projected overrides transition"),
        (Rebound(100), {}, "Rebound overrides apply_step"),
        (Narrow(100), {}, "Narrow carries a (B, 1) float32, not (B, H) float32"),
        (Special(100), {}, "its step uses digamma, which a TPU kernel does not have"),
        (LSTM(2048), {}, "MiB of VMEM, this TPU has 16"),
    ],
    ids=lambda a: type(a).__name__ if isinstance(a, Cell) else None,
)
def test_refusals_name_the_reason(cell, change, reason):
    with pytest.raises(ValueError, match="engine 'pallas_tpu' cannot run") as caught:
        choose_engine(cell, WORK._replace(**change), "pallas_tpu")
    assert reason in str(caught.value)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("cell", [LSTM, PeepholeLSTM, GRU, Three, LayerNorm, TwoHeads])
def test_it_is_the_first_choice_on_a_tpu(cell, precision):
    work = WORK._replace(precision=precision)
    assert choose_engine(cell(100), work) == (PallasTPU(), "the first choice")


def test_what_it_refuses_the_next_engine_runs():
    chosen, reason = choose_engine(Special(100), WORK)
    assert chosen == Derived()
    assert reason == "no pallas_tpu: its step uses digamma, which a TPU kernel does not have"
    assert choose_engine(LSTM(100), WORK._replace(platform="cpu")) == (CPU(), "the first choice")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"unroll": -1}, "unroll must be at least 1, got -1"),
        ({"rows": 12}, "rows must be a multiple of 16, got 12"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        PallasTPU(**settings)


@pytest.mark.parametrize("hidden", [1, 20, 100, 128, 200])
@pytest.mark.parametrize("batch", [1, 17, 64, 256, 1000])
@pytest.mark.parametrize("steps", [1, 7, 97, 500])
def test_sizes_fit_and_divide(steps, batch, hidden):
    plan = PallasTPU().plan(LSTM(hidden), WORK._replace(steps=steps, batch=batch))
    assert 1 <= plan.chunk <= steps
    assert plan.rows % 16 == 0
    assert plan.chunk % plan.unroll == plan.chunk % plan.group == 0
    assert plan.vmem <= 16 * 2**20 or plan.chunk == 1


@pytest.mark.parametrize(
    ("hidden", "heads", "width", "groups"),
    [
        (512, 4, 128, 4),  # a head a group
        (768, 3, 256, 3),
        (512, 16, 128, 4),  # four heads a group
        (192, 3, 128, 2),  # two heads, and one
        (768, 8, 384, 2),  # heads of 96 units: four of them are three tiles
        (200, 2, 200, 1),  # nothing to be gained
        (100, 1, 100, 1),
    ],
)
def test_heads_are_grouped_to_whole_tiles(hidden, heads, width, groups):
    cell = SLSTM(hidden, heads=heads)
    plan = PallasTPU().plan(cell, WORK)
    assert (plan.width, len(plan.groups)) == (width, groups)
    kernel = cell.init(jax.random.key(0), 2)["recurrent_kernel"]
    packed, whole = (np.asarray(grouped(cell, kernel, n)) for n in (width, hidden))
    # Put the groups where they belong, and all of the block-diagonal matrix is there.
    scattered = np.zeros_like(whole)
    for units, _ in plan.groups:
        for gate in range(len(cell.gates)):
            columns = slice(gate * hidden + units.start, gate * hidden + units.stop)
            scattered[units, columns] = packed[: units.stop - units.start, columns]
    np.testing.assert_array_equal(scattered, whole)
    block = hidden // heads
    own = np.arange(hidden)[:, None] // block == np.arange(hidden) // block
    gates = np.asarray(kernel).reshape(block, len(cell.gates), hidden)
    for gate in range(len(cell.gates)):
        wanted = np.where(own, np.tile(gates[:, gate], (heads, 1)), 0)
        np.testing.assert_array_equal(whole[:, gate * hidden : (gate + 1) * hidden], wanted)


def test_importing_the_library_does_not_import_pallas():
    code = "import lstmjax.layers, sys; sys.exit('jax.experimental.pallas' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
