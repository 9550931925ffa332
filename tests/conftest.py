"""Eight CPU devices for every test, no silent broadcasting, and a tiny run."""

import atexit
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import pytest

# Before jax is imported. What the user has set stays. Of several test processes (`-n`) the first one does it for all.
if "LLADAX_TESTS_XLA_FLAGS" not in os.environ:
  flags = os.environ.get("XLA_FLAGS", "")
  # XLA's older emitters compile in half the time; `pytest -m slow` takes those that users have. From 0.11 on the older
  # ones are gone, and their flag is an error.
  if importlib.metadata.version("jaxlib") < "0.11" and "slow" not in sys.argv:
    flags = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()
  os.environ["LLADAX_TESTS_XLA_FLAGS"] = flags
  if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  # A tiny model compiles longer than it runs: the tests, and the commands they start, compile each program once.
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lladax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
XLA_FLAGS = os.environ["LLADAX_TESTS_XLA_FLAGS"]  # without the eight devices

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).parent.parent
BEGAN = time.monotonic()
# They take minutes, by default or with the slow ones, and are begun first: one that came last would leave a core idle.
LONGEST = [
  f"tests/{name}_test.py"
  for name in (
    "commands", "training/plan", "inference/samplers", "lowering", "notebooks", "inference/llada", "main",
    "storage/safetensors", "scaling", "devices/distributed", "evaluation/adapter", "wheel", "training/step", "hostile",
    "training/loop", "evaluation/sandbox", "faults", "devices/interrupts", "data/template", "inference/verify",
  )
]  # fmt: skip


def pytest_addoption(parser):
  parser.addoption("--seconds", type=float, default=float("inf"), help="what would begin later is skipped")


MAPS = pathlib.Path("/proc/self/maps")  # of Linux


def pytest_runtest_teardown(item):
  """Programs are let go of before there are too many: each is mapped, and a process may have 65,530 maps, no more.

  Behind that XLA crashes, wherever it is. What is needed again comes from the cache on disk. And a command that was run
  here (`guard`) leaves no log behind, whose stream is closed by now.
  """
  for handler in logging.root.handlers[:]:
    if type(handler.formatter).__module__ == "lladax.terminal":
      logging.root.removeHandler(handler)
  if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
    jax.clear_caches()
    gc.collect()


def pytest_runtest_setup(item):
  if time.monotonic() - BEGAN > item.config.getoption("seconds"):
    pytest.skip("no time left (--seconds)")


def pytest_collection_modifyitems(items):
  order = {str(ROOT / name): i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: order.get(str(item.path), len(order)))


@pytest.fixture(scope="session")
def load_benchmark():
  """load_benchmark("scaling") -> the module benchmarks/scaling.py; the folder is no package."""

  def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

  return load


@pytest.fixture(scope="session")
def quickstart_workdir(tmp_path_factory):
  """A workdir as the quickstart leaves it, after two steps: README's own command, on one device."""
  workdir = tmp_path_factory.mktemp("quickstart")
  command = f"-m lladax.main --config=configs/quickstart.py --workdir={workdir} --config.steps=2"
  command += " --config.evaluate.num_samples=1"
  with _quick_compiles():
    env = {**os.environ, "XLA_FLAGS": XLA_FLAGS}
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=env, check=True)
  return workdir


@contextlib.contextmanager
def _quick_compiles():
  before = jax.config.read("jax_disable_most_optimizations")  # one may stand inside another
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for the commands that a test starts
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
  if not before:
    os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)


@pytest.fixture(scope="module")
def quick_compiles():
  """XLA compiles in half the time: for tests that compile more than they compute."""
  with _quick_compiles():
    yield


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
  """A JSONL file of 200 documents with something to learn: rhymes of colours."""
  path = tmp_path_factory.mktemp("corpus") / "colours.jsonl"
  colours = random.Random(0).choices(["red", "green", "blue", "yellow"], k=200)
  lines = (json.dumps({"text": f"{colour} and {colour} {i % 10}"}) + "\n" for i, colour in enumerate(colours))
  path.write_text("".join(lines))
  return path


@pytest.fixture(scope="session")
def tiny_values(tiny_corpus):
  """What makes configs/base.py a run of seconds: field -> value."""
  return {
    "steps": 20,
    "model.D": 16,
    "model.N": 2,
    "model.H": 2,
    "model.G": 2,
    "model.K": 8,
    "model.F": 32,
    "tokenizer.kind": "bytes",
    "data.corpus": f"files:{tiny_corpus}",
    "data.length": 16,
    "data.batch_size": 32,
    "data.held_out": 0.1,
    "optimizer.schedule": ((5, 0.03), (-1, 0.03)),
    "checkpoint.every": 5,
    "evaluate.num_samples": 2,
    "log.tensorboard": False,
  }


@pytest.fixture(scope="session")
def tiny(tiny_values):
  """tiny({"steps": 3}) -> the Config of a run of seconds, with these fields changed."""
  from lladax.config import parse
  from lladax.configs import base

  def make(changes=()):
    values = base.get_config()
    values.update_from_flattened_dict(tiny_values | dict(changes))
    return parse(values.to_dict())

  return make


@pytest.fixture(scope="session")
def tiny_flags(tiny_values):
  """The same on the command line."""
  return ["--config=configs/base.py", *(f"--config.{name}={value}" for name, value in tiny_values.items())]


@pytest.fixture(scope="session")
def tiny_workdir(tiny, tmp_path_factory):
  """The workdir of an unbroken tiny run. To be copied, not changed."""
  from lladax.training import trainer

  workdir = tmp_path_factory.mktemp("tiny") / "unbroken"
  with _quick_compiles():
    trainer.train(tiny(), workdir)
  return workdir


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  """A question or three of each kind of the harness's task."""
  from questions import write

  folder = tmp_path_factory.mktemp("benchmarks")
  choice = [{"question": f"{i}?", "choices": ["a", "b", "cd"], "answer": i % 3} for i in range(6)]
  for split in ("test", "train"):
    write(folder, f"eval/arc_challenge_{split}", choice)
    write(folder, f"math/gsm8k_{split}", [{"question": f"{i} + 1?", "answer": f"so\n#### {i + 1}"} for i in range(6)])
  write(
    folder,
    "eval/lambada_openai",
    [{"context": "one two", "continuation": "three"}, {"context": "a", "continuation": "b"}],
  )
  program = {"entry_point": "f", "prompt": "def f(x):\n", "test": "def check(c):\n  assert c(1) == 2"}
  write(folder, "eval/humaneval", [program | {"task_id": "HumanEval/0", "canonical_solution": "  return x + 1\n"}])
  lines = [
    program | {"entry_point": name, "prompt": f"def {name}(x):\n", "suffix": "  return y\n", "task_id": f"{name}/{i}"}
    for name in "fgh" for i in range(2)
  ]  # fmt: skip
  lines = [line | {"canonical_solution": "  y = x + 1\n"} for line in lines]
  write(folder, "eval/humaneval_infill_single_line", lines)
  (folder / "zh").mkdir()
  (folder / "zh" / "poem_data.json").write_text(json.dumps([{"first": "ab", "second": "cd"}] * 3))
  return folder


@pytest.fixture
def libtpu():
  pytest.importorskip("libtpu")


@pytest.fixture
def quick_plans(libtpu, monkeypatch):
  """libtpu compiles in half the time: for tests of what is told of a program, not of how good it is."""
  monkeypatch.setenv("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1.0")  # for the commands that a test starts
  before = jax.config.jax_exec_time_optimization_effort
  jax.config.update("jax_exec_time_optimization_effort", -1.0)
  yield
  jax.config.update("jax_exec_time_optimization_effort", before)


@pytest.fixture
def gpu_compiler():
  from lladax.devices import ahead

  if not ahead.has_gpu_compiler():
    pytest.skip("could not find JAX's CUDA plugin and NVIDIA's assembler: pip install -e '.[plan-gpu]'")
