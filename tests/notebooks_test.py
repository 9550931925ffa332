"""The notebooks run from the first cell to the last."""

import pathlib

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # the kernel's own machinery; the cells raise on their own
def test_notebook_runs(path, tmp_path, monkeypatch):
  monkeypatch.setenv("LLADAX_STEPS", "8")
  monkeypatch.setenv("LLADAX_WORKDIR", str(tmp_path / "run"))
  monkeypatch.setenv("XLA_FLAGS", "")
  monkeypatch.setenv("MPLBACKEND", "agg")
  notebook = nbformat.read(path, as_version=4)
  assert "import lladax" in "".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
  nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
  drawn = [o for cell in notebook.cells for o in cell.get("outputs", []) if "text/html" in o.get("data", {})]
  assert any("lladax" in o["data"]["text/html"] for o in drawn), "no unmasking was drawn"
