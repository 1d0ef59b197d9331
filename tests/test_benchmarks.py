"""A light benchmark that turns red when a fast path is lost, and the harness of the full one."""

import argparse
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import (
    cells,
    contenders,
    harness,
    numerics,
    parts,
    problems,
    profile,
    report,
    worker,
)
from benchmarks.contenders import Contender, Job, ours, training_job
from lstmjax.cells import GRU, LRU, LSTM, SRU, PeepholeLSTM
from tests.references import PAPERS

# --- What must stay fast -------------------------------------------------------------------------


@pytest.mark.alone
def test_the_derived_engine_is_faster_than_the_plain_scan():
    """Both in one process, compiled as for users.

    Other work on the machine can hide a speed-up in one round; it cannot make up one.
    """
    case = problems.S | {"steps": 250, "mode": "forward+backward"}
    engines = parts.work((contenders.PLAIN, contenders.DERIVED), case, "light")
    ratios = []
    with harness.Session("light") as session:
        while len(ratios) < 5 and max(ratios, default=0) < 1.3:
            scan, derived = session.measure(engines, turns=5)
            ratios.append(scan["seconds"] / derived["seconds"])
    assert max(ratios) >= 1.3, ratios


@pytest.fixture
def compilations():
    """Programs compiled so far, as JAX counts them."""
    events = []

    def listener(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield events
    jax.monitoring.unregister_event_duration_listener(listener)


def test_a_training_step_compiles_once(compilations):
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes integers and floats
        case = problems.S | parts.TINY | {"batches": 3}
        job = ours.train_step(case)
        before = len(compilations)
        job.run()
        first = len(compilations)
        assert first > before
        job.run()
    assert len(compilations) == first, "a later step was compiled again"


# --- The harness ---------------------------------------------------------------------------------


def test_deviation():
    expected = {"a": np.array([1.0, -4.0]), "b": np.zeros(2)}
    assert harness.deviation({"a": expected["a"]}, {"a": np.array([1.0, -4.5])}) == 0.125
    assert harness.deviation({"a": expected["a"]}, {"a": np.array([1.0, np.nan])}) != 0
    assert harness.deviation(expected, {"a": expected["a"]}) == float("inf")
    assert harness.deviation({}, {}) == 0


def test_arrays_survive_the_way_between_processes():
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "d x": np.ones(1)}
    found = worker.unpack(worker.pack(arrays))
    assert found.keys() == arrays.keys()
    assert all((found[name] == arrays[name]).all() for name in arrays)


class FakeWorker:
    """Answers as a worker would; times are 1, 2, 3, ... seconds in the order asked for."""

    asked = []

    def __init__(self, process):
        self.clock = 0

    def ask(self, do, **request):
        FakeWorker.asked.append((do, request.get("job")))
        if do == "prepare" and request["source"] == "none":
            return {"unavailable": "not here"}
        if do == "prepare":
            check = {"y": np.array([1.0, request["options"].get("y", 2.0)])}
            return {"first": 9.0, "memory": None, "check": worker.pack(check)}
        self.clock += 1
        return {"seconds": self.clock, "cpu": 10 * self.clock} if do == "measure" else {}

    def close(self):
        FakeWorker.asked.append(("close", None))


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr(harness, "Worker", FakeWorker)
    monkeypatch.setattr(harness, "PAUSE", 0)
    FakeWorker.asked = []
    with harness.Session("test") as session:
        yield session


def fake(name, source="some", **options):
    return Contender(name, "jax", source, options=options)


def test_turns_are_interleaved_and_medians_taken(session):
    who = [fake("lstmjax"), fake("absent", "none"), fake("peer")]
    rows = session.measure(parts.work(who, {"steps": 2}, "c"), turns=3, per=2)
    jobs = [job for do, job in FakeWorker.asked if do == "measure"]
    assert jobs == [2, 0, 0, 2, 2, 0]  # who begins changes from turn to turn
    assert [(row["turns"], row["seconds"], row["cpu"]) for row in rows] == [
        ([1, 1.5, 3], 1.5, 15),
        ([0.5, 2, 2.5], 2, 20),
    ]
    assert session.skipped == {"absent": "not here"}
    assert session.deviations == {"lstmjax": 0, "peer": 0}
    assert parts.against_peers(rows, "c") == {"c: lstmjax / peer (fastest peer)": 0.75}


def test_contenders_that_compute_something_else_are_not_timed(session):
    who = [fake("lstmjax"), fake("peer", y=2.1)]
    with pytest.raises(harness.BenchmarkError, match=r"peer deviates .* by 5.0e-02"):
        session.measure(parts.work(who, {}, "c"))
    assert "measure" not in dict(FakeWorker.asked)


def test_what_is_not_installed_or_slow_is_skipped_by_name(session):
    who = [fake("a")._replace(packages="no_such_package"), fake("b")._replace(slow=True), fake("c")]
    session.measure(parts.work(who, {}, "c"), turns=1)
    assert session.skipped["a"] == "no_such_package is not installed"
    assert "--full" in session.skipped["b"]
    assert [row["contender"] for row in session.rows] == ["c"]


def test_training_jobs_compare_their_first_two_losses():
    losses = iter([3.0, 2.0])
    job = training_job(lambda: next(losses))
    job.run()
    assert job.check()["losses"].tolist() == [3, 2]


def test_workers_repeat_short_jobs(monkeypatch):
    seconds = iter([0.0, 2.0, 2.0, 3.0, 3.0, 9.0])
    monkeypatch.setitem(worker.JOBS, 7, Job(lambda: None))
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(seconds))
    used = iter([10.0, 15.0])
    monkeypatch.setattr(worker, "_of_all_cores", lambda: next(used))
    assert worker.measure(7, least=3.0) == {"seconds": 1.5, "cpu": 2.5}


def test_the_time_of_all_cores_is_that_of_ended_processes_too():
    before = worker._of_all_cores()
    subprocess.run([sys.executable, "-c", "sum(range(10**6))"], check=True)
    assert worker._of_all_cores() - before > 0.01


def test_without_imdb_the_epoch_is_skipped_by_name(session, tmp_path):
    options = argparse.Namespace(data_dir=str(tmp_path), full=False, tiny=False)
    assert parts.epoch(session, options) == {}
    assert "--data-dir" in session.skipped["all"]


@pytest.mark.slow
def test_a_part_runs_from_the_command_line_to_the_page(tmp_path, monkeypatch, capsys):
    """Two real processes, at a tiny size."""
    monkeypatch.setattr(contenders, "RECURRENCE", [contenders.SCAN, contenders.LINEN])
    monkeypatch.setattr(harness, "LEAST", 0.0)
    assert command.main(["recurrence", "--tiny", "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    part = json.loads(file.read_text())["recurrence"]
    assert {"lstmjax scan", "Flax linen RNN"} <= {row["contender"] for row in part["rows"]}
    assert all(row["seconds"] > 0 for row in part["rows"])
    assert max(part["deviations"].values()) < 1e-4
    assert "lstmjax scan" in capsys.readouterr().out


def test_time_to_accuracy_stops_the_run_at_the_target(tmp_path):
    script = "import signal, sys; print(sys.argv[2], file=open(sys.argv[1], 'w')); {}"
    metrics = tmp_path / "metrics.jsonl"

    def command(accuracy, then):
        record = json.dumps({"test_accuracy": accuracy})
        return ["-c", script.format(then), str(metrics), record]

    seconds, reached = parts.time_to_accuracy("jax", command(0.9, "signal.pause()"), str(tmp_path))
    assert reached
    assert 0 < seconds < 60
    metrics.unlink()
    seconds, reached = parts.time_to_accuracy("jax", command(0.5, "pass"), str(tmp_path))
    assert not reached
    assert 0 < seconds < 60


@pytest.mark.parametrize(
    "arguments", [["speed"], ["--tiny"]], ids=["unknown part", "tiny without a folder"]
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_deviations_from_float64_get_onto_their_page(tmp_path):
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes integers and floats
        found = numerics.measure(numerics.Sizes(6, 2, 3, 4, 5))
    rows = {(row["engine"], row["precision"]): row for row in found["rows"]}
    assert {(e, p) for e in ("derived", "scan") for p in ("float32", "bfloat16")} <= rows.keys()
    for (engine, precision), row in rows.items():
        most = 1e-4 if precision == "float32" else 0.1
        assert all(0 <= row[what] < most for what in numerics.COLUMNS), (engine, row)
        assert (row["last output"] > 1e-5) == (precision == "bfloat16")
    common = {"machine": report.machine(), "versions": {}, "date": "now", "platform": "cpu"}
    report.merge(tmp_path / "this.json", "numerics", found | common)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    numerics.write_page(tmp_path, page)
    text = page.read_text()
    assert re.fullmatch(r"before\n.*## this.*\| `derived` \| bfloat16 \|.*after\n", text, re.DOTALL)
    assert "old" not in text


@pytest.mark.slow
def test_cells_get_into_the_table(tmp_path):
    every = [LSTM(4), SRU(4), LRU(4)]
    found = cells.measure(cells.Sizes(5, 2, 3, 4, 2), every)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    facts = {"machine": report.machine(), "versions": {"jax": "1"}, "date": "now"}
    compiled = {"LSTM": {"v5e": "2,471", "hopper": "1 / 2"}}
    cells.write_page(found | facts, compiled, page)
    rows = re.findall(r"^\| `.*", page.read_text(), re.MULTILINE)
    said = "`cpu` | 1.00 | `pallas_tpu` | 2,471 | `pallas_gpu` | 1 / 2"
    assert rows[0] == f"| `LSTM` | {cells.lines_of(LSTM)} | {said} |"
    assert rows[1].startswith(f"| `SRU` ¹ | {cells.lines_of(SRU)} | `cpu` | ")
    assert len(rows) == 3
    reasons = {row["cell"]: row["engines"]["tpu"]["reason"] for row in found["rows"]}
    assert "LRU overrides transition" in reasons["LRU"]


def test_every_cell_has_a_reference():
    named = {type(cell) for cell in cells.every_cell(8)}
    assert named == {type(paper.cell) for paper in PAPERS.values()} | {LSTM, GRU, PeepholeLSTM}
    assert cells.lines_of(LSTM) == 10


# --- The report ----------------------------------------------------------------------------------


def result(seconds, **case):
    rows = [
        {"column": "c", "contender": name, "case": problems.S | case, "seconds": s, "memory": 2**20}
        for name, s in zip(("lstmjax scan", "peer"), (seconds, 2 * seconds), strict=True)
    ]
    session = argparse.Namespace(rows=rows, skipped={"x": "why"}, deviations={"peer": 1e-7})
    return report.record(session, {"ratio": 0.5}, "python -m benchmarks recurrence", 3.21)


def test_one_part_replaces_only_itself(tmp_path):
    path = tmp_path / "device.json"
    for name, seconds in (("recurrence", 0.1), ("floor", 0.2), ("recurrence", 0.123456)):
        report.merge(path, name, result(seconds))
    found = report.load(tmp_path)["device"]
    assert [found[name]["rows"][0]["seconds"] for name in ("recurrence", "floor")] == [0.1235, 0.2]


def test_the_table_gives_medians_and_ratios_to_the_first():
    lines = report.table(result(0.05)).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")] == ["", "peer", "100 ms (2.00)", ""]
    assert [report.duration(s) for s in (2.5e-5, 0.0123, 1.5, 123.4)] == [
        *("25 µs", "12.3 ms", "1.5 s", "123 s")
    ]


def test_the_page_is_renewed_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for name in ("recurrence", "growth"):
        report.merge(tmp_path / "device.json", name, result(0.05))
    report.write_page(tmp_path, page)
    text = page.read_text()
    report.write_page(tmp_path, page)
    assert page.read_text() == text, "renewing twice changes nothing"
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    for expected in ("100 ms (2.00)", "ratio: 0.5", "x was skipped: why", "1.0e-07 (peer)"):
        assert expected in text
    for plot in ("device-recurrence.png", "device-growth.png"):
        assert f"]({plot})" in text
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_the_results_there_are():
    for device, found in report.load(report.FOLDER).items():
        for name, part in found.items():
            assert report.text(name, part) in report.PAGE.read_text(), (
                f"{device}, {name}: renew docs/performance.md by python -m benchmarks --report"
            )


def test_results_name_no_folder_and_no_host():
    case = {"steps": 500, "data_dir": "/home/somebody/data"}
    row = {"column": "epoch", "contender": "lstmjax", "case": case, "seconds": 1.0}
    session = argparse.Namespace(rows=[row], skipped={}, deviations={})
    found = json.dumps(report.record(session, {}, "python -m benchmarks epoch", 1.0))
    assert "somebody" not in found
    assert os.uname().nodename not in found


def test_a_device_is_named_by_processor_and_cores():
    facts = {"processor": "Intel(R) Xeon(R) Platinum 8480C @ 2.00GHz", "cores": 2}
    names = [report.device_name(facts | {"instructions": i}) for i in ([], ["avx2", "avx512f"])]
    assert names == [f"intel-xeon-platinum-8480c{i}-2-cores" for i in ("", "-avx512")]


# --- The profile ---------------------------------------------------------------------------------


def test_a_profile_tells_kernels_apart_and_counts_them():
    weights = np.eye(40, dtype=np.float32)

    def loop(x):
        return jax.lax.fori_loop(0, 30, lambda i, x: jax.numpy.tanh(x @ weights).T, x)

    profiled = profile.Profiled(jax.jit(loop), (weights,), "step", 30, devices=1, traced=2)
    lines = profile.table(profiled).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines[2:-3]]
    counts = {kind.split(":")[0].split(" ")[0]: int(number) for kind, number, *_ in rows}
    assert counts["products"] == counts["functions"] == 1
    assert sum(float(share.rstrip("%")) for *_, share in rows) == pytest.approx(100, abs=2)
    assert "of one step on one of 1 device(s)" in lines[-2]
    with pytest.raises(RuntimeError, match="trace fewer"):
        profile.table(profiled._replace(units=10_000))
