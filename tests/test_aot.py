"""Compiling for devices that are not there.

What needs a compiler of its own is skipped where that is not installed: `pip install '.[aot]'`.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from lstmjax.aot.bundles import loops_over, read_dump, read_loops, read_vmem
from lstmjax.aot.tpu import dump_folder, environment

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def run(*command, **variables):
    variables = os.environ | {"PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"} | variables
    return subprocess.run(
        [sys.executable, *command], env=variables, capture_output=True, text=True, check=False
    )


def aot(*flags):
    return run("-m", "lstmjax.aot", *flags)


# --- Reading what the compiler writes ------------------------------------------------------------

# A loop of ten passes, in it one of three passes and one that does not say how many it has.
PROGRAM = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s10_s0 = inlined_call_operand.vmem [shape: f32[8,128]] }
   0x1   :  { %s11_s1 = smov 0 }
   0x2 LB: > { %s12_s1 = sadd.s32 2, %s11_s1  ;;  %v1_v1 = vadd.f32 %v2_v2, %v3_v3 }
   0x3   : > { %p13_p0 = scmp.ge.s32.totalorder %s12_s1, 20 /* loop exit test */ }
   0x4 LB: >> { %s14_s2 = sadd.s32 1, %s15_s2 }
   0x5   : >> { %p16_p1 = scmp.eq.s32.totalorder %s14_s2, 3 /* loop exit test */ }
   0x6   : >> { %17 = sbr.rel (!%p16_p1) target = $region2 }
   0x7   : >> { %v1_v1 = vadd.f32 %v2_v2, %v3_v3 }
   0x8   : >> { %v1_v1 = vadd.f32 %v2_v2, %v3_v3 }
   0x9   : >> { %v1_v1 = vadd.f32 %v2_v2, %v3_v3 }
   0xa   : >> { %v1_v1 = vadd.f32 %v2_v2, %v3_v3 }
   0xb   : > { %v1_v1 = vadd.f32 %v2_v2, %v3_v3 }
   0xc LB: >> { %v1_v1 = vadd.f32 %v2_v2, %v3_v3 }
   0xd   : >> { %18 = sbr.rel (!%p19_p2) target = $region3 }
   0xe LB: > { %20 = sbr.rel (!%p13_p0) target = $region1 }
"""

MODULE = """\
HloModule jit_f, is_scheduled=true

%body.1 (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %arg = (s32[], f32[8,4]{1,0}) parameter(0)
  %fusion.1 = f32[4]{0} fusion(%arg), kind=kLoop, calls=%fused
  ROOT %tuple.1 = (s32[], f32[8,4]{1,0}) tuple(%arg, %fusion.1)
}

ENTRY %main.2 (x: f32[8,4]) -> f32[8,4] {
  %while.1 = (s32[], f32[8,4]{1,0}) while(%tuple.0), condition=%condition.1, body=%body.1
  ROOT %while.2 = (s32[], f32[7,4]{1,0}) while(%tuple.3), condition=%condition.1, body=%body.1
}
"""


def test_bundles_are_counted_loop_by_loop():
    program = read_loops(PROGRAM)
    assert (program.own, program.passes) == (2, 1)
    (outer, last) = program.inner
    assert (outer.passes, outer.own, [loop.own for loop in outer.inner]) == (10, 3, [7, 2])
    assert [loop.passes for loop in outer.inner] == [3, None]
    assert outer.a_pass() == 3 + 3 * 7 + 2
    assert program.a_pass() == 2 + 10 * outer.a_pass() + last.a_pass()


def test_what_a_compiler_dumps_is_found_by_name(tmp_path):
    (tmp_path / "123-fusion.1-05-final_bundles.txt").write_text(PROGRAM)
    (tmp_path / "123-fusion.1-04-schedule-analysis_final_bundles.txt").write_text("")
    (tmp_path / "123-fusion.1-02-packed-bundles-post-ra.txt").write_text("")
    assert read_dump(tmp_path).keys() == {"fusion.1"}
    blocks = [{"block_type": "SCOPED", "block_size": 12}]
    report = {"hlo_breakdowns": {"kernel.1": {"blocks": blocks}}}
    text = f"<script> const DATA = {json.dumps(report)}; const other = 1;</script>"
    (tmp_path / "123-TLP-06-vmem_report.html").write_text(text)
    assert read_vmem(tmp_path) == {"kernel.1": {"SCOPED": 12}}


def test_only_loops_over_stacked_arrays_count():
    assert loops_over(MODULE, 8) == [["arg", "fusion.1", "tuple.1"]]
    assert loops_over(MODULE, 9) == []


def test_the_dump_folder_is_that_of_the_environment(monkeypatch):
    assert dump_folder() is None
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_jf_dump_to=/of/the/user")
    assert dump_folder() is None
    for name, value in environment("/some/where").items():
        monkeypatch.setenv(name, value)
    assert str(dump_folder()) == "/some/where"


# --- The command line ----------------------------------------------------------------------------


def test_help_explains():
    out = aot("--help").stdout
    for text in ("--target", "v5e", "hopper", "file.py:MyCell", "--train-step", "--devices"):
        assert text in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden", "0"], "error: --hidden must be at least 1, got 0"),
        (["--cell", "Nothing"], "error: no cell 'Nothing' in lstmjax.cells"),
        (["--target", "hopper", "--devices", "4"], "error: --devices is for TPUs; leave it out"),
        (["--target", "hopper", "--free-layouts"], "error: --free-layouts is for TPUs; leave"),
        (["--json", "no/such/folder/x.json"], "error: no folder no/such/folder for --json"),
        (["--batch", "6", "--devices", "4"], "error: 6 rows cannot be spread over 4 devices"),
    ],
    ids=lambda a: a if isinstance(a, str) else None,
)
def test_mistakes_are_one_line_and_exit_status_2(flags, message):
    done = aot(*flags)
    assert done.returncode == 2
    # JAX' CUDA plug-in says on loading, whatever one sets, that there is no driver.
    plug_in = ("absl::InitializeLog", "cudart_stub")
    lines = [a for a in done.stderr.splitlines() if not any(text in a for text in plug_in)]
    assert len(lines) == 1
    assert lines[0].startswith(message)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_it_says_how_to_get_it():
    done = aot()
    assert done.returncode == 2
    assert done.stderr.startswith("error: compiling for a TPU needs the package libtpu: pip inst")
    assert done.stderr.count("\n") == 1


# --- Compiled for a TPU --------------------------------------------------------------------------


@needs_libtpu
@pytest.mark.parametrize(
    "flags",
    [["LSTM"], ["LSTM", "--masked"], ["GRU"], ["tests/kernel_cases.py:Three"]],
    ids=" ".join,
)
def test_kernels_compile_and_take_fewer_bundles_than_the_plain_scan(flags, tmp_path):
    file = tmp_path / "figures.json"
    done = aot("--cell", *flags, "--target", "v5e", "--json", str(file))
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())["results"]
    by = {(r["program"], r["engine"]): r for r in results}
    for program in ("forward", "forward+backward"):
        kernel, plain = by[program, "pallas_tpu"], by[program, "plain scan"]
        assert 0 < kernel["bundles"] <= 0.65 * plain["bundles"]
        assert 0 < kernel["vmem"] < 128 * 2**20
    assert kernel["temporaries"] + kernel["in_vmem"] <= 0.6 * (
        plain["temporaries"] + plain["in_vmem"]
    )


@needs_libtpu
def test_heads_take_fewer_bundles_than_one(tmp_path):
    found = []
    for cell in ("SLSTM(heads=4)", "SLSTM"):
        file = tmp_path / "figures.json"
        done = aot("--cell", cell, "--hidden", "512", "--target", "v5e", "--json", str(file))
        assert done.returncode == 0, done.stderr
        results = json.loads(file.read_text())["results"]
        found.append([r["bundles"] for r in results if r["engine"] == "pallas_tpu"])
    for heads, dense in zip(*found, strict=True):
        assert 0 < heads <= 0.6 * dense


@needs_libtpu
@pytest.mark.parametrize("flags", [[], ["--free-layouts"]], ids=["", "free layouts"])
def test_forward_keeps_nothing_but_weights_and_the_layouts_that_it_needs(flags, tmp_path):
    file = tmp_path / "figures.json"
    done = aot("--target", "v5e", "--json", str(file), *flags)
    assert done.returncode == 0, done.stderr
    kernel = json.loads(file.read_text())["results"][0]
    assert (kernel["program"], kernel["engine"]) == ("forward", "pallas_tpu")
    copies = 0 if flags else 2 * 500 * 64 * 128 * 4  # of inputs and outputs, features along lanes
    assert kernel["temporaries"] + kernel["in_vmem"] <= copies + 2**20


COMPILE = """
import tempfile
import os
from lstmjax.aot import tpu
os.environ.update(tpu.environment(tempfile.gettempdir()))
os.environ.pop("LIBTPU_INIT_ARGS")
import jax
from jax.sharding import PartitionSpec as P
from lstmjax.cells import LSTM
from lstmjax.recurrence import unroll
cell, seeds, rows = LSTM(20), {seeds}, P("batch")
mesh = tpu.described_mesh("v5e", 1 if seeds else 4)
x = jax.ShapeDtypeStruct((32, 6, 3), "float32")
mask = jax.ShapeDtypeStruct((32, 6), bool)

def init():
    if not seeds:
        return cell.init(jax.random.key(0), 3)
    return jax.vmap(lambda key: cell.init(key, 3))(jax.random.split(jax.random.key(0), seeds))

def loss(params, x, mask):
    hs, _ = unroll(cell, params, x, mask=mask, resets=mask, engine="pallas_tpu")
    return (hs ** 2).sum() if seeds else jax.lax.psum((hs ** 2).sum(), "batch")

if seeds:
    f = jax.vmap(jax.grad(loss), (0, None, None))
else:
    f = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(P(), rows, rows), out_specs=P())
params = jax.eval_shape(init)
args = tpu.on_mesh(mesh, params, P()), tpu.on_mesh(mesh, x, rows), tpu.on_mesh(mesh, mask, rows)
with jax.set_mesh(mesh):
    jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",)).compile()
print("compiled")
"""


@needs_libtpu
@pytest.mark.parametrize("seeds", [0, 3], ids=["shard_map checks what varies", "vmap over seeds"])
def test_it_compiles_under_transformations(seeds):
    done = run("-c", COMPILE.format(seeds=seeds))
    assert done.stdout == "compiled\n", done.stderr
