"""Every notebook in examples/ runs from top to bottom, and is stored as it was run."""

import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    # jupyter_core announces that it will look for its folders elsewhere.
    warnings.filterwarnings("ignore", "Jupyter is migrating its paths", DeprecationWarning)
    import nbformat
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# Imports take longer than most notebooks, which share a process for that, and nothing else.
RESET = """
%reset -f
import torch
torch.set_default_dtype(torch.float32)
torch.default_generator.manual_seed(-1)
del torch
"""


class ThisInterpreter(AsyncKernelManager):
    """Starts the interpreter that runs the tests, whatever kernels are installed."""

    @property
    def kernel_spec(self):
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


@pytest.fixture(scope="module")
def client():
    """Runs notebooks in one process, each with names, generator and default dtype as new."""
    client = NotebookClient(
        nbformat.v4.new_notebook(),
        kernel_manager_class=ThisInterpreter,
        timeout=120,
        resources={"metadata": {"path": str(ROOT)}},
    )
    yield client
    with client.setup_kernel():  # ends it
        pass


def run(client, *cells):
    client.nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(RESET), *cells])
    client.execute(cleanup_kc=False)
    return client.nb.cells[1:]


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_nothing_of_a_notebook_is_left_for_the_next(client):
    sources = "import torch; x = torch.ones(2)", "torch.set_default_dtype(torch.float64)"
    run(client, *map(nbformat.v4.new_code_cell, sources))
    left = "import torch; print('x' in globals(), 'plt' in globals(), torch.get_default_dtype())"
    (cell,) = run(client, nbformat.v4.new_code_cell(left))
    assert cell.outputs[0].text.strip() == "False False torch.float32"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, client):
    if "compiled" in path.stem and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        pytest.skip("torch.compile needs a C++ compiler")
    notebook = nbformat.read(path, as_version=4)
    run(client, *notebook.cells)
    assert "assert" in notebook.cells[-1].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert not re.search(r"/(home|tmp|Users|root)/", path.read_text("utf-8"))
