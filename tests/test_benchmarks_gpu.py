"""Benchmarks of GPU and TPU where there is neither: what is present runs, in tiny."""

import gzip
import json
import sys

import pytest

from benchmarks import device, gpu, signoff, tpu
from lstmjax.cells import LSTM
from lstmjax.recurrence.gpu.engine import PallasGPU
from lstmjax.recurrence.gpu.plain import plain_kernel
from tests.kernel_cases import Case


@pytest.mark.slow
def test_every_contender_present_runs_and_is_right(capsys, monkeypatch):
    monkeypatch.setattr(device, "CELLS", {name: device.CELLS[name] for name in ("LSTM", "Leaky")})
    assert device.check(gpu.BENCH) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("lstmjax derived" in line and "skipped" not in line for line in lines) == 4
    kernel = [line for line in lines if "lstmjax kernel" in line]
    assert len(kernel) == 6  # two with a mask
    assert all("it runs on GPUs, not on cpu" in line for line in kernel)


def test_a_wrong_result_is_no_result():
    right = device.lstmjax_runs

    def wrong(engine, precision, problem):
        runs = right(engine, precision, problem)
        return runs._replace(numpy=lambda a: 1.01 * runs.numpy(a))

    contender = device.Contender("off", "float32", ("LSTM",), lambda p: wrong("scan", "float32", p))
    row = device.measure("LSTM", device.TINY, contender, "cpu", turns=1, least=0.0)
    assert "forward is off by 1.0e-02" in row["failed"]


@pytest.mark.parametrize("bench", [gpu.BENCH, tpu.BENCH], ids=["gpu", "tpu"])
def test_results_are_kept_row_by_row(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "CELLS", {"LSTM": device.CELLS["LSTM"]})
    path = tmp_path / "results" / "gpu.json"
    device.run(bench, (device.TINY,), path, limit=0.0)
    rows = json.loads(path.read_text())["rows"]
    assert {row["skipped"] for row in rows} == {"no time left"}
    assert len(rows) == len(list(device.jobs(bench, (device.TINY,))))
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize("bench", [gpu.BENCH, tpu.BENCH], ids=["gpu", "tpu"])
def test_what_is_fused_is_measured_before_the_rest(bench):
    todo = [*device.jobs(bench, bench.shapes)]
    late = [contender.late for _, _, contender in todo]
    assert late == sorted(late)
    assert set(late) == {False, True}
    assert {"lstmjax kernel"} <= {who.name for _, _, who in todo if not who.late}
    fused = [(shape, name) for name, shape, who in todo if not who.late]
    first = fused.index((bench.shapes[0], "GRU"))
    assert {name for _, name in fused[:first]} == {"LSTM", "PeepholeLSTM"}


@pytest.mark.parametrize("module", [gpu, tpu], ids=["gpu", "tpu"])
def test_without_a_device_nothing_is_measured(module, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # of the process that is asked for a TPU
    with pytest.raises(SystemExit):
        device.main(module.BENCH, module.__doc__, [])
    name = module.BENCH.platform.upper()
    assert f"JAX has no {name} here, its backend is cpu" in capsys.readouterr().err


WORKER = """
import json, sys
for name in json.load(sys.stdin):
    if name == "hangs":
        sys.stdin.close()
        import threading; threading.Event().wait()
    print("said", name, file=sys.stderr)
    if name == "dies":
        sys.exit(1)
    print(json.dumps({"found": name}), flush=True)
"""


@pytest.mark.parametrize("side_by_side", [1, 2])
def test_what_hangs_or_dies_is_told_and_the_rest_goes_on(tmp_path, monkeypatch, side_by_side):
    monkeypatch.setattr(signoff, "STARTING", 2.0)
    names = ("one", "hangs", "two", "dies", "three", "alone")
    items = {name: signoff.Item(lambda: {}, 0.5, alone=name == "alone") for name in names}
    command, path, shown = [sys.executable, "-c", WORKER], tmp_path / "all.json", []

    def again(items, seconds):
        results = signoff.Results(path, lambda name, _: shown.append(name))
        return signoff.run_all(items, command, results, seconds, side_by_side)

    assert again(items, 60.0)
    assert sorted(shown) == sorted(names)
    assert shown[-1] == "alone"
    if side_by_side == 1:
        assert shown == list(names)
    found = json.loads(path.read_text())
    assert [found[name].get("found") for name in ("one", "two", "three")] == ["one", "two", "three"]
    assert "it hangs" in found["hangs"]["failed"]
    assert "its process ended" in found["dies"]["failed"]
    # Again: what there is no answer to yet, and then what failed.
    del found["two"]
    path.write_text(json.dumps(found))
    assert again(items, 60.0)
    assert set(shown[len(names) :]) == {"two", "hangs", "dies"}
    assert not again(items | {"four": items["one"]}, 0.0)


def test_what_wants_a_fresh_process_has_one_to_itself(tmp_path):
    worker = """
import json, os, sys
names = json.load(sys.stdin)
for name in names:
    print(json.dumps({"names": names, "process": os.getpid()}), flush=True)
"""
    kinds = {"one": {}, "two": {}, "apart": {"alone": True, "fresh": True}, "time": {"alone": True}}
    items = {name: signoff.Item(lambda: {}, **kind) for name, kind in kinds.items()}
    results = signoff.Results(tmp_path / "all.json", lambda *_: None)
    assert signoff.run_all(items, [sys.executable, "-c", worker], results, 60.0)
    assert list(results.known) == ["one", "two", "apart", "time"]
    assert results.known["apart"]["names"] == ["apart"]
    assert len({said["process"] for said in results.known.values()}) == 3


def test_the_sign_off_of_a_tpu_asks_all_that_is_asked_of_a_gpu():
    found = [device.items(bench, False) for bench in (gpu.BENCH, tpu.BENCH)]
    kinds = [{name.partition(",")[0] for name in items} for items in found]
    assert kinds[0] == kinds[1]
    (training,) = (item for name, item in found[1].items() if "training" in name)
    assert training.fresh


def test_what_an_item_raises_is_its_outcome(capsys):
    def fail():
        print("said meanwhile")
        raise ValueError("off\nby one")

    signoff.work(
        {"good": signoff.Item(lambda: {"error": 0.0}), "bad": signoff.Item(fail)}, ["bad", "good"]
    )
    bad, good = map(json.loads, capsys.readouterr().out.splitlines())
    assert bad["failed"] == "ValueError: off"
    assert "ended" not in bad
    assert good["error"] == 0


@pytest.mark.slow
def test_an_interpreted_check_is_against_float64():
    engine = PallasGPU(interpret=plain_kernel)
    case = Case(LSTM(5), steps=5, flags=("mask",))
    found = signoff.checks(engine, {"LSTM": case}, 2)
    outcomes = {name: item.run() for name, item in found.items()}
    assert 0 < outcomes["check, LSTM"]["error"] < 1e-5
    assert outcomes["check, LSTM"]["repeats"] == 2
    assert len(outcomes) == 3


def test_the_device_was_at_work_from_the_first_event_to_the_last(tmp_path):
    events = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
        {"ph": "X", "pid": 1, "name": "kernel", "ts": 100.0, "dur": 20.0},
        {"ph": "X", "pid": 1, "name": "kernel", "ts": 130.0, "dur": 20.0},
        {"ph": "X", "pid": 2, "name": "python", "ts": 0.0, "dur": 900.0},
    ]
    with gzip.open(tmp_path / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert device.device_seconds(tmp_path) == pytest.approx(50e-6)


def test_the_bound_is_of_a_known_device():
    shape = gpu.SHAPES[0]
    times = [
        device.bound("LSTM", shape, "bfloat16", "NVIDIA H200", gradient=g) for g in (False, True)
    ]
    assert 0 < times[0] < times[1]
    for precision in ("bfloat16", "float32"):
        fast, slow = (
            device.bound("LSTM", shape, precision, kind, gradient=True)
            for kind in ("TPU v5", "TPU v5 lite")
        )
        assert 0 < fast < slow
    assert device.bound("LSTM", shape, "bfloat16", "something else", gradient=False) is None
