"""Executes the notebooks of docs/ and writes them back with what came out: ``make notebooks``.

python tests/notebooks.py                     # all of them
python tests/notebooks.py comparing tutorial  # those
"""

import json
import os
import pathlib
import sys
import tempfile

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "docs" / "notebooks").glob("*.ipynb"))
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TQDM_DISABLE": "1"}
"""A progress bar is worth nothing afterwards."""


def cells(page, kind):
    """The cells of a kind, their source as one text."""
    found = json.loads(page.read_text())["cells"]
    return [{**c, "source": "".join(c["source"])} for c in found if c["cell_type"] == kind]


def program(page):
    """The code of all cells as one; a cell that is to be a file becomes code that writes it."""
    return "\n".join(_code(cell["source"]) for cell in cells(page, "code"))


def _code(source):
    if not source.startswith("%%writefile "):
        return source
    magic, content = source.split("\n", 1)
    return f"import pathlib; pathlib.Path({magic.split()[1]!r}).write_text({content!r})"


def execute(page):
    """Run a notebook in an empty folder; what goes to the error stream is an error."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(page, 4)
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, resources=where, coalesce_streams=True).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        said = [out.text for out in cell.get("outputs", ()) if out.get("name") == "stderr"]
        if said:
            raise SystemExit(f"{page.name} writes to the error stream: {said[0]}")
    nbformat.write(notebook, page)


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    for page in NOTEBOOKS:
        if page.stem in (sys.argv[1:] or [page.stem]):
            print(page.stem, flush=True)
            execute(page)
