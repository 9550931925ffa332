import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lladax
from lladax.data import tokenizer
from lladax.devices import sharding
from lladax.inference.engine import Engine
from lladax.inference.llada import LLaDA
from lladax.mistake import Mistake
from lladax.model.mask_predictor import MaskPredictorConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

HERE = pathlib.Path(__file__).parents[1] / "golden"
SETS = [x for x in pathlib.Path(os.environ.get("LLADAX_GOLDEN", HERE)).glob("llada-*") if "moe" not in x.name]
GOLDEN = SETS[0] if SETS else HERE / "llada-tiny"
ANSWERS = json.loads((GOLDEN / "golden.json").read_text())
CASES = {case["name"]: case for case in ANSWERS["cases"]}
CACHES = {"prefix_cache": "prefix", "dual_cache": "dual"}


@pytest.fixture(scope="module")
def golden():
  """The reference's checkpoint as a LLaDA without a tokenizer, and its answers."""
  with np.load(GOLDEN / "golden.npz") as arrays:
    return lladax.load(GOLDEN), dict(arrays)


def test_golden_logits(golden):
  llada, answers = golden
  np.testing.assert_allclose(llada.logits(answers["x_masked"]), answers["logits"], atol=1e-4)


def test_golden_logits_on_a_mesh(golden):
  _, answers = golden
  mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
  llada = lladax.load(GOLDEN, mesh=mesh)
  assert llada.params["blocks"]["gate"].sharding.spec == sharding.spec("NDF")
  np.testing.assert_allclose(llada.logits(answers["x_masked"]), answers["logits"], atol=1e-4)


def test_golden_logits_left_padded(golden):
  llada, answers = golden
  real_BL = answers["attention_mask"] > 0
  logits_BLV = llada.logits(answers["x_masked"], answers["attention_mask"])
  np.testing.assert_allclose(logits_BLV[real_BL], answers["logits_left_padded"][real_BL], atol=1e-4)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_golden_samples_token_for_token(golden, case):
  llada, answers = golden
  prompts_BL = answers["batch_prompt" if case.get("batched") else "prompt"]
  real_BL = answers["batch_attention_mask"] > 0 if case.get("batched") else np.ones_like(prompts_BL, bool)
  options = {name: case[name] for name in ("steps", "gen_length", "block_length")}
  out = llada.sample(
    [row[real].tolist() for row, real in zip(prompts_BL, real_BL, strict=True)],
    guidance_scale=case.get("cfg_scale", 0.0),
    threshold=case.get("threshold"),
    cache=CACHES.get(case["sampler"]),
    **options,
  )
  expected_BL = answers[f"out_{case['name']}"]
  for tokens, expected, real, padding in zip(out.tokens, expected_BL, real_BL, out.padding, strict=True):
    np.testing.assert_array_equal(tokens[padding:], expected[len(real) - real.sum() :])
  if case["sampler"] not in CACHES:  # whose reference also pays for blocks that are already finished
    assert out.nfe == case.get("nfe", case["steps"])


@pytest.mark.parametrize("guidance_scale, name", [(0.0, "loglik_exact"), (0.5, "loglik_exact_cfg0.5")])
def test_golden_log_likelihood(golden, guidance_scale, name):
  llada, answers = golden
  pair = answers["prompt"][0].tolist(), answers["answer"].tolist()
  draws = [llada.log_likelihood(*pair, num_samples=256, guidance_scale=guidance_scale, seed=seed) for seed in range(8)]
  error = np.std(draws, ddof=1) / np.sqrt(len(draws))
  assert error < 0.15 and abs(np.mean(draws) - ANSWERS[name]) < 4 * error, (np.mean(draws), error)
  # The two exact values lie 1.4 apart: what ignores the guidance fails.


def tiny(**fields):
  """A tiny random LLaDA over bytes."""
  text = tokenizer.create(tokenizer.TokenizerConfig(kind="bytes"))
  shape = {"D": 12, "N": 1, "H": 2, "G": 1, "K": 6, "F": 16, "V": text.rows, "max_length": 96, "dtype": "float32"}
  c = MaskPredictorConfig(**(shape | fields))
  rng, shapes = np.random.default_rng(0), jax.eval_shape(c.init, jax.random.key(0))
  params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32), shapes)
  return LLaDA(c, params, text, text.mask_id, text.eos_id, text.vocab_size)


@pytest.fixture(scope="module")
def llada():
  return tiny()


def test_sample_takes_one_prompt_or_many_of_any_length(llada):
  options = {"gen_length": 8, "block_length": 4, "steps": 8}
  prompts = ["ab", "", "é, and as long as it takes to be padded to 64 tokens"]
  many = llada.sample(prompts, **options)
  assert many.tokens.shape == many.unmasked_at.shape == many.confidence.shape == (3, 64 + 8)
  assert many.nfe == 8 and len(many.text) == 3
  for i, prompt in enumerate(prompts):
    ids = llada.tokenizer.encode(prompt)
    assert many.tokens[i, many.padding[i] : 64].tolist() == ids and many.padding[i] == 64 - len(ids)
    np.testing.assert_array_equal(many.unmasked_at[i] == 0, np.arange(72) < 64)
    for alone in (llada.sample(prompt, **options), llada.sample([ids], **options)):
      assert alone.text == [many.text[i]]
      np.testing.assert_array_equal(alone.tokens[0, -8:], many.tokens[i, -8:])


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guidance_fills_the_canvas_with_every_option(llada, remasking, temperature):
  options = {"remasking": remasking, "temperature": temperature, "guidance_scale": 1.5, "threshold": 0.2}
  out = llada.sample(["ab", "c"], gen_length=8, block_length=4, steps=4, seed=3, **options)
  drawn_BA = out.tokens[:, -8:]
  assert np.all((drawn_BA != llada.mask_id) & (drawn_BA < llada.vocab_size))
  assert np.all(out.unmasked_at[:, -8:] > 0) and np.isfinite(out.confidence).all()


def test_guidance_leans_away_from_the_prediction_without_the_prompt(llada):
  canvases = [[*prompt, llada.mask_id] for prompt in (b"abcd", b"wxyz", b"1234", b"zz00")]
  cond_BV = llada.logits(canvases)[:, -1].astype(np.float64)
  un_BV = llada.logits([[llada.mask_id] * 5])[:, -1]
  logits_BV = un_BV + 3.0 * (cond_BV - un_BV)
  id_V = np.arange(llada.model.V)
  best_B = np.argmax(np.where((id_V < llada.vocab_size) & (id_V != llada.mask_id), logits_BV, -np.inf), axis=1)
  out = llada.unmask(canvases, guidance_scale=2.0)
  np.testing.assert_array_equal(out.tokens[:, -1], best_B)
  p_BV = np.exp(logits_BV - np.logaddexp.reduce(logits_BV, axis=1, keepdims=True))
  np.testing.assert_allclose(out.confidence[:, -1], p_BV[np.arange(4), best_B], rtol=1e-4)
  assert np.any(llada.unmask(canvases).tokens[:, -1] != best_B)


def test_text_ends_at_the_first_eos(llada):
  out = llada.sample(["a"] * 16, gen_length=32, block_length=32, steps=1, temperature=20.0)  # next to uniform
  ended = 0
  for text, tokens in zip(out.text, out.tokens, strict=True):
    answer = tokens[-32:].tolist()
    ended += llada.eos_id in answer
    assert text == llada.tokenizer.decode(answer[: [*answer, llada.eos_id].index(llada.eos_id)])
  assert 0 < ended < 16


def test_infill_keeps_the_text_around(llada):
  out = llada.infill(["ab[MASK][MASK]cd", "[MASK]"])
  assert llada.mask_id not in out.tokens and len(out.text) == 2
  row = out.tokens[0, out.padding[0] :]
  assert len(row) == 6 and bytes(row[[0, 1, 4, 5]].tolist()) == b"abcd"
  assert out.text[0] == llada.tokenizer.decode(row) and out.nfe == 2
  assert out.text[0] == llada.infill("ab[MASK][MASK]cd").text[0]
  assert sorted(out.unmasked_at[0, out.padding[0] :]) == [0, 0, 0, 0, 1, 2]


def test_unmask_takes_canvases_of_any_lengths_and_no_tokenizer(llada):
  nameless = LLaDA(llada.model, llada.params, None, llada.mask_id, llada.eos_id, llada.vocab_size)
  m = llada.mask_id
  canvases = [[1, 2, m, m, 5], [m] * 40, [7, m], [1, 2, 3]]
  out = nameless.unmask(canvases, steps=3, block_length=16)
  for i, canvas in enumerate(canvases):
    row = out.tokens[i, out.padding[i] :].tolist()
    assert len(row) == len(canvas) and m not in row
    assert all(a == b for a, b in zip(row, canvas, strict=True) if b != m)
    alone = nameless.unmask([canvas], steps=3, block_length=16)
    assert alone.tokens[0, alone.padding[0] :].tolist() == row
  assert out.text == [""] * 4 and "7 " in out.html()


def enumerated_log_likelihood(llada, prompt, answer):
  """Of an answer of two tokens: l = 1 or 2, and for l = 1 either of them, scaled by 2 / l."""
  masked = [[llada.mask_id, answer[1]], [answer[0], llada.mask_id], [llada.mask_id] * 2]
  log_p = jax.nn.log_softmax(llada.logits([[*prompt, *x] for x in masked])[:, len(prompt) :])
  first, second, both = ([log_p[i, j, answer[j]] for j in range(2)] for i in range(3))
  return float((first[0] + second[1] + sum(both)) / 2)


def test_log_likelihood_of_one_pair_of_many_and_of_ids(llada):
  one = llada.log_likelihood("abc", "de", num_samples=300)
  assert isinstance(one, float)
  assert one == llada.log_likelihood(list(b"abc"), list(b"de"), num_samples=300)
  many = llada.log_likelihood(["abc", list(b"abc")], ["de", "d"], num_samples=300)
  assert many[0] == one and len(many) == 2 and one != llada.log_likelihood("abc", "de", num_samples=300, seed=1)
  # 300 draws with stratified counts: both tokens in half of them, and in the others either.
  np.testing.assert_allclose(one, enumerated_log_likelihood(llada, b"abc", b"de"), atol=0.5)
  exact = jax.nn.log_softmax(llada.logits([[*b"abc", llada.mask_id]])[0, -1])[ord("d")]
  np.testing.assert_allclose(many[1], exact, rtol=1e-5)  # one token: no noise at all


@pytest.mark.parametrize("guidance_scale", [0.0, 0.7])
def test_answers_of_one_token_to_one_prompt_share_a_pass(llada, guidance_scale, monkeypatch):
  passes, real = [], Engine._choices
  monkeypatch.setattr(Engine, "_choices", lambda self, prompts, *a: passes.extend(prompts) or real(self, prompts, *a))
  prompts = [prompt for prompt in ("abc", "", "x" * 40, "y") for _ in "ABCD"]
  found = llada.log_likelihood(prompts, list("ABCD") * 4, guidance_scale=guidance_scale)
  assert sorted(map(len, passes)) == [0, 1, 3, 40]
  for prompt, answer, value in zip(prompts, "ABCD" * 4, found, strict=True):
    canvas = [*prompt.encode(), llada.mask_id]
    cond, un = (llada.logits([x])[0, -1] for x in (canvas, [llada.mask_id] * len(canvas)))
    exact = jax.nn.log_softmax(un + (guidance_scale + 1) * (cond - un))[ord(answer)]
    np.testing.assert_allclose(value, exact, rtol=1e-4)
  chain = llada.log_likelihood(prompts, list("ABCD") * 4, guidance_scale=guidance_scale, method="chain_rule")
  assert chain == found


def test_log_likelihood_of_an_answer_to_nothing(llada):
  exact = jax.nn.log_softmax(llada.logits([[llada.mask_id]])[0, -1])[7]
  for prompt in ("", []):
    np.testing.assert_allclose(llada.log_likelihood(prompt, [7]), exact, rtol=1e-5)


@pytest.mark.parametrize(
  "call, said",
  [
    (lambda llada: llada.sample([]), "there is nothing to sample: the list of prompts is empty"),
    (lambda llada: llada.infill([]), "unmask: the canvases are empty"),
    (lambda llada: llada.unmask([]), "unmask: the canvases are empty"),
    (lambda llada: llada.unmask([[]]), r"unmask\[0\] is empty"),
    (lambda llada: llada.unmask([[1], []]), r"unmask\[1\] is empty"),
    (lambda llada: llada.infill(["[MASK]", ""]), r"unmask\[1\] is empty"),
    (lambda llada: llada.sample("a", gen_length=10, block_length=4), "sample.gen_length=10 is not a multiple of"),
    (lambda llada: llada.sample("a", gen_length=96), "a canvas of 97 tokens is longer than model.max_length=96"),
    (lambda llada: llada.unmask([[1] * 97]), "longer than model.max_length=96"),
    (lambda llada: llada.sample("a", steps=0), "sample.steps=0"),
    (lambda llada: llada.log_likelihood("a", ""), "log_likelihood: an answer is empty"),
    (lambda llada: llada.log_likelihood("a", "b", num_samples=0), "num_samples=0"),
    (lambda llada: llada.log_likelihood(["a"], ["b", "c"]), "log_likelihood: 1 prompts and 2 answers"),
    (lambda llada: LLaDA(llada.model, {}, None, 1, 2, 3).sample("a"), "this model has no tokenizer"),
    (lambda llada: tiny(causal=True).unmask([[1]]), "a causal model cannot fill in the middle"),
    # lengths
    (lambda llada: llada.sample("a", gen_length=2**30, block_length=1), "a canvas of 1073741825 tokens is longer than"),
    (lambda llada: llada.sample("a", gen_length=2**31), "sample.gen_length=2147483648: .* less than 2"),
    (lambda llada: llada.sample([1] * 97, gen_length=None), "a canvas of 97 tokens is longer than"),
    (lambda llada: tiny(causal=True).sample("a", gen_length=96), "a canvas of 97 tokens is longer than"),
    (
      lambda llada: llada.log_likelihood("a" * 90, "b" * 110),
      "pair 0 of 200 tokens is longer than model.max_length=96",
    ),
    (lambda llada: llada.log_likelihood(["a", "b"], ["c", "d" * 96], num_samples=1), "pair 1 of 97 tokens"),
    (lambda llada: llada.logits([[1] * 97]), "a canvas of 97 tokens is longer than model.max_length=96"),
    (lambda llada: llada.logits([]), "logits: the canvases are empty"),
    (lambda llada: llada.logits(np.zeros((2, 0), int)), r"logits\[0\] is empty"),
    (lambda llada: llada.logits([[1, 2], [3]]), "logits: the canvases differ in length"),
    (lambda llada: llada.logits([[1, 2]], [1, 1]), r"segment_BL: int64 \(2,\): give numbers of segments \(1, 2\)"),
    (lambda llada: llada.logits([[1, 2]], [[0.5, 1]]), "segment_BL: float64"),
    (lambda llada: llada.logits([[1, 2]], [[-1, 1]]), "segment_BL: int64"),
    # ids
    (lambda llada: llada.sample([[1], [2, 9999]]), r"prompts\[1\]\[1\]=9999: the ids of this model's .* 0 to 260"),
    (lambda llada: llada.sample([2, -5]), r"prompts\[0\]\[1\]=-5: the ids"),
    (lambda llada: llada.sample([261]), r"prompts\[0\]\[0\]=261: the ids"),  # a row of the embedding, but no token
    (lambda llada: llada.sample([65, 2.0]), r"prompts\[0\]\[1\]=2.0: expected int, not float"),
    (lambda llada: llada.sample([[True]]), r"prompts\[0\]\[0\]=True: expected int, not bool"),
    (lambda llada: llada.sample([65, "a"]), r"prompts\[0\]\[1\]='a': expected int, not str"),
    (lambda llada: llada.sample(["a", None]), r"prompts\[1\]=None: expected tuple, not NoneType"),
    (lambda llada: llada.sample(7), "prompts=7: give a list"),
    (lambda llada: llada.sample({"role": "user", "content": "a"}), "prompts={.*}: give a list"),
    (lambda llada: llada.unmask([[1, 300]]), r"unmask\[0\]\[1\]=300: the ids"),
    (lambda llada: llada.unmask(np.array([[0.5]])), r"unmask\[0\]\[0\]=0.5: expected int, not float"),
    (lambda llada: llada.unmask("ab"), r"unmask\[0\]\[0\]='a': expected int, not str"),
    (lambda llada: llada.infill([5]), r"texts\[0\]=5: expected str, not int"),
    (lambda llada: llada.logits([[1, 9999]]), r"logits\[0\]\[1\]=9999: the ids"),
    (lambda llada: llada.logits(np.ones((1, 2))), r"logits\[0\]\[0\]=1.0: expected int, not float"),
    (lambda llada: llada.log_likelihood([1, -5], [2]), r"prompts\[0\]\[1\]=-5: the ids"),
    (lambda llada: llada.log_likelihood(["a", [1]], ["b", [9999]]), r"answers\[1\]\[0\]=9999: the ids"),
    (lambda llada: llada.log_likelihood([1], [2, 257]), r"answers\[0\]\[1\]=257 is \[MASK\]"),
    (lambda llada: tiny(causal=True).log_likelihood([257], [2]), r"prompts\[0\]\[0\]=257 is \[MASK\]"),
    (lambda llada: llada.log_likelihood([1], [2.5]), r"=2.5: expected int, not float"),
    # options
    (lambda llada: llada.sample("a", steps=2.5), "sample.steps=2.5: expected int, not float"),
    (lambda llada: llada.sample("a", gen_length="8"), "sample.gen_length='8': expected int, not str"),
    (lambda llada: llada.stream("a", temperature=True), "sample.temperature=True: expected float, not bool"),
    (lambda llada: llada.unmask([1], early_stop="no"), "sample.early_stop='no': expected bool, not str"),
    (lambda llada: llada.infill("a", seed=2**32), "sample.seed=4294967296: must be from 0 to 2"),
    (lambda llada: llada.sample("a", seed=-1), "sample.seed=-1: must be from 0 to 2"),
    (lambda llada: llada.sample("a", seed=[0, -1]), "sample.seed=-1: must be from 0 to 2"),
    (
      lambda llada: llada.sample("a", seed=[1, 2]),
      r"sample.seed=\[1, 2\]: give one seed, or one for each of the 1 rows",
    ),
    (
      lambda llada: llada.unmask([[1], [2]], seed=[1]),
      r"sample.seed=\[1\]: give one seed, or one for each of the 2 rows",
    ),
    (
      lambda llada: llada.sample("a", temperature=float("nan")),
      "sample.temperature=nan: must be at least 0, and at most a million",
    ),
    (lambda llada: llada.sample("a", threshold=float("nan")), "sample.threshold=nan: must be a number"),
    (lambda llada: llada.sample("a", until=None), "until=None: give a list of strings"),
    (lambda llada: LLaDA(llada.model, {}, None, 1, 2, 3).sample([0], until=["x"]), "this model has no tokenizer"),
    (lambda llada: llada.log_likelihood("a", "b", num_samples=2.5), "num_samples=2.5: expected int, not float"),
    (lambda llada: llada.log_likelihood("a", "b", guidance_scale="1"), "guidance_scale='1': expected float, not str"),
    (lambda llada: llada.log_likelihood("a", "b", guidance_scale=-1), "guidance_scale=-1.0: must be at least 0"),
    (lambda llada: llada.log_likelihood("a", "b", seed=-1), "seed=-1: must be from 0 to 2"),
    (lambda llada: lladax.load(GOLDEN, step="3"), "step='3': expected int, not str"),
  ],
)
def test_a_mistake_is_one_clear_line(llada, call, said):
  with pytest.raises(Mistake, match=said) as error:
    call(llada)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "options",
  [
    {"guidance_scale": 0.5}, {"threshold": 0.9}, {"factor": 1.0}, {"cache": "prefix"}, {"confidence_eos_eot_inf": True},
    {"steps": 4}, {"gen_length": None},
  ],
  ids=str,
)  # fmt: skip
def test_a_causal_model_refuses_what_it_would_ignore(options):
  causal = tiny(causal=True)
  (name,) = options
  with pytest.raises(Mistake, match=f"^sample.{name}={list(options.values())[0]!r}: a causal model "):
    causal.sample("a", **({"gen_length": 8} | options))


def test_a_causal_model_knows_no_guided_likelihood_and_draws_no_forbidden_eos():
  causal = tiny(causal=True)
  with pytest.raises(Mistake, match="^guidance_scale=0.5: a causal model has no use for it"):
    causal.log_likelihood("ab", "cde", guidance_scale=0.5)
  exact = causal.log_likelihood("ab", "cde")
  assert causal.log_likelihood("ab", "cde", method="chain_rule") == exact
  options = {"gen_length": 24, "temperature": 20.0}  # next to uniform
  drawn, never = (causal.sample(["a"] * 16, logits_eos_inf=x, **options).tokens[:, -24:] for x in (False, True))
  assert (drawn == causal.eos_id).any() and not (never == causal.eos_id).any()


def test_numpy_is_taken_wherever_lists_and_numbers_are(llada):
  options = {"gen_length": 8, "block_length": 4, "steps": 8, "temperature": 0.5, "seed": 2**31}
  arrays = {name: np.asarray(value)[()] for name, value in options.items()}
  plain = llada.sample([65, 66, 67], **options)
  for prompt in ([[65, 66, 67]], np.array([65, 66, 67]), jnp.array([[65, 66, 67]]), "ABC", (65, 66, 67), range(65, 68)):
    np.testing.assert_array_equal(llada.sample(prompt, **arrays).tokens, plain.tokens)
  assert (llada.sample([65, 66, 67], **options | {"seed": 0}).tokens != plain.tokens).any()
  canvas = [65, llada.mask_id, 67]
  np.testing.assert_array_equal(llada.unmask(canvas).tokens, llada.unmask(np.array([canvas])).tokens)
  np.testing.assert_array_equal(llada.logits(canvas), llada.logits([canvas], np.ones((1, 3), bool)))
  one = llada.log_likelihood([65], [66, 67], num_samples=3, seed=2**32 - 1)
  assert llada.log_likelihood([np.array([65])], [np.array([66, 67])], num_samples=np.int64(3), seed=2**32 - 1) == [one]


def test_an_unknown_option_is_named(llada):
  with pytest.raises(TypeError, match="sample.lenght: there is no such field; did you mean sample.gen_length"):
    llada.sample("a", lenght=3)


def test_causal_log_likelihood_is_the_chain_rule():
  causal = tiny(causal=True)
  log_p_LV = jax.nn.log_softmax(causal.logits([[*b"abcde"]])[0])  # at i what is predicted for token i
  expected = sum(log_p_LV[i, token] for i, token in list(enumerate(b"abcde"))[2:])
  np.testing.assert_allclose(causal.log_likelihood("ab", "cde"), expected, rtol=1e-5)


def test_what_is_printed_leaves_the_parameters_out(llada):
  out = llada.sample("ab", gen_length=4, block_length=4, steps=4)
  assert "params" not in repr(llada) + repr(out) and len(repr(llada)) < 2000 and "nfe=4" in repr(out)


def test_a_notebook_draws_the_unmasking(llada):
  out = llada.sample(["ab", "cd"], gen_length=4, block_length=4)
  assert out._repr_html_() == out.html() != out.html("a title")
  assert [len(unmasking.pieces) for unmasking in out.unmaskings()] == [6, 6]  # no padding
  assert out.unmaskings()[1].pieces[:2] == ("c", "d")


def test_what_is_no_text_and_no_conversation_is_refused(llada, tiny_workdir):
  for wrong in ("hi", [], [{"role": "user", "content": "x"}, "y"]):
    with pytest.raises(ValueError, match="^chat: .* is no conversation: give a list of messages"):
      llada.chat(wrong)
  for wrong in (b"abc", [b"abc"]):
    with pytest.raises(ValueError, match=r"^prompts(\[0\])?=b'abc': "):
      llada.sample(wrong)
  with pytest.raises(ValueError, match=r"^segment_BL: give one array of shape \(1, 2\)"):
    llada.logits([[5, 6]], [[0], [1, 2]])
  with pytest.raises(ValueError, match="^path=5: give a folder"):
    lladax.load(5)
  with pytest.raises(ValueError, match="^step=6: .* is the checkpoint of step 20; say one of them$"):
    lladax.load(tiny_workdir / "checkpoints" / "20", step=6)
