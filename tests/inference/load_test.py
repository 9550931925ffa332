"""Models in 8 and 4 bits from published folders and workdirs, of which no device ever holds all in 16."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import LLADA, publish

import lladax
from lladax import config
from lladax.devices import sharding
from lladax.inference import convert, show
from lladax.mistake import Mistake
from lladax.model.mask_predictor import Block
from lladax.storage import checkpoint, safetensors

pytest.importorskip("qwix")
pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Most of it is in the layers, as in a model that is worth it."""
  wide = LLADA | {"n_layers": 8, "embedding_size": 64, "vocab_size": 60, "mask_token_id": 59}
  return publish(tmp_path_factory.mktemp("published") / "llada", wide)


def live():
  return sum(x.nbytes for x in jax.live_arrays())


def assert_the_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_published_folder_is_quantised_while_it_is_read(folder, monkeypatch):
  """When a tensor is read, what was read before is in bits already: at most one tensor of one layer is not."""
  full = lladax.load(folder)
  expected = jax.jit(dataclasses.replace(full.model, weights="int8").freeze)(
    jax.tree.map(lambda x: x.astype(jnp.float32), full.params)
  )
  whole = sum(x.nbytes for x in jax.tree.leaves(full.params))
  del full
  held, read = [], safetensors.Tensor.rows

  def rows(self, *args):
    held.append(live() - before)
    return read(self, *args)

  gc.collect()
  before = live()
  monkeypatch.setattr(safetensors.Tensor, "rows", rows)
  llada = lladax.load(folder, weights="int8", dtype="float32")
  assert_the_same(llada.params, expected)
  assert (llada.model.weights, llada.model.dtype) == ("int8", "float32")
  narrow = sum(x.nbytes for x in jax.tree.leaves(expected))
  matrix = 64 * 96 * 2
  assert len(held) > 8 * 9 and max(held) <= narrow + 2 * matrix  # the array that fills up, and what fills it
  full_layers = sum(expected["blocks"][name]["bits"].size * 2 for name in Block.MATRICES)
  kept = sum(x.nbytes for name in Block.MATRICES for x in expected["blocks"][name].values())
  assert kept < 0.55 * full_layers < whole


@pytest.mark.parametrize("weights", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_on_a_mesh_every_device_keeps_its_part(folder, weights):
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))
  plain, sliced = lladax.load(folder, weights=weights), lladax.load(folder, weights=weights, mesh=mesh)
  assert_the_same(sliced.params, plain.params)
  assert jax.tree.map(lambda x: x.sharding, sliced.params) == sharding.shardings(mesh, plain.model.letters())


def test_a_workdir_is_quantised_parameter_by_parameter(tiny_workdir, monkeypatch):
  """Of a checkpoint that is torn somewhere nothing is taken."""
  full, read, torn = lladax.load(tiny_workdir), [], []
  *_, before, last = checkpoint.steps(tiny_workdir)
  restore = checkpoint.restore

  def one(workdir, step, abstract):
    read.append((step, len(jax.tree.leaves(abstract))))
    if step in torn and len(read) == 3:
      raise checkpoint.Corrupt("torn")
    return restore(workdir, step, abstract)

  monkeypatch.setattr(checkpoint, "restore", one)
  llada = lladax.load(tiny_workdir, weights="int8")
  assert read == [(last, 1)] * len(jax.tree.leaves(full.params))
  assert_the_same(llada.params, jax.jit(llada.model.freeze)(full.params))
  torn.append(last)
  read.clear()
  fallen_back = lladax.load(tiny_workdir, weights="int8").params
  assert read == [(last, 1)] * 3 + [(before, 1)] * len(jax.tree.leaves(full.params))
  assert jax.tree.structure(fallen_back) == jax.tree.structure(llada.params)


@pytest.mark.slow
def test_samples_of_a_workdir_in_bits(tiny_workdir, capsys):
  """From Python, and from the shell, as `--config.model.weights=int8` asks."""
  llada = lladax.load(tiny_workdir, weights="int8")
  c = config.load(tiny_workdir)
  c = dataclasses.replace(c, model=dataclasses.replace(c.model, weights="int8"))
  sampler = dataclasses.replace(c.sample, gen_length=8, block_length=8, steps=8)
  show.show_samples(dataclasses.replace(c, sample=sampler), tiny_workdir, ["red"], None)
  assert (
    capsys.readouterr().out.removesuffix("\n") == llada.sample("red", gen_length=8, block_length=8, steps=8).text[0]
  )


def test_an_import_that_says_so_is_loaded_in_bits(folder, tmp_path):
  values = lladax.configs.load("base").to_dict()
  values["model"]["weights"] = "int4"
  convert.from_published(folder, tmp_path / "imported", values)
  llada = lladax.load(tmp_path / "imported")
  assert_the_same(llada.params, lladax.load(folder, weights="int4").params)
  assert lladax.load(tmp_path / "imported", weights="full").params["blocks"]["q"].dtype == jnp.bfloat16


def test_where_float16_is_computed_in_parameters_are_float16(folder):
  llada, full = lladax.load(folder, dtype="float16"), lladax.load(folder)
  assert {x.dtype for x in jax.tree.leaves(llada.params)} == {np.dtype("float16")}
  tokens_BL = np.random.default_rng(0).integers(0, 60, (2, 16))
  expected = full.logits(tokens_BL)
  np.testing.assert_allclose(llada.logits(tokens_BL), expected, atol=0.01 * np.abs(expected).max())


def test_what_is_not_a_kind_of_weights(folder):
  with pytest.raises(Mistake, match="^model.weights='int5': use one of full, int8, int4, nf4$"):
    lladax.load(folder, weights="int5")
  with pytest.raises(Mistake, match="^weights=8: expected str, not int$"):
    lladax.load(folder, weights=8)


def test_a_mesh_that_cuts_a_byte(folder):
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=8))
  theirs = LLADA | {"n_layers": 1, "d_model": 24, "n_heads": 2, "n_kv_heads": 2}
  path = publish(folder.parent / "narrow", theirs)
  with pytest.raises(Mistake, match="^mesh.fsdp=8 does not divide model.D=24 in pairs, which share a byte: use a div"):
    lladax.load(path, weights="nf4", mesh=mesh)
  with pytest.raises(Mistake, match="^mesh.tensor=8 does not divide model.H=2: use a divisor of it$"):
    lladax.load(path, mesh=sharding.make_mesh(sharding.MeshConfig(data=1, tensor=8)))
  values = lladax.configs.load("base").to_dict()
  values["model"]["weights"] = "nf4"
  odd = publish(folder.parent / "odd", theirs | {"mlp_hidden_size": 33})
  with pytest.raises(Mistake, match="^model.weights='nf4' keeps two values in a byte: model.D=24, model.F=33 are not"):
    convert.from_published(odd, folder.parent / "never", values)
  assert not (folder.parent / "never" / "config.json").exists()
