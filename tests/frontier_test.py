"""The sweep of quality against speed: the grid, what is counted, the frontier, and a sweep of seconds."""

import json
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest

pytest.importorskip("lm_eval")

pytestmark = [
  pytest.mark.usefixtures("quick_compiles"),
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the harness and of what it imports
]


@pytest.fixture(scope="module")
def frontier(load_benchmark):
  return load_benchmark("frontier")


SCRIPT = pathlib.Path(__file__).parent.parent / "benchmarks/frontier.py"
FLAGS = ["--path=x", "--task=lladax_gsm8k", "--limit=8"]


def test_the_grid_is_every_way_with_every_block_and_cache(frontier):
  a = frontier.parse([*FLAGS, "--blocks=8,16", "--steps=32,16", "--thresholds=0.9", "--caches=none,dual"])
  grid = frontier.settings(a)
  assert len(grid) == 2 * 2 * 3 == len({x["name"] for x in grid})
  assert grid[2] == {"name": "block 8, threshold 0.9", "block_length": 8, "cache": None, "threshold": 0.9, "steps": 128}
  assert len(frontier.settings(frontier.parse([*FLAGS, "--thresholds="]))) == 2 * 3


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--limit=9"], "--limit=9: must be a multiple of --batch_size=8"),
    (["--gen_length=128", "--blocks=32,12"], "--blocks=12: --gen_length=128 must be a multiple of it"),
    (["--caches=some"], "--caches: 'some' is none of"),
  ],
)
def test_bad_flags(frontier, flags, message):
  with pytest.raises(ValueError, match=message):
    frontier.parse([*FLAGS, *flags])


@pytest.mark.slow
def test_a_mistake_is_one_line_and_a_crash_is_none(tmp_path):
  (tmp_path / "frontier.json").write_text("{")
  for flags, code, said in (
    (["--limit=9"], 1, "^frontier: --limit=9: must be a multiple of --batch_size=8[^\n]*\n$"),
    ([f"--out={tmp_path}"], 70, "Traceback .*JSONDecodeError"),
  ):
    done = subprocess.run([sys.executable, SCRIPT, *FLAGS, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == code and re.search(said, done.stderr, re.DOTALL), done.stderr


def test_nothing_on_the_frontier_is_beaten(frontier):
  rng = np.random.default_rng(0)
  found = [{"tokens_per_second": s, "accuracy": a, "nfe": n} for s, a, n in rng.integers(1, 9, (50, 3)).tolist()]
  for by, sign in (("tokens_per_second", 1), ("nfe", -1)):
    kept = frontier.frontier(found, by)
    for x in found:
      beaten = any(
        sign * y[by] >= sign * x[by] and y["accuracy"] >= x["accuracy"]
        and (y[by], y["accuracy"]) != (x[by], x["accuracy"]) for y in found
      )  # fmt: skip
      there = any((y[by], y["accuracy"]) == (x[by], x["accuracy"]) for y in kept)
      assert there == (not beaten)
    assert [sign * x[by] for x in kept] == sorted(sign * x[by] for x in kept)


def test_tokens_count_up_to_the_end_and_compilation_does_not(frontier, monkeypatch):
  out = types.SimpleNamespace(
    tokens=np.array([[7, 7, 9, 1, 1], [1, 9, 9, 9, 9]]), unmasked_at=np.array([[0, 1, 2, 3, 4], [0, 0, 1, 1, 1]]), nfe=4
  )
  out.text = ["so", "long"]
  calls = []

  def sample(prompts, steps, until=()):
    calls.append(steps)
    if len(calls) == 1:
      frontier._count("/jax/core/compile/backend_compile_duration", 0.1)
    return out

  text = types.SimpleNamespace(encode=lambda text, begins: list(text))
  counted = frontier.Counted(types.SimpleNamespace(sample=sample, ends=(1,), name="x", tokenizer=text))
  assert counted.sample([[1], [2]], steps=3) is out and counted.name == "x"
  assert calls == [3, 3] and (counted.tokens, counted.nfe, counted.calls) == (3 + 3, 4, 1)
  counted.sample([[1], [2]], steps=3, until=["."])
  assert counted.tokens == 6 + 2 + 3  # "so" was two tokens up to its stop string, of three


def test_a_task_that_generates_nothing_is_refused_before_loading(frontier, tmp_path):
  (tmp_path / "eval").mkdir()
  row = {"question": "?", "choices": ["a", "b"], "answer": 0}
  for split in ("test", "train"):
    (tmp_path / "eval" / f"arc_challenge_{split}.jsonl").write_text(json.dumps(row) + "\n")
  with pytest.raises(ValueError, match="--task=lladax_arc_challenge generates nothing"):
    frontier.main(["--path=x", "--task=lladax_arc_challenge", f"--data_dir={tmp_path}", f"--out={tmp_path / 'out'}"])


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped(frontier, tiny_workdir, tmp_path, capsys):
  import lzma

  for split in ("test", "train"):
    (tmp_path / "math").mkdir(exist_ok=True)
    with lzma.open(tmp_path / "math" / f"gsm8k_{split}.jsonl.xz", "wt") as file:
      file.writelines(json.dumps({"question": f"{i}?", "answer": f"#### {i}"}) + "\n" for i in range(6))
  out = tmp_path / "out"
  flags = [f"--path={tiny_workdir}", "--task=lladax_gsm8k", f"--data_dir={tmp_path}", "--limit=2", "--batch_size=2"]
  flags += ["--gen_length=4", "--blocks=4", "--thresholds=0.5", f"--out={out}"]
  frontier.main([*flags, "--steps=4", "--caches=none"])
  first = json.loads((out / "frontier.json").read_text())["found"]
  assert [x["name"] for x in first] == ["block 4, 4 steps", "block 4, threshold 0.5"]
  assert first[0]["nfe"] == 4 and 2 <= first[0]["tokens"] <= 8 and first[0]["tokens_per_second"] > 0
  frontier.main([*flags, "--steps=4,2", "--caches=none"])
  again = json.loads((out / "frontier.json").read_text())["found"]
  assert again[:2] == first and again[2]["name"] == "block 4, 2 steps" and again[2]["nfe"] == 2
  page = (out / "frontier.md").read_text()
  assert all(f"| {x['name']} | 0.0 ± 0.0% |" in page for x in again)
  assert (out / "frontier.png").stat().st_size > 10_000 and (out / "frontier.svg").is_file()
  with pytest.raises(ValueError, match="--limit=4: .*frontier.json was made with 2; give another --out"):
    frontier.main([*flags, "--limit=4"])
  assert "2 of 3: block 4, 2 steps: exact_match/strict-match 0.000" in capsys.readouterr().out
  with pytest.raises(ValueError, match="--metric=speed: lladax_gsm8k has exact_match/strict-match, "):
    frontier.main([*flags, "--metric=speed", f"--out={out}2"])
