"""Who may import whom, and what `import lladax` may cost."""

import ast
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).parent.parent / "lladax"
# A module may import only the modules before it.
ORDER = """mistake fields configs template tokenizer diffusion autoregressive attention sharding distributed optimizer
metrics visualize animation facts sandbox reading contamination corpus records mask_predictor sampling data prepare
checkpoint safetensors huggingface llada convert reversal config report answers harness evaluate train chat plan main
__init__""".split()
HEAVY = {"grain", "tensorflow_datasets", "apache_beam", "torch"}


def files():
  """Module -> its file; the recipes of configs/ are one with the module that finds them."""
  return {file.stem: file for file in PACKAGE.glob("*.py")} | {"configs": PACKAGE / "configs/__init__.py"}


def imports(file):
  """The lladax modules that a file imports, anywhere in it; the package itself is `__init__`."""
  for node in ast.walk(ast.parse(file.read_text("utf-8"))):
    if isinstance(node, ast.Import):
      paths = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      parent = ".".join(filter(None, ["lladax" if node.level else "", node.module]))
      paths = [f"{parent}.{alias.name}" for alias in node.names]
    else:
      continue
    for package, *rest in (path.split(".") for path in paths):
      if package == "lladax":
        yield rest[0] if rest and rest[0] in files() else "__init__"


def test_every_module_imports_only_modules_before_it():
  modules = {module: set(imports(file)) for module, file in files().items()}
  modules["configs"] |= {x for file in (PACKAGE.parent / "configs").glob("*.py") for x in imports(file)} - {"configs"}
  assert modules.keys() <= set(ORDER), "a new module needs its place in ORDER"
  rank = {module: i for i, module in enumerate(ORDER)}
  assert not [f"{a} imports {b}" for a in modules for b in modules[a] if rank[b] >= rank[a]]


def test_importing_lladax_does_not_load_the_data_libraries():
  code = "import sys, lladax; print(*{name.partition('.')[0] for name in sys.modules})"
  result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, stdout=-1, check=True)
  loaded = HEAVY & set(result.stdout.decode().split())
  assert not loaded
