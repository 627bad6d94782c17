"""Every notebook runs from top to bottom, and is kept with what it printed."""

from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "experiments"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("default")  # Jupyter's own; what the cells warn of goes to their output
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("BITNET_NOTEBOOK_SMALL", "1")  # of the production model: the same, smaller
    # The commands of a notebook, each a process, compile the same programs: they share this one's.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in code), "kept without its outputs; run it and save"
    kept = [output.output_type for cell in code for output in cell.outputs]
    assert "error" not in kept
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    warned = [
        output.text
        for cell in code
        for output in cell.outputs
        if output.output_type == "stream" and "Warning" in output.text
    ]
    assert not warned
