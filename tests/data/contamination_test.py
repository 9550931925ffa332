import random

import pytest

from lladax.data import contamination

WORDS = [f"w{i}" for i in range(100)]
SENTENCE = "北国风光千里冰封万里雪飘望长城内外惟余莽莽大河上下顿失滔滔山舞银蛇原驰蜡象欲与天公试比高须晴日看红装素裹"


def test_of(*texts, named=False):
  return contamination.Test(((text, "test") for text in texts), named)


def holds(test, document):
  """Whether a document holds a text of a test, alone, and among others, its halves."""
  found = test.held_by(
    ["begin", document, "", document[: len(document) // 2], document[len(document) // 2 :], document]
  )
  assert found[1] == found[-1] and test.held_by([document]) == [found[1]] and found[0] is None
  return found[1] is not None


test_of.__test__ = False


@pytest.mark.parametrize(("n", "held"), [(13, True), (12, False)])
def test_thirteen_words_in_a_row_are_enough(n, held):
  test = test_of(" ".join(WORDS[:40]))
  for begin in (0, 20, 40 - n):
    document = ["other", *WORDS[begin : begin + n], "other"] * 2
    assert holds(test, " ".join(document)) == held


@pytest.mark.parametrize(("n", "held"), [(50, True), (49, False)])
def test_fifty_characters_are_enough_where_there_are_no_spaces(n, held):
  test = test_of(SENTENCE)
  assert holds(test, f"之{SENTENCE[1 : n + 1]}之") == held
  assert holds(test, "，".join(SENTENCE[1 : n + 1])) == held  # punctuation does not matter


@pytest.mark.parametrize(
  ("short", "used"),
  [(WORDS[:8], True), (WORDS[:7], False), ([SENTENCE[:31]], True), ([SENTENCE[:30]], False)],
)
def test_a_short_text_counts_as_a_whole_if_it_says_enough(short, used):
  text = " ".join(short)
  test = test_of(text)
  assert (test.used, test.too_short) == (used, not used)
  assert holds(test, f"x {text} x") == used
  assert not holds(test, f"x {text[:-1]}")  # a part of it is not enough
  assert holds(test_of(text, named=True), f"x {text} x")


@pytest.mark.parametrize("text", ["A", "七言", "It's"])
def test_a_named_text_is_found_between_words_only(text):
  test = test_of(text, named=True)
  assert holds(test, f'He said "{text.lower()}".') and not holds(test, f"x{text[:-1]}x") and not holds(test, "")
  assert not holds(test, "an hit 七 its-not itself 言七".replace("its-", ""))


def test_case_punctuation_and_how_a_character_is_written_do_not_matter():
  text = "Élan: the ＡＢＣ of (don't) walking—home, at 3 o'clock; in straße nine and हिन्दी"
  test = test_of(text)
  same = "ÉLAN the abc of don\u2019t WALKING home at\n3 o\u2019clock in STRASSE nine “and” हिन्दी"
  assert test.used and holds(test, same)
  assert not holds(test, same.replace("nine", "ten"))


def test_parts_are_cut_between_words():
  test, before = test_of("हिन्दी", named=True), contamination._PART - 8
  assert all(holds(test, f"{'z' * before}{' ' * spaces}हिन्दी z") for spaces in range(1, 12))


def test_a_mark_belongs_to_its_word():
  assert not holds(test_of("हिन्दी में", named=True), "हन्द म")


def tokens(text):
  return tuple("".join(f" {x} " if x in "春夏秋冬" else " " if x == "，" else x for x in text).split())


def runs(text):
  """What of a text is looked for, by the definition: windows, or the whole."""
  found = tokens(text)
  weights = [13 if x in "春夏秋冬" else 50 for x in found]
  windows = set()
  for i in range(len(found)):
    if n := next((n for n in range(len(found) - i + 1) if sum(weights[i : i + n]) >= 650), 0):
      windows.add(found[i : i + n])
  return windows or {found}


@pytest.mark.parametrize("alphabet", ["abc ", "春夏秋冬", "ab春夏 ，"])
def test_nothing_is_missed_and_nothing_is_made_up(alphabet):
  """Against the definition, in long documents too, which are looked at in parts."""
  rng = random.Random(0)
  texts = ["".join(rng.choices(alphabet, k=rng.choice([5, 80]))) for _ in range(20)]
  texts = [text for text in texts if tokens(text)]
  documents = ["".join(rng.choices(alphabet, k=rng.randrange(200))) for _ in range(100)]
  documents += [f"z{text[3:]} z" for text in texts]  # also long texts, but for their beginning
  test, looked_for = test_of(*texts, named=True), set().union(*map(runs, texts))
  answers = []
  for document in documents:
    found = tokens(document)
    parts = {found[i:j] for i in range(len(found)) for j in range(i + 1, len(found) + 1)}
    answers.append(not parts.isdisjoint(looked_for))
    assert holds(test, document) == answers[-1], document
  assert 10 < sum(answers) < len(answers) - 10
  for document, held in zip(documents[:3], answers, strict=False):
    assert holds(test, f"{'z ' * 40_000}{document} {'z ' * 40_000}") == held


@pytest.mark.parametrize(
  ("name", "text", "error", "message"),
  [
    ("a.json", "[{}, 3]", ValueError, "^data.exclude='.*a.json' holds no text to look for$"),
    ("a.json", '["A", "B"]', ValueError, "holds no text to look for: 2 are shorter than 8 words .* FILE:FIELD"),
    ("a.json", "[", ValueError, "^data.exclude=.*a.json is not JSON"),
    ("b.json", "[]", FileNotFoundError, "^data.exclude=.*a.json: no file matches"),
  ],
)
def test_an_excluded_test_that_cannot_be_read(tmp_path, name, text, error, message):
  (tmp_path / name).write_text(text)
  with pytest.raises(error, match=message):
    contamination.excluded(f"{tmp_path}/a.json")


def test_a_field_that_no_record_of_a_test_has(tmp_path):
  test = tmp_path / "a.json"
  test.write_text('[{"first": "x"}]')
  with pytest.raises(ValueError, match=r"exclude='.*:frist': no record has the field 'frist'; there are \['first'\]"):
    contamination.excluded(f"{test}:frist")


def test_a_file_that_was_edited_is_read_anew(tmp_path):
  test = tmp_path / "a.json"
  test.write_text('[{"first": "x"}]')
  assert contamination.excluded(f"{test}:first").held_by(["y"]) == [None]
  test.write_text('[{"first": "y"}]')  # as long as before
  assert contamination.excluded(f"{test}:first").held_by(["y"]) == ["a.json"]
  test.unlink()
  assert contamination.excluded(f"{test}:first").held_by(["y"]) == ["a.json"]  # a run does not need it again
