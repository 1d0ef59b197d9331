"""The notebooks of docs/: what they show came out of one run of each, and their code still runs."""

import os
import re
import subprocess
import sys

import pytest

from tests.notebooks import ENVIRONMENT, NOTEBOOKS, cells, program

pytestmark = pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)

OF_A_MACHINE = r"(?<![\w.<])/(?:\w[\w.-]*/)+|\b[A-Z]:\\|\w://|\blocalhost\b"
"""An absolute path, an address, or a host."""


def test_what_it_shows_came_out_of_one_run(page):
    code = cells(page, "code")
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [out for cell in code for out in cell["outputs"]]
    assert {out["output_type"] for out in outputs} <= {"stream", "display_data", "execute_result"}
    assert {out["name"] for out in outputs if "name" in out} <= {"stdout"}
    for out in outputs:
        shown = {"text": out.get("text", ""), **out.get("data", {})}
        text = "\n".join("".join(shown[kind]) for kind in shown if kind != "image/png")
        assert not re.search(OF_A_MACHINE, text), text
    assert outputs
    assert page.stat().st_size < 300_000


def test_its_links_lead_somewhere(page):
    for cell in cells(page, "markdown"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", cell["source"]):
            assert (page.parent / target).exists(), target


@pytest.mark.sampled(0)
def test_its_code_runs(page, tmp_path):
    """In a process of its own, since it may choose its devices; warnings are errors."""
    (tmp_path / "notebook.py").write_text(program(page))
    mine = {**os.environ, **ENVIRONMENT, "MPLBACKEND": "agg"}
    mine.pop("XLA_FLAGS")  # those of conftest.py: numbers here are as users get them
    command = [sys.executable, "-W", "error", "notebook.py"]
    ran = subprocess.run(command, cwd=tmp_path, env=mine, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
