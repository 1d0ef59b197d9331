"""The GPU benchmark where there is no GPU: every contender that is present runs, in tiny."""

import json

import pytest

from benchmarks import gpu


def test_every_contender_present_runs_and_is_right(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "CELLS", {name: gpu.CELLS[name] for name in ("LSTM", "Leaky")})
    assert gpu.check() == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("lstmjax derived" in line and "skipped" not in line for line in lines) == 4
    kernel = [line for line in lines if "lstmjax kernel" in line]
    assert len(kernel) == 4
    assert all("it runs on GPUs, not on cpu" in line for line in kernel)


def test_a_wrong_result_is_no_result():
    right = gpu.lstmjax_runs

    def wrong(engine, precision, problem):
        runs = right(engine, precision, problem)
        return runs._replace(numpy=lambda a: 1.01 * runs.numpy(a))

    contender = gpu.Contender("off", "float32", ("LSTM",), lambda p: wrong("scan", "float32", p))
    row = gpu.measure("LSTM", gpu.TINY, contender, "cpu", turns=1, least=0.0)
    assert "forward is off by 1.0e-02" in row["failed"]


def test_results_are_kept_row_by_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "CELLS", {"LSTM": gpu.CELLS["LSTM"]})
    path = tmp_path / "results" / "gpu.json"
    gpu.run((gpu.TINY,), path, limit=0.0)
    rows = json.loads(path.read_text())["rows"]
    assert {row["skipped"] for row in rows} == {"no time left"}
    assert len(rows) == len(list(gpu.jobs((gpu.TINY,))))
    assert str(path) in capsys.readouterr().out


def test_without_a_gpu_nothing_is_measured(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "JAX has no GPU here, its backend is cpu" in capsys.readouterr().err


def test_the_bound_is_of_a_known_device():
    shape = gpu.SHAPES[0]
    times = [gpu.bound("LSTM", shape, "bfloat16", "NVIDIA H200", gradient=g) for g in (False, True)]
    assert 0 < times[0] < times[1]
    assert gpu.bound("LSTM", shape, "bfloat16", "something else", gradient=False) is None
