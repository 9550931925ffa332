"""An import that was trained for something else: what is exported says what it is now."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import conftest
import jax
import numpy as np
import pytest
from layouts import CONFIGS, add_tokenizer, publish

import lladax
from lladax import configs
from lladax.inference import convert
from lladax.mistake import Mistake
from lladax.storage import checkpoint, published
from lladax.training import setup, step

pytestmark = pytest.mark.usefixtures("quick_compiles")

TEXT = {"eos_token_id": 257, "pad_token_id": None, "mask_token_id": None}
FREE, FULL = {"vocab_size": 384}, {"vocab_size": 262}  # rows of the embedding beside the tokenizer's
ROOT = pathlib.Path(__file__).parents[2]


def base(folder, name, config, mask="<hole>"):
  """(the folder of a family with text, the workdir that it is read into)."""
  said = {key: x for key, x in (CONFIGS[name] | TEXT | config).items() if x is not None or key not in TEXT}
  source = publish(folder / "source", said)
  add_tokenizer(source, mask=mask)
  convert.from_published(source, folder / "base", configs.load("base").to_dict())
  return source, folder / "base"


def begun(config, workdir):
  """A run, saved before its first step."""
  run = setup.prepare(config, workdir)
  with jax.set_mesh(run.mesh):
    saver = checkpoint.Checkpoints(workdir)
    saver.save(1, step.to_tree(setup.begin(run)))
    saver.close()


CASES = {
  "Qwen3, by blocks": ("Qwen3", FULL, {"noise.block": 4}, "SDAR"),
  "Qwen3, tied, by blocks, with free rows": ("Qwen3", FREE | {"tie_word_embeddings": True}, {"noise.block": 4}, "SDAR"),
  "Qwen3-MoE, by blocks": ("Qwen3-MoE", FREE, {"noise.block": 8}, "SDAR-MoE"),
  "Qwen2, shifted": ("Qwen2", FULL, {"model.shift": True}, "Dream"),
  "Qwen2, shifted, by blocks": ("Qwen2", FULL, {"model.shift": True, "noise.block": 8}, "Fast-dLLM v2"),
  "Llama": ("Llama", FULL, {}, "iLLaDA"),
  "Llama with free rows": ("Llama", FREE, {}, "iLLaDA"),
  "SDAR, longer blocks": ("SDAR", FREE | {"mask_token_id": 258}, {"noise.block": 8}, "SDAR"),
  "LLaDA2, shorter blocks": ("LLaDA2", FREE | {"mask_token_id": 258}, {"noise.block": 8}, "LLaDA2"),
  "Dream, as it was": ("Dream", FREE | {"mask_token_id": 258}, {}, "Dream"),
}


QUICK = ("Qwen3, by blocks", "Llama with free rows")


@pytest.mark.parametrize("case", [pytest.param(x, marks=[pytest.mark.slow] * (x not in QUICK)) for x in CASES])
def test_what_is_exported_is_what_it_has_become(case, tiny, tmp_path):
  name, config, changes, becomes = CASES[case]
  source, workdir = base(tmp_path, name, config)
  segments = {"data.segments": True, "init_from": str(workdir)}
  begun(tiny(segments | changes), tmp_path / "run")
  convert.to_published(tmp_path / "run", tmp_path / "target")
  shutil.move(workdir, tmp_path / "moved")  # it holds all it needs
  ours, theirs = lladax.load(tmp_path / "run"), lladax.load(tmp_path / "target")
  assert published.read(tmp_path / "target").family.name == becomes
  assert theirs.model.objective.fills and theirs.model == type(ours.model)(**(vars(ours.model) | {"attention": "auto"}))
  assert (theirs.mask_id, theirs.eos_id, theirs.ends) == (ours.mask_id, ours.eos_id, ours.ends)
  assert theirs.tokenizer.fingerprint == ours.tokenizer.fingerprint
  tokens_BL = np.random.default_rng(0).integers(0, theirs.vocab_size, (2, 16))
  np.testing.assert_array_equal(theirs.logits(tokens_BL), ours.logits(tokens_BL))
  options = theirs.defaults | {"gen_length": 8} | ({} if theirs.model.block else {"steps": 8, "block_length": 8})
  assert theirs.sample("red", **options).text == ours.sample("red", **options).text
  said = json.loads((tmp_path / "target" / "config.json").read_text())
  if case == "Dream, as it was":
    assert said == json.loads((source / "config.json").read_text())
  # And what is read again comes back the same.
  convert.from_published(tmp_path / "target", tmp_path / "again", configs.load("base").to_dict())
  convert.to_published(tmp_path / "again", tmp_path / "back")
  assert json.loads((tmp_path / "back" / "config.json").read_text()) == said


def test_what_no_family_says_is_refused_before_anything_is_read(tiny, tmp_path):
  """Qwen3 with a shift: no published mask predictor norms its heads, and shifts."""
  _, workdir = base(tmp_path, "Qwen3", FREE)
  begun(tiny({"data.segments": True, "init_from": str(workdir), "model.shift": True}), tmp_path / "run")
  with pytest.raises(Mistake, match="no published layout that is known says such a model: .*model.shift=True"):
    convert.to_published(tmp_path / "run", tmp_path / "target")
  assert not (tmp_path / "target").exists()


@pytest.mark.slow
def test_from_qwen_to_sdar_on_the_command_line(tiny_flags, tmp_path):

  def command(*flags):
    env = os.environ | {"XLA_FLAGS": conftest.XLA_FLAGS}
    done = subprocess.run(
      [sys.executable, "-m", "lladax.main", *map(str, flags)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr

  source = publish(tmp_path / "source", {k: x for k, x in (CONFIGS["Qwen3"] | TEXT | FULL).items() if x is not None})
  add_tokenizer(source, mask="<hole>")
  workdir, run, target = (tmp_path / x for x in ("workdir", "run", "target"))
  assert command("--mode=import", f"--source={source}", f"--workdir={workdir}")[0] == 0
  flags = ["--config.noise.block=4", "--config.data.segments=True", "--config.steps=6", "--config.checkpoint.every=6"]
  done = command(*tiny_flags, *flags, f"--config.init_from={workdir}", f"--workdir={run}")
  assert done[0] == 0, done
  done = command("--mode=export", f"--workdir={run}", f"--target={target}")
  assert done[0] == 0, done
  said = json.loads((target / "config.json").read_text())
  assert (said["model_type"], said["architectures"], said["block_size"]) == ("sdar", ["SDARForCausalLM"], 4)
  ours, theirs = lladax.load(run), lladax.load(target)
  tokens_BL = np.random.default_rng(0).integers(0, theirs.vocab_size, (2, 16))
  np.testing.assert_array_equal(theirs.logits(tokens_BL), ours.logits(tokens_BL))
  code, stdout, stderr = command("--mode=import", f"--source={target}", f"--workdir={tmp_path / 'again'}")
  assert code == 0, stderr
  code, stdout, stderr = command("--mode=sample", f"--workdir={tmp_path / 'again'}", "--prompt=red")
  assert code == 0 and stdout, stderr
