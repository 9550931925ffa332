import json
import os
import pathlib
import sqlite3
import subprocess
import sys

import pytest

import lladax
from lladax.inference.llada import LLaDA
from lladax.mistake import Mistake

pytest.importorskip("lm_eval")
from lm_eval.api.model import CachingLM  # noqa: E402
from questions import bombs, tiny

from lladax import harness as door  # noqa: E402
from lladax.devices import distributed  # noqa: E402
from lladax.evaluation import adapter, harness

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = [
  pytest.mark.usefixtures("quick_compiles"),
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the harness and of what it imports
]


def test_importing_it_loads_no_torch():
  code = "import sys, lladax.harness; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def llada():
  return tiny()


@pytest.fixture
def command(monkeypatch, capsys):
  """command(FLAGS) -> (exit code, what it wrote to standard error), in this process."""
  import lm_eval.tasks
  import lm_eval.utils
  from lm_eval.api import model

  def state():
    return lm_eval.tasks.TaskManager, model.CachingLM, sys.argv, dict(os.environ)

  monkeypatch.setattr(lm_eval.utils, "setup_logging", lambda: None)
  monkeypatch.setattr(distributed.logging, "basicConfig", lambda **_: None)
  monkeypatch.setenv(harness.DATA, "")

  def run(flags):
    capsys.readouterr()
    before = state()
    code = distributed.guard(door.main, ["lladax.harness", *flags.split()], "lladax.harness")
    assert state() == before, "what one command asked another task of this process would get"
    return code, capsys.readouterr().err

  return run


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    ("--limit 1", "--tasks is missing: name some"),
    ("--tasks lladax_arc_chalenge", "task 'lladax_arc_chalenge': there is no such task; did you mean lladax_arc_chall"),
    ("--tasks lladax_arc_challenge --model_args path=x,num_samples=0", "num_samples=0: must be a positive number"),
    ("--tasks lladax_arc_challenge --data_dir /nowhere", "--data_dir /nowhere: there is no such folder"),
    ("--tasks lladax_arc_challenge", "data_dir='': there is no eval/arc_challenge_test.jsonl"),
    ("--tasks lladax_arc_challenge --include_path /nowhere", "--include_path /nowhere: there is no such folder"),
    ("--tasks /nowhere/a.yaml", "--tasks /nowhere/a.yaml: there is no such file"),
    ("--tasks lladax_arc_challenge --model lladex", "--model lladex: there is no such model; did you mean lladax"),
    ("--tasks lladax_gsm8k --model dummy --use_cache c", "--use_cache c: answers of other models than lladax would be"),
    ("--tasks lladax_mbpp", "lladax_mbpp runs generated code: allow it with"),
    ("--tasks lladax_gsm8k --log_samples", "Specify --output_path if providing --log_samples"),
    (
      "--tasks lladax_gsm8k --output_path /dev/null/x",
      "--output_path: /dev/null/x cannot be written: /dev/null is a file, where a folder is needed",
    ),
    ("--config /nowhere.yaml", "Config file not found: /nowhere.yaml"),
    (
      "--tasks lladax_gsm8k --data_dir={data} --gen_kwargs do_sample=True,temperature=1,min_p=0.5",
      "lladax_gsm8k: generation_kwargs: min_p=0.5: lladax's sampler has no min_p",
    ),
    ("--tasks lladax_gsm8k --data_dir={data} --model_args path=/nowhere", "/nowhere"),
  ],
)
def test_the_command_line_says_a_mistake_in_one_line(command, data_dir, monkeypatch, flags, said):
  if "path=/nowhere" not in flags:
    monkeypatch.setattr(adapter.load, "load", None)  # before there is a model
  code, told = command(flags.format(data=data_dir))
  assert code == 1 and "Traceback" not in told
  last = told.strip().splitlines()[-1]
  assert last.startswith("lladax.harness: ") and said in last


@pytest.mark.parametrize("error", [ValueError("a shape"), OSError("a file")])
def test_a_crash_of_the_command_line_is_a_crash(command, data_dir, monkeypatch, error):
  def load(*_, **__):
    raise error

  monkeypatch.setattr(adapter.load, "load", load)
  code, told = command(f"--tasks lladax_gsm8k --data_dir {data_dir} --model_args path=x")
  assert code == 70 and "Traceback" in told


@pytest.mark.slow
def test_the_module_is_the_command():
  flags = "--tasks lladax_arc_challenge --model_args path=x,mcnum=3"
  done = subprocess.run(
    [sys.executable, "-m", "lladax.harness", *flags.split()], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 1 and "Traceback" not in done.stderr
  said = "lladax.harness: mcnum=3: there is no such option; did you mean mc_num?"
  assert done.stderr.strip().splitlines()[-1] == said


def plant(path, bomb, keys=()):
  """The harness's own kind of cache, with a pickle as the answer to every key."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with sqlite3.connect(path) as file:
    file.execute("CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB)")
    file.executemany("INSERT INTO unnamed VALUES (?, ?)", [(key, bomb) for key in keys])
  file.close()


def test_a_bomb_in_the_cache_does_not_go_off(command, llada, data_dir, tmp_path, monkeypatch, caplog):
  from lm_eval.api.model import hash_args

  marker, cache, keys = tmp_path / "marker", tmp_path / "workdir" / "harness", []
  real = adapter.Harness.loglikelihood
  monkeypatch.setattr(
    adapter.Harness, "loglikelihood", lambda self, requests, **options: keys.extend(
      hash_args("loglikelihood", request.args) for request in requests
    ) or real(self, requests, **options)
  )  # fmt: skip
  run = {"data_dir": str(data_dir), "limit": 1, "num_samples": 2, "num_fewshot": 0}
  clean = harness.evaluate(llada, "arc_challenge", **run)
  name = cache / adapter.fingerprint(adapter.Harness(llada=llada, num_samples=2))
  pickled, *others = bombs(marker)
  for path in (name, tmp_path / "c_rank0"):
    plant(path.with_suffix(".db"), pickled, dict.fromkeys(keys))
    path.with_suffix(".jsonl").write_bytes(b"\n".join([pickled, *others]))
  for _ in range(2):
    assert harness.evaluate(llada, "arc_challenge", use_cache=cache, **run) == clean
    assert name.with_suffix(".jsonl").read_bytes().count(b'["loglikelihood", ') == 3 and not marker.exists()
    assert "what is no answer of lladax is not read" in caplog.text
    monkeypatch.setattr(LLaDA, "log_likelihood", None)  # the second time they are there
  monkeypatch.undo()
  monkeypatch.setattr(adapter.load, "load", lambda *_, **__: llada)
  flags = f"--tasks lladax_arc_challenge --data_dir {data_dir} --limit 1 --model_args path=x,mc_num=2"
  for _ in range(2):
    code, told = command(f"{flags} --use_cache {tmp_path / 'c'}")
    assert code == 0, told
    assert (tmp_path / "c_rank0.jsonl").read_bytes().count(b'["loglikelihood", ') == 3 and not marker.exists()
  with pytest.raises(Mistake, match="the harness's own cache of answers is not read"):
    CachingLM(adapter.Harness(llada=llada), str(tmp_path / "c_rank0.db"))


@pytest.mark.slow
def test_the_command_line_and_a_mesh(tiny_workdir, data_dir, tmp_path):
  args = f"path={tiny_workdir},mc_num=2,gen_length=4,tensor=2,fsdp=2"
  command = f"-m lladax.harness --tasks lladax_arc_challenge,lladax_humaneval --limit 2 --model_args {args}"
  command += f" --data_dir {data_dir} --output_path {tmp_path} --use_cache {tmp_path / 'cache'}"
  run = {"cwd": ROOT, "env": os.environ | {"HF_HUB_OFFLINE": "1"}, "capture_output": True, "text": True}
  refused = subprocess.run([sys.executable, *command.split()], **run)
  assert refused.returncode == 1 and "runs generated code" in refused.stderr and "--allow_code" in refused.stderr
  assert "Traceback" not in refused.stderr
  done = subprocess.run([sys.executable, *command.split(), "--allow_code"], **run)
  assert done.returncode == 0, done.stderr[-2000:]
  assert "lladax_arc_challenge" in done.stdout and "pass@1" in done.stdout
  (file,) = tmp_path.glob("**/results_*.json")
  found = json.loads(file.read_text())["results"]["lladax_arc_challenge"]
  plain = harness.evaluate(
    lladax.load(tiny_workdir), "lladax_arc_challenge", data_dir=str(data_dir), limit=2, num_samples=2
  )
  assert found["acc,none"] == plain["lladax_arc_challenge"]["acc"]
