import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax import autoregressive, sampling
from lladax.data import tokenizer
from lladax.inference.engine import lower_sampler
from lladax.inference.llada import LLaDA
from lladax.model.mask_predictor import MaskPredictorConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

START, EOS, MASK = 30, 30, 31
TINY = MaskPredictorConfig(D=12, N=2, H=4, G=2, K=6, F=20, V=32, causal=True, dtype="float32")
TOKENS = np.random.default_rng(0).integers(0, 30, (2, 9)).astype(np.int32)
SEGMENT = np.array([[1, 1, 1, 1, 2, 2, 3, 3, 3], [0, 0, 1, 1, 1, 1, 1, 1, 0]], np.int32)


def random_params(c):
  rng, shapes = np.random.default_rng(0), jax.eval_shape(c.init, jax.random.key(0))
  return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), shapes)


PARAMS = random_params(TINY)


@functools.cache
def next_token_log_p(prefix):
  """Log p over the token that follows, by a pass over these tokens alone (what is behind them is not seen)."""
  input_1L = np.array([(START, *prefix) + (0,) * (9 - len(prefix))], np.int32)
  return np.asarray(jax.nn.log_softmax(logits(input_1L)[0, len(prefix)]))


@jax.jit
def logits(input_BL):
  return TINY.bind(PARAMS)(input_BL)


def chain_rule(tokens):
  """Log p of every token of a document after those before it."""
  return np.array([next_token_log_p(tuple(map(int, tokens[:i])))[tokens[i]] for i in range(len(tokens))])


def nll(segment_BL):
  return lambda input_BL, target_BL: TINY.bind(PARAMS).nll(
    input_BL, target_BL, TINY.visible(input_BL.shape[1], segment_BL)
  )


def test_shift_begins_every_document_anew():
  tokens_BL = np.arange(9, dtype=np.int32)[None]
  for segment, expected in [
    ([1, 1, 1, 1, 2, 2, 3, 3, 3], [START, 0, 1, 2, START, 4, START, 6, 7]),
    ([0, 0, 1, 1, 1, 1, 1, 0, 0], [START, 0, START, 2, 3, 4, 5, START, 7]),  # of padding, whatever
    ([1] * 9, [START, 0, 1, 2, 3, 4, 5, 6, 7]),
  ]:
    shifted_BL = autoregressive.shift(jnp.asarray(tokens_BL), jnp.array([segment]), START)
    np.testing.assert_array_equal(shifted_BL, [expected])


def test_loss_is_the_weighted_next_token_cross_entropy_of_each_document():
  weight_BL = np.random.default_rng(1).random(TOKENS.shape).astype(np.float32) * (SEGMENT > 0)
  weight_BL[0, 1] = weight_BL[1, 4] = 0  # given
  batch = {"tokens": jnp.asarray(TOKENS), "weight": jnp.asarray(weight_BL), "segment": jnp.asarray(SEGMENT)}

  @jax.jit
  def loss_of(batch):
    visible = TINY.visible(TOKENS.shape[1], batch["segment"])
    weighted_nll = functools.partial(TINY.bind(PARAMS).weighted_nll, visible=visible)
    return autoregressive.Causal().loss(weighted_nll, batch, eos_id=START)[0]

  loss = loss_of(batch)
  expected = 0.0
  for tokens_L, weight_L, segment_L in zip(TOKENS, weight_BL, SEGMENT, strict=True):
    for document in range(1, 4):
      own = segment_L == document
      expected -= np.sum(weight_L[own] * chain_rule(tokens_L[own]))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_log_likelihood_is_the_sum_of_the_chain_rule():
  scored_BL = np.zeros(TOKENS.shape, bool)
  scored_BL[0, 4:6], scored_BL[1, 5:8] = True, True
  estimate = jax.jit(lambda *args: autoregressive.Causal().log_likelihood(nll(SEGMENT), *args, eos_id=START))
  actual_B = estimate(jnp.asarray(TOKENS), scored_BL, jnp.asarray(SEGMENT))
  expected_B = [chain_rule(TOKENS[0, 4:6]).sum(), chain_rule(TOKENS[1, 2:8])[3:].sum()]
  np.testing.assert_allclose(actual_B, expected_B, rtol=1e-5)


@pytest.fixture(scope="module")
def llada():
  text = tokenizer.create(tokenizer.TokenizerConfig(kind="bytes"))
  c = MaskPredictorConfig(D=12, N=2, H=4, G=2, K=6, F=20, V=text.rows, causal=True, dtype="float32")
  return LLaDA(c, random_params(c), text, text.mask_id, text.eos_id, text.vocab_size)


PROMPTS = ["a", "", "a longer prompt, so long that the others are padded"]


def test_sampling_a_padded_batch_with_a_cache_is_greedy_decoding_of_each_row_alone_by_full_passes(llada):
  out = llada.sample(PROMPTS, gen_length=8)
  id_V = np.arange(llada.model.V)
  for i, prompt in enumerate(PROMPTS):
    row, confidence = llada.tokenizer.encode(prompt), []
    for _ in range(8):
      logits_V = llada.logits([row + [0] * (64 - len(row))])[0, len(row)]
      logits_V = np.where((id_V < llada.vocab_size) & (id_V != llada.mask_id), logits_V, -np.inf)
      row.append(int(np.argmax(logits_V)))
      confidence.append(1 / np.sum(np.exp(logits_V - logits_V.max())))
    assert out.tokens[i, -8:].tolist() == row[-8:] and llada.eos_id not in row
    np.testing.assert_allclose(out.confidence[i, -8:], confidence, rtol=1e-4)
  assert out.nfe == 9  # the prompt, and one a token


def test_temperature_draws_by_the_seed(llada):
  draw = functools.partial(llada.sample, ["a"] * 4, gen_length=8, temperature=1.0)
  first = draw(seed=1).tokens
  assert len(np.unique(first, axis=0)) == 4
  np.testing.assert_array_equal(draw(seed=1).tokens, first)
  assert np.mean(draw(seed=2).tokens[:, -8:] != first[:, -8:]) > 0.5
  padded = llada.sample(["a", PROMPTS[2]], gen_length=8, temperature=1.0, seed=1).tokens  # to another length
  np.testing.assert_array_equal(padded[0, -8:], first[0, -8:])


def test_a_draw_is_among_the_most_probable(llada):
  options = {"gen_length": 8, "temperature": 9.0}
  greedy = llada.sample(PROMPTS, gen_length=8, temperature=0.0)
  for few in ({"top_k": 1}, {"top_p": 1e-6}):
    out = llada.sample(PROMPTS, **options, **few)
    np.testing.assert_array_equal(out.tokens, greedy.tokens)
    assert (out.confidence[:, -8:] == 1).all()
  assert (llada.sample(PROMPTS, **options, top_k=5).tokens != greedy.tokens).any()


def test_what_is_lowered_for_a_plan_is_what_samples(llada):
  c = sampling.SamplerConfig(gen_length=8, block_length=8)
  shape, settings = sampling.split(c, 2)
  state = jax.eval_shape(
    lambda: sampling.start(jnp.zeros((2, 40), jnp.int32), settings.steps, shape, mask_id=0, first=32)
  )
  params = jax.eval_shape(lambda: llada.params)
  for causal, name in ((True, "_autoregressive_sample"), (False, "unmask_until")):
    model = dataclasses.replace(llada.model, causal=causal)
    lowered = lower_sampler(model, params, state, c, first=32, mask_id=0, ends=(1,))
    assert f"module @jit_{name} " in lowered.as_text()


@pytest.mark.parametrize("ends, nfe", [((2, 0), 4), ((0, 0), 2), ((9, 1), 7)])
def test_a_row_stops_at_eos_and_the_loop_with_the_last_row(ends, nfe):
  prompt_length, L = 3, 9

  def step(tokens_BW, cache, start):
    """Counts on from the token read; a row says EOS as the answer's token number `ends`."""
    position = start + tokens_BW.shape[1] - 1 - prompt_length
    token_B = jnp.where(position == jnp.array(ends), EOS, (tokens_BW[:, -1] + 1) % 30)
    return 50.0 * jax.nn.one_hot(token_B, 32), cache + 1

  options = {"prompt_length": prompt_length, "start_id": START, "eos_id": EOS}
  greedy = lambda logits_BV, noise: jnp.argmax(logits_BV, axis=-1)  # noqa: E731
  run = jax.jit(functools.partial(autoregressive.sample, step, greedy, **options))
  canvas_BL, segment_BL = jnp.array([[5, 6, 7] + [0] * 6, [9, 1, 2] + [0] * 6]), jnp.ones((2, L), jnp.int32)
  out_BL, confidence_BL, passes = run(jnp.int32(0), canvas_BL, segment_BL, jax.random.split(jax.random.key(0), 2))
  counted_BL = np.array([[5, 6, 7, 8, 9, 10, 11, 12, 13], [9, 1, 2, 3, 4, 5, 6, 7, 8]])
  ended_BL = np.arange(L)[None] >= prompt_length + np.array(ends)[:, None]
  np.testing.assert_array_equal(out_BL, np.where(ended_BL, EOS, counted_BL))
  assert int(passes) == nfe
  drawn = slice(prompt_length, prompt_length + nfe - 1)
  np.testing.assert_allclose(confidence_BL[:, drawn], 1.0, atol=1e-5)
