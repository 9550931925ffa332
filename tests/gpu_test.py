"""benchmarks/gpu.py on tiny shapes: what a lease of ten minutes must not find out."""

import json
import sys

import pytest


@pytest.fixture(scope="module")
def gpu(load_benchmark):
  return load_benchmark("gpu")


def run(gpu, monkeypatch, capsys, out, *flags):
  """(what main printed, the lines of gpu.jsonl)."""
  monkeypatch.setattr(sys, "argv", ["gpu.py", f"--out={out}", "--tiny", *flags])
  gpu.main()
  return capsys.readouterr().out, [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


def test_what_the_time_does_not_hold_is_said(gpu, monkeypatch, capsys, tmp_path):
  said, lines = run(gpu, monkeypatch, capsys, tmp_path, "--minutes=0")
  assert [x["skipped"] for x in lines] == ["the time was up"] * len(gpu.CONTENDERS) and len(lines) > 10
  assert "skipped: the time was up" in said and said.endswith((tmp_path / "gpu.md").read_text() + "\n")


def test_a_contender_that_fails_is_said_and_the_others_go_on(gpu, monkeypatch):
  assert gpu.run("no_such_function", {}, 60)["skipped"] == "KeyError: 'no_such_function'"
  monkeypatch.setattr(sys, "executable", "false")
  assert gpu.run("check", {}, 60)["skipped"] == "exit code 1"


def test_an_unknown_part_is_named(gpu, monkeypatch, capsys, tmp_path):
  with pytest.raises(SystemExit):
    run(gpu, monkeypatch, capsys, tmp_path, "--parts=train,serve")
  assert "serve is none of check, train, sample, digests, kernels" in capsys.readouterr().err


@pytest.mark.parametrize("rows, expected", [(1, [256]), (3, [256, 192, 128])])
def test_prompts_of_a_ragged_batch(gpu, rows, expected):
  assert gpu.lengths({"prompt": 256, "rows": rows}) == expected


def test_the_table_and_the_picture(gpu, tmp_path):
  pytest.importorskip("matplotlib")
  numbers = {"seconds": 0.5, "tokens_per_second": 65536.0, "mfu": 0.5, "peak_gib": 40.0, "seconds_to_build": 20.0,
             "device": "H100"}  # fmt: skip
  results = [
    {"part": "check", "name": "cuDNN", "nans": 0, "relative_errors": {"out": 0.004}},
    {"part": "train", "name": "lladax"} | numbers,
    {"part": "train", "name": "PyTorch", "skipped": "out of memory"},
    {"part": "sample", "name": "lladax", "passes": 256, "ms_a_pass": 2.0} | numbers | {"peak_gib": None},
    {"part": "digests", "name": "1B", "gib": 12.0} | numbers,
    {"part": "kernels", "name": "lladax", "kernels": {"gemm": (22, 300.0)}},
  ]
  lines = gpu.table(results).splitlines()
  for row in (
    "| cuDNN | 0 | 4.0e-03 |", "| lladax | 500.0 | 65,536 | 50.0% | 40.0 | 20 |",
    "| PyTorch | skipped: out of memory |  |  |  |  |", "| lladax | 2.00 | 256 | 65,536.0 | ? | 20 |",
    "| 1B | 500.0 | 12.0 | 40.0 | 20 |", "| lladax | gemm 300.0 |",
  ):  # fmt: skip
    assert row in lines
  gpu.draw(results, tmp_path / "gpu.svg")
  assert "tokens a second, H100" in (tmp_path / "gpu.svg").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
  "function, options",
  [
    ("check", {"kernel": "cudnn", "segments": "right"}),
    ("lladax_train", {"remat": "attention", "documents": 4}),
    ("lladax_train", {"remat": "dots", "masking": "exact", "times": "antithetic"}),
    ("lladax_sample", {"rows": 3, "cache": "dual", "threshold": 0.9}),
    ("lladax_sample", {"rows": 1, "weights": "nf4"}),
    ("digests", {"remat": "none"}),
  ],
)
def test_contenders_on_a_tiny_model(gpu, function, options):
  """Here without a GPU, where cuDNN's place is taken by XLA."""
  if "weights" in options:
    pytest.importorskip("qwix")
  sizes = gpu.TINY_SAMPLE if function == "lladax_sample" else gpu.TINY_TRAIN
  found = getattr(gpu, function)(sizes | options)
  if function == "check":
    assert found["nans"] == 0 and all(1e-4 < error < 2e-2 for error in found["relative_errors"].values())
  elif function == "digests":
    assert found["seconds"] > 0 and found["gib"] > 0
  else:
    assert found["seconds"] > 0 and found["tokens_per_second"] > 0
  if function == "lladax_train":
    assert 5 < found["loss"] < 9 and found["compiled_gib"] > 0
