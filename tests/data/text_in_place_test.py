"""Text stands where it stands: prompt and answer spell the canvas, whatever a vocabulary does to spaces and bytes."""

import io
import itertools
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lladax import sampling
from lladax.data import tokenizer
from lladax.inference.engine import Filled
from lladax.inference.llada import LLaDA
from lladax.model.mask_predictor import MaskPredictorConfig

TEXTS = ["The capital of France is Paris. the king of France, and the cat sat on the mat\n\n  The end.\t秦川"] * 9
SPECIAL = ["<s>", "</s>", "<|mdm_mask|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
ALPHABET = sorted({character for text in TEXTS for character in text})


def sentencepiece(model_type="bpe", **options):
  import sentencepiece as library

  model = io.BytesIO()
  options = {"byte_fallback": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"} | options
  library.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS), model_writer=model, model_type=model_type, vocab_size=330, hard_vocab_limit=False,
    character_coverage=1.0, minloglevel=2, **options,
  )  # fmt: skip
  return "sentencepiece", model.getvalue()


def merged(vocabulary, texts, **options):
  """A BPE model of characters, with the merges that spell the texts' words."""
  vocabulary, merges = dict(vocabulary), []
  for word in texts:
    for i in range(1, len(word)):
      if word[: i + 1] not in vocabulary:
        merges.append((word[:i], word[i]))
        vocabulary[word[: i + 1]] = len(vocabulary)
  return models.BPE(vocabulary, merges, **options)


WORDS = ["▁The", "▁Paris", "▁of", "▁France", "▁is", "▁▁", "ing"]


def fallback(normalizer=None, pre_tokenizer=None, decoder=None):
  """Llama-2's kind: characters and merges, bytes for what is unknown."""
  pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
  pieces += [character for character in ALPHABET if character not in "\n\t ▁秦川"]
  options = {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
  model = tokenizers.Tokenizer(merged({x: i for i, x in enumerate(pieces)}, WORDS, **options))
  if normalizer:
    model.normalizer = normalizer
  if pre_tokenizer:
    model.pre_tokenizer = pre_tokenizer
  strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  model.decoder = decoder or decoders.Sequence(strip)
  return model


def published(model):
  model.add_special_tokens(SPECIAL)
  return "huggingface", model.to_str().encode()


def prepend():
  return published(fallback(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])))


def metaspace(scheme):
  keep = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
  split = pre_tokenizers.Metaspace(prepend_scheme=scheme)
  return published(fallback(None, split, keep if scheme == "never" else None))


def byte_level(add_prefix_space):
  alphabet = {x: i for i, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  model = tokenizers.Tokenizer(merged(alphabet, ["ĠThe", "ĠParis", "ing", "ĠĠ"]))
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
  model.decoder = decoders.ByteLevel()
  return published(model)


def unigram():
  """T5's kind: words are split at spaces before each gets its own; no bytes, one unknown for many characters."""
  pieces = ["<unk>", "▁", *(x for x in ALPHABET if x not in " \n\t▁秦川"), *WORDS]
  model = tokenizers.Tokenizer(models.Unigram([(x, -5.0 if len(x) == 1 else -2.0) for x in pieces], 0))
  model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
  model.decoder = decoders.Metaspace()
  return published(model)


def wordpiece():
  pieces = ["[UNK]", "the", "play", "##ing", "is", "paris", ".", *"abcdefghij", *(f"##{x}" for x in "abcdefghij")]
  model = tokenizers.Tokenizer(models.WordPiece({x: i for i, x in enumerate(pieces)}, unk_token="[UNK]"))
  model.normalizer = normalizers.BertNormalizer(lowercase=True)
  model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  model.decoder = decoders.WordPiece()
  return published(model)


# What comes back letter for letter; and what a vocabulary changes in reading it.
EXACT = {
  "bytes": lambda: ("bytes", b""),
  "sentencepiece bpe": sentencepiece,
  "sentencepiece unigram": lambda: sentencepiece("unigram"),
  "sentencepiece plain": lambda: sentencepiece(add_dummy_prefix=False),
  "prepend": prepend,
  "metaspace always": lambda: metaspace("always"),
  "metaspace first": lambda: metaspace("first"),
  "metaspace never": lambda: metaspace("never"),
  "byte level": lambda: byte_level(False),
}
LOSSY = {
  "sentencepiece stripped": lambda: sentencepiece(remove_extra_whitespaces=True),
  "sentencepiece unknown": lambda: sentencepiece(byte_fallback=False),
  "byte level prefixed": lambda: byte_level(True),
  "unigram": unigram,
  "wordpiece": wordpiece,
}
NAMES = {"eos": "</s>", "mask": "<|mdm_mask|>", "pad": "", "bos": ""}


def make(builder):
  kind, content = builder()
  return tokenizer.Tokenizer(tokenizer._KINDS[kind](content), NAMES)


@pytest.fixture(scope="module", params=EXACT)
def exact(request):
  return make(EXACT[request.param])


@pytest.fixture(scope="module", params=EXACT | LOSSY)
def every(request):
  return make((EXACT | LOSSY)[request.param])


def spelled(text, ids):
  """The tokens as their vocabulary writes them."""
  name = text._vocabulary._model
  return [name.id_to_token(i) if hasattr(name, "id_to_token") else name.id_to_piece(i) for i in ids]


SAYINGS = [
  "Paris.",
  " Paris.",
  "  Paris",
  "\nParis",
  "\n\n",
  "\t",
  " ",
  "  ",
  "秦川雄帝宅",
  "é",
  "😀",
  " 😀😀",
  "ing",
  "",
  "▁a",
]


def test_prompt_and_answer_spell_the_canvas(exact):
  no_block = exact.decode(exact.encode("▁")) != "▁"  # such a vocabulary has no space but this
  no_front = exact.decode(exact.encode(" a")) == "a"  # Metaspace has one space for the beginning and the text's own
  for prompt, answer in itertools.product(
    ["The capital of France is", "The ", "a\n", "秦", "😀", "", "The  "], SAYINGS
  ):
    answer = answer.replace("▁", " ") if no_block else answer
    answer = answer.lstrip(" ") if no_front and not prompt else answer
    asked = exact.encode(prompt)
    for ids in (exact.behind(asked, answer), exact.pair(prompt, answer)[1]):
      assert exact.decode(asked + ids) == prompt + answer
      assert exact.decode(ids, behind=asked) == answer, prompt
      assert exact.decode(ids, behind=[exact.eos_id, *asked]) == answer  # of another text nothing is left
    if not prompt:
      assert exact.behind([], answer) == exact.encode(answer) == exact.behind([exact.eos_id], answer)
      assert exact.decode(exact.encode(answer), behind=[exact.eos_id]) == answer


def test_an_answer_is_tokenised_as_it_stands():
  for name in ("prepend", "metaspace always", "metaspace first"):
    text = make(EXACT[name])
    prompt, answer = text.pair("The capital of France is", " Paris.")
    assert prompt == text.encode("The capital of France is")
    assert spelled(text, answer) == ["▁Paris", "."], name
    assert prompt + answer == text.encode("The capital of France is Paris.")
    # The two share ▁Paris: each by itself, the answer without the space of a beginning.
    assert spelled(text, text.pair("The ", "Paris")[1]) == list("Paris"), name
    assert spelled(text, text.behind([5], "ing")) == ["ing"], name


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_any_two_texts_spell_their_canvas(data):
  text = made(data.draw(st.sampled_from([*EXACT])))
  part = st.text(st.one_of(st.sampled_from(" \n\ta.T秦😀é"), st.characters(exclude_categories=["Cs"])), max_size=12)
  prompt, answer = (data.draw(part).replace("▁", "") for _ in range(2))
  prompt = "a" + prompt  # Metaspace has one space for the beginning and the text's own
  asked, ids = text.pair(prompt, answer)
  assert text.decode(asked) == prompt and text.decode(ids, behind=asked) == answer
  assert text.decode(asked + ids) == prompt + answer
  cut = data.draw(st.integers(0, len(ids)))  # anywhere, in the middle of a character too
  parts = text.decode(ids[:cut], behind=asked) + text.decode(ids[cut:], behind=asked + ids[:cut])
  assert parts.replace("\ufffd", "") == answer.replace("\ufffd", "")


_made = {}


def made(name):
  if name not in _made:
    _made[name] = make(EXACT[name])
  return _made[name]


def test_what_a_vocabulary_loses_it_loses_alone(every):
  """No crash, no space that nobody wrote: the answer reads as it does in the whole."""
  prompts = ["The capital of France is", "The ", "play", ""]
  for prompt, answer in itertools.product(prompts, [*SAYINGS, "the", " is paris."]):
    asked, ids = every.pair(prompt, answer)
    assert every.decode(asked + ids) == every.decode(asked) + every.decode(ids, behind=asked), (prompt, answer)
    assert all(0 <= i < every.vocab_size for i in ids)


@pytest.mark.parametrize(("prompt", "answer", "said"), [("play", "ing", " ing"), ("The", " Paris.", " paris.")])
def test_wordpieces_have_sane_spaces(prompt, answer, said):
  text = make(wordpiece)
  asked, ids = text.pair(prompt, answer)
  assert text.decode(ids, behind=asked) in (said, said.strip())
  assert text.decode(text.encode("playing")[1:], behind=text.encode("play")) == "ing"


def test_words_keep_apart_where_spaces_are_cut_off():
  """The prefix is the only space that these have."""
  for name in ("unigram", "sentencepiece stripped"):
    text = make(LOSSY[name])
    asked, ids = text.pair("The", " Paris is")
    assert text.decode(asked + ids) == "The Paris is" and text.decode(ids, behind=asked) == " Paris is"
    assert text.decode(asked + text.behind(asked, " Paris  is")) == "The Paris is"
    assert text.decode(asked + text.behind(asked, "ing")) == "Theing"


def test_an_emoji_cut_in_the_middle(exact):
  """Between prompt and answer it is the answer's; at the end it is U+FFFD, and those before it stay."""
  ids = exact.encode("a😀😀")
  cut = next(n for n in range(len(ids), 0, -1) if exact.decode(ids[:n]).startswith("a😀") and exact.decode(ids[:n])[2:])
  assert exact.decode(ids[: cut - 1])[:2] == "a😀" and set(exact.decode(ids[: cut - 1])[2:]) <= {"\ufffd"}
  for n in range(cut - 3, cut):
    before = exact.decode(ids[:n])
    assert exact.decode(ids[n:], behind=ids[:n]) == "😀", before
  broken = exact.decode(ids[: cut - 2] + exact.behind(ids, "b"))
  assert broken.startswith("a😀") and broken.endswith("b") and set(broken[2:-1]) == {"\ufffd"}


def test_behind_a_mask_stands_no_beginning(exact):
  ids = exact.encode_canvas("The [MASK][MASK] of France")
  head = exact.encode("The ")
  assert ids[: len(head)] == head and ids[len(head) : len(head) + 2] == [exact.mask_id] * 2
  assert exact.decode(ids) == "The  of France"
  assert exact.decode(ids, skip_special=False) == "The <|mdm_mask|><|mdm_mask|> of France"
  filled = head + exact.behind(head, "king") + ids[len(head) + 2 :]
  assert exact.decode(filled) == "The king of France"


@pytest.mark.parametrize("name", ["prepend", "metaspace always", "sentencepiece bpe"])
def test_pieces_of_a_template_are_pieces(name):
  text = made(name)
  ids = text.chat([{"role": "user", "content": "The"}])
  assert text.piece(ids[1]) == "u"
  header = [text.start_header_id, *text.encode("user", begins=False), text.end_header_id]
  assert ids[: len(header)] == header
  said = text.decode(ids, skip_special=False)
  assert said == (
    "<|start_header_id|>user<|end_header_id|>\n\nThe<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
  )
  assert text.decode(text.reply(" The"), behind=ids) == "The"


def test_documents_begin_as_they_always_did(every):
  """What a model was trained on: the backend's own ids."""
  kind, model = every._vocabulary.kind, getattr(every._vocabulary, "_model", None)
  for text in (*TEXTS[:1], *SAYINGS[:-1]):
    raw = list(text.encode()) if kind == "bytes" else model.encode(text)
    assert every.encode(text) == (raw if kind != "huggingface" else model.encode(text, add_special_tokens=False).ids)


def test_a_folder_and_its_tokenizer_agree_behind_a_text():
  """The reference for what stands behind a text is the text in one go."""
  raw = tokenizers.Tokenizer.from_str(json.dumps(json.loads(prepend()[1])))
  text = make(prepend)
  for answer in SAYINGS:
    whole = raw.encode("is" + answer, add_special_tokens=False).ids
    assert text.encode("is") + text.encode(answer, begins=False) == whole, answer


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
