"""`check_cell`: every broken cell is caught by the check that is meant for it, and told why."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lstmjax
from lstmjax import GRU, LSTM, MinGRU, ZoneoutLSTM
from lstmjax.check import CHECKS, check_cell
from lstmjax.check.__main__ import main
from lstmjax.errors import UserError
from tests import broken_cells
from tests.broken_cells import BROKEN, OtherOrder

NAMES = [check.name for check in CHECKS]
QUICK = {"speed": False, "targets": ()}


def all_but(*names):
    """Checks to skip: all but these and those that come before all others."""
    wanted = {"contract", "pure", "dtype", "init", "finite", *names}
    return [name for name in NAMES if name not in wanted]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("cell", BROKEN)
def test_a_broken_cell_is_caught_and_told_why(cell):
    check, words = BROKEN[cell]
    report = check_cell(cell, skip=all_but(check), **QUICK)
    assert report.failed == (check,), report
    assert words in str(report)
    assert not report.ok


@pytest.mark.sampled(1)
@pytest.mark.parametrize("cell", [LSTM(4), MinGRU(4), ZoneoutLSTM(4)])
def test_a_cell_of_the_library_passes_them_all(cell):
    report = check_cell(cell, **QUICK)
    assert report.ok, report
    assert [r.name for r in report.results if r.status == "not run"] == ["reference"]
    affine = isinstance(cell, MinGRU)
    for kernel in ("TPU kernel", "GPU kernel"):
        assert (kernel in report["engines"].told) == (not affine)
    assert ("associative" in report["engines"].told) == affine
    assert report.facts["kind"].startswith("element-wise")
    assert report.facts["on a CPU"].startswith("cpu")


def test_the_reference_is_compared():
    skip = all_but("reference")
    report = check_cell(LSTM, reference=broken_cells.lstm, skip=skip, **QUICK)
    assert report["reference"].status == "ok", report
    report = check_cell(OtherOrder, reference=broken_cells.lstm, skip=skip, **QUICK)
    assert report.failed == ("reference",)
    assert "columns of kernels come in that of gates, i, g, f, o" in str(report)

    def swapped(params, x, h, state):
        h, (c,) = broken_cells.lstm(params, x, h, state)
        return c, (h,)

    def crooked(params, x, h, state):
        return h[:, :1], state

    def failing(params, x, h, state):
        raise KeyError("peephole")

    for function, words in (
        (swapped, "from step 1 on the reference gives another h"),
        (crooked, "the reference gives h (3, 1), not (3, 8)"),
        (failing, "the reference does not run: KeyError: 'peephole' (test_check.py:"),
    ):
        report = check_cell(LSTM, reference=function, skip=skip, **QUICK)
        assert words in report["reference"].told


def test_what_depends_on_a_failed_check_is_not_run():
    report = check_cell(broken_cells.MixesRows, **QUICK)
    others = [result for result in report.results if result.name != "contract"]
    assert {result.status for result in others} == {"not run"}
    assert "means nothing while contract fails" in str(report)
    assert report.facts == {}


def test_a_report_is_read_by_people_and_by_machines():
    report = check_cell(broken_cells.UnusedGate, skip=all_but("used"), **QUICK)
    lines = str(report).splitlines()
    assert lines[0].startswith("UnusedGate(8) (broken_cells.py:")
    assert max(map(len, lines)) < 240
    k = next(k for k, line in enumerate(lines) if "FAILED" in line)
    assert lines[k].split(maxsplit=2)[1:] == ["used", "nothing depends on gate 'r'"]
    assert [line.split()[0] for line in lines[k + 1 : k + 3]] == ["cause:", "remedy:"]
    assert lines[-1].startswith("1 check failed: used (")
    found = json.loads(json.dumps(report.to_json()))
    assert found["ok"] is False
    assert found["results"][NAMES.index("used")]["status"] == "failed"


@pytest.mark.usefixtures("no_type_checks")
def test_what_is_no_cell_is_told():
    with pytest.raises(UserError, match="is no cell"):
        check_cell(int)
    with pytest.raises(UserError, match=r"Needy\(8\) cannot be built.*'leak'"):
        check_cell(broken_cells.Needy)
    with pytest.raises(UserError, match="no check 'grad'; there are: contract, pure"):
        check_cell(GRU, skip=["grad"])


def test_the_settings_of_the_caller_are_as_before():
    x64, device = jax.config.jax_enable_x64, jax.config.jax_default_device
    check_cell(GRU, skip=all_but(), **QUICK)
    assert jax.config.jax_enable_x64 == x64
    assert jax.config.jax_default_device == device
    assert jnp.ones(1).dtype == np.float32


@pytest.mark.alone
def test_speed_is_measured_beside_the_lstm():
    report = check_cell(LSTM, skip=NAMES[1:], targets=())
    assert 0.5 < float(report.facts["speed"].split()[0]) < 2


# --- The command line ----------------------------------------------------------------------------

CELL = """
import numpy as np
from lstmjax import LSTM
from tests.broken_cells import lstm, MixesRows

class Mine(LSTM):
    pass

def reference(params, x, h, state):
    return lstm(params, x, h, state)
"""


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["check", *arguments, "--no-speed", "--targets"])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, *capsys.readouterr()


def test_the_command_line(tmp_path, monkeypatch, capsys):
    file = tmp_path / "my_cell.py"
    file.write_text(CELL)
    skip = ("--skip", *all_but("reference"))
    out = tmp_path / "report.json"
    status, text, _ = run(monkeypatch, capsys, f"{file}:Mine", *skip, "--json", str(out))
    assert status == 0, text
    assert "the reference gives the same over 7 steps, in float64" in text
    assert json.loads(out.read_text())["ok"] is True
    status, text, _ = run(monkeypatch, capsys, f"{file}:MixesRows", "--skip", "init")
    assert status == 1
    assert text.strip().splitlines()[-1].startswith("1 check failed: contract")
    for arguments, words in (
        ((f"{file}:Yours",), "no cell 'Yours'"),
        (("LSTM", "--hidden", "0"), "--hidden must be at least 1"),
        (("LSTM", "--skip", "all"), "no check 'all'"),
    ):
        status, _, error = run(monkeypatch, capsys, *arguments)
        assert status == 2
        assert error.startswith("error: ")
        assert words in error


def test_the_module_runs():
    root = pathlib.Path(lstmjax.__file__).parent.parent
    command = [sys.executable, "-m", "lstmjax.check", "Nothing"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no cell 'Nothing'")
