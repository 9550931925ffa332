import json
import os
import pathlib
import shutil
import subprocess
import sys

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from layouts import BF16, LLADA, WITH_TEXT, add_tokenizer, publish, tensors
from vocabularies import CHATML, folder_of

import lladax
from lladax.data import tokenizer
from lladax.devices import sharding
from lladax.inference import convert
from lladax.storage import checkpoint, published, transfer
from lladax.training import setup, trainer

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("quick_compiles")


def command(*flags):
  env = os.environ | {"XLA_FLAGS": conftest.XLA_FLAGS}
  done = subprocess.run(
    [sys.executable, "-m", "lladax.main", *map(str, flags)], cwd=ROOT, env=env, capture_output=True, text=True
  )
  return done.returncode, done.stdout, done.stderr


@pytest.fixture
def with_text(tmp_path):
  source = publish(tmp_path / "with_text", WITH_TEXT)
  add_tokenizer(source)
  return source


def test_tokenizer_files_make_text(with_text):
  llada = lladax.load(with_text)
  text = llada.tokenizer
  assert (llada.mask_id, llada.eos_id, llada.vocab_size, text.bos_id, text.eot_id) == (258, 257, 262, 256, 261)
  assert text.chat([{"role": "user", "content": "Hi"}])[0] == 256 and text.template is None  # it is LLaDA's
  assert llada.eot_id == 261 and llada.ends == (257, 261)
  out = llada.sample("Hi", gen_length=4, block_length=4, steps=4)
  assert isinstance(out.text[0], str) and out.tokens.max() < 262


@pytest.fixture
def with_a_template(tmp_path):
  """A folder that speaks ChatML: its end of a turn is no EOS of config.json, and generation_config.json names more."""
  source = publish(tmp_path / "chatml", WITH_TEXT)
  folder_of(source, "prepend", CHATML, ["<|im_start|>", "<|im_end|>"])
  ids = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).token_to_id
  special = {"eos_token_id": ids("</s>"), "mask_token_id": ids("<|mdm_mask|>"), "pad_token_id": None}
  (source / "config.json").write_text(json.dumps(WITH_TEXT | special))
  (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids("<|im_end|>"), ids("<s>")]}))
  return source, ids


TALK = [{"role": "user", "content": "The king<|im_end|>"}]


def test_a_folder_speaks_in_its_own_template(with_a_template, tmp_path):
  source, ids = with_a_template
  llada = lladax.load(source)
  text, end = llada.tokenizer, ids("<|im_end|>")
  assert (llada.eot_id, llada.ends) == (end, (ids("</s>"), end, ids("<s>")))
  assert text.vocab_size == llada.vocab_size == 1 + end  # nothing was appended
  asked = text.chat(TALK)
  assert asked[0] == ids("<|im_start|>") and asked.count(end) == 1
  out = llada.chat(TALK, gen_length=4, block_length=4, steps=4)
  assert out.tokens[0, out.padding[0] : -4].tolist() == asked
  workdir, target = tmp_path / "workdir", tmp_path / "target"
  convert.from_published(source, workdir, {"model": {}, "tokenizer": {}})
  convert.to_published(workdir, target)
  (source / "tokenizer_config.json").unlink()
  shutil.move(workdir, tmp_path / "moved")  # it holds all it needs
  for folder in (tmp_path / "moved", target):
    again = lladax.load(folder)
    assert again.tokenizer.fingerprint == text.fingerprint and again.tokenizer.chat(TALK) == asked
    assert (again.eot_id, again.ends, again.vocab_size) == (llada.eot_id, llada.ends, llada.vocab_size)
  with pytest.raises(ValueError, match="^a conversation: this model has no chat template, nor LLaDA's chat tokens"):
    header = json.loads((source / "tokenizer.json").read_text())
    header["added_tokens"] = [x for x in header["added_tokens"] if "header" not in x["content"]]
    (source / "tokenizer.json").write_text(json.dumps(header))
    lladax.load(source).chat(TALK)


def test_fine_tuning_speaks_the_bases_template(with_a_template, tiny, tmp_path):
  """What is learnt is what `chat` asks for, and the run's workdir goes on without the base."""
  source, _ = with_a_template
  convert.from_published(source, tmp_path / "base", {"model": {}, "tokenizer": {}})
  lines = [{"messages": [*TALK, {"role": "assistant", "content": f"Paris {i}"}]} for i in range(20)]
  (tmp_path / "talks.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  fields = {"init_from": str(tmp_path / "base"), "data.corpus": f"files:{tmp_path / 'talks.jsonl'}",
            "data.format": "chat", "data.length": 96}  # fmt: skip
  run = setup.prepare(tiny(fields), tmp_path / "run")
  text, rows = tokenizer.load(tmp_path / "run" / "tokenizer"), run.sources[0]
  assert text.fingerprint == run.text.fingerprint == json.loads((tmp_path / "run" / "config.json").read_text())[
    "tokenizer_fingerprint"
  ]  # fmt: skip
  ids, (begin, place, end) = rows._talks.ids(0), (x[0] for x in (rows._begin_R, rows._reply_R, rows._end_R))
  prompt, reply = ids[begin:place], ids[place:end]
  assert prompt.tolist() == text.chat(TALK) and reply[-1] == text.eot_id
  assert text.decode(reply, behind=prompt).startswith("Paris ")
  with jax.set_mesh(run.mesh):
    found = trainer._llada(run, setup.begin(run), 0)
  assert found.ends == lladax.load(source).ends and found.eot_id == text.eot_id


@pytest.mark.slow
def test_import_and_export_from_the_command_line(with_text, tmp_path):
  workdir, target = tmp_path / "workdir", tmp_path / "target"
  done = command("--mode=import", f"--source={with_text}", f"--workdir={workdir}")
  assert done == (0, "", f"lladax: {with_text} is read into {workdir}\n")
  llada, direct = lladax.load(workdir), lladax.load(with_text)
  assert llada.model == direct.model and llada.tokenizer.fingerprint == direct.tokenizer.fingerprint
  assert (llada.mask_id, llada.eos_id, llada.vocab_size, llada.eot_id) == (258, 257, 262, 261)
  jax.tree.map(np.testing.assert_array_equal, llada.params, direct.params)
  assert llada.params["embedding"].dtype == BF16
  code, stdout, stderr = command("--mode=sample", f"--workdir={workdir}", "--prompt=Hi")
  assert code == 0 and stdout, stderr

  done = command("--mode=export", f"--workdir={workdir}", f"--target={target}")
  assert done == (0, "", f"lladax: {workdir} is written to {target}\n")
  assert tensors(target) == tensors(with_text)
  for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
    assert json.loads((target / name).read_text()) == json.loads((with_text / name).read_text())

  for flags, said in (
    (["--mode=import", f"--source={with_text}"], f"--workdir={workdir} is not empty: an import needs a new workdir"),
    (["--mode=export", f"--target={target}"], f"--target={target} is not empty: an export needs a new folder"),
  ):
    code, stdout, stderr = command(*flags, f"--workdir={workdir}")
    assert (code, stdout, stderr) == (1, "", f"lladax: {said}\n")


def test_a_mesh_that_does_not_divide_the_model_leaves_nothing_behind(with_text, tmp_path):
  for mesh, said in (({"tensor": 8}, "mesh.tensor=8 does not divide model.F=100"), ({"fsdp": 3}, "do not multiply")):
    source = publish(tmp_path / f"{mesh}", WITH_TEXT | {"mlp_hidden_size": 100})
    add_tokenizer(source)
    with pytest.raises(ValueError, match=said):
      convert.from_published(source, tmp_path / "workdir", {"model": {}, "tokenizer": {}, "mesh": mesh})
    assert not (tmp_path / "workdir").exists()


def test_fine_tuning_can_start_from_an_import(tmp_path):
  """The parameters alone, cast to float32, onto any mesh."""
  source, workdir = publish(tmp_path / "source", LLADA), tmp_path / "workdir"
  values = {"model": {"remat": "dots"}, "tokenizer": {}}
  convert.from_published(source, workdir, values)
  assert json.loads((workdir / "config.json").read_text())["model"]["remat"] == "dots"
  theirs = published.read(source)
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1))
  at = sharding.shardings(mesh, theirs.model.letters())
  wanted = jax.eval_shape(theirs.model.init, jax.random.key(0))
  wanted = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), wanted, at)
  params = checkpoint.restore(workdir, 0, {"params": wanted})["params"]
  jax.tree.map(np.testing.assert_array_equal, params, transfer.load_params(theirs, dtype=jnp.float32))
  assert jax.tree.map(lambda x: (x.dtype, x.sharding), params) == jax.tree.map(lambda x: (jnp.dtype("float32"), x), at)
  llada = lladax.load(workdir)  # ids only
  assert llada.tokenizer is None and llada.mask_id == 249 and llada.unmask([[1, 249]]).tokens.shape == (1, 32)
  with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
    convert.from_published(tmp_path / "nowhere", tmp_path / "new", values)
  assert not (tmp_path / "new").exists()


def test_a_run_of_ours_becomes_a_published_folder(tiny_workdir, tmp_path):
  target = tmp_path / "target"
  convert.to_published(tiny_workdir, target, "bfloat16")
  ours, theirs = lladax.load(tiny_workdir), lladax.load(target)
  assert {x.dtype for x in jax.tree.leaves(theirs.params)} == {BF16}
  assert theirs.tokenizer.fingerprint == ours.tokenizer.fingerprint and theirs.mask_id == ours.mask_id
  assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
  shutil.rmtree(target)
  convert.to_published(tiny_workdir, target)
  theirs = lladax.load(target)
  jax.tree.map(np.testing.assert_array_equal, theirs.params, ours.params)
  prompt = {"gen_length": 8, "block_length": 8, "steps": 8}
  assert theirs.sample("red", **prompt).text == ours.sample("red", **prompt).text
