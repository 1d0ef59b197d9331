"""The GPU engine on a CPU: its kernels in Pallas' interpreter, against the plain scan in float64.

The interpreter runs the warpgroups of a block as threads, with their barriers and copies. It is not
used for clusters and knows no layouts: those only compiling shows (`test_aot_gpu.py`).
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lstmjax.cells import GRU, LSTM, SLSTM, Cell, PeepholeLSTM
from lstmjax.recurrence import Derived, Workload, choose_engine, unroll
from lstmjax.recurrence.gpu import backend
from lstmjax.recurrence.gpu import engine as gpu_engine
from lstmjax.recurrence.gpu.engine import PallasGPU
from lstmjax.recurrence.gpu.plain import plain_kernel
from lstmjax.recurrence.split import split_outside
from tests.gpu_interpreter import INTERPRET
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
from tests.tolerances import assert_close, relative_error

ENGINE = PallasGPU(interpret=INTERPRET)
PLAIN = PallasGPU(interpret=plain_kernel)
BOTH = ("mask", "resets")

CASES = {
    "LSTM": Case(LSTM(5), steps=4),
    "LSTM, bfloat16, flags": Case(LSTM(64), precision="bfloat16", flags=BOTH),
    "PeepholeLSTM, flags, reverse, two blocks": Case(
        PeepholeLSTM(5), batch=9, flags=BOTH, reverse=True
    ),
    "GRU, two tiles, flags": Case(GRU(70), steps=2, flags=BOTH),
    "GRU, three tiles, bfloat16": Case(GRU(130), steps=2, precision="bfloat16"),
    "Three, flags, bfloat16": Case(Three(6), flags=BOTH, precision="bfloat16"),
    "Three, flags, reverse": Case(Three(6), steps=4, flags=BOTH, reverse=True),
    "Ratio, resets, rows of padding": Case(Ratio(6), flags=("resets",)),
    "sLSTM of two heads": Case(SLSTM(6, heads=2), steps=3, flags=("resets",), initial=False),
    "heads": Case(TwoHeads(6), steps=3),
    "heads, parts apart": Case(TwoHeadsApart(6), steps=3),
    "groups of two heads, flags": Case(SLSTM(128, heads=4), steps=2, flags=BOTH),
    "heads of two tiles, apart": Case(TwoHeadsApart(140), steps=2, flags=("mask",)),
    "one step of one row": Case(LSTM(64), batch=1, steps=1),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
def test_values_and_all_gradients(name):
    case = CASES[name]
    args, options = draw(case)
    got = jax.jit(lambda *a: values_and_gradients(ENGINE, case.cell, *a, **options))(*args)
    compare(case, got, expected(case, args, options))
    if case.flags:
        plain = jax.jit(lambda *a: values_and_gradients(PLAIN, case.cell, *a, **options))(*args)
        # Sums over units run in another order: some units in the last place, whereupon a bfloat16
        # may be rounded the other way. What the kernel leaves out of products of two parts, 2^-16
        # of each, would show.
        errors = jax.tree.map(relative_error, *jax.device_get((got, plain)))
        assert max(jax.tree.leaves(errors)) < {"float32": 2e-6, "bfloat16": 2**-9}[case.precision]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_parts_of_the_weights_add_up(parts):
    x = np.random.default_rng(0).normal(size=(64, 64)).astype("float32")
    found = jax.jit(lambda x: split_outside(x, parts))(x)
    assert all(part.dtype == jnp.bfloat16 for part in found)
    error = sum(np.asarray(part, "float64") for part in found) - x
    assert np.all(np.abs(error) <= 2.0 ** (-8 * parts) * np.abs(x))


@pytest.mark.slow
def test_gradients_of_the_parameters_alone_from_the_final_carry_alone():
    compare_final_gradients(ENGINE)


# --- Under the transformations of JAX ------------------------------------------------------------


@pytest.mark.slow
def test_vmap_over_parameters_is_the_loop():
    compare_vmapped(ENGINE)


@pytest.mark.slow
def test_many_steps_of_many_units():
    """More than a block holds: on a device, a cluster runs it."""
    case = Case(GRU(150), steps=200, batch=2, flags=BOTH)
    args, options = draw(case)
    got = jax.jit(lambda *a: values_and_gradients(PLAIN, case.cell, *a, **options))(*args)
    compare(case, got, expected(case, args, options))


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [False, True])
def test_under_shard_map(check_vma):
    """Rows over two devices, parameters on both; what varies is checked with the interpreter."""
    case = Case(PeepholeLSTM(5), batch=4, flags=BOTH)
    engine, devices = (ENGINE, 1) if check_vma else (PLAIN, 2)
    args, options = draw(case)
    mesh = jax.make_mesh(
        (devices,), ("rows",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,)
    )
    rows = P("rows")

    def local(mask, resets, *args):
        flags = {"mask": mask, "resets": resets}
        out, (d_params, *d_rest) = values_and_gradients(engine, case.cell, *args, **flags)
        if not check_vma:  # else the transpose of spreading the parameters has summed them already
            d_params = jax.lax.psum(d_params, "rows")
        return out, (d_params, *d_rest)

    shards = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, rows, P(), *[rows] * 4),
        out_specs=(rows, (P(), rows, rows)),
        check_vma=check_vma,
    )
    got = jax.jit(shards)(options["mask"], options["resets"], *args)
    compare(case, got, expected(case, args, options))


@pytest.mark.slow
def test_second_derivatives_are_those_of_the_scan():
    compare_second_derivatives(PLAIN)


def test_forward_mode_is_that_of_the_scan():
    case = Case(LSTM(5))
    (params, x, *_), _ = draw(case)

    def run(engine):
        hs = lambda x: unroll(case.cell, params, x, engine=engine)[0]  # noqa: E731
        return jax.jvp(hs, (x,), (x,))

    for got, wanted in zip(run(PLAIN), run("scan"), strict=True):
        assert_close(got, wanted, reduction=100)


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


# --- What it refuses -----------------------------------------------------------------------------


class Undeclared(LSTM):
    """Mixes units, and does not say so."""

    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return h - jnp.mean(h, axis=-1, keepdims=True), state


class PerUnitConstant(LSTM):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return h * np.linspace(0, 1, self.hidden_size, dtype="float32")[None], state


class Special(LSTM):
    def step(self, pre, state, params):
        h, state = super().step(pre, state, params)
        return jax.lax.digamma(h), state


def attach(monkeypatch, capability="9.0", cores=132):
    device = SimpleNamespace(compute_capability=capability, device_kind="GPU", core_count=cores)
    monkeypatch.setattr(gpu_engine, "_attached", lambda: device)


WORK = Workload("gpu", "float32", "bfloat16", steps=500, batch=64, features=32)


@pytest.mark.parametrize(
    ("cell", "change", "reason"),
    [
        (LSTM(100), {"platform": "tpu"}, "it runs on GPUs, not on tpu"),
        (LSTM(100), {"dtype": "float64"}, "it computes in float32, the inputs are float64"),
        (LayerNorm(100), {}, "its step uses reduce_sum"),
        (Undeclared(100), {}, "its step uses reduce_sum"),
        (PerUnitConstant(100), {}, "its step holds a constant of shape (1, 100)"),
        (Special(100), {}, "its step uses digamma"),
        (Projected(100), {}, "Projected overrides transition"),
        (Rebound(100), {}, "Rebound overrides apply_step"),
        (Narrow(100), {}, "Narrow carries a (B, 1) float32, not (B, H) float32"),
        (TwoHeads(1024), {}, "1024 units with 4 gates do not fit into shared memory"),
        (LSTM(512), {}, "512 units with 4 gates do not fit into shared memory"),
        (LSTM(256), {"precision": "float32"}, "256 units with 4 gates do not fit"),
    ],
    ids=lambda a: type(a).__name__ if isinstance(a, Cell) else None,
)
def test_refusals_name_the_reason(cell, change, reason):
    engine = PallasGPU(attached="platform" in change)
    refusal = engine.refusal(cell, WORK._replace(**change))
    assert refusal is not None
    assert reason in refusal


@pytest.mark.parametrize(
    ("found", "fits"),
    [("9.0", True), ("8.0", False), ("7.5", False), ("10.0", False), ("gfx942", False)],
)
def test_only_hopper_is_served(found, fits, monkeypatch):
    attach(monkeypatch, found)
    refusal = PallasGPU().refusal(LSTM(100), WORK)
    reason = f"it needs a Hopper GPU (compute capability 9.0), not {found}"
    assert refusal == (None if fits else reason)


def test_it_is_the_first_choice_on_a_gpu_that_it_runs_on(monkeypatch):
    attach(monkeypatch, "9.0")
    assert choose_engine(LSTM(5), WORK) == (PallasGPU(), "the first choice")
    attach(monkeypatch, "8.0")
    reason = "no pallas_gpu: it needs a Hopper GPU (compute capability 9.0), not 8.0"
    assert choose_engine(LSTM(5), WORK) == (Derived(), reason)


def test_one_may_ask_for_a_gpu_where_there_is_none():
    reason = "no pallas_gpu: it needs a Hopper GPU (compute capability 9.0), and there is none here"
    assert choose_engine(LSTM(5), WORK) == (Derived(), reason)


def test_a_backend_that_has_changed_is_refused_by_name(monkeypatch):
    """As from JAX 0.11 to 0.12; the next engine runs instead."""

    def moved(*_, **__):
        raise TypeError("wgmma() got an unexpected argument\nand more")

    backend.backend_refusal.cache_clear()
    assert backend.backend_refusal() is None
    monkeypatch.setattr(plgpu, "wgmma", moved)
    attach(monkeypatch, "9.0")
    backend.backend_refusal.cache_clear()
    chosen, reason = choose_engine(LSTM(5), WORK)
    backend.backend_refusal.cache_clear()
    assert chosen == Derived()
    assert reason == (
        f"no pallas_gpu: its kernels are not made for the Mosaic GPU of JAX {jax.__version__} "
        "(TypeError: wgmma() got an unexpected argument)"
    )


def test_elsewhere_it_is_refused_to_those_who_ask_for_it():
    assert choose_engine(LSTM(5), WORK._replace(platform="cpu"))[0] == Derived()
    with pytest.raises(ValueError, match=r"'pallas_gpu' cannot run .*: it runs on GPUs, not on"):
        choose_engine(LSTM(5), WORK._replace(platform="cpu"), "pallas_gpu")


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("hidden", [1, 20, 64, 100, 128])
@pytest.mark.parametrize("cell", [LSTM, PeepholeLSTM, GRU, Three])
def test_what_it_serves(cell, hidden, precision):
    engine = PallasGPU(attached=False)
    assert engine.refusal(cell(hidden), WORK._replace(precision=precision)) is None


def test_settings_are_checked():
    with pytest.raises(ValueError, match="rows must be a multiple of 8, got 12"):
        PallasGPU(rows=12)
    with pytest.raises(ValueError, match="depth must be at least 2, got 1"):
        PallasGPU(depth=1)


@pytest.mark.parametrize(("cores", "most"), [(132, 256), (114, 224), (78, 128)])
def test_clusters_share_no_group_of_multiprocessors(cores, most, monkeypatch):
    """H100, H100 PCIe, H20; four blocks, of 8 rows, in a cluster."""
    attach(monkeypatch, cores=cores)
    for batch, rows in ((most, 8), (most + 1, 16)):
        plans = PallasGPU().plans(LSTM(256), WORK._replace(batch=batch))
        assert [plan.rows for plan in plans] == [rows] * 2


def test_numbers_in_parts_take_a_cluster():
    engine = PallasGPU(attached=False)
    works = {p: WORK._replace(precision=p) for p in ("bfloat16", "float32")}
    found = {p: engine.plans(LSTM(100), work) for p, work in works.items()}
    assert [plan.cluster for plan in found["bfloat16"]] == [False, False]
    assert [plan.cluster for plan in found["float32"]] == [True, True]


def test_more_rows_a_block_where_blocks_would_wait():
    engine = PallasGPU(attached=False)

    def rows_of(engine, batch):
        return engine.plans(LSTM(100), WORK._replace(batch=batch))[0].rows

    rows = {batch: rows_of(engine, batch) for batch in (64, 1056, 1057)}
    assert rows == {64: 8, 1056: 8, 1057: 16}
    assert rows_of(PallasGPU(rows=8, attached=False), 4096) == 8
