"""The families beside LLaDA, against what their PyTorch references answer (tests/golden/README.md).

A set is a folder that the first words of a family's name begin, here or where LLADAX_GOLDEN says.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import tensors

import lladax
from lladax import sampling
from lladax.inference import convert
from lladax.model import experts
from lladax.storage import layout, published, transfer

pytestmark = pytest.mark.usefixtures("quick_compiles")

SETS = pathlib.Path(os.environ.get("LLADAX_GOLDEN", pathlib.Path(__file__).parent / "golden"))
NAMES = ("llada-moe", "llada2", "sdar", "dream", "qwen2", "qwen3-moe", "qwen3-tied", "qwen3", "llama")
CAUSAL = ("qwen2", "qwen3-moe", "qwen3-tied", "qwen3", "llama")


def found(*names):
  """The sets of these families; each folder is of the longest name that it begins with."""
  folders = sorted(x for x in SETS.iterdir() if (x / "golden.json").is_file())
  of = {x: max((n for n in NAMES if x.name.startswith((n + "-", n + "_")) or x.name == n), key=len, default="") for x in
        folders}  # fmt: skip
  return [folder for folder in folders if of[folder] in names]


def sets(*names):
  """A test for each set of these families."""
  return pytest.mark.parametrize("folder", [pytest.param(x, id=x.name) for x in found(*names)])


def cases(*names):
  """A test for each case of a sampler."""
  return pytest.mark.parametrize(
    ("folder", "case"),
    [pytest.param(x, case, id=f"{x.name}-{case['name']}") for x in found(*names) for case in about(x)["cases"]],
  )


@functools.cache
def about(folder):
  return json.loads((folder / "golden.json").read_text())


@functools.cache
def golden(folder):
  """(its model, what the reference answers)."""
  with np.load(folder / "golden.npz") as file:
    return load(folder), dict(file)


def said(folder, **more):
  """What the folder does not say, and the golden set does."""
  facts, config = about(folder), json.loads((folder / "config.json").read_text())
  ids = {name: facts[name] for name in ("mask_id", "eos_id") if config.get(name.replace("_id", "_token_id")) is None}
  ids = {name: value for name, value in ids.items() if name in facts}
  needs = facts["family"] in ("llada2", "sdar") and config.get("block_size") is None
  return ids | ({"block": facts["block_size"]} if needs else {}) | more


def load(folder, **more):
  facts = about(folder)
  if facts["family"] in ("llada2", "llada-moe", "sdar", "dream"):
    return lladax.load(folder, **said(folder, **more))
  return lladax.load(folder, **more)


def of_model(llada, **changes):
  return dataclasses.replace(llada, model=dataclasses.replace(llada.model, **changes))


close = functools.partial(np.testing.assert_allclose, atol=1e-3, rtol=0)


@sets("llada-moe", "llada2", "sdar")
def test_golden_logits(folder):
  llada, answers = golden(folder)
  orders = {"logits": {"block": 0}, "logits_full": {"block": 0}, "logits_block_causal": {}}
  for name, changes in orders.items():
    if name in answers:
      close(of_model(llada, **changes).logits(answers["x_masked"]), answers[name])
  if "logits_left_padded" in answers:
    real_BL = answers["attention_mask"] > 0
    logits_BLV = llada.logits(answers["x_masked"], answers["attention_mask"].astype(np.int32))
    close(logits_BLV[real_BL], answers["logits_left_padded"][real_BL])


@sets("dream")
def test_golden_logits_that_are_shifted(folder):
  """At i stands what is predicted for i: the reference has it one place further left."""
  llada, answers = golden(folder)
  logits_BLV = llada.logits(answers["x_masked"])
  close(logits_BLV[:, 1:], answers["logits"][:, :-1])
  close(logits_BLV[:, 0], answers["logits"][:, 0])
  real_BL = answers["attention_mask"] > 0
  both_BL = real_BL[:, 1:] & real_BL[:, :-1]
  logits_BLV = llada.logits(answers["x_masked"], real_BL.astype(np.int32))
  close(logits_BLV[:, 1:][both_BL], answers["logits_left_padded"][:, :-1][both_BL])


@sets(*CAUSAL)
def test_golden_logits_of_causal_models(folder):
  llada, answers = golden(folder)
  close(llada.logits(answers["x"])[:, 1:], answers["logits"][:, :-1])
  close(llada.logits(answers["x_long"])[:, 1:], answers["logits_long"][:, :-1])
  real_BL = answers["attention_mask"] > 0
  both_BL = real_BL[:, 1:] & real_BL[:, :-1]
  logits_BLV = llada.logits(answers["x"], real_BL.astype(np.int32))
  close(logits_BLV[:, 1:][both_BL], answers["logits_left_padded"][:, :-1][both_BL])
  # The beginning of a mask predictor.
  close(of_model(llada, causal=False).logits(answers["x"])[:, 1:], answers["logits_bidirectional"][:, :-1])
  if "logits_long_without_rope_scaling" in answers:
    plain = of_model(llada, rope_scaling="none")
    close(plain.logits(answers["x_long"])[:, 1:], answers["logits_long_without_rope_scaling"][:, :-1])


@sets(*CAUSAL)
def test_golden_greedy_and_likelihood_of_causal_models(folder):
  llada, answers = golden(folder)
  n = about(folder)["cases"][0]["max_new_tokens"]
  prompt = answers["prompt"][0].tolist()
  endless = dataclasses.replace(llada, eos_id=llada.model.V, ends=(llada.model.V,), vocab_size=llada.model.V)
  out = endless.sample([prompt], gen_length=n)
  np.testing.assert_array_equal(out.tokens[0][-n:], answers["out_greedy"][0][-n:])
  row, nll = answers["x"][0].tolist(), answers["token_nll"][0]
  np.testing.assert_allclose(llada.log_likelihood(row[:5], row[5:]), -nll[4:].sum(), rtol=1e-4)


@sets(*CAUSAL)
def test_golden_config_as_transformers_5_writes_it(folder, tmp_path):
  shutil.copytree(folder, tmp_path / "five")
  shutil.copyfile(folder / "config_transformers5.json", tmp_path / "five" / "config.json")
  assert published.read(tmp_path / "five").model == published.read(folder).model


@sets(*NAMES)
def test_golden_parameters(folder):
  llada, _ = golden(folder)
  assert llada.model.num_params() == about(folder)["parameters"]


@sets("llada-moe", "llada2")
def test_golden_router(folder):
  """The chosen experts of every token, and what they count."""
  llada, answers = golden(folder)
  routed, route = [], experts.route

  def listening(*args):
    chosen = route(*args)
    routed.append((np.asarray(chosen[0]), np.asarray(chosen[1])))
    return chosen

  c = dataclasses.replace(llada.model, block=0)
  with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
    patch.setattr(experts, "route", listening)
    c.bind(llada.params).hidden(jnp.asarray(answers["x_masked"]))
  expected = zip(answers["router_topk"], answers["router_weights"], strict=True)
  for (expert_TJ, weight_TJ), (theirs, weights) in zip(routed, expected, strict=True):
    order_TJ, their_TJ = np.argsort(expert_TJ, axis=1), np.argsort(theirs.reshape(expert_TJ.shape), axis=1)
    sort = functools.partial(np.take_along_axis, axis=1)
    np.testing.assert_array_equal(sort(expert_TJ, order_TJ), sort(theirs.reshape(expert_TJ.shape), their_TJ))
    close(sort(weight_TJ, order_TJ), sort(weights.reshape(weight_TJ.shape), their_TJ), atol=1e-4)


def trained_on(llada, noised_BL, clean_BL, masked_BL, weight_BL, segment_BL=None):
  """(logits of the noised half, cross-entropy of each masked token, the weighted loss) of one training pass."""
  c, L = llada.model, noised_BL.shape[1]
  bound, visible = c.bind(llada.params), c.visible(L, segment_BL)
  target_BL = np.where(masked_BL, clean_BL, -1)
  logits_BLV = bound.logits(bound.seen(noised_BL, visible, clean_BL))
  nll_BL = bound.nll(noised_BL, target_BL, visible, clean_BL=clean_BL)
  loss, _ = bound.weighted_nll(noised_BL, target_BL, jnp.asarray(weight_BL), visible, clean_BL=clean_BL)
  return logits_BLV, nll_BL, loss


@sets("llada2")
def test_golden_training_pass_of_llada2(folder):
  llada, answers = golden(folder)
  facts = about(folder)["train"]
  noised_BL, clean_BL = (jnp.asarray(answers[f"train_{x}"]) for x in ("xt", "x0"))
  masked_BL = answers["train_loss_mask"] > 0
  mean_BL = np.full(masked_BL.shape, 1 / masked_BL.sum(), np.float32)
  logits_BLV, nll_BL, loss = trained_on(llada, noised_BL, clean_BL, masked_BL, mean_BL)
  close(logits_BLV, answers["train_logits"])
  close(nll_BL, answers["train_token_nll"])
  np.testing.assert_allclose(loss, facts["loss_mean_ce"], rtol=1e-5)
  maskable = sum(masked_BL.shape[1] - n for n in facts["prompt_lengths"])
  bound_BL = np.broadcast_to(1 / np.array(facts["t"], np.float32)[:, None] / maskable, masked_BL.shape)
  loss = trained_on(llada, noised_BL, clean_BL, masked_BL, bound_BL)[2]
  np.testing.assert_allclose(loss, facts["loss_inverse_t_per_maskable_token"], rtol=1e-5)
  segment_BL = jnp.asarray(answers["packed_document"]) + (1 - answers["packed_document"].min())
  logits_BLV, nll_BL, loss = trained_on(llada, noised_BL, clean_BL, masked_BL, mean_BL, segment_BL)
  close(logits_BLV, answers["packed_logits"])
  close(nll_BL, answers["packed_token_nll"])
  np.testing.assert_allclose(loss, facts["packed_loss_mean_ce"], rtol=1e-5)


@sets("sdar")
def test_golden_training_pass_of_sdar(folder):
  """Packed documents whose last blocks are short."""
  llada, answers = golden(folder)
  noised_BL, clean_BL = (jnp.asarray(answers[f"train_{x}"]) for x in ("xt", "x0"))
  masked_BL, document_BL = answers["train_loss_mask"] > 0, answers["train_document"]
  answer_BL = answers["train_prompt_mask"] == 0
  p_BL = answers["train_p"]
  p_BL = p_BL if p_BL.shape == masked_BL.shape else np.take_along_axis(p_BL, document_BL - document_BL.min(), axis=1)
  weight_BL = (1 / p_BL / answer_BL.sum()).astype(np.float32)
  segment_BL = jnp.asarray(document_BL + (1 - document_BL.min()), jnp.int32)
  logits_BLV, nll_BL, loss = trained_on(llada, noised_BL, clean_BL, masked_BL, weight_BL, segment_BL)
  close(logits_BLV, answers["train_logits"])
  close(nll_BL, answers["train_token_nll"])
  np.testing.assert_allclose(loss, about(folder)["train"]["loss_inverse_p_per_answer_token"], rtol=1e-5)


def unpadded(answers, name="prompt"):
  """The prompts of a batch as lists of ids."""
  mask_BL = answers["batch_attention_mask"] if name == "batch_prompt" else np.ones_like(answers[name])
  return [row[real > 0].tolist() for row, real in zip(answers[name], mask_BL, strict=True)]


def up_to(ids, ends):
  """A row up to and with the first of the ends."""
  at = np.flatnonzero(np.isin(ids, ends))
  return ids[: at[0] + 1] if len(at) else ids


def filled_a_pass(out, nfe, start=0):
  """How many tokens of the first row each pass committed."""
  return np.bincount(np.maximum(out.unmasked_at[0][start:], 0), minlength=nfe + 1)[1:].tolist()


@cases("llada-moe")
def test_golden_samples_of_llada_moe(folder, case):
  llada, answers = golden(folder)
  rows = unpadded(answers, "batch_prompt" if case.get("batched") else "prompt")
  options = {name: case[name] for name in ("steps", "gen_length", "block_length")}
  out = llada.sample(rows, guidance_scale=case.get("cfg_scale", 0.0), **options)
  for row, tokens, expected, padding in zip(rows, out.tokens, answers[f"out_{case['name']}"], out.padding, strict=True):
    np.testing.assert_array_equal(tokens[padding:], expected[-len(row) - case["gen_length"] :])
  assert out.nfe == case["steps"]


@cases("llada2")
def test_golden_samples_of_llada2(folder, case):
  """Tokens up to an EOS, passes and, as far as they are returned, commits and edits of both generators."""
  llada, answers = golden(folder)
  llada, edits = of_model(llada, block=case["block_length"]), case["sampler"] == "llada2.1"
  options = {"gen_length": case["gen_length"], "threshold": case["threshold"], "steps": 64, "early_stop": False}
  options["early_stop"] = case.get("eos_early_stop", False)
  if edits:
    options |= {"tokens_per_step": case.get("num_to_transfer", 1), "edit_threshold": case["editing_threshold"]}
    options |= {"max_post_passes": case["max_post_steps"]}
  else:
    options["block_steps"] = min(case["steps"], case["gen_length"] // case.get("minimal_topk", 1))
  prompt = answers[case["prompt"]][0].tolist()
  out, n = llada.sample([prompt], **options), case["gen_length"]
  answer, expected = out.tokens[0][-n:], answers[f"out_{case['name']}"][0]
  ends = (about(folder)["eos_id"],)
  np.testing.assert_array_equal(up_to(answer, ends), up_to(expected, ends))
  if case["stopped_by_eos"] == "after a block" and not options["early_stop"]:  # the reference stops there unasked
    size = case["block_length"]
    end = -(-(len(prompt) + len(up_to(answer, ends))) // size) * size - len(prompt)
    assert out.unmasked_at[0][-n:][:end].max() == case["nfe"]
    return
  assert out.nfe == case["nfe"]
  if (len(prompt) + n) % case["block_length"] == 0 and not case["stopped_by_eos"] and not options["early_stop"]:
    assert filled_a_pass(out, out.nfe, -n) == case["commits"]
    if edits:  # how many there were of a token is not kept, and which pass was its last is
      last = np.bincount(out.edited_at[0][-n:], minlength=out.nfe + 1)[1:]
      assert (last <= case["edits"]).all() and (last.sum() > 0) == (sum(case["edits"]) > 0)


@cases("sdar")
def test_golden_samples_of_sdar(folder, case):
  llada, answers = golden(folder)
  facts, size = about(folder), case["block_length"]
  llada = of_model(llada, block=size)
  if case.get("use_stop"):
    stops = (facts["eos_id"], *(i for i in facts["stop_ids"] if i != facts["eos_id"]))
    llada = dataclasses.replace(llada, ends=stops)
  prompt, n = answers[case["prompt"]][0].tolist(), case["gen_length"]
  out = llada.sample(
    [prompt], gen_length=n, block_steps=case["denoising_steps"], threshold=case.get("threshold"),
    early_stop=case.get("use_stop", False),
    remasking="sequential" if case["strategy"] == "sequential" else "low_confidence",
  )  # fmt: skip
  expected = answers[f"out_{case['name']}"][0]
  answer = out.tokens[0][out.padding[0] :]
  ours, theirs = answer[len(prompt) :], expected[len(prompt) : len(answer)]
  if case.get("use_stop"):
    ours, theirs = up_to(ours, llada.ends), up_to(theirs, llada.ends)
  np.testing.assert_array_equal(ours, theirs)
  assert out.nfe == case["nfe"]
  if (len(prompt) + n) % size == 0 and not case.get("use_stop"):
    assert filled_a_pass(out, out.nfe, -n) == case["commits"]


ALGORITHMS = {"maskgit_plus": "low_confidence", "entropy": "high_entropy", "topk_margin": "low_margin"}


@cases("dream")
def test_golden_samples_of_dream(folder, case):
  """Where confidences tie at exactly 1, as with top-p, the reference's order is that of a library's partial sort: any
  is right, and the canvas must be one that such an order leads to."""
  llada, answers = golden(folder)
  n, name = case["max_new_tokens"], case.get("prompt", "batch_prompt" if case.get("batched") else "prompt")
  rows = unpadded(answers, name)
  options = {"steps": case["steps"], "eps": case.get("eps", 1e-3), "remasking": ALGORITHMS[case["alg"]]}
  options |= {"temperature": case["temperature"], "top_p": case.get("top_p"), "top_k": case.get("top_k")}
  if llada.mask_id in rows[0]:
    out = llada.unmask([row + [llada.mask_id] * n for row in rows], block_length=2**20, **options)
  else:
    out = llada.sample(rows, gen_length=n, block_length=n, **options)
  assert out.nfe == case["nfe"]
  assert filled_a_pass(out, out.nfe) == case["transfers_per_step"]
  expected_BL = answers[f"out_{case['name']}"]
  if "top_p" in case:
    assert follows(llada, rows[0], expected_BL[0], case)
    return
  for row, tokens, expected, padding in zip(rows, out.tokens, expected_BL, out.padding, strict=True):
    np.testing.assert_array_equal(tokens[padding:], expected[-len(row) - n :])


def follows(llada, prompt, expected_L, case):
  """Whether a canvas can be reached with top-p, whichever of equal confidences comes first."""
  n, steps, mask_id = case["max_new_tokens"], case["steps"], llada.mask_id
  options = sampling.SamplerConfig(top_p=case["top_p"], eps=case.get("eps", 1e-3))
  _, settings = sampling.split(options, 1)
  allowed_V = jnp.arange(llada.model.V) != mask_id
  noise_BW = jax.random.split(jax.random.key(0), (1, len(expected_L)))  # asked for, and not used

  def reached(canvas_L, step):
    masked_L = canvas_L == mask_id
    if not masked_L.any():
      return bool((canvas_L == expected_L).all())
    logits_BWV = jnp.asarray(llada.logits([canvas_L.tolist()]))
    token_BW, _, score_BW = sampling.candidates(
      logits_BWV, lambda: noise_BW, settings, remasking=ALGORITHMS[case["alg"]], allowed_V=allowed_V,
      ends=(llada.eos_id,), alike_B=jnp.zeros(1, bool), chooses=True,
    )  # fmt: skip
    token_L, score_L = np.asarray(token_BW)[0], np.where(masked_L, np.asarray(score_BW)[0], -np.inf)
    quota = int(sampling.by_time(jnp.array([masked_L.sum()]), jnp.array([steps]), step, settings.eps)[0])
    if quota == 0:
      return reached(canvas_L, step + 1)
    least = np.sort(score_L)[::-1][quota - 1]
    sure, tied = np.flatnonzero(score_L > least + 1e-6), np.flatnonzero(np.abs(score_L - least) <= 1e-6)
    for some in itertools.combinations(tied, quota - len(sure)):
      kept = [*sure, *some]
      if (token_L[kept] == expected_L[kept]).all():
        after_L = canvas_L.copy()
        after_L[kept] = token_L[kept]
        if reached(after_L, step + 1):
          return True
    return False

  return reached(np.array(prompt + [mask_id] * n), 0)


@sets(*NAMES)
def test_golden_round_trip_is_the_identity(folder, tmp_path):
  """Through a workdir, byte for byte; and a merged layout of experts as well."""
  from lladax import configs

  values = configs.load("base").to_dict()
  ids = said(folder) if about(folder)["family"] in ("llada2", "llada-moe", "sdar", "dream") else {}
  convert.from_published(folder, tmp_path / "workdir", values, published.Said(**ids))
  ours, theirs = lladax.load(tmp_path / "workdir"), golden(folder)[0]
  assert (ours.model, ours.mask_id, ours.ends) == (theirs.model, theirs.mask_id, theirs.ends)
  convert.to_published(tmp_path / "workdir", tmp_path / "back")
  assert tensors(tmp_path / "back") == tensors(folder)
  config = json.loads((folder / "config.json").read_text())
  assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
  if theirs.model.E:
    (tmp_path / "merged").mkdir()
    transfer.export(theirs.params, theirs.model, tmp_path / "merged", config, merged=True)
    apart, merged = tensors(folder), tensors(tmp_path / "merged")
    assert len(merged) == len(apart) - 3 * (theirs.model.E - 1) * (theirs.model.N - theirs.model.dense)
    again = lladax.load(tmp_path / "merged", **ids)
    jax.tree.map(np.testing.assert_array_equal, again.params, theirs.params)


@sets("llada-moe", "llada2")
def test_golden_folder_that_does_not_say_its_mask_is_asked(folder):
  with pytest.raises(
    ValueError, match="mask_token_id=None, and the embedding has .* rows; say which it is, as mask_id="
  ):
    lladax.load(folder)


def test_every_family_has_a_golden_set_or_is_another_s():
  """A family without a set of its own shares layout and model with one that has."""
  kinds = {json.loads((x / "config.json").read_text())["model_type"] for x in found(*NAMES)}
  assert {family.kind for family in layout.FAMILIES} - kinds <= {"illada", "sdar_moe", "Fast_dLLM_Qwen"}
