"""Runs of models with experts, and of mask predictors that begin with a causal model."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import Crash, assert_bitwise_equal, assert_close, at_batch, crash, parameters

import lladax
from lladax.devices import sharding
from lladax.evaluation import held_out
from lladax.mistake import Mistake
from lladax.storage import checkpoint, metrics
from lladax.training import setup, step, trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

# The first layer dense, a shared expert, groups, a bias that chooses and learns, both auxiliary losses.
EXPERTS = {
  "model.N": 2, "model.H": 4, "model.G": 4, "model.E": 8, "model.J": 2, "model.X": 8, "model.S": 8, "model.dense": 1,
  "model.router": "sigmoid", "model.router_bias": True, "model.router_groups": 4, "model.router_topk_groups": 2,
  "model.router_renormalise": True,
  "model.router_scale": 2.5, "model.balance": 0.01, "model.z_loss": 0.001, "model.balance_rate": 1e-3,
  "model.qk_norm": True, "data.segments": True, "steps": 6,
}  # fmt: skip
SOFTMAX = EXPERTS | {
  "model.S": 0, "model.dense": 0, "model.router": "softmax", "model.router_bias": False, "model.router_groups": 0,
  "model.router_topk_groups": 0, "model.router_renormalise": False, "model.router_scale": 1.0,
  "model.balance_rate": 0.0, "model.qk_norm": False,
}  # fmt: skip


def on(monkeypatch, devices):
  make_mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:devices])
  monkeypatch.setattr(sharding, "make_mesh", make_mesh)
  monkeypatch.setattr(held_out, "bound", lambda *_: {})


def routed(workdir):
  """What the metrics say of the experts, a row a step."""
  rows = metrics.read(workdir / "metrics.jsonl")
  return np.array([[row[x] for x in ("expert_load", "router_entropy", "dropped")] for row in rows if "loss" in row])


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
  """The workdir of a run with experts on one device."""
  workdir = tmp_path_factory.mktemp("experts") / "one"
  with pytest.MonkeyPatch.context() as patch:
    on(patch, 1)
    trainer.train(tiny(EXPERTS), workdir)
  return workdir


@pytest.mark.parametrize(
  ("mesh", "more"),
  [
    ({"tensor": 4, "fsdp": 2}, {"model.remat": "dots"}),
    pytest.param({"fsdp": 8}, {}, marks=pytest.mark.slow),
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, {"micro_batches": 2}, marks=pytest.mark.slow),
    pytest.param({"slices": 2, "fsdp": 2, "context": 2}, {"model.remat": "full"}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_every_mesh_is_the_same_with_experts(one, tiny, tmp_path, monkeypatch, mesh, more):
  on(monkeypatch, 8)
  axes = {f"mesh.{axis}": size for axis, size in ({"data": 1} | mesh).items()}
  trainer.train(tiny(EXPERTS | axes | more), tmp_path)
  assert_close(tmp_path, one)
  np.testing.assert_allclose(routed(tmp_path), routed(one), rtol=1e-5)


def test_a_run_with_experts_from_end_to_end(one, tiny, tmp_path, monkeypatch):
  """Cut off and continued it is the same, bit for bit; it samples, by blocks too."""
  on(monkeypatch, 1)
  with monkeypatch.context() as patch:
    at_batch(patch, 4, crash)
    with pytest.raises(Crash):
      trainer.train(tiny(EXPERTS | {"checkpoint.every": 3}), tmp_path)
  trainer.train(tiny(EXPERTS | {"checkpoint.every": 3}), tmp_path)
  assert_bitwise_equal(tmp_path, one)
  llada = lladax.load(one)
  assert set(llada.params) >= {"first", "blocks"} and "gate" in llada.params["first"]
  sampled = llada.sample(["red", "a"], gen_length=8, block_length=4, steps=8, cache="dual")
  assert len(sampled.text) == 2
  blocks = dataclasses.replace(llada, model=dataclasses.replace(llada.model, block=4))
  assert len(blocks.sample(["red", "a"], gen_length=8, steps=8).text) == 2
  loads, entropies, dropped = routed(one).T
  assert (loads >= 1).all() and (entropies > 0).all() and (dropped == 0).all()


def test_the_choosing_bias_moves_by_the_loads_alone(one):
  """After 6 steps it is a sum of six steps of 1e-3, up or down, whatever the learning rate."""
  choice_NE = parameters(one)["blocks/choice"]
  np.testing.assert_allclose(choice_NE / 1e-3, np.round(choice_NE / 1e-3), atol=1e-3)
  assert (np.abs(choice_NE) <= 6.001e-3).all() and (choice_NE > 0).any() and (choice_NE < 0).any()


@pytest.mark.slow
def test_loads_are_balanced_in_time(tiny, tmp_path, monkeypatch):
  """By the bias alone, and by the auxiliary loss alone."""
  on(monkeypatch, 1)
  for name, changes in (
    ("none", {"model.balance": 0.0, "model.balance_rate": 0.0}), ("loss", {"model.balance": 1.0}),
    ("bias", {"model.balance": 0.0, "model.balance_rate": 2e-2}),
  ):  # fmt: skip
    base = EXPERTS | {"model.router_groups": 0, "model.router_topk_groups": 0, "steps": 40, "log.every": 1}
    trainer.train(tiny(base | {"model.balance_rate": 0.0} | changes), tmp_path / name)
  none, loss, bias = (routed(tmp_path / name)[-10:, 0].mean() for name in ("none", "loss", "bias"))
  assert loss < none and bias < none


def test_micro_batches_change_nothing_with_an_auxiliary_loss(tiny, tmp_path, monkeypatch):
  on(monkeypatch, 1)
  for name, more in (("whole", {}), ("parts", {"micro_batches": 4})):
    trainer.train(tiny(SOFTMAX | more), tmp_path / name)
  assert_close(tmp_path / "parts", tmp_path / "whole")
  np.testing.assert_allclose(routed(tmp_path / "parts"), routed(tmp_path / "whole"), rtol=1e-5)


def test_adapters_of_experts_and_of_all_else(one, tiny, tmp_path, monkeypatch):
  """Trained over a frozen base, and merged by loading: what both compute is the same."""
  on(monkeypatch, 1)
  lora = EXPERTS | {"init_from": str(one), "model.lora_rank": 2, "model.lora_alpha": 4.0, "steps": 8}
  trainer.train(tiny(lora), tmp_path / "lora")
  merged, base = lladax.load(tmp_path / "lora"), lladax.load(one)
  assert merged.model.lora_rank == 0
  for stack, names in (
    ("first", ("q", "gate", "down")),
    ("blocks", ("v", "experts_up", "experts_down", "shared_gate")),
  ):
    for name in names:
      assert np.abs(np.asarray(merged.params[stack][name]) - np.asarray(base.params[stack][name])).max() > 0
  for name in ("router", "choice"):
    np.testing.assert_array_equal(merged.params["blocks"][name], base.params["blocks"][name])
  config = tiny(lora | {"model.V": base.model.V})
  c = config.model
  _, init, _, _ = step.program(config, sharding.make_mesh(config.mesh))
  adapters = jax.tree.map(lambda x: x + 0.1, init().params)
  tokens_BL = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
  beside = c.bind(c.join(adapters, base.params))(tokens_BL)
  whole, params = c.merge(adapters, base.params)
  np.testing.assert_allclose(beside, whole.bind(params)(tokens_BL), atol=1e-4)


def test_what_a_step_with_experts_costs(tiny):
  """Of the experts the ones that a token meets."""
  c = tiny(EXPERTS | {"model.V": 32}).model
  layers = [dataclasses.replace(c, N=1, dense=0)]
  of_expert = 3 * c.D * c.X
  all_of_it, met = c.num_params(), c.num_params(active=True)
  assert all_of_it - met == (c.E - c.J) * of_expert * (c.N - c.dense) and layers
  assert step.matmuls(tiny(EXPERTS | {"model.V": 32})) == met - c.V * c.D


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"model.J": 9}, "model.J=9: a token is given to at least 1 of model.E=8 experts"),
    ({"model.X": 0}, "model.X=0: an expert has a width of at least 1"),
    ({"model.dense": 2}, "model.dense=2: of model.N=2 layers at least one has experts"),
    ({"model.router_groups": 3}, "model.router_groups=3 does not divide model.E=8 into groups"),
    ({"model.router_topk_groups": 5}, "model.router_topk_groups=5: of model.router_groups=4 so many are kept"),
    ({"model.router": "linear"}, "model.router='linear': use softmax or sigmoid"),
    ({"model.router_bias": False}, "model.balance_rate=0.001 moves the choosing bias: set model.router_bias=True"),
    ({"model.weights": "int8"}, "model.weights='int8': experts are not kept in bits"),
    ({"model.E": 0}, "model.J=2: there are no experts: set model.E"),
  ],
)
def test_experts_that_do_not_fit_are_refused(tiny, changes, said):
  with pytest.raises(Mistake, match=said):
    tiny(EXPERTS | changes)


def test_a_base_with_experts_may_be_balanced(one, tiny, tmp_path, monkeypatch):
  """By a config that does not repeat its shape; a base without any is refused before anything is read."""
  on(monkeypatch, 1)
  base = {"init_from": str(one), "data.segments": True, "model.balance_rate": 1e-3, "model.balance": 0.01}
  trainer.train(tiny(base | {"steps": 6}), tmp_path / "balanced")
  assert (
    lladax.load(tmp_path / "balanced").params["blocks"]["choice"] != lladax.load(one).params["blocks"]["choice"]
  ).any()
  with pytest.raises(Mistake, match="model.balance=0.01: there are no experts: set model.E, or leave it out"):
    trainer.train(tiny({"model.balance": 0.01}), tmp_path / "none")


def test_a_base_that_is_older_than_a_field_has_its_default(tiny, tiny_workdir, tmp_path):
  shutil.copytree(tiny_workdir, tmp_path / "old")
  saved = json.loads((tmp_path / "old" / "config.json").read_text())
  saved["model"] = {
    x: y for x, y in saved["model"].items() if x not in ("E", "J", "X", "S", "dense", "router", "shift")
  }
  (tmp_path / "old" / "config.json").write_text(json.dumps(saved))
  config = tiny({"init_from": str(tmp_path / "old"), "model.E": 4, "model.J": 2, "model.X": 8, "steps": 6})
  assert setup.prepare(config, tmp_path / "new").config.model.E == 0


def test_experts_that_a_mesh_does_not_divide_are_refused(tiny, tmp_path, monkeypatch):
  config = tiny(EXPERTS | {"model.E": 6, "model.router_groups": 3, "mesh.data": 2, "mesh.tensor": 4})
  with pytest.raises(Mistake, match="mesh.tensor=4 does not divide model.E=6: use a divisor of it"):
    trainer.train(config, tmp_path)


@pytest.fixture(scope="module")
def causal(tiny, tmp_path_factory):
  """The workdir of a causal model."""
  workdir = tmp_path_factory.mktemp("causal") / "run"
  trainer.train(tiny({"objective": "autoregressive", "data.segments": True, "steps": 10}), workdir)
  return workdir


@pytest.mark.parametrize(
  "changes", [{"noise.block": 4}, {"model.shift": True}, {"noise.block": 4, "model.shift": True}, {}], ids=str
)
def test_a_causal_model_becomes_a_mask_predictor(causal, tiny, tmp_path, changes):
  config = tiny(
    {"init_from": str(causal), "data.segments": True, "steps": 4, "optimizer.schedule": ((-1, 0.0),)} | changes
  )
  trainer.train(config, tmp_path)
  ours, theirs = lladax.load(tmp_path), lladax.load(causal)
  assert ours.model.objective.fills and ours.model.shift == bool(changes.get("model.shift"))
  rows = np.delete(np.arange(theirs.vocab_size), ours.mask_id)
  for name in ("embedding", "blocks"):  # a learning rate of 0: what it began with
    a, b = ours.params[name], theirs.params[name]
    jax.tree.map(np.testing.assert_array_equal, *((x[rows] if name == "embedding" else x) for x in (a, b)))
  words_VD, mask_D = np.asarray(theirs.params["embedding"])[rows], np.asarray(ours.params["embedding"])[ours.mask_id]
  assert 0.5 < np.linalg.norm(mask_D) / np.linalg.norm(words_VD, axis=1).mean() < 2  # as long as a word's
  if ours.model.shift:  # and it knows the next word still: of a canvas that is given up to there
    tokens = theirs.tokenizer.encode("the red fox")
    as_ours = {"causal": False, "shift": True, "block": ours.model.block}
    full = dataclasses.replace(theirs, model=dataclasses.replace(theirs.model, **as_ours))
    np.testing.assert_allclose(ours.logits([tokens])[:, :, rows], full.logits([tokens])[:, :, rows], atol=1e-4)


def test_what_a_causal_model_cannot_become(causal, tiny, tmp_path):
  base = {"init_from": str(causal), "data.segments": True}
  with pytest.raises(Mistake, match="model.shift=True: .* has none, its states predict their own places"):
    setup.prepare(tiny(base | {"model.shift": True, "objective": "autoregressive"}), tmp_path)
  with pytest.raises(Mistake, match="model.lora_rank=2: .* is autoregressive, and what it knows of"):
    setup.prepare(tiny(base | {"model.lora_rank": 2}), tmp_path)


def test_a_run_with_experts_is_read_in_16_bits(one):
  """Parameter by parameter, those of the dense layers as well."""
  wide, narrow = lladax.load(one), lladax.load(one, dtype="float16")
  assert narrow.params.keys() == wide.params.keys()
  kept = {path: x.dtype.name for path, x in checkpoint.flat(narrow.params)}
  assert {path for path, dtype in kept.items() if dtype == "float32"} == {"blocks/router", "blocks/choice"}
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), narrow.params, wide.params)
  tokens = wide.tokenizer.encode("red and")
  np.testing.assert_allclose(narrow.logits([tokens]), wide.logits([tokens]), atol=0.05)


def test_experts_are_in_the_config_of_a_run(one):
  saved = json.loads((one / "config.json").read_text())["model"]
  assert (saved["E"], saved["J"], saved["router"], saved["router_groups"]) == (8, 2, "sigmoid", 4)
