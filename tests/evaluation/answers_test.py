"""Answers in a file; and what holds of every file: nothing that is read can run."""

import contextlib
import json
import pathlib
import re
import shutil
import threading

import pytest
from questions import bombs

import lladax
from lladax import config as configs  # noqa: E402
from lladax.evaluation.answers import Answers
from lladax.mistake import Mistake
from lladax.storage import metrics

ROOT = pathlib.Path(__file__).parents[2]
FOUND = {
  "loglikelihood": {"a": (-1.5, False), "b": (float("-inf"), True)},
  "loglikelihood_rolling": {"a": -3.25, "b": -0.1},
  "generate_until": {"a": "two\nlines", "b": "", "c": "\u2028 \ud800 😀"},
}
ALL = {(kind, key): answer for kind, found in FOUND.items() for key, answer in found.items()}


def fill(path):
  answers = Answers(path)
  for kind, found in FOUND.items():
    answers.add(kind, found)
  return answers


def test_answers_come_back_as_they_were(tmp_path):
  path = tmp_path / "new" / "answers.jsonl"
  assert fill(path).known == Answers(path).known == ALL
  assert [json.loads(line)[0] for line in path.read_text("ascii").splitlines()] == [kind for kind, _ in ALL]


def test_what_was_being_written_costs_no_other_line(tmp_path, caplog):
  path = tmp_path / "answers.jsonl"
  fill(path)
  whole = path.read_bytes()
  cut = whole[: whole.rindex(b"\n", 0, -1) + 10]
  path.write_bytes(cut)
  answers = Answers(path)
  lost = list(ALL)[-1]
  assert answers.known.keys() == ALL.keys() - {lost} and "not read (lines: 1)" in caplog.text
  answers.add(lost[0], {lost[1]: ALL[lost]})
  assert Answers(path).known == ALL
  path.write_bytes(whole[:-1])  # of the last line only the end of it is missing: it is whole
  answers = Answers(path)
  answers.add("loglikelihood_rolling", {"d": -1.0})
  assert Answers(path).known == ALL | {("loglikelihood_rolling", "d"): -1.0}


@pytest.mark.parametrize(
  "line",
  [
    b"SQLite format 3\x00\xff\xfe",
    b"\x80\x02cposix\nsystem\n",
    b"[" * 100_000,
    b"1" * 10_000,
    b"null",
    b"{}",
    b"[1, 2]",
    b'["generate_until", "a", 3]',
    b'["loglikelihood", "a", [-1.0]]',
    b'["loglikelihood", "a", ["x", true]]',
    b'["loglikelihood_rolling", "a", "x"]',
    b'["other", "a", "x"]',
    b'["generate_until", ["a"], "x"]',
  ],
)
def test_what_is_no_answer_is_not_read_and_said(tmp_path, caplog, line):
  path = tmp_path / "answers.jsonl"
  path.write_bytes(line)
  answers = Answers(path)
  assert answers.known == {} and f"{path}: what is no answer of lladax is not read" in caplog.text
  answers.add("generate_until", {"a": "b"})
  assert Answers(path).known == {("generate_until", "a"): "b"}
  assert path.read_bytes() == line.rstrip(b"\n") + b'\n["generate_until", "a", "b"]\n'  # what it was stays as it was


def test_two_evaluations_may_share_a_file(tmp_path):
  path = tmp_path / "answers.jsonl"

  def write(name):
    answers = Answers(path)
    for i in range(200):
      answers.add("generate_until", {f"{name}{i}-{j}": name * 500 for j in range(4)})

  threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert Answers(path).known == {
    ("generate_until", f"{name}{i}-{j}"): name * 500 for name in "abc" for i in range(200) for j in range(4)
  }


@pytest.mark.parametrize("path", ["", "/dev/null/answers.jsonl"])
def test_a_path_that_cannot_be_written_is_a_mistake(tmp_path, path):
  with pytest.raises(Mistake, match="^use_cache=.*; name a file that can be written$"):
    Answers(tmp_path / path if not path else path)


# What runs what it reads, or can. `(?<![.\w])`: a method of that name (a regular expression's, a network's) is none.
RUNS = re.compile(
  r"""(?<![.\w])(eval|exec|compile|__import__)\s*\(|^\s*eval\s|pickle|__reduce__|\bmarshal\b|\bshelve\b|\bdill\b
  |\bjoblib\b|sqlitedict|CachingLM|runpy|exec_module|spec_from_file|torch\.load|np\.load\(|numpy\.load\(
  |yaml\.(load|load_all|unsafe_load|full_load)\b|trust_remote_code""",
  re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
ALLOWED = {
  # A config that the command line names is a program of the user's, or a recipe of ours; none is read from a workdir.
  "lladax/configs/__init__.py": ["import runpy", "compile(path.read_bytes()", "runpy.run_path(str(path)"],
  # Generated code, in a process of its own with fences, and only where the user allows it; see there.
  "lladax/evaluation/fences.py": ['program = compile(program, "program", "exec")'],
  # Plain arrays, and no objects.
  "lladax/storage/near.py": ["allow_pickle=False"],
  # Ours to ours: Grain and Beam send our own objects from a process to its children. It is never in a file.
  "lladax/data/tokenizer.py": ["def __reduce__(self):", '"""Pickles as what `save` writes'],
  # What the harness keeps answers in is put out of use; what its option says of data sets is the user's word.
  "lladax/harness.py": [
    "would be kept as pickles", "a pickle named PATH_rank0.db", '(model, "CachingLM", _kept)',
  ],
  "lladax/evaluation/adapter.py": [
    "keeps its answers in are pickles", "trust_remote_code: bool = False", "trust_remote_code: likewise",
    "trust_remote_code\n",
  ],
}  # fmt: skip


def test_nothing_that_is_read_from_a_file_can_run():
  folders = ("lladax", "configs", "benchmarks", "launch", "notebooks")
  files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
  code = [path for path in files if path.suffix in ("", ".py", ".sh", ".yaml", ".ipynb", ".json", ".js", ".html")]
  texts = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in code}
  assert {
    "lladax/evaluation/sandbox.py",
    "lladax/evaluation/tasks/local.py",
    "lladax/evaluation/tasks/lladax_gsm8k.yaml",
  } <= texts.keys()
  found = {}
  for name, text in texts.items():
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
      drawn = name.endswith(".ipynb") and len(line) > 1000  # a picture in letters
      if not drawn and RUNS.search(line) and not any(allowed in line for allowed in ALLOWED.get(name, ())):
        found[f"{name}:{number}"] = line.strip()[:200]
  assert not found
  unused = [x for name, lines in ALLOWED.items() for x in lines if x not in texts[name]]
  assert not unused, "what is allowed is there"


@pytest.mark.parametrize(
  "line",
  [
    "value = eval(text)", "exec(open(path).read())", "import pickle", "from cloudpickle import dumps", "import dill",
    "x = np.load(path, allow_pickle=True)", "yaml.load(file)", "torch.load(path)", "import marshal", "import shelve",
    "import joblib", "from sqlitedict import SqliteDict", 'eval "$(cat file)"', "  spec.loader.exec_module(module)",
  ],
)  # fmt: skip
def test_the_net_has_no_holes(line):
  assert RUNS.search(line) and not RUNS.search("model.eval()  # pattern.exec(text)")


def test_a_bomb_in_a_workdir_does_not_go_off(tiny_workdir, tmp_path):
  marker, workdir = tmp_path / "marker", tmp_path / "workdir"
  shutil.copytree(tiny_workdir, workdir)
  for folder in sorted((workdir / "checkpoints").iterdir())[:-1]:
    shutil.rmtree(folder)
  files = [path for path in workdir.rglob("*") if path.is_file()]
  assert {"config.json", "metrics.jsonl"} <= {path.name for path in files} and (workdir / "tokenizer").is_dir()
  pickled, *texts = bombs(marker)
  for file in files:
    content = file.read_bytes()
    for bomb in [pickled, *texts] if file.suffix in (".json", ".jsonl") else [pickled]:
      file.write_bytes(bomb)
      for read in (configs.load, metrics.losses, lladax.load):
        with contextlib.suppress(Exception):
          read(workdir)
      assert not marker.exists(), file
    file.write_bytes(content)
  lladax.load(workdir)  # nothing else was broken
