"""Executes docs/tutorial.ipynb and writes it back with what came out: ``make tutorial``."""

import pathlib
import tempfile

import nbformat
from nbclient import NotebookClient

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "tutorial.ipynb"


def main():
    notebook = nbformat.read(PAGE, 4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":  # progress bars go to the error stream
            kept = [out for out in cell.outputs if out.get("name") != "stderr"]
            cell.outputs = [out for out in kept if out.get("text", "...").strip()]
    nbformat.write(notebook, PAGE)


if __name__ == "__main__":
    main()
