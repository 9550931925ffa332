"""The published samplers of the families, told plainly in NumPy, and what `sampling.run` makes of the same logits.

No model: logits are a cheap function of the canvas. Each batch mixes rows of different settings.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax import sampling
from lladax.sampling import SamplerConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

MASK, EOS, V = 15, 14, 17
ALLOWED = np.arange(V) < MASK
TABLE = (2.5 * np.random.default_rng(5).standard_normal((5, V, V))).astype(np.float32)


def logits(tokens_BL, end):
  """Of every place, [B, L, V]: what stands there, on both sides and at `end`, and the sum up to there, all matter."""
  tokens_BL = jnp.where(jnp.arange(tokens_BL.shape[1]) < end, tokens_BL, 0)
  sides = (jnp.roll(tokens_BL, 1, axis=1), tokens_BL, jnp.roll(tokens_BL, -1, axis=1))
  rest = (
    jnp.broadcast_to(tokens_BL.sum(axis=1, keepdims=True) % V, tokens_BL.shape),
    jnp.arange(tokens_BL.shape[1]) % V,
  )
  return sum(jnp.asarray(TABLE[i])[jnp.broadcast_to(x, tokens_BL.shape)] for i, x in enumerate((*sides, *rest)))


def predict(tokens_BL, start, W, cache, of_blocks):
  end = start + W if of_blocks else tokens_BL.shape[1]
  return jax.lax.dynamic_slice_in_dim(logits(tokens_BL, end), start, W, axis=1), cache


@functools.partial(jax.jit, static_argnames="shape")
def _run(tokens_BL, settings, shape):
  state = sampling.start(tokens_BL, settings.steps, shape, mask_id=MASK, block_steps_B=settings.block_steps)
  model = functools.partial(predict, of_blocks=shape.of_blocks)
  return sampling.run(
    model, state, sampling.keys(settings), settings, shape, mask_id=MASK, allowed_V=jnp.asarray(ALLOWED),
    ends=(EOS, 13), origin=tokens_BL.shape[1], begin=model if shape.of_blocks else None,
  ).canvas  # fmt: skip


def run(rows, each, of_blocks=False):
  shape, settings = sampling.split(each, len(rows))
  out = _run(np.array(rows, np.int32), settings, shape._replace(of_blocks=of_blocks))
  return jax.tree.map(np.asarray, out)


plain = jax.jit(logits)


def guesses(x, end, top_p=None, top_k=None):
  """(tokens, their probabilities, all probabilities) of a canvas, in float64; what is filtered is renormalised."""
  z = np.asarray(plain(jnp.asarray(x)[None], end))[0].astype(np.float64)
  p = np.exp(z - z.max(axis=-1, keepdims=True))
  p /= p.sum(axis=-1, keepdims=True)
  if top_p or top_k:
    p = np.where(ALLOWED, p, 0)
    p /= p.sum(axis=-1, keepdims=True)
  order = np.argsort(-p, axis=-1)
  for i, row in enumerate(order):
    before = np.cumsum(p[i, row]) - p[i, row]
    p[i, row[(before > (top_p or 2)) | (np.arange(V) >= (top_k or V))]] = 0
  p /= p.sum(axis=-1, keepdims=True)
  token = np.where(ALLOWED, p, -1).argmax(axis=-1)
  return token, p[np.arange(len(x)), token], p


def dream(row, steps, alg, eps=1e-3, top_p=None, top_k=None):
  """Tokens, the step that committed each, and how many each step did."""
  x, at, counts = np.array(row), np.zeros(len(row), int), []
  t = np.linspace(1, eps, steps + 1).astype(np.float32)
  for i in range(steps):
    masked = x == MASK
    token, chosen, p = guesses(x, len(x), top_p, top_k)
    two = np.sort(p, axis=-1)
    confidence = {
      "maskgit_plus": chosen, "entropy": np.sum(p * np.log(p + 1e-10), axis=-1), "topk_margin": two[:, -1] - two[:, -2]
    }[alg]  # fmt: skip
    n = int(np.float32(masked.sum()) * (1 - t[i + 1] / t[i])) if i < steps - 1 else masked.sum()
    best = np.argsort(np.where(masked, -confidence, np.inf), kind="stable")[:n]
    x[best], at[best] = token[best], i + 1
    counts.append(n)
  return x, at, counts


def blocks(row, W, *, quotas=None, least=None, threshold=np.inf, edit=None, most=16, stop=False, strategy="confidence"):
  """LLaDA2.0 and SDAR (`quotas` of the steps of a block), LLaDA2.1 (`least` in each, `edit`): tokens, at, passes."""
  x, prompt, nfe = np.array(row), row.index(MASK), 0
  at, edited = np.zeros(len(x), int), np.zeros(len(x), int)
  for start in range(prompt // W * W, len(x), W):
    window, step, post = slice(start, start + W), 0, 0
    while True:
      masked = x[window] == MASK
      if not masked.any():
        post += 1
        if edit is None or post > most:
          break
      token, p, _ = (guess[window] for guess in guesses(x, start + W))
      nfe, step, n = nfe + 1, step + 1, least or quotas[step]
      confident = masked & (p > threshold)
      if confident.sum() < n:
        order = np.argsort(-p, kind="stable") if strategy == "confidence" else np.arange(W)
        confident = np.isin(np.arange(W), [i for i in order if masked[i]][:n])
      changes = np.zeros(W, bool)
      if edit is not None:
        changes = ~masked & (np.arange(start, start + W) >= prompt) & (p > edit) & (token != x[window])
      x[window] = np.where(confident | changes, token, x[window])
      at[window][confident], edited[window][changes] = nfe, nfe
      if edit is not None and not masked.any() and not changes.any():
        break
    if stop and np.isin(x[prompt:], (EOS, 13)).any():
      break
  return x, at, edited, nfe


def canvases(rows, L, seed, prompts=None):
  """Prompts and [MASK]s; without `prompts` [MASK]s stand anywhere."""
  rng = np.random.default_rng(seed)
  given = [rng.random(L) < 0.3 if prompts is None else np.arange(L) < prompts[i] for i in range(rows)]
  return [np.where(x, rng.integers(0, 13, L), MASK).tolist() for x in given]


@pytest.mark.parametrize(
  ("masks", "steps", "eps", "counts"),  # as the published sampler counted them
  [
    (16, 16, 1e-3, [0, *[1] * 14, 2]),
    (24, 5, 1e-3, [4, 4, 5, 5, 6]),
    (16, 30, 1e-3, [*[0] * 15, *[1] * 14, 2]),
    (24, 12, 1e-3, [1, *[2] * 10, 3]),
    (20, 8, 0.1, [*[2] * 7, 6]),
    (18, 9, 1e-3, [1, *[2] * 7, 3]),
  ],
)
def test_dreams_schedule(masks, steps, eps, counts):
  out = run([[MASK] * masks + [1] * (24 - masks)], SamplerConfig(block_length=24, steps=steps, eps=eps))
  assert np.bincount(out.unmasked_at_BL[0], minlength=steps + 1)[1:].tolist() == counts
  assert out.nfe == out.step_B[0] == steps


@pytest.mark.parametrize(
  ("alg", "remasking"),
  [("maskgit_plus", "low_confidence"), ("entropy", "high_entropy"), ("topk_margin", "low_margin")],
)
def test_dream(alg, remasking):
  asked = [
    {"steps": 8}, {"steps": 24}, {"steps": 5, "top_p": 0.8}, {"steps": 9, "top_k": 3}, {"steps": 7, "eps": 0.1},
    {"steps": 12, "top_p": 0.6, "top_k": 4}, {"steps": 9, "top_p": 0.95}, {"steps": 40},
  ]  # fmt: skip
  rows = canvases(len(asked), 24, 0)
  each = [SamplerConfig(block_length=24, remasking=remasking, **({"eps": 1e-3} | options)) for options in asked]
  out = run(rows, each)
  for i, (row, options) in enumerate(zip(rows, asked, strict=True)):
    tokens, at, counts = dream(row, alg=alg, **options)
    np.testing.assert_array_equal(out.tokens_BL[i], tokens)
    np.testing.assert_array_equal(out.unmasked_at_BL[i], at)
    assert out.step_B[i] == len(counts) == options["steps"] and counts[-1] > 0
  assert out.nfe == 40


def quotas(W, steps):
  return [W // steps + (i < W % steps) for i in range(steps)]


def test_llada20_and_sdar():
  """Thresholds and fixed numbers, in steps of each block; static is dynamic without a threshold."""
  asked = [(8, 0.95), (8, 0.6), (8, 0.3), (3, 0.7), (4, 0.7), (8, None), (4, None), (3, None), (32, 0.5)]
  rows = canvases(len(asked), 32, 1, prompts=[13, 3, 8, 16, 1, 9, 0, 5, 12])
  each = [SamplerConfig(block_length=8, block_steps=steps, threshold=threshold) for steps, threshold in asked]
  out = run(rows, each, of_blocks=True)
  for i, (row, (steps, threshold)) in enumerate(zip(rows, asked, strict=True)):
    tokens, at, _, nfe = blocks(row, 8, quotas=quotas(8, steps), threshold=threshold or np.inf)
    np.testing.assert_array_equal(out.tokens_BL[i], tokens)
    np.testing.assert_array_equal(out.unmasked_at_BL[i], at)
    assert out.step_B[i] == nfe


def test_sdar_from_left_to_right():
  rows = canvases(3, 16, 2, prompts=[5, 0, 9])
  each = [SamplerConfig(block_length=4, block_steps=steps, remasking="sequential") for steps in (4, 3, 2)]
  out = run(rows, each, of_blocks=True)
  for i, (row, steps) in enumerate(zip(rows, (4, 3, 2), strict=True)):
    tokens, at, _, nfe = blocks(row, 4, quotas=quotas(4, steps), strategy="sequential")
    np.testing.assert_array_equal(out.tokens_BL[i], tokens)
    np.testing.assert_array_equal(out.unmasked_at_BL[i], at)
    assert out.step_B[i] == nfe


@pytest.mark.parametrize("stop", [False, True])
def test_llada21(stop):
  asked = [
    {"threshold": 0.95, "edit": 0.9}, {"threshold": 0.7, "edit": 0.5}, {"threshold": 0.3, "edit": 0.0},
    {"threshold": 0.2, "edit": 0.0, "most": 1}, {"threshold": 0.5, "edit": 1.0}, {"threshold": 0.5},
    {"threshold": 0.7, "edit": 0.2, "most": 0}, {"threshold": 0.9, "edit": 0.4, "most": 4, "least": 3},
    {"threshold": 0.9, "edit": 0.1, "most": 30},
  ]  # fmt: skip
  rows = canvases(len(asked), 32, 3, prompts=[13, 3, 8, 16, 1, 9, 0, 5, 12])
  names = {"edit": "edit_threshold", "most": "max_post_passes", "least": "tokens_per_step"}
  each = [
    SamplerConfig(
      block_length=8, early_stop=stop, **({"tokens_per_step": 1} | {names.get(k, k): x for k, x in options.items()})
    )
    for options in asked
  ]
  out, edits, stopped = run(rows, each, of_blocks=True), 0, 0
  for i, (row, options) in enumerate(zip(rows, asked, strict=True)):
    tokens, at, edited, nfe = blocks(row, 8, stop=stop, **({"least": 1} | options))
    left = tokens == MASK
    stopped += left.any()
    np.testing.assert_array_equal(out.tokens_BL[i], np.where(left, EOS, tokens))
    np.testing.assert_array_equal(out.unmasked_at_BL[i][~left], at[~left])
    np.testing.assert_array_equal(out.edited_at_BL[i][~left], edited[~left])
    assert out.step_B[i] == nfe
    edits += (edited > 0).sum()
  assert edits > 10 and (stopped > 2) == stop


def test_an_early_stop_gives_the_text_up_to_the_end_in_no_more_passes():
  """LLaDA2.0 and SDAR end after the block with an end; here a row ends once all is there up to it."""
  rows = canvases(6, 48, 4, prompts=[5, 0, 9, 3, 12, 8])
  given = {"block_length": 8, "block_steps": 8, "threshold": 0.6}
  whole, early = (run(rows, SamplerConfig(early_stop=stop, **given), of_blocks=True) for stop in (False, True))
  sooner = 0
  for i, row in enumerate(rows):
    tokens, _, _, nfe = blocks(row, 8, quotas=[1] * 8, threshold=0.6, stop=True)
    prompt = row.index(MASK)
    ends = np.flatnonzero(np.isin(tokens[prompt:], (EOS, 13)))
    if not len(ends):
      continue
    end = prompt + int(ends[0]) + 1
    for out in (whole, early):
      np.testing.assert_array_equal(out.tokens_BL[i, :end], tokens[:end])
    assert whole.unmasked_at_BL[i, : -(-end // 8) * 8].max() == nfe >= early.step_B[i]
    sooner += nfe > early.step_B[i]
  assert sooner > 1


@pytest.mark.parametrize("options", [{"top_p": 0.7}, {"top_k": 4}, {"top_p": 0.9, "top_k": 6}], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_draw_is_from_what_is_left_at_its_temperature(options, temperature):
  n = 6000
  logits_V = TABLE[0, 0]
  _, settings = sampling.split(SamplerConfig(temperature=temperature, **options), 1)
  key_BW = jax.random.split(jax.random.key(0), (1, n))
  token_BW, probability_BW, _ = sampling.candidates(
    jnp.broadcast_to(logits_V, (1, n, V)), lambda: key_BW, settings, remasking="low_confidence",
    allowed_V=jnp.asarray(ALLOWED), ends=(EOS,), alike_B=jnp.zeros(1, bool), chooses=True,
  )  # fmt: skip
  p_V = np.where(ALLOWED, np.exp(logits_V.astype(np.float64) / temperature), 0)
  p_V /= p_V.sum()
  order = np.argsort(-p_V)
  before = np.cumsum(p_V[order]) - p_V[order]
  left = order[(before <= options.get("top_p", 2)) & (np.arange(V) < options.get("top_k", V))]
  expected_V = np.where(np.isin(np.arange(V), left), p_V, 0)
  expected_V *= n / expected_V.sum()
  counts_V = np.bincount(token_BW[0], minlength=V)
  assert np.all(abs(counts_V - expected_V) <= 4.5 * np.sqrt(expected_V)) and 1 < len(left) < 15
  share_V = np.exp(logits_V) / np.exp(logits_V[left]).sum()
  np.testing.assert_allclose(probability_BW[0], share_V[token_BW[0]], rtol=1e-5)


def test_what_is_left_is_what_sorting_leaves():
  rng = np.random.default_rng(0)
  logits_BWV = (3 * rng.standard_normal((6, 5, 300))).astype(np.float32)
  logits_BWV[:, 0] = np.round(logits_BWV[:, 0])  # ties
  asked = [
    {},
    {"top_p": 1.0},
    {"top_k": 1},
    {"top_k": 20},
    {"top_p": 0.5},
    {"top_p": 0.9, "top_k": 20, "temperature": 0.7},
  ]
  shape, settings = sampling.split([SamplerConfig(**options) for options in asked], 6)
  assert shape.chooses and not sampling.split(SamplerConfig(top_p=1.0), 2)[0].chooses
  left_BWV = np.asarray(jax.jit(sampling.probable)(logits_BWV, settings))
  for options, x_WV, left_WV in zip(asked, logits_BWV.astype(np.float64), left_BWV, strict=True):
    p_WV = np.exp(x_WV / options.get("temperature", 1.0))
    p_WV /= p_WV.sum(axis=-1, keepdims=True)
    above_WVV = p_WV[:, None] > p_WV[:, :, None]
    share_WV = np.where(above_WVV, p_WV[:, None], 0).sum(axis=-1)
    top_p = options.get("top_p", 1.0)
    expected_WV = (share_WV <= (top_p if top_p < 1 else 2)) & (above_WVV.sum(axis=-1) < options.get("top_k", 300))
    np.testing.assert_array_equal(left_WV, expected_WV)


@pytest.mark.parametrize("banned", [(), (EOS,)])
def test_what_may_not_be_drawn_takes_no_place_among_the_most_probable(banned):
  logits_BWV = np.broadcast_to(np.where(ALLOWED, TABLE[0, 0], 30.0), (1, 2, V)).astype(np.float32)
  c = SamplerConfig(top_k=2 if banned else 1, logits_eos_inf=bool(banned), confidence_eos_eot_inf=not banned)
  logits_BWV = np.where(np.arange(V) == EOS, 40.0, logits_BWV).astype(np.float32)
  key_BW = jax.random.split(jax.random.key(0), (1, 2))
  token_BW, probability_BW, score_BW = sampling.candidates(
    logits_BWV, lambda: key_BW, sampling.split(c, 1)[1], remasking="high_entropy", allowed_V=jnp.asarray(ALLOWED),
    ends=(EOS,), alike_B=jnp.zeros(1, bool), chooses=True,
  )  # fmt: skip
  best = int(np.where(ALLOWED & (np.arange(V) != EOS), TABLE[0, 0], -np.inf).argmax())
  assert (np.asarray(token_BW) == (best if banned else EOS)).all()
  if banned:
    assert (probability_BW > 0.5).all() and (probability_BW < 1).all()
  else:
    assert (probability_BW == 0).all() and (score_BW < -1e29).all()
