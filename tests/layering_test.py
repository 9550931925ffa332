"""Who may import whom, and what `import lladax` may cost."""

import ast
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).parent.parent / "lladax"
# A module may import only the modules before it.
ORDER = """mistake fields tokenizer diffusion autoregressive attention sharding distributed optimizer metrics visualize
animation facts sandbox corpus records mask_predictor sampling data prepare checkpoint safetensors huggingface llada
convert reversal config report harness evaluate train chat plan main __init__""".split()
HEAVY = {"grain", "tensorflow_datasets", "apache_beam", "torch"}


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
        yield rest[0] if rest and (PACKAGE / f"{rest[0]}.py").exists() else "__init__"


def test_every_module_imports_only_modules_before_it():
  modules = {file.stem: set(imports(file)) for file in PACKAGE.glob("*.py")}
  assert modules.keys() <= set(ORDER), "a new module needs its place in ORDER"
  rank = {module: i for i, module in enumerate(ORDER)}
  assert not [f"{a} imports {b}" for a in modules for b in modules[a] if rank[b] >= rank[a]]


def test_importing_lladax_does_not_load_the_data_libraries():
  code = "import sys, lladax; print(*{name.partition('.')[0] for name in sys.modules})"
  result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, stdout=-1, check=True)
  loaded = HEAVY & set(result.stdout.decode().split())
  assert not loaded
