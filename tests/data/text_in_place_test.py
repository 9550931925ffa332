"""Text stands where it stands: prompt and answer spell the canvas, whatever a vocabulary does to spaces and bytes."""

import itertools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import EXACT, LOSSY, SAYINGS, TEXTS, made, make, prepend, wordpiece


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
