"""README.md is true: its table of files, its commands, and its Python."""

import itertools
import pathlib
import re
import shlex

import pytest
from absl import flags

from lladax import configs

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```([^\n]*)\n(.*?)^```\s*$", README, re.MULTILINE | re.DOTALL)
PYTHON = [(info.split()[1:], code) for info, code in BLOCKS if info.startswith("python")]
SHELL = "\n".join(text for info, text in BLOCKS if not info.startswith("python"))
LINES = SHELL.replace("\\\n", " ").splitlines()


def commands():
  """Yields {flag: value} for each call of lladax in README's fenced blocks."""
  for line in LINES:
    for call in re.finditer(r"(?:python3? -m lladax\.main|\blladax)\s+(?=(--.*))", line):
      words = shlex.shlex(call[1], posix=True, punctuation_chars=True)
      words.whitespace_split = True
      words = itertools.takewhile(lambda word: word != "--" and not set(word) <= set("&|;<>()"), words)  # -- Beam's
      yield dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))


def test_the_first_commands_are_the_promised_ones():
  quickstart = "python -m lladax.main --config=configs/quickstart.py --workdir=runs/quickstart"
  assert [line for line in LINES if line.startswith("pip install -e ")][:3] == [
    f"pip install -e . && {quickstart}",
    "pip install -e '.[test]' && pytest",
    "pip install -e '.[test-all]' && pytest",  # which .ci/run runs
  ]


def test_the_table_of_files_is_the_folder():
  table = README.partition("| file | what it does |")[2].partition("\n\n")[0]
  named = re.findall(r"^\| `([\w/]+\.py)` \| \w", table, re.MULTILINE)
  package = ROOT / "lladax"
  files = {str(file.relative_to(package)) for file in package.rglob("*.py")}
  assert sorted([*named, "configs/__init__.py"]) == sorted(files)


def test_commands_name_configs_and_flags_that_exist(monkeypatch):
  import lladax.main  # noqa: F401  (defines the flags)

  monkeypatch.chdir(ROOT)
  for given in commands():
    config = configs.load(given.get("config", "base"))  # without one it is a workdir's
    for name, text in given.items():
      flag, *path = name.split(".")
      assert flag in flags.FLAGS, f"README uses --{name}, which does not exist"
      if flag != "config" and text:
        flags.FLAGS[flag].parser.parse(text)  # such as a mode that does not exist
      value = config
      for key in path:
        assert value is not None and key in value, f"README sets --{name}: no such field"
        value = value[key]


@pytest.mark.parametrize("code", [code for _, code in PYTHON])
def test_python_compiles(code):
  compile(code, "README.md", "exec")


@pytest.mark.slow
def test_python_marked_to_be_run_runs(request, tmp_path, monkeypatch):
  """Every ```python run block, in order, in one namespace, beside a short run of the quickstart."""
  marked = [code for marks, code in PYTHON if "run" in marks]
  if not marked:
    pytest.skip("README marks no python block with `run`")
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs/quickstart").symlink_to(request.getfixturevalue("quickstart_workdir"))
  monkeypatch.chdir(tmp_path)
  namespace = {}
  for code in marked:
    exec(compile(code, "README.md", "exec"), namespace)
