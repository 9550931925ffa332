"""The pages are true: their commands, fields, Python and links; the table of files; and they can be built."""

import contextlib
import itertools
import pathlib
import re
import shlex
import subprocess
import sys

import prose
import pytest
import served
from absl import flags

from lladax import configs

ROOT = prose.ROOT
# The fenced blocks that a page may have. Others would go past the tests.
KINDS = r"bash|text|python .+|{toctree}|{eval-rst}|{include} \S+"


def calls(text):
  """Yields {flag: value} for each call of lladax in a page, fenced or between backticks."""
  for line in prose.lines(prose.shell(text)) + [x for x in prose.inline(text) if "=..." not in x]:
    for call in re.finditer(r"(?:python3? -m lladax\.main|(?:^|[;&] )lladax)\s+(?=(--.*))", line):
      inner = call[1].count("'") % 2  # a command within the quotes of another one
      words = shlex.shlex(call[1].rstrip("'") if inner else call[1], posix=True, punctuation_chars=True)
      words.whitespace_split = True
      words = itertools.takewhile(lambda word: word != "--" and not set(word) <= set("&|;<>()"), words)  # -- Beam's
      yield dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))


def python(text):
  """[(marks, code)] of the blocks of Python."""
  return [(info.partition(" ")[2], code) for info, code in prose.blocks(text) if info.split()[:1] == ["python"]]


def test_the_first_commands_are_the_promised_ones():
  quickstart = "python -m lladax.main --config=configs/quickstart.py --workdir=runs/quickstart"
  assert [
    line for line in prose.lines(prose.shell(prose.PAGES["README.md"])) if line.startswith("pip install -e ")
  ] == [
    f"pip install -e . && {quickstart}",
    "pip install -e '.[test]' && pytest",
    "pip install -e '.[test-all]' && pytest",  # which .ci/run runs
  ]


def test_readme_fits_two_screens():
  assert len(prose.PAGES["README.md"].splitlines()) <= 120


def test_the_table_of_files_is_the_folder():
  table = prose.PAGES["docs/design.md"].partition("| file | what it does |")[2].partition("\n\n")[0]
  named = re.findall(r"^\| `([\w/]+\.py)` \| \w", table, re.MULTILINE)
  package = ROOT / "lladax"
  files = {str(file.relative_to(package)) for file in package.rglob("*.py")}
  assert sorted([*named, "configs/__init__.py"]) == sorted(files)


@pytest.mark.parametrize("page", prose.PAGES)
def test_commands_name_configs_and_flags_that_exist(page, monkeypatch):
  import lladax.main  # noqa: F401  (defines the flags)

  monkeypatch.chdir(ROOT)
  for given in calls(prose.PAGES[page]):
    spec = given.get("config", "base")  # without one it is a workdir's
    config = configs.load("base" if spec.startswith("runs/") else spec)
    for name, text in given.items():
      flag, *path = name.split(".")
      assert flag in flags.FLAGS, f"{page} uses --{name}, which does not exist"
      if flag != "config" and text:
        flags.FLAGS[flag].parser.parse(text)  # such as a mode that does not exist
      value = config
      for key in path:
        assert value is not None and key in value, f"{page} sets --{name}: no such field"
        value = value[key]


@pytest.mark.parametrize("page", prose.PAGES)
def test_fields_that_are_named_exist(page):
  base = configs.load("base")
  groups = "|".join(name for name, value in base.items() if hasattr(value, "keys"))
  for text in prose.inline(prose.PAGES[page]):
    for group, name in re.findall(rf"(?<![\w./-])(?:--config\.)?({groups})\.(\w+)(?!\w|\()", text):
      assert name in base[group] or (name in ("py", "ipynb") and "=" not in text), f"{page}: there is no {group}.{name}"


@pytest.mark.parametrize("page", [page for page in prose.PAGES if page != "CHANGELOG.md"])
def test_files_that_are_named_exist(page):
  for text in prose.inline(prose.PAGES[page]):
    named = re.fullmatch(r"[\w./]+/\w+\.(?:cfg|ipynb|md|py|sh|toml|yaml)", text)
    if named and not re.search(r"NAME|ROOM|MODULE", text):  # which stand for a name
      assert any((ROOT / folder / text).is_file() for folder in ("", "lladax", "lladax/evaluation")), f"{page}: {text}"


@pytest.mark.parametrize("page", prose.PAGES)
def test_blocks_are_of_a_known_kind(page):
  """Python is run, or says why not: ```python run, or ```python shown: it needs a TPU."""
  odd = [info for info, _ in prose.blocks(prose.PAGES[page]) if not re.fullmatch(KINDS, info)]
  assert odd == []
  for marks, code in python(prose.PAGES[page]):
    assert re.fullmatch(r"run|shown: \w.+", marks), f"{page}: a block of Python is marked {marks!r}"
    compile(code, page, "exec")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("page", [page for page, text in prose.PAGES.items() if "```python run\n" in text])
def test_python_marked_to_be_run_runs(page, request, tmp_path, monkeypatch):
  """Every ```python run block of a page, in order, in one namespace, beside a short run of the quickstart."""
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs/quickstart").symlink_to(request.getfixturevalue("quickstart_workdir"))
  monkeypatch.chdir(tmp_path)
  blocks, namespace, server = (
    [code for marks, code in python(prose.PAGES[page]) if marks == "run"],
    {},
    "http://127.0.0.1:8000",
  )
  with contextlib.ExitStack() as stack:
    if any(server in code for code in blocks):
      for name in ("openai", "uvicorn"):
        pytest.importorskip(name)
      address = stack.enter_context(served.command(tmp_path / "runs/quickstart"))[1]
      blocks = [code.replace(server, address) for code in blocks]
    for code in blocks:
      exec(compile(code, page, "exec"), namespace)


@pytest.mark.parametrize("page", prose.PAGES)
def test_links_lead_somewhere(page):
  for link in prose.links(prose.PAGES[page]):
    if re.match(r"https?://", link):
      continue
    path, _, anchor = link.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    assert file.is_file(), f"{page} links {link}: there is no such file"
    if anchor:
      there = prose.PAGES[str(file.resolve().relative_to(ROOT))]
      assert anchor in prose.anchors(there), f"{page} links {link}: there is no such heading"


@pytest.mark.slow
def test_the_pages_are_built_without_a_warning(tmp_path):
  pytest.importorskip("sphinx")
  pytest.importorskip("myst_parser")
  pytest.importorskip("sphinx_book_theme")
  # What warns in Python while a page is built is not ours; what Sphinx says of a page is, and is an error.
  command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "docs", str(tmp_path / "site")]
  run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr[-6000:]
  found = {path.stem for path in (tmp_path / "site").glob("*.html")}
  assert found >= {path.stem for path in (ROOT / "docs").glob("*.md")}
  assert "log_likelihood" in pathlib.Path(tmp_path / "site/api.html").read_text("utf-8")  # docstrings are shown
