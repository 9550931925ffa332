"""Who may import whom, and what `import lladax` may cost."""

import ast
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).parent.parent / "lladax"
# A module imports only modules before it, of its own room or another. A name without a room is a door; the recipes are
# the files of configs/, which the module `configs` finds without knowing them.
ORDER = [
  f"{room}.{name}" if room else name
  for room, names in (
    ("", "terminal mistake address fields configs sampling diffusion autoregressive optimizer"),
    ("drawing", "pages unmasking animation report"),
    ("devices", "gpus sharding interrupts distributed hlo ahead"),
    ("data", "template vocabularies tokenizer facts reading contamination corpus"),
    ("data", "windows records dialogues sources batches prepare"),
    ("model", "attention cross_entropy quantized rope experts mask_predictor"),
    ("storage", "writing metrics digest together checkpoint near safetensors layout published transfer"),
    ("", "config recipes"),
    ("inference", "engine slots llada load convert verify show chat"),
    ("serving", "settings scheduler orders replies protocol gate app serve"),
    ("evaluation", "reversal fences sandbox tasks.local answers presets kwargs adapter harness held_out evaluate"),
    ("training", "history step setup loop trainer roofline explanation plan"),
    ("", "harness main __init__"),
  )
  for name in names.split()
]
HEAVY = {"grain", "tensorflow_datasets", "apache_beam", "torch"}


def files():
  """Module -> its file."""
  found = {}
  for file in PACKAGE.rglob("*.py"):
    *rooms, name = file.relative_to(PACKAGE).with_suffix("").parts
    found[".".join(rooms if name == "__init__" and rooms else [*rooms, name])] = file
  return found


def imports(file):
  """The lladax modules that a file imports, anywhere in it; the package itself is `__init__`."""
  known = files()
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
        parts = (".".join(rest[:n]) for n in range(len(rest), 0, -1))
        yield next((part for part in parts if part in known), "__init__")


def test_every_module_imports_only_modules_before_it():
  modules = {module: set(imports(file)) for module, file in files().items()}
  modules["recipes"] = {x for file in (PACKAGE.parent / "configs").glob("*.py") for x in imports(file)}
  assert modules.keys() == set(ORDER), "every module has its place in ORDER, and every place a module"
  rank = {module: i for i, module in enumerate(ORDER)}
  assert not [f"{a} imports {b}" for a in modules for b in modules[a] if rank[b] >= rank[a]]


def test_a_file_is_tested_in_the_room_that_it_stands_in():
  tests, rooms = pathlib.Path(__file__).parent, {}
  for module in files():
    *room, name = module.split(".")
    rooms.setdefault(f"{name}_test.py", []).append("/".join(room) or ".")
  for path in tests.rglob("*_test.py"):
    assert str(path.relative_to(tests).parent) in rooms.get(path.name, [str(path.relative_to(tests).parent)]), path


def test_importing_lladax_does_not_load_the_data_libraries():
  code = "import sys, lladax.configs.base; print(*{name.partition('.')[0] for name in sys.modules})"
  result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, stdout=-1, check=True)
  loaded = HEAVY & set(result.stdout.decode().split())
  assert not loaded
