import json
import pathlib
import shutil

import pytest

import lladax
from lladax import config as configs
from lladax.inference import convert
from lladax.mistake import Mistake
from lladax.training import setup

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_a_run_goes_on_with_another_config_where_that_is_safe(tiny, tiny_workdir, tmp_path, caplog):
  workdir = shutil.copytree(tiny_workdir, tmp_path / "run")
  changes = {"steps": 30, "log.every": 5, "evaluate.rows": 3, "checkpoint.keep": 1, "sample.steps": 8}
  setup.prepare(tiny(changes), workdir)
  messages = [record.getMessage() for record in caplog.records]
  for message in ("steps was 20, and is 30", "log.every was 1, and is 5", "checkpoint.keep was 2, and is 1"):
    assert any(message in x for x in messages), message
  assert json.loads((workdir / "config.json").read_text())["steps"] == 30
  caplog.clear()
  setup.prepare(tiny(changes), workdir)
  assert not caplog.records


@pytest.mark.parametrize(
  ("field", "value", "there"),
  [
    ("seed", 1, "0"), ("data.length", 8, "16"), ("data.batch_size", 16, "32"), ("data.held_out", 0.2, "0.1"),
    ("model.D", 32, "16"), ("model.V", 512, "384"), ("optimizer.b2", 0.9, "0.95"),
    ("noise.masking", "exact", "'independent'"), ("tokenizer.eos", "<end>", "'<|endoftext|>'"),
  ],
)  # fmt: skip
def test_a_run_refuses_another_config_where_it_matters(tiny, tiny_workdir, tmp_path, field, value, there):
  workdir = shutil.copytree(tiny_workdir, tmp_path / "run")
  before = (workdir / "config.json").read_text()
  with pytest.raises(ValueError) as error:
    setup.prepare(tiny({field: value, "steps": 30}), workdir)
  assert f"another config ({field}: {there} there, {value!r} here)" in str(error.value)
  assert "\n" not in str(error.value)
  assert (workdir / "config.json").read_text() == before


def test_a_run_that_is_older_than_a_field_had_its_default(tiny, tiny_workdir, tmp_path):
  workdir = shutil.copytree(tiny_workdir, tmp_path / "run")
  saved = json.loads((workdir / "config.json").read_text())
  assert saved["noise"].pop("times") == "uniform" and saved["data"].pop("packing") is False
  (workdir / "config.json").write_text(json.dumps(saved))
  setup.prepare(tiny(), workdir)
  assert json.loads((workdir / "config.json").read_text())["noise"]["times"] == "uniform"
  (workdir / "config.json").write_text(json.dumps(saved))
  with pytest.raises(Mistake, match=r"another config \(noise.times: 'uniform' there, 'stratified' here\)"):
    setup.prepare(tiny({"noise.times": "stratified"}), workdir)


def test_a_corpus_that_changed_under_a_run_is_refused_by_name(tiny, tiny_workdir, tmp_path):
  workdir = shutil.copytree(tiny_workdir, tmp_path / "run")
  corpus = pathlib.Path(tiny().data.corpus.removeprefix("files:"))
  saved = json.loads((workdir / "config.json").read_text())
  assert list(saved["data_digests"]) == [f"files:{corpus}"]
  before = corpus.read_text()
  try:
    corpus.write_text(before.replace("red", "rad", 1))
    with pytest.raises(Mistake, match=f"^data.corpus: files:{corpus} has changed since the run in {workdir} began"):
      setup.prepare(tiny({"steps": 30}), workdir)
  finally:
    corpus.write_text(before)
  del saved["data_digests"]  # as of a run that is older
  (workdir / "config.json").write_text(json.dumps(saved))
  setup.prepare(tiny({"steps": 30}), workdir)
  assert list(json.loads((workdir / "config.json").read_text())["data_digests"]) == [f"files:{corpus}"]


@pytest.mark.parametrize("content", [b"", b'{"seed": 0, "mod', b"[1]", b'{"model": "\xff"}', b"\x00" * 20])
def test_a_damaged_config_is_one_line(tiny, tmp_path, content):
  (tmp_path / "config.json").write_bytes(content)
  (tmp_path / "checkpoints/3").mkdir(parents=True)
  (tmp_path / "tokenizer").mkdir()
  doors = (
    lladax.load, configs.load, lambda workdir: setup.prepare(tiny(), workdir),
    lambda workdir: setup.prepare(tiny({"init_from": str(workdir)}), tmp_path / "new"),
    lambda workdir: convert.to_published(workdir, tmp_path / "published"),
  )  # fmt: skip
  said = f"^{tmp_path}/config.json (is damaged .*: put back a copy of it|is no JSON|holds .1., expected a JSON object)"
  for door in doors:
    with pytest.raises(Mistake, match=said) as error:
      door(tmp_path)
    assert "\n" not in str(error.value)
