"""The notebooks run from a clean kernel, and ship with what they showed."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).parents[2] / "docs"
NAMES = ["compare_policies", "retrieval"]


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(DOCS / f"{name}.ipynb", as_version=4)


def shown(notebook: nbformat.NotebookNode) -> list[set[str]]:
    """The kinds of output of each code cell; what goes to standard error is not kept."""
    return [
        {
            kind
            for output in cell.outputs
            for kind in output.get("data", {output.output_type: None})
            if output.get("name") != "stderr"
        }
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_ships_with_its_outputs_and_prose(name: str):
    notebook = read(name)
    assert sum("image/png" in kinds for kinds in shown(notebook)) >= 2
    assert not any("error" in kinds for kinds in shown(notebook))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run in order, from a clean kernel"
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) >= len(code) // 2
    assert (DOCS / f"{name}.ipynb").stat().st_size < 500_000


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_a_clean_kernel(name: str, tmp_path: Path):
    shutil.copy(DOCS / f"{name}.ipynb", tmp_path)
    before, notebook = shown(read(name)), read(name)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert not any("error" in kinds for kinds in shown(notebook))
    assert sum("image/png" in kinds for kinds in shown(notebook)) >= 2
    if any(before):  # it ships with outputs: the same kinds of them
        assert shown(notebook) == before
