"""The scaling study: what it fits is what was put in, and a real one of seconds ends with a page."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lladax.training import trainer

ROOT = pathlib.Path(__file__).parent.parent
BUDGETS = [1e12, 3e12, 1e13, 3e13, 1e14]

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="session")
def scaling(load_benchmark):
  return load_benchmark("scaling")


@pytest.fixture
def base(tiny):
  """The tiny run with a schedule that fits any number of steps."""
  return tiny({"optimizer.schedule": ((0.1, 0.02), (-1, 0.0)), "model.D": 64, "model.V": 384})


def made_up(a, b, ratio, *, noise=0.0, seed=0, budgets=BUDGETS, sizes=(1e5, 2e5, 4e5, 8e5, 16e5)):
  """Runs whose optima are a C^-b for the baseline, and the same at `ratio` times the compute for diffusion."""
  rng = np.random.default_rng(seed)
  rows = []
  for budget in budgets:
    best = 3e5 * (budget / 1e13) ** 0.3
    for n in sizes:
      for family, needs in (("autoregressive", 1.0), ("diffusion", ratio)):
        loss = a * (budget / needs) ** -b + 0.05 * math.log(n / best) ** 2
        loss *= math.exp(noise * rng.standard_normal())
        rows.append({
          "family": family, "size": f"{n:g}", "params": n, "budget": budget, "flops": budget, "steps": 100,
          "tokens": 1000, "epochs": 0.1, "loss": loss, "loss_stderr": 0.01, "bits_per_byte": loss / 2,
          "bits_per_byte_stderr": 0.01,
        })  # fmt: skip
  return rows


def test_exponents_and_ratio_are_recovered_exactly(scaling):
  found = scaling.analyse(made_up(30.0, 0.07, 16.0))
  for family, needs in (("autoregressive", 1.0), ("diffusion", 16.0)):
    fit = found["fits"][family]
    assert fit.b == pytest.approx(0.07)
    assert fit.loss(1e13) == pytest.approx(30 * (1e13 / needs) ** -0.07)
    assert fit.b_stderr < 1e-9
    assert {x["how"] for x in found["optima"][family]} == {"parabola"}
  assert not found["ratio"]["extrapolated"] and len(found["ratio"]["at"]) == 3
  for x in found["ratio"]["at"]:
    assert x["ratio"] == pytest.approx(16.0)
    assert x["flops"][0] == pytest.approx(16 * x["flops"][1])


@pytest.mark.parametrize("seed", range(5))
def test_exponents_and_ratio_are_recovered_from_noise(scaling, seed):
  found = scaling.analyse(made_up(30.0, 0.07, 16.0, noise=0.003, seed=seed))
  for fit in found["fits"].values():
    assert 1e-5 < fit.b_stderr < 0.01
    assert abs(fit.b - 0.07) < 6 * fit.b_stderr  # Student's t of three degrees of freedom has long tails
  middle = found["ratio"]["at"][1]
  assert abs(math.log(middle["ratio"] / 16.0)) < 6 * middle["log_stderr"] < 1.5


def test_the_stated_errors_are_those_of_many_repetitions(scaling):
  studies = [scaling.analyse(made_up(30.0, 0.07, 16.0, noise=0.003, seed=seed)) for seed in range(200)]
  for family in scaling.FAMILIES:
    fits = [x["fits"][family] for x in studies]
    spread = np.std([fit.b for fit in fits])
    assert np.mean([fit.b_stderr**2 for fit in fits]) ** 0.5 == pytest.approx(spread, rel=0.2)
  middles = [x["ratio"]["at"][1] for x in studies]
  spread = np.std([math.log(x["ratio"]) for x in middles])
  assert np.mean([x["log_stderr"] ** 2 for x in middles]) ** 0.5 == pytest.approx(spread, rel=0.25)


def test_the_minimum_of_a_budget_is_that_of_the_parabola(scaling):
  (row, *_) = made_up(30.0, 0.07, 16.0)

  def of(sizes, best):
    return scaling.optimum([row | {"params": n, "loss": 3 + 0.1 * math.log(n / best) ** 2} for n in sizes])

  inside = of((1e5, 2e5, 4e5, 8e5), 3e5)
  assert inside["how"] == "parabola"
  assert (inside["params"], inside["loss"]) == (pytest.approx(3e5), pytest.approx(3.0))
  outside = of((4e5, 8e5, 16e5), 3e5)
  assert (outside["params"], outside["how"]) == (pytest.approx(4e5), "best size; no minimum inside")
  two = of((1e5, 4e5), 3e5)
  assert (two["params"], two["how"]) == (pytest.approx(4e5), "best of 2")


def test_an_extrapolation_says_so(scaling):
  rows = made_up(30.0, 0.07, 1e4)
  found = scaling.analyse(rows)
  (only,) = found["ratio"]["at"]
  assert found["ratio"]["extrapolated"] and only["ratio"] == pytest.approx(1e4)
  assert "EXTRAPOLATION" in scaling.page(rows, found)
  rows = made_up(30.0, 0.07, 16.0)
  assert "EXTRAPOLATION" not in scaling.page(rows, scaling.analyse(rows))


def test_too_little_for_a_fit_is_a_page_without_one(scaling, tmp_path):
  one_budget, rising = made_up(30.0, 0.07, 16.0, budgets=[1e12]), made_up(30.0, -0.07, 16.0)
  one_family = [row for row in made_up(30.0, 0.07, 16.0) if row["family"] == "diffusion"]
  for rows in (one_budget, rising, one_family):
    assert "No compute ratio" in scaling.page(rows, scaling.analyse(rows))
  scaling.draw(one_budget, scaling.analyse(one_budget), tmp_path)
  two = scaling.analyse(made_up(30.0, 0.07, 16.0, budgets=[1e12, 1e14]))
  assert two["fits"]["diffusion"].b_stderr is None and two["ratio"]["at"][0]["log_stderr"] is None


def test_steps_spend_the_budget_on_both_families_alike(scaling, base):
  limits = {"min_steps": 1, "max_epochs": 1e9}
  runs, left_out = scaling.plan(base, ["32x1", "64x2"], ["1e10", "4e9"], 3000, **limits)
  assert not left_out
  names = [f"{f}_{s}_{b}" for b in ("4e9", "1e10") for s in ("32x1", "64x2") for f in scaling.FAMILIES]
  assert [run.name for run in runs] == names
  N = {
    "32x1": 4 * 32**2 + 3 * 32 * 96 + 2 * 32 + 32 + 384 * 32,
    "64x2": 2 * (4 * 64**2 + 3 * 64 * 192 + 2 * 64) + 64 + 384 * 64,
  }
  for name, c, flops in runs:
    objective, size, budget = name.split("_")
    D, layers = map(int, size.split("x"))
    per_step = (6 * N[size] + 12 * layers * D * 16) * 32 * 16
    assert c.steps == round(float(budget) / per_step) and flops == c.steps * per_step
    assert abs(flops - float(budget)) <= per_step / 2
    assert (c.objective, c.model.H, c.model.K, c.model.F) == (objective, D // 32, 32, 3 * D)
    assert c.optimizer.schedule[0] == (0.1, pytest.approx(0.02 * math.sqrt(64 / D)))
  for (_, a, _), (_, b, _) in zip(runs[::2], runs[1::2], strict=True):
    assert (a.steps, a.data, a.optimizer, a.tokenizer, a.seed) == (b.steps, b.data, b.optimizer, b.tokenizer, b.seed)


def test_runs_too_short_or_too_long_are_left_out(scaling, base):
  runs, left_out = scaling.plan(base, ["32x1", "64x2"], ["4e9"], 10**9, min_steps=20, max_epochs=4)
  assert {run.name for run in runs} == {"diffusion_32x1_4e9", "autoregressive_32x1_4e9"}
  assert left_out == ["64x2_4e9: 10 steps, 5.1e-06 times the text"]
  runs, left_out = scaling.plan(base, ["32x1", "64x2"], ["4e9"], 2000, min_steps=1, max_epochs=4)
  assert len(runs) == 2 and left_out[0].startswith("32x1_4e9")


@pytest.mark.parametrize(
  ("sizes", "budgets", "says"),
  [
    (["64"], ["1e9"], "--sizes: '64' is no size"),
    (["64x0"], ["1e9"], "--sizes: '64x0' is no size"),
    (["48x2"], ["1e9"], "--sizes: '48x2': the width must be a multiple of 32"),
    (["64x2"], ["many"], "--budgets: 'many' is no number of FLOPs"),
    (["64x2"], ["-1e9"], "--budgets: '-1e9' is no number of FLOPs"),
    (["64x2", "32x1"], ["1e9", "1e6"], "--budgets: no size suits 1e6 FLOPs"),
  ],
)
def test_bad_input_is_refused_before_any_training(scaling, base, tmp_path, monkeypatch, sizes, budgets, says):
  monkeypatch.setattr(trainer, "train", None)
  with pytest.raises(ValueError, match=says) as error:
    scaling.study(base, tmp_path, sizes, budgets)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"optimizer.schedule": ((5, 0.03), (-1, 0.0))}, "optimizer.schedule=.* fractions"),
    ({"data.held_out": 0.0}, "data.held_out"),
  ],
)
def test_configs_that_cannot_be_compared_are_refused(scaling, tiny, tmp_path, changes, says):
  with pytest.raises(ValueError, match=says):
    scaling.study(tiny(changes), tmp_path, ["32x1"], ["1e9"])


@pytest.mark.parametrize(
  ("more", "says"),
  [
    (["--sizes=32y1", "--budgets=1e9"], "--sizes: '32y1' is no size"),
    pytest.param([], "--sizes, --budgets missing", marks=pytest.mark.slow),
    pytest.param(["--report_only"], "there is no finished run", marks=pytest.mark.slow),
  ],
)
@pytest.mark.slow
def test_the_command_line_complains_in_one_line(tiny_flags, tmp_path, more, says):
  command = [sys.executable, "benchmarks/scaling.py", *tiny_flags, f"--workdir={tmp_path / 'study'}", *more]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
  assert done.returncode == 1 and not done.stdout
  (line,) = done.stderr.splitlines()
  assert line.startswith("scaling: ") and says in line


def pretend(monkeypatch):
  """Training that only writes what training writes; the list of its (config, workdir)."""
  seen = []

  def train_(config, workdir):
    seen.append((config, workdir))
    workdir.mkdir()
    values = dataclasses.asdict(config) | {"tokenizer_fingerprint": "", "base": ""}
    (workdir / "config.json").write_text(json.dumps(values))
    loss = 3.0 - 0.1 * math.log(config.steps)
    results = {"bits_per_byte": loss / 2, "bits_per_byte_stderr": 0.01, "nats_per_token": loss}
    (workdir / "evaluations.jsonl").write_text(json.dumps({"step": config.steps} | results) + "\n")

  monkeypatch.setattr(trainer, "train", train_)
  return seen


SIZES, FLOPS, LIMITS = ["32x1", "64x1"], ["1e9", "2e9"], {"min_steps": 4, "max_epochs": 20.0}


def check_study(scaling, base, workdir, monkeypatch, budgets=FLOPS):
  """The files of a finished study; a second call trains nothing."""
  page = scaling.report(workdir)
  assert {path.name for path in workdir.glob("scaling.*")} == {f"scaling.{x}" for x in ("json", "md", "png", "svg")}
  assert (workdir / "scaling.png").read_bytes().startswith(b"\x89PNG")
  numbers = json.loads((workdir / "scaling.json").read_text())
  assert len(numbers["runs"]) == 4 * len(budgets) and page == (workdir / "scaling.md").read_text()
  for a, b in zip(numbers["runs"][::2], numbers["runs"][1::2], strict=True):
    assert (a["family"], b["family"]) == ("autoregressive", "diffusion")
    assert all(a[name] == b[name] for name in ("size", "budget", "steps", "tokens", "params", "flops", "epochs"))
  monkeypatch.setattr(trainer, "train", None)
  scaling.study(base, workdir, SIZES, budgets, **LIMITS)
  assert scaling.report(workdir) == page
  with pytest.raises(ValueError, match="seed"):
    scaling.study(dataclasses.replace(base, seed=1), workdir, SIZES, budgets, **LIMITS)


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(scaling, base, tmp_path, monkeypatch, capsys):
  seen = pretend(monkeypatch)
  scaling.study(base, tmp_path, SIZES[:1], FLOPS, **LIMITS)
  assert [workdir.name for _, workdir in seen] == [
    f"{family}_32x1_{budget}" for budget in ("1e9", "2e9") for family in ("diffusion", "autoregressive")
  ]
  del seen[:]
  (tmp_path / "diffusion_32x1_1e9" / "evaluations.jsonl").rename(tmp_path / "evaluations.jsonl")  # it was cut off
  (tmp_path / "diffusion_32x1_1e9" / "config.json").unlink()
  (tmp_path / "diffusion_32x1_1e9").rmdir()
  scaling.study(base, tmp_path, SIZES, FLOPS, **LIMITS)
  assert {workdir.name for _, workdir in seen} == {
    "diffusion_32x1_1e9", *(f"{family}_64x1_{budget}" for family in scaling.FAMILIES for budget in ("1e9", "2e9"))
  }  # fmt: skip
  said = capsys.readouterr().err
  assert "8 runs, 3 of them finished" in said and "run 8 of 8: autoregressive_64x1_2e9" in said and " left" in said
  check_study(scaling, base, tmp_path, monkeypatch)


@pytest.mark.slow
def test_one_tokenizer_is_trained_for_all_runs(scaling, base, tmp_path, monkeypatch):
  seen = pretend(monkeypatch)
  changes = {"kind": "sentencepiece", "vocab_size": 300}
  base = dataclasses.replace(base, tokenizer=dataclasses.replace(base.tokenizer, **changes))
  for _ in range(2):
    scaling.study(base, tmp_path, ["32x1"], ["1e9"], **LIMITS)
  assert len(seen) == 2
  for config, _ in seen:
    assert pathlib.Path(config.tokenizer.path) == tmp_path / "tokenizer" / "sp.model"
    assert pathlib.Path(config.tokenizer.path).is_file()


def test_time_left_is_so_much_a_run_and_so_much_a_flop(scaling):
  seen = [(flops, 5 + flops / 1e11) for flops in (1e11, 1e12, 3e12)]
  assert scaling.time_left(seen, [1e12, 1e13]) == pytest.approx(2 * 5 + 110)
  assert scaling.time_left(seen[1:2], [1e12]) == pytest.approx(15)


@pytest.mark.slow
def test_a_real_study_trains_both_families_and_ends_with_a_page(scaling, base, tmp_path, monkeypatch):
  scaling.study(base, tmp_path, SIZES, FLOPS[:1], **LIMITS)
  check_study(scaling, base, tmp_path, monkeypatch, FLOPS[:1])
  for run in json.loads((tmp_path / "scaling.json").read_text())["runs"]:
    assert 0 < run["loss"] < math.log(384) and run["loss_stderr"] > 0
