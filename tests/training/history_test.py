"""A run says what it rests on: it is done again from its config.json, and goes on with nothing else than it began with.

Unless that is said, and then it stands in its history.
"""

import hashlib
import json
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rows
from runs import assert_bitwise_equal, curve

import lladax
from lladax import config as configs
from lladax import diffusion
from lladax.mistake import Mistake
from lladax.storage import metrics
from lladax.training import history, setup, trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")


def starts(workdir):
  return metrics.read(workdir / history.FILE)


@pytest.fixture
def copy(tiny_workdir, tmp_path):
  return shutil.copytree(tiny_workdir, tmp_path / "run")


def test_every_start_is_on_record(tiny, copy, tiny_workdir):
  setup.prepare(tiny({"steps": 30}), copy)
  first, second = starts(copy)
  assert [first] == starts(tiny_workdir) and (first["step"], second["step"]) == (0, 20)
  assert (first["changed"], second["changed"]) == ({}, {"steps": [20, 30]})
  saved = json.loads((copy / "config.json").read_text())
  for start in (first, second):
    assert start["versions"]["jax"] == jax.__version__ and start["versions"]["python"][:2] == "3."
    assert start["devices"]["platform"] == "cpu" and start["devices"]["count"] == jax.device_count()
    assert start["devices"]["mesh"]["data"] == jax.device_count() and start["devices"]["processes"] == 1
    assert start["data"] == saved["data_digests"] and start["draws"] == saved["draws"] == history.draws()
    assert start["command"] and start["commit"] == history.commit(pathlib.Path(history.__file__).parent)


def test_a_run_is_done_again_from_its_config(tiny_workdir, tmp_path):
  lladax.train(tiny_workdir / "config.json", tmp_path / "again")
  assert_bitwise_equal(tmp_path / "again", tiny_workdir)
  one, other = (json.loads((x / "config.json").read_text()) for x in (tiny_workdir, tmp_path / "again"))
  assert one == other


def test_a_config_of_a_run_is_like_any_other(tiny, tiny_workdir, tmp_path):
  values = json.loads((tiny_workdir / "config.json").read_text())
  assert values["noise"].pop("times") == "uniform"  # older than the field
  (tmp_path / "config.json").write_text(json.dumps(values))
  loaded = configs.configs.load(str(tmp_path / "config.json"))
  assert isinstance(loaded.evaluate.tasks, tuple)  # as the command line needs it
  assert configs.parse(loaded.to_dict()) == configs.load(tiny_workdir)
  (tmp_path / "other.json").write_text('{"a": 1}')
  for name, why in (("other.json", "it is not the config.json of a run"), ("none.json", "there is no such recipe")):
    with pytest.raises(Mistake, match=why):
      configs.configs.load(str(tmp_path / name))


@pytest.mark.parametrize("name", ["order", "noise", "rng"])
def test_other_draws_are_refused_by_name(tiny, copy, monkeypatch, name):
  before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
  monkeypatch.setattr(history, "draws", lambda real=history.draws: real() | {name: "another"})
  with pytest.raises(Mistake, match=f"^{name}: the run in {copy} draws its {name} by .*, and this is 'another'"):
    setup.prepare(tiny({"steps": 30}), copy)
  assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before


def test_a_run_older_than_the_versions_goes_on(tiny, copy):
  values = json.loads((copy / "config.json").read_text())
  del values["draws"]
  (copy / "config.json").write_text(json.dumps(values))
  (copy / history.FILE).unlink()
  setup.prepare(tiny({"steps": 30}), copy)
  assert json.loads((copy / "config.json").read_text())["draws"] == history.draws()
  assert [x["step"] for x in starts(copy)] == [20]


def test_the_first_draws_are_those_of_these_versions():
  """What changes one of them raises its version in history.DRAWS."""
  assert history.DRAWS == {"order": "1", "noise": "1"}
  order = np.stack([x["tokens"] for x in rows.made(rows.numbered(400), seed=3, stop=40)])
  mixed = rows.DataConfig(length=4, batch_size=3, mixture=(("a", 1.0), ("b", 2.0)))
  sources = [rows.windows.Windows(rows.numbered(n), mixed, eos_id=rows.EOS, seed=3) for n in (100, 300)]
  mixture = np.stack([x["tokens"] for x in rows.draw(sources, mixed, seed=3)])
  assert [digest(x) for x in (order, mixture)] == ["d4240461ef143c1b", "598df7d9fa1846ec"]
  found = []
  for masking, times in (("independent", "uniform"), ("exact", "antithetic")):
    noise = diffusion.NoiseConfig(masking=masking, times=times)
    tokens_BL = jnp.ones((4, 64), jnp.int32)
    _, masked_BL, _ = diffusion.forward_process(
      tokens_BL, tokens_BL > 0, jnp.arange(8, 12), jax.random.fold_in(jax.random.key(3), 5), 0, noise, 4
    )
    found.append(digest(np.asarray(masked_BL)))
  assert found == ["5c6ba86d58dcc3fb", "529528c6ed9678c3"]


def digest(x):
  return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:16]


def test_a_schedule_is_changed_deliberately(tiny, copy, tiny_workdir):
  """As LLaDA went on with a lower rate where its loss had crashed."""
  lower = {"steps": 24, "optimizer.schedule": ((0, 1e-4),)}
  with pytest.raises(Mistake, match=r"another config \(optimizer.schedule: .*, or say --allow=optimizer.schedule$"):
    trainer.train(tiny(lower), copy)
  trainer.train(tiny(lower), copy, allow=["optimizer.schedule"])
  assert curve(copy)[:20] == curve(tiny_workdir)
  assert [rate for *_, rate in curve(copy)[20:]] == pytest.approx([1e-4] * 4)
  old, new = starts(copy)[-1]["changed"]["optimizer.schedule"]
  assert old == json.loads((tiny_workdir / "config.json").read_text())["optimizer"]["schedule"] and new == [[0.0, 1e-4]]
  assert starts(copy)[-1]["allowed"] == ["optimizer.schedule"]
  setup.prepare(tiny(lower | {"steps": 26}), copy)  # nothing is left to allow ...
  assert starts(copy)[-1]["changed"] == {"steps": [24, 26]}
  setup.prepare(tiny(lower | {"steps": 26}), copy, allow=["optimizer.schedule"])  # ... nor does it harm
  with pytest.raises(Mistake, match=r"optimizer.schedule: \[\[0.0, 0.0001\]\] there"):
    setup.prepare(tiny({"steps": 26}), copy)


@pytest.mark.parametrize("name", ["model.D", "seed", "data.corpus", "optimizer.shedule", "optimizer"])
def test_what_may_not_change_cannot_be_allowed(tiny, copy, name):
  with pytest.raises(Mistake, match=f"^--allow={name}: name fields of optimizer, noise, guard"):
    setup.prepare(tiny(), copy, allow=[name])


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_commit_is_that_of_the_checkout_that_keeps_the_folder(tmp_path):
  def git(*words):
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

  kept, installed = tmp_path / "kept", tmp_path / "venv"
  for folder in (kept, installed):
    folder.mkdir()
    (folder / "file.py").write_text("1\n")
  assert history.commit(kept) is None
  git("init")
  git("add", "kept")
  git("commit", "-m", "one")
  found = history.commit(kept)
  assert found and len(found) == 40 and history.commit(installed) is None  # of a folder that a checkout does not keep
  (kept / "file.py").write_text("2\n")
  assert history.commit(kept) == f"{found}-dirty"
  assert history.commit(tmp_path / "nowhere") is None
