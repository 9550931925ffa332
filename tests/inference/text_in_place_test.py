"""What a model is asked, and what it says, stands where it stands: in a canvas, behind its prompt."""

import itertools

import numpy as np
import pytest
from vocabularies import made

from lladax import sampling
from lladax.inference.engine import Filled
from lladax.inference.llada import LLaDA
from lladax.model.mask_predictor import MaskPredictorConfig


@pytest.fixture(scope="module", params=["prepend", "metaspace first", "sentencepiece bpe", "byte level", "bytes"])
def llada(request):
  """A tiny random LLaDA over one of the vocabularies."""
  import jax
  import jax.numpy as jnp

  text = made(request.param)
  c = MaskPredictorConfig(D=12, N=1, H=2, G=1, K=6, F=16, V=text.rows, max_length=96, dtype="float32")
  rng, shapes = np.random.default_rng(0), jax.eval_shape(c.init, jax.random.key(0))
  params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32), shapes)
  return LLaDA(c, params, text, text.mask_id, text.eos_id, text.vocab_size, text.eot_id)


PROMPT = "The capital of France is"


def generated(prompt, ids, eos_id):
  """A canvas in which `ids` were generated behind the prompt, padded to 32."""
  tokens_BL = np.array([[eos_id] * (32 - len(prompt)) + prompt + ids])
  at_BL = np.array([[0] * 32 + [1] * len(ids)])
  canvas = sampling.Canvas(tokens_BL, at_BL, np.ones(at_BL.shape), step_B=np.array([1]), nfe=np.int32(1))
  return Filled(canvas, np.array([32 - len(prompt)]), 32)


def test_a_sampled_text_keeps_its_first_space(llada):
  text = llada.tokenizer
  prompt = text.encode(PROMPT)
  for answer in (" Paris.", "Paris", "  \n", " 😀"):
    filled = generated(prompt, text.behind(prompt, answer), llada.eos_id)
    assert llada._sampled(filled, llada.ends).text == [answer]
    assert llada._has_ended(filled, 0, [answer]) and not llada._has_ended(filled, 0, [answer + "x"])
  filled = generated(prompt, [*text.behind(prompt, " Paris"), llada.eos_id, *text.encode("The")], llada.eos_id)
  assert llada._sampled(filled, llada.ends).text == [" Paris"]


@pytest.mark.usefixtures("quick_compiles")
def test_prompts_and_their_texts_spell_the_canvases(llada):
  out = llada.sample([PROMPT] * 8, gen_length=8, block_length=8, steps=2, temperature=2.0)
  for row, padding, said in zip(out.tokens, out.padding, out.text, strict=True):
    ended = [*row[padding:-8], *itertools.takewhile(lambda i: i not in llada.ends, row[-8:])]
    assert llada.tokenizer.decode(ended) == PROMPT + said


@pytest.mark.usefixtures("quick_compiles")
def test_an_answer_is_scored_as_it_stands(llada):
  prompt, answer = llada.tokenizer.pair(PROMPT, " Paris.")
  options = {"num_samples": 4, "seed": 1}
  wanted = llada.log_likelihood(prompt, answer, **options)
  assert llada.log_likelihood(PROMPT, " Paris.", **options) == wanted
  assert llada.log_likelihood(prompt, " Paris.", **options) == wanted
  assert llada.log_likelihood([PROMPT], [" Paris."], **options) == [wanted]


@pytest.mark.usefixtures("quick_compiles")
def test_infilled_pieces_stand_behind_their_masks(llada):
  out = llada.infill("The [MASK] of France", steps=1)
  assert out.text[0].startswith("The ") and out.text[0].endswith(" of France")
  assert (
    llada.tokenizer.encode("The ") == out.tokens[0, out.padding[0] :][: len(llada.tokenizer.encode("The "))].tolist()
  )
