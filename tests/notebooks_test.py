"""The notebooks run from the first cell to the last, and install nothing that nobody has named."""

import ast
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import conftest
import layouts
import pytest

import lladax

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code(path):
  return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # the kernel's own machinery; the cells raise on their own
def test_notebook_runs(path, tmp_path, monkeypatch):
  nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
  pytest.importorskip("ipykernel")
  monkeypatch.setenv("LLADAX_STEPS", "8")
  monkeypatch.setenv("LLADAX_WORKDIR", str(tmp_path / "run"))
  monkeypatch.setenv("LLADAX_LENGTH", "16")
  if path.stem == "llada":
    pytest.importorskip("qwix")
    published = layouts.publish(tmp_path / "published", layouts.WITH_TEXT | {"max_sequence_length": 512})
    layouts.add_tokenizer(published)
    monkeypatch.setenv("LLADAX_MODEL", str(published))
  monkeypatch.setenv("XLA_FLAGS", conftest.XLA_FLAGS)
  monkeypatch.setenv("MPLBACKEND", "agg")
  notebook = nbformat.read(path, as_version=4)
  assert "import lladax" in "".join(code(path))
  nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
  drawn = [o for cell in notebook.cells for o in cell.get("outputs", []) if "text/html" in o.get("data", {})]
  assert any("lladax" in o["data"]["text/html"] for o in drawn), "no unmasking was drawn"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_what_the_user_names(path, tmp_path, monkeypatch):
  cell, ran = code(path)[0], []
  assert cell == code(NOTEBOOKS[0])[0] and 'SOURCE = ".."' in cell
  (tmp_path / "notebooks").mkdir()
  monkeypatch.chdir(tmp_path / "notebooks")
  monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))

  def run(source, installed):
    with monkeypatch.context() as here:
      here.chdir(tmp_path / "notebooks")
      here.setattr(importlib.util, "find_spec", lambda name: installed or None)
      exec(cell.replace('SOURCE = ".."', f"SOURCE = {source!r}"), {})

  run("..", True)
  assert not ran
  for source in ("..", "lladax", "lladax/lladax"):  # opened on its own; names that an index would look up
    with pytest.raises(FileNotFoundError, match=f"SOURCE = {source!r}: no checkout of lladax is there.*that you trust"):
      run(source, False)
  assert not ran
  sources = [str(ROOT), "git+https://example.org/somebody/lladax", "lladax-0.1.0-py3-none-any.whl"]
  for source in sources:
    run(source, False)
  assert ran == [[sys.executable, "-m", "pip", "install", "-q", source] for source in sources]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_the_public_names_alone(path):
  nodes = list(ast.walk(ast.parse("\n".join(code(path)))))
  imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
  imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
  assert "lladax" in imported and not [name for name in imported if name.startswith("lladax.")]
  names = [x.attr for x in nodes if isinstance(x, ast.Attribute) and getattr(x.value, "id", "") == "lladax"]
  assert names and {*names} <= {*lladax.__all__}


def test_no_page_or_script_fetches_code_from_a_name_that_is_a_guess():
  """This project has no address yet; anybody may take a name that a page made up."""
  texts = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml")]
  texts += sorted((ROOT / "docs").glob("*.md"))
  texts += [path for folder in ("notebooks", "launch", "configs", "lladax") for path in (ROOT / folder).rglob("*.*")]
  host = r"(?:git\+|https?://|git@|hf://)"
  fetched = re.compile(rf"(?:clone|pip3? install|git\+)[^\n`]*?{host}\w[^\s\"'`]*")
  ours = re.compile(rf"{host}[^\s\"'`)]*\blladax\b[^\s\"'`)]*")
  for path in texts:
    if path.suffix not in (".pyc", ".png", ".svg"):
      text = path.read_text("utf-8")
      assert not (fetched.findall(text) + ours.findall(text)), path
