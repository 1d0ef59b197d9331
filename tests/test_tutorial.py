"""The code of docs/tutorial.ipynb, with less training: nothing in it may stop working."""

import json
import pathlib

import pytest

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "tutorial.ipynb"
SHORTER = {"epochs=4": "epochs=1", "range(300)": "range(3)", '"demo"': '"demo(size=200)"'}


def sources():
    """The code of every cell, and what it is to write to a file as code that does so."""
    for cell in json.loads(PAGE.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        if source.startswith("%%writefile "):
            magic, content = source.split("\n", 1)
            yield f"from pathlib import Path; Path({magic.split()[1]!r}).write_text({content!r})"
        else:
            yield source


@pytest.mark.slow
@pytest.mark.usefixtures("as_for_users")
def test_the_tutorial_runs(monkeypatch):
    monkeypatch.syspath_prepend(".")
    code = "\n".join(sources())
    for long, short in SHORTER.items():
        assert code.count(long) == 1
        code = code.replace(long, short)
    known = {}
    exec(compile(code, "tutorial", "exec"), known)
    assert known["report"].ok
    assert pathlib.Path("runs/comparison/comparison.png").exists()
    assert len(known["model"].predict(known["texts"])) == 2
