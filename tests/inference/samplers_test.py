"""Every way to fill a canvas, through `LLaDA`, on one tiny random model: what must hold whatever the options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax import sampling
from lladax.data import tokenizer
from lladax.devices import sharding
from lladax.inference import engine, show
from lladax.inference.engine import bucket
from lladax.inference.llada import LLaDA, cut
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.sampling import SamplerConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = [list(range(40, 47)), [60, 61], list(range(70, 110))]


def make(eos_bias=0.0, **fields):
  """A model of two layers over bytes; `eos_bias` makes it end its texts sooner."""
  text = tokenizer.create(tokenizer.TokenizerConfig(kind="bytes"))
  shape = {"D": 12, "N": 2, "H": 2, "G": 1, "K": 6, "F": 16, "V": text.rows, "max_length": 160, "dtype": "float32"}
  c = MaskPredictorConfig(**(shape | fields))
  rng, shapes = np.random.default_rng(0), jax.eval_shape(c.init, jax.random.key(0))
  params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32), shapes)
  params["final_norm"] = jnp.abs(params["final_norm"])
  # A direction of its own in the stream, which only the head's EOS column reads.
  params["embedding"] = params["embedding"].at[:, 0].set(1.0)
  params["head"] = params["head"].at[0].set(0.0).at[0, text.eos_id].set(eos_bias)
  return LLaDA(c, params, text, text.mask_id, text.eos_id, text.vocab_size, text.eot_id)


SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def llada():
  return make()


@pytest.fixture(scope="module")
def ending():
  return make(eos_bias=5.0)


def assert_same(out, i, other, j):
  """Row i of one answer is row j of another, padding and what one canvas has more of at the right end left out."""
  for name in ("tokens", "unmasked_at", "confidence"):
    a, b = getattr(out, name)[i, out.padding[i] :], getattr(other, name)[j, other.padding[j] :]
    np.testing.assert_allclose(a[: len(b)], b[: len(a)], atol=1e-5, err_msg=name)


OPTIONS = [
  {"cache": "dual", "threshold": 0.06, "early_stop": True},
  *(
    pytest.param(options, marks=pytest.mark.slow)
    for options in (
      {"cache": "prefix", "guidance_scale": 0.7, "temperature": 0.8},
      {"gen_length": None, "cache": "dual", "steps": 3},
      {"cache": "prefix", "factor": 2.1},
      {"cache": "dual", "guidance_scale": 0.7, "remasking": "random"},
      {"remasking": "low_margin", "logits_eos_inf": True},
      {"remasking": "high_entropy", "confidence_eos_eot_inf": True, "cache": "dual"},
      {"gen_length": None, "guidance_scale": 0.7, "temperature": 0.8},
    )
  ),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_row_answers_as_it_would_alone(ending, options):
  options = {"gen_length": 24, "block_length": 8, "steps": 9} | options
  together = ending.sample(PROMPTS, **options)
  assert not (together.tokens == ending.mask_id).any()
  if options.get("temperature") or options.get("remasking") == "random":  # noise is a row's own: its place stays
    assert_same(together, 1, ending.sample(PROMPTS[:2], **options), 1)
    assert_same(together, 0, ending.sample(PROMPTS[:1], **options), 0)
  else:
    for i in (0, 2):
      assert_same(together, i, ending.sample(PROMPTS[i : i + 1], **options), 0)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("tied, G", [(False, 1), (True, 2)])
def test_a_window_over_a_fresh_cache_is_the_full_pass(cache, tied, G):
  c = MaskPredictorConfig(D=12, N=3, H=2, G=G, K=6, F=16, V=32, tied=tied, dtype="float32")
  model = c.bind(c.init(jax.random.key(0)))
  tokens_BL = jax.random.randint(jax.random.key(1), (2, 20), 0, 32)
  segment_BL = jnp.asarray(np.arange(20)[None] >= np.array([[0], [5]]), jnp.int32)
  position_BL = jnp.maximum(jnp.cumsum(segment_BL, axis=1) - 1, 0)
  full, made = model.hidden(tokens_BL, c.visible(20, segment_BL), position_BL, c.new_cache(2, 20))
  plain, _ = model.hidden(tokens_BL, c.visible(20, segment_BL), position_BL)
  np.testing.assert_allclose(full, plain, atol=1e-6)
  stale = jax.tree.map(lambda x: x.at[:, :, 8:].set(1e3) if cache == "prefix" else x.at[:, :, 8:12].set(1e3), made)
  at_L = np.arange(20)
  size, reuse_L = (12, at_L < 8) if cache == "prefix" else (4, (at_L < 8) | (at_L >= 12))
  visible = c.visible(20, segment_BL, W=size, start=8, reuse_L=jnp.asarray(reuse_L))
  window, kept = model.hidden(tokens_BL[:, 8 : 8 + size], visible, position_BL, stale)
  np.testing.assert_allclose(window, full[:, 8 : 8 + size], atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, kept, stale)  # read, not written


@pytest.mark.parametrize(
  "options", [{}, *(pytest.param(options, marks=SLOW) for options in ({"guidance_scale": 0.5}, {"gen_length": None}))]
)
def test_caches_change_nothing_where_every_step_is_a_blocks_first(llada, options):
  options = {"gen_length": 24, "block_length": 8} | options
  options["steps"] = 1 if options["gen_length"] is None else 3
  plain, prefix, dual = (llada.sample(PROMPTS, cache=cache, **options) for cache in (None, "prefix", "dual"))
  assert plain.nfe == prefix.nfe == dual.nfe
  for i in range(len(PROMPTS)):
    assert_same(plain, i, prefix, i)
    assert_same(plain, i, dual, i)


def test_caches_are_an_approximation_in_the_steps_between(llada):
  plain, prefix, dual = (
    llada.sample(PROMPTS, cache=cache, gen_length=32, steps=32) for cache in (None, "prefix", "dual")
  )
  for out in (prefix, dual):
    assert out.nfe == plain.nfe and not (out.tokens == llada.mask_id).any()
    assert np.abs(out.confidence - plain.confidence).max() > 1e-5


@pytest.mark.parametrize(
  "options",
  [{}, {"cache": "dual"}, {"gen_length": None, "cache": "prefix"}, {"eps": 1e-3, "block_steps": 11, "top_p": 0.9}],
)
@pytest.mark.parametrize("every", ["block", "step"])
def test_stream_is_sample_seen_on_its_way(ending, every, options):
  options = {"gen_length": 24, "block_length": 8, "steps": 9, "temperature": 0.5} | options
  last = ending.sample(PROMPTS, **options)
  compiled = engine.unmask_until._cache_size()
  seen = list(ending.stream(PROMPTS, every=every, **options))
  assert engine.unmask_until._cache_size() == compiled
  for i in range(len(PROMPTS)):
    assert_same(seen[-1], i, last, i)
  assert seen[-1].text == last.text
  if every == "step":
    assert [out.nfe for out in seen] == list(range(1, last.nfe + 1))
  elif options["gen_length"]:
    assert len(seen) == 3
  for before, after in zip(seen, seen[1:], strict=False):  # what is committed stays
    width = before.tokens.shape[1]
    kept = before.tokens != ending.mask_id
    np.testing.assert_array_equal(before.tokens[kept], after.tokens[:, :width][kept])
  if options["gen_length"]:
    assert seen[0].unmaskings()[0].steps > seen[0].nfe  # masked positions are drawn as masked


@pytest.mark.parametrize(
  "options", [{}, {"cache": "dual", "threshold": 0.1}, pytest.param({"gen_length": None}, marks=SLOW)]
)
def test_stop_strings_cut_texts_and_spare_the_blocks_behind(llada, options):
  options = {"gen_length": 24, "block_length": 8, "steps": 24} | options
  whole = llada.sample(PROMPTS, **options)
  compiled = engine.unmask_until._cache_size()
  stops = sorted({text[3] for text in whole.text})  # all texts hold one in their first block
  out = llada.sample(PROMPTS, until=stops, **options)
  assert engine.unmask_until._cache_size() == compiled
  assert out.text == [cut(text, stops) for text in whole.text] and max(map(len, out.text)) <= 3
  first = next(iter(llada.stream(PROMPTS, **options)))
  assert out.nfe == first.nfe < whole.nfe
  for i in range(len(PROMPTS)):
    assert_same(out, i, first, i)
  assert llada.sample(PROMPTS, until=["never"], **options).nfe == whole.nfe
  text = whole.text[0]
  assert llada.sample(PROMPTS[:1], until=["never", text[9:]], **options).text == [text[: text.index(text[9:])]]


@pytest.mark.parametrize("until", ["text", ["x", ""], [3]])
def test_stop_strings_are_a_list(llada, until):
  with pytest.raises(ValueError, match="until=.*: give a list of strings, none of them empty"):
    llada.sample(PROMPTS, until=until)


@pytest.mark.slow
def test_variable_length_is_one_block_after_another(ending):
  """The reference here appends a block of masks, fills it with `unmask`, and looks for EOS."""
  W, steps = 4, 3
  out = ending.sample(PROMPTS, gen_length=None, block_length=W, steps=steps)
  lengths = set()
  for i, prompt in enumerate(PROMPTS):
    row = list(prompt)
    while ending.eos_id not in row[len(prompt) :] and len(row) + W <= ending.model.max_length:
      canvas = row + [ending.mask_id] * W
      filled = ending.unmask([canvas], block_length=bucket(len(canvas)), steps=steps)
      row = filled.tokens[0, filled.padding[0] :].tolist()
    answer = out.tokens[i, out.padding[i] :].tolist()
    assert answer[: len(row)] == row and set(answer[len(row) :]) <= {ending.eos_id}
    lengths.add(len(row) - len(prompt))
  assert len(lengths) > 1 and max(lengths) > 4 * W, lengths  # the canvas had to grow, and rows ended apart


def test_variable_length_ends_at_the_models_longest_canvas(llada):
  never = dataclasses.replace(
    llada, params=llada.params | {"head": llada.params["head"].at[0, llada.eos_id].set(-50.0)}
  )
  out = never.sample(PROMPTS, gen_length=None, block_length=16, steps=1)
  assert out.tokens.shape[1] - bucket(40) == (160 - 40) // 16 * 16 and out.nfe == 7
  with pytest.raises(ValueError, match="a prompt of 150 tokens leaves no block of 16 within model.max_length=160"):
    llada.sample([[1] * 150], gen_length=None, block_length=16)


def test_early_stop_saves_passes_and_changes_no_text():
  ending, options = make(eos_bias=8.0), {"gen_length": 64, "block_length": 8, "steps": 64}
  whole, early = ending.sample(PROMPTS, **options), ending.sample(PROMPTS, early_stop=True, **options)
  assert early.text == whole.text and early.nfe < whole.nfe
  for tokens in early.tokens[:, bucket(40) :]:
    end = tokens.tolist().index(ending.eos_id)
    assert set(tokens[end // 8 * 8 + 8 :].tolist()) <= {ending.eos_id}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_eos_is_never_drawn(ending, temperature):
  options = {"gen_length": 16, "block_length": 16, "steps": 16, "temperature": temperature}
  drawn, never = (
    ending.sample(PROMPTS, logits_eos_inf=flag, **options).tokens[:, bucket(40) :] for flag in (False, True)
  )
  assert (drawn == ending.eos_id).any() and not (never == ending.eos_id).any()


def test_blocks_of_one_are_autoregressive_order(llada):
  out = llada.sample(PROMPTS, gen_length=12, block_length=1, steps=12)
  np.testing.assert_array_equal(out.unmasked_at[:, bucket(40) :], np.tile(np.arange(1, 13), (3, 1)))


def test_a_conversation_is_a_prompt(ending):
  messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
  options = {"gen_length": 16, "block_length": 8, "steps": 4}
  ids = ending.tokenizer.chat(messages)
  reply, same = ending.chat(messages, **options), ending.sample([ids], early_stop=True, **options)
  assert reply.text == same.text
  np.testing.assert_array_equal(reply.tokens, same.tokens)
  *_, last = ending.stream(messages, early_stop=True, **options)
  assert last.text == same.text


def test_chain_rule_is_the_likelihood_of_autoregressive_order(llada):
  prompt, answer = PROMPTS[0], [65, 66, 67]
  expected = 0.0
  for i, token in enumerate(answer):
    canvas = prompt + answer[:i] + [llada.mask_id] * (len(answer) - i)
    expected += jax.nn.log_softmax(llada.logits([canvas])[0, len(prompt) + i])[token]
  assert llada.log_likelihood(prompt, answer, method="chain_rule") == pytest.approx(float(expected), rel=1e-5)
  with pytest.raises(ValueError, match="method='exact': use monte_carlo or chain_rule"):
    llada.log_likelihood(prompt, answer, method="exact")


@pytest.mark.parametrize("options", [{}, {"method": "chain_rule"}, {"guidance_scale": 0.5}])
def test_many_pairs_of_any_lengths_are_scored_as_each_alone(llada, options):
  answers = [[65], [66, 67, 68], list(range(70, 90))]
  together = llada.log_likelihood(PROMPTS, answers, num_samples=5, **options)
  alone = [llada.log_likelihood(p, a, num_samples=5, **options) for p, a in zip(PROMPTS, answers, strict=True)]
  np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_buckets():
  lengths = range(1, 3000)
  assert all(length <= bucket(length) <= max(length + 31, length * 9 / 8) for length in lengths)
  assert len({bucket(length) for length in lengths if length <= 2048}) == 8 + 8 * 3
  assert bucket(0) == 0 and bucket(33) == 64 and bucket(257) == 288


def test_bad_options(llada):
  with pytest.raises(ValueError, match="sample.cache='both': use one of None, prefix, dual"):
    llada.sample("a", cache="both")
  with pytest.raises(ValueError, match="every='token': use block or step"):
    llada.stream("a", every="token")
  with pytest.raises(ValueError, match="sample.gen_length=None: a canvas has a length"):
    llada.unmask([[1, llada.mask_id]], gen_length=None)
  with pytest.raises(ValueError, match="sample.gen_length=None ends at EOS"):
    llada.sample("a", gen_length=None, logits_eos_inf=True)


def perturbed(llada, n):
  """As if the same were computed in another order: every parameter off by about one rounding."""
  rng = np.random.default_rng(n)
  shake = lambda x: x * (1 + 1e-7 * rng.standard_normal(x.shape)).astype(np.float32)  # noqa: E731
  return dataclasses.replace(llada, params=jax.tree.map(shake, llada.params))


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"remasking": "high_entropy", "temperature": 0.5},
    *(
      pytest.param(options, marks=pytest.mark.slow)
      for options in (
        {"remasking": "low_margin"},
        {"temperature": 0.5},
        {"remasking": "random"},
        {"guidance_scale": 0.7, "cache": "dual"},
        {"gen_length": None, "cache": "prefix", "steps": 4},
        {"confidence_eos_eot_inf": True, "factor": 1.0},
        {"top_p": 0.4, "eps": 1e-3, "remasking": "low_margin"},
      )
    ),
  ],
  ids=str,
)
def test_an_empty_prompt_has_one_answer_however_it_is_rounded(options):
  flat = make(eos_bias=1.0)
  flat = dataclasses.replace(flat, params=flat.params | {"head": 0.1 * flat.params["head"]})  # far from certain
  options = {"gen_length": 32, "block_length": 16, "steps": 8} | options
  answers = set()
  for n in range(10):
    for prompts in ([[]], [[], PROMPTS[0]]):
      out = perturbed(flat, n).sample(prompts, **options)
      row = slice(out.padding[0], out.padding[0] + 16)
      answers.add((*out.tokens[0, row].tolist(), *out.unmasked_at[0, row].tolist()))
  assert len(answers) == 1
  at = out.unmasked_at[0, row]
  if options.get("remasking") != "random" and not options.get("temperature"):
    first = np.flatnonzero(at == 1)
    np.testing.assert_array_equal(first, np.arange(len(first)))  # which tie, and go by position


def test_a_canvas_of_masks_is_filled_the_same_wherever_it_stands(llada):
  m, canvases = llada.mask_id, [[llada.mask_id] * 12, [5, *[llada.mask_id] * 60]]
  for n in range(3):
    shaken = perturbed(llada, n)
    alone, among = shaken.unmask([[m] * 12], steps=4, block_length=8), shaken.unmask(canvases, steps=4, block_length=8)
    assert_same(alone, 0, among, 0)


def test_an_empty_prompt_alone_answers_as_it_does_among_others():
  ending, options = make(eos_bias=8.0), {"gen_length": 64, "block_length": 16, "steps": 8, "temperature": 1.0}
  alone, among = ending.sample([[]], **options), ending.sample([[], PROMPTS[0]], **options)
  assert_same(alone, 0, among, 0)
  tokens = alone.tokens[0].tolist()
  end = min(tokens.index(i) for i in ending.ends if i in tokens)
  assert alone.text == [ending.tokenizer.decode(tokens[:end])] == among.text[:1]


@pytest.mark.parametrize(
  ("mesh", "options"),
  [
    pytest.param({"data": 2, "tensor": 2, "context": 2}, {}, marks=SLOW),
    pytest.param({"data": 1, "fsdp": 4, "tensor": 2}, {}, marks=SLOW),
    pytest.param({"data": 2, "tensor": 2, "context": 2}, {"cache": "dual", "guidance_scale": 0.7}, marks=SLOW),
    pytest.param({"data": 1, "fsdp": 4, "tensor": 2}, {"cache": "prefix", "temperature": 0.8}, marks=SLOW),
  ],
  ids=str,
)
def test_any_mesh_answers_alike(mesh, options):
  llada = make(G=2, D=16, V=384)
  grid = sharding.make_mesh(sharding.MeshConfig(**mesh))
  params = jax.device_put(llada.params, sharding.shardings(grid, llada.model.letters()))
  meshed = dataclasses.replace(llada, params=params)
  options = {"steps": 16, "gen_length": 16, "block_length": 8} | options
  out, expected = (model.sample([*PROMPTS, []], **options) for model in (meshed, llada))
  for i in range(4):
    assert_same(out, i, expected, i)
  assert out.nfe == expected.nfe
  scored = {"num_samples": 4, "guidance_scale": options.get("guidance_scale", 0.0)}
  out, expected = (model.log_likelihood(PROMPTS, [[1, 2, 3], [4], [5, 6]], **scored) for model in (meshed, llada))
  np.testing.assert_allclose(out, expected, rtol=1e-5)
  out, expected = (model.logits([[1, 2, 3, 4]]) for model in (meshed, llada))
  np.testing.assert_allclose(out, expected, atol=1e-5)


def test_a_causal_model_on_a_mesh():
  llada = make(G=2, D=16, V=384, causal=True)
  grid = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
  params = jax.device_put(llada.params, sharding.shardings(grid, llada.model.letters()))
  out, expected = (model.sample(PROMPTS, gen_length=8) for model in (dataclasses.replace(llada, params=params), llada))
  np.testing.assert_array_equal(out.tokens, expected.tokens)


def test_a_seed_is_told_from_its_number_in_the_batch_or_given_with_the_row():
  _, settings = sampling.split(SamplerConfig(seed=2**32 - 1), 3)
  expected = [jax.random.fold_in(jax.random.key(2**32 - 1), row) for row in range(3)]
  keys = sampling.keys(settings)
  np.testing.assert_array_equal(jax.random.key_data(keys), jax.random.key_data(jnp.stack(expected)))
  expected = [jax.random.fold_in(jax.random.key(seed), 0) for seed in (5, 2**31)]
  for own in (SamplerConfig(seed=(5, 2**31)), [SamplerConfig(seed=5), SamplerConfig(seed=2**31)]):
    keys = sampling.keys(sampling.split(own, 2)[1])
    np.testing.assert_array_equal(jax.random.key_data(keys), jax.random.key_data(jnp.stack(expected)))


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_with_a_seed_of_its_own_has_the_same_noise_in_any_batch(causal):
  llada, options = make(eos_bias=-9.0, causal=causal), {"gen_length": 16, "block_length": 8, "temperature": 2.0}
  program = engine._autoregressive_sample if causal else engine.unmask_until
  together = llada.sample([*PROMPTS, PROMPTS[1]], seed=[3, 4, 5, 6], **options)
  compiled = program._cache_size()
  assert_same(llada.sample([*PROMPTS, PROMPTS[1]], seed=3, **options), 0, together, 0)
  other = llada.sample([PROMPTS[1], PROMPTS[2], *PROMPTS[:2]], seed=np.array([6, 5, 3, 4]), **options)
  assert program._cache_size() == compiled
  for i, j in ((0, 3), (1, 2), (2, 0), (3, 1)):
    assert_same(other, i, together, j)
  assert (together.tokens[1] != together.tokens[3]).any()  # asked twice, answered twice
  assert_same(llada.sample(PROMPTS[1], seed=4, **options), 0, together, 1)
  assert_same(llada.sample(PROMPTS[1:2], seed=[4], **options), 0, together, 1)
  if not causal:
    canvas = [[*PROMPTS[1], *[llada.mask_id] * 9]]
    one, two = (llada.unmask(canvas * 2, seed=seed, temperature=2.0) for seed in ([8, 9], [9, 8]))
    assert_same(one, 0, two, 1)
    *_, last = llada.stream([*PROMPTS, PROMPTS[1]], seed=[3, 4, 5, 6], **options)
    np.testing.assert_array_equal(last.tokens, together.tokens)


@pytest.mark.slow
def test_prompts_of_one_command_have_noise_of_their_own(tiny, tiny_workdir, capsys):
  config = tiny({"sample.temperature": 2.0, "sample.gen_length": 8, "sample.block_length": 8, "sample.steps": 2})
  said = []
  for prompts in (["red"] * 3, ["red"] * 2, ["r[MASK][MASK][MASK]"] * 2):
    show.show_samples(config, tiny_workdir, prompts, None)
    said.append(capsys.readouterr().out.splitlines())
  assert len(set(said[0])) == 3 and said[1] == said[0][:2] and len(set(said[2])) == 2


def stalled(params, state, *args, **options):
  """A program that gets nowhere."""
  return state


def blind(masked_W, *args):
  """`commit` that commits nothing."""
  return jnp.zeros_like(masked_W)


@pytest.mark.parametrize("options", [{}, {"gen_length": None}, {"cache": "dual", "early_stop": True}], ids=str)
@pytest.mark.parametrize("broken", ["program", "commit"])
def test_masks_that_never_vanish_end_every_loop(monkeypatch, broken, options):
  if broken == "program":
    monkeypatch.setattr(engine, "unmask_until", stalled)
  else:
    monkeypatch.setattr(engine.sampling, "commit", blind)
  llada = make(max_length=72, N=1, F=15)  # which no other test compiles
  options = {"gen_length": 16, "block_length": 8, "steps": 8} | options
  places = options["gen_length"] or 2 * (72 - 2)  # a canvas that grows begins again with a larger one
  for every, most in (("block", places // 8), ("step", places)):
    seen = list(llada.stream([[5], [6, 7]], every=every, **options))
    assert 1 <= len(seen) <= most and (seen[-1].unmasked_at == 0).all()
  for until in ((), ["x"]):
    assert llada.sample([[5], [6, 7]], until=until, **options).nfe <= places


@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_in_a_prompt_is_refused(causal):
  llada = make(causal=causal)
  prompts = [[5], [5, llada.mask_id, 7]]
  said = rf"^prompts\[1\]\[1\]={llada.mask_id} is \[MASK\], which has no place here: unmask\(\) is what fills"
  for options in ({}, {"until": ["x"]}, {"gen_length": None}):
    with pytest.raises(ValueError, match=said):
      llada.sample(prompts, **options)
    if not causal and "until" not in options:
      with pytest.raises(ValueError, match=said):
        llada.stream(prompts, **options)
