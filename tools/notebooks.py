"""Run the notebooks of docs/ from a clean kernel and keep their outputs: `python tools/notebooks.py [NAME]`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).parents[1] / "docs"
NAMES = ("compare_policies", "retrieval")


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook, run in a folder of its own; small pictures, and no trace of the machine."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, folder)
        kernel = {"timeout": 600, "kernel_name": "python3", "resources": {"metadata": {"path": folder}}}
        NotebookClient(notebook, **kernel).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _tidied(cell.outputs)
    return notebook


def _tidied(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Without what went to standard error, and with neighbouring prints in one."""
    found: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if found and output.output_type == found[-1].output_type == "stream":
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def main(names: list[str]) -> None:
    """Run what was asked for, or all."""
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    for name in names or NAMES:
        begun = time.perf_counter()
        notebook = run(DOCS / f"{name}.ipynb")
        nbformat.write(notebook, DOCS / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
