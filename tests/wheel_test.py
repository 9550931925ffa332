"""The wheel is the product: built, installed, and used in a folder of somebody else's."""

import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  if importlib.util.find_spec("pip") is None:
    pytest.skip("pip is not installed beside the tests")
  folder = tmp_path_factory.mktemp("wheel")
  isolated = [] if importlib.util.find_spec("hatchling") is None else ["--no-build-isolation"]
  command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *isolated, "-w", folder, ROOT]
  subprocess.run(command, check=True)
  (path,) = folder.glob("lladax-*.whl")
  return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
  folder = tmp_path_factory.mktemp("site")
  subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wheel], check=True)
  return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
  """A folder that has a package `configs` of its own."""
  folder = tmp_path_factory.mktemp("elsewhere")
  (folder / "configs").mkdir()
  (folder / "configs/__init__.py").write_text("")
  for name in ("base", "quickstart"):
    (folder / f"configs/{name}.py").write_text("raise RuntimeError('this one is not ours')\n")
  (folder / "configs/settings.py").write_text("STEPS = 2\n")
  (folder / "configs/own.py").write_text(
    "from configs import settings\nfrom lladax.configs import quickstart\n\n\n"
    "def get_config(seed):\n  config = quickstart.get_config()\n"
    "  config.update(steps=settings.STEPS, seed=int(seed))\n  return config\n"
  )
  return folder


@pytest.fixture(scope="module")
def python(site, elsewhere):
  """python(argument, ...) -> a finished process, which sees the wheel and the dependencies but not the checkout."""
  env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (site, sysconfig.get_path("purelib"))))}

  def python(*given):
    command = [sys.executable, "-S", *map(str, given)]  # -S: no .pth, so no editable checkout
    return subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=300)

  return python


@pytest.fixture(scope="module")
def call(python):
  """call(flag, ...): the command."""
  return functools.partial(python, "-m", "lladax.main")


@pytest.fixture(scope="module")
def run(call, tiny_values, elsewhere):
  """The name of a workdir that a recipe was trained in, for two steps."""
  values = tiny_values | {"steps": 2, "optimizer.schedule": ((-1, 0.03),), "data.held_out": 0.0}
  values["evaluate.canvases"] = ()
  done = call("--config=quickstart", "--workdir=run", *(f"--config.{name}={value}" for name, value in values.items()))
  assert done.returncode == 0, done.stderr
  assert len((elsewhere / "run/metrics.jsonl").read_text().splitlines()) >= 2
  return "run"


def test_it_holds_what_the_tree_holds(wheel):
  held = set(zipfile.ZipFile(wheel).namelist())
  tree = {str(path.relative_to(ROOT)) for path in ROOT.glob("lladax/**/*") if path.is_file()}
  tree |= {f"lladax/configs/{path.name}" for path in ROOT.glob("configs/*")}
  assert {name for name in tree if "__pycache__" not in name} == {name for name in held if ".dist-info/" not in name}


def test_the_sources_hold_the_package(tmp_path):
  pytest.importorskip("hatchling")
  subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path], cwd=ROOT, check=True)
  (path,) = tmp_path.glob("lladax-*.tar.gz")
  held = {name.partition("/")[2] for name in tarfile.open(path).getnames()}
  tree = {str(path.relative_to(ROOT)) for path in ROOT.glob("lladax/**/*") if path.is_file()}
  assert {name for name in tree if "__pycache__" not in name} <= held


def test_a_recipe_is_trained_by_its_name_and_sampled_without(python, site, run):
  given = f"--workdir={run} --mode=sample --prompt=red --config.sample.steps=4 --config.sample.gen_length=4"
  done = python(site / "bin/lladax", *given.split(), "--config.sample.block_length=4")  # what a user types as lladax
  assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.slow
def test_a_config_of_the_user_s_builds_on_ours(python):
  code = "from lladax import configs; c = configs.load('configs/own.py:7'); print(c.steps, c.seed, c.noise.masking)"
  done = python("-c", code)
  assert done.stdout == "2 7 exact\n", done.stderr


def test_the_fields_are_shown_with_their_comments(call):
  done = call("--config=quickstart", "--mode=show")
  assert done.returncode == 0 and re.search(r"^steps +800 +recipe +updates *$", done.stdout, re.MULTILINE), done.stderr


@pytest.mark.slow
def test_a_page_is_drawn_from_the_files_in_it(python):
  code = """
import numpy, lladax.drawing.unmasking as unmasking, lladax.drawing.report as report
canvas = unmasking.Unmasking(("a", "b"), numpy.arange(2), numpy.ones(2))
print(unmasking.html([canvas]), unmasking.heat_map([canvas]), report.page(report.Report("r", {})))
"""
  done = python("-c", code)
  assert done.returncode == 0, done.stderr
  assert done.stdout.count(".lladax") > 2 and done.stdout.count("</script>") == 2 and "<h1>r</h1>" in done.stdout


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ("--config=quickstart --workdir=x --config.stpes=3", "config.stpes: there is no such field; did you mean"),
    ("--config=quikstart --workdir=x", "--config=quikstart: there is no such recipe or file; did you mean quickstart?"),
  ],
)
def test_a_mistake_is_one_line(call, given, message):
  done = call(*given.split())
  assert (done.returncode, done.stdout) == (1, "")
  assert done.stderr.startswith(f"lladax: {message}") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_an_import_needs_no_config(call, elsewhere):
  done = call("--mode=import", f"--source={ROOT / 'tests/golden/llada-tiny'}", "--workdir=imported")
  assert done.returncode == 0, done.stderr
  assert (elsewhere / "imported/config.json").is_file()
