import dataclasses
import itertools
import math

import numpy as np
import pytest
from rows import Letters, assert_same, draw, talk

from lladax.data import dialogues, tokenizer, windows
from lladax.data.windows import DataConfig

CHAT = DataConfig(format="chat", length=16, batch_size=2)


def rows_of(conversations, c=CHAT, **options):
  return dialogues.Dialogues(conversations, Letters(), c, seed=0, **options)


class Foreign(Letters):
  """With a template of others, which leaves earlier replies out: [user] text <1> ... [assistant]."""

  template = "others"

  def turn(self, messages):
    asked = [id for x in messages[:-1] if x["role"] == "user" for id in self.message(x)]
    return [*asked, 5], [*self.encode(messages[-1]["content"]), self.eot_id]

  def chat(self, messages, ask=True):
    raise AssertionError("it wants a message")


def test_a_foreign_template_renders_each_prompt_whole():
  for length, wanted, cut in ((16, ["4ab15|cd10", "4ab14e15|f10"], ""), (6, ["15|cd10", "e15|f10"], "; 2 prompts cut")):
    c = dataclasses.replace(CHAT, length=length, eos_padding="none")
    source = dialogues.Dialogues([talk("ab", "cd", "e", "f")], Foreign(), c, seed=0, every_turn=True)
    rows = [source.row(i, 0, 0) for i in range(len(source))]
    parts = [(tokens[(segment > 0) & (weight == 0)], tokens[weight > 0]) for tokens, segment, weight in rows]
    assert ["|".join(map(spelled, part)) for part in parts] == wanted
    assert source.num_tokens == 7 and cut in source.about


def test_lladas_template_makes_the_ids_it_always_made():
  """Fingerprints and digests of runs that were begun before a folder's own template was read."""
  texts = [
    "def add(left, right):\n\n    return left + right  # the sum\n",
    "秦川雄帝宅，函谷壮皇居。\r\n绮殿千寻起，离宫百雉余。",
  ] * 3
  talks = [talk("ab", "cd"), talk("  a\n", "b ", "c", "d\n\ne")]
  text = tokenizer.create(tokenizer.TokenizerConfig(kind="bytes"))
  assert text.fingerprint == "e585558d5efe7680"
  assert (
    dialogues.Dialogues(talks, text, dataclasses.replace(CHAT, length=64), seed=0).digest[:16] == "161c0e67ba891502"
  )
  assert windows.stream(texts, text).sum() == 55344


def spelled(ids):
  return "".join(chr(i) if i > 9 else str(i) for i in ids)


@pytest.mark.parametrize(("eos_padding", "end"), [("none", len("24ab15cd10")), ("batch", 12), ("row", 16)])
def test_a_reply_is_scored_and_its_prompt_is_not(eos_padding, end):
  source = rows_of([talk("ab", "cd")], dataclasses.replace(CHAT, eos_padding=eos_padding))
  tokens_L, segment_L, weight_L = source.row(0, 0, 12)
  assert spelled(tokens_L) == "24ab15cd10000000"
  np.testing.assert_array_equal(segment_L, np.arange(16) < end)
  np.testing.assert_array_equal(weight_L > 0, (np.arange(16) >= 6) & (np.arange(16) < end))
  np.testing.assert_allclose(weight_L.sum(), 1.0)
  assert source.shape(0, 0) == (1, 10)


def test_a_reply_is_filled_up_to_the_longest_row_of_the_batch():
  c = dataclasses.replace(CHAT, batch_size=3)
  source = rows_of([talk("a", "b"), talk("aa", "b"), talk("aaaa", "bb")], c)
  for batch in draw([source], c):
    described = {name: (x.dtype.name, x.shape) for name, x in batch.items()}
    assert described == {name: ("int32" if name != "weight" else "float32", (3, 16)) for name in batch} | {
      "index": ("int32", (3,))
    }
    ends = [len("24a15b10"), len("24aa15b10"), len("24aaaa15bb10")]
    drawn = [ends[{"a1": 0, "aa": 1}.get(spelled(row[2:4]), 2) if row[4] != ord("a") else 2] for row in batch["tokens"]]
    assert (batch["segment"].sum(axis=1) == max(drawn)).all()
    np.testing.assert_allclose(batch["weight"].sum(axis=1), 1 / 3, rtol=1e-6)
  whole, parts = draw([source], c), [draw([source], c, rows=np.array(rows)) for rows in ([0, 2], [1])]
  for a, b, d in zip(whole, *parts, strict=True):
    assert_same({name: x[[0, 2]] for name, x in a.items()}, b)
    assert_same({name: x[[1]] for name, x in a.items()}, d)


def test_one_reply_of_a_dialogue_is_drawn_at_random():
  source = rows_of([talk("a", "b", "c", "d", "e", "f")], dataclasses.replace(CHAT, length=32, eos_padding="none"))
  seen = [spelled(source.row(0, epoch, 0)[0]).rstrip("0") for epoch in range(300)]
  possible = ["24a15b1", "24a15b14c15d1", "24a15b14c15d14e15f1"]
  for text in possible:
    assert 70 < seen.count(text) < 130, text
  assert set(seen) == set(possible)
  assert seen == [spelled(source.row(0, epoch, 0)[0]).rstrip("0") for epoch in range(300)]
  every = rows_of([talk("a", "b", "c", "d")], dataclasses.replace(CHAT, eos_padding="none"), every_turn=True)
  assert [spelled(every.row(i, 0, 0)[0]).rstrip("0") for i in range(len(every))] == possible[:2]
  assert (every.num_bytes, every.num_tokens) == (4, 6)


def test_a_reply_of_weight_0_is_in_the_prompt_and_never_drawn():
  conversation = talk("a", "b", "c", "d", "e", "f")
  conversation[1]["weight"] = conversation[5]["weight"] = 0
  source = rows_of([conversation], dataclasses.replace(CHAT, length=32, eos_padding="none"))
  rows = [source.row(0, epoch, 0) for epoch in range(50)]
  assert {spelled(tokens_L).rstrip("0") for tokens_L, *_ in rows} == {"24a15b14c15d1"}
  assert {spelled(tokens_L[weight_L > 0]) for tokens_L, _, weight_L in rows} == {"d10"}


def test_a_long_prompt_loses_its_left_and_a_long_reply_is_left_out():
  source = rows_of([talk("abcdefghijkl", "mn"), talk("a", "b" * 14), talk("a", "b" * 13)])
  assert len(source) == 2
  tokens_L, _, weight_L = source.row(0, 0, 0)
  assert spelled(tokens_L) == "cdefghijkl15mn10"[-16:]
  assert (weight_L > 0).sum() == 4
  assert spelled(source.row(1, 0, 0)[0]) == "5" + 13 * "b" + "10"
  assert "2 prompts cut at the left to data.length=16; 1 replies left out" in source.about
  with pytest.raises(ValueError, match="data.length=16: no reply of 1 conversations fits"):
    rows_of([talk("a", "b" * 14)])


ALL = dataclasses.replace(CHAT, length=32, eos_padding="block", replies="all", align=4)


def test_all_replies_are_learnt_at_once_and_none_sees_its_answer():
  """The dialogue goes on without a gap; what is noised of a block behind a reply is EOS."""
  source = rows_of([talk("a", "b", "cde", "fg", "h", "ij")], ALL)
  assert source.shape(0, 0) == (1.0, len("24a15b14cde15fg14h15ij10"))
  tokens_L, segment_L, weight_L, clean_L = source.row(0, 0, 0)
  assert spelled(clean_L) == "24a15b14cde15fg14h15ij10" + "0" * 8
  assert spelled(tokens_L) == "24a15b10cde15fg10000ij10" + "0" * 8  # its end fills a block of its own
  learnt = [".xxx" if i == 1 else ".xxx" if i == 3 else "xxxx" if i in (4, 5) else "...." for i in range(8)]
  np.testing.assert_array_equal(weight_L > 0, [x == "x" for x in "".join(learnt)])
  np.testing.assert_array_equal(segment_L, np.arange(32) < 24)
  for part in (slice(4, 8), slice(13, 20), slice(20, 24)):
    np.testing.assert_allclose(weight_L[part].sum(), 1 / 3)


@pytest.mark.parametrize(("length", "align"), [(32, 1), (32, 4), (32, 8), (16, 1), (16, 4), (12, 2), (64, 64)])
def test_all_replies_are_what_one_reply_at_a_time_is(length, align):
  """Each reply once, given what it is given alone; and each counts as it does when one of its dialogue is drawn."""
  rng = np.random.default_rng(length + align)
  talks = [
    talk(*("".join(rng.choice(list("abcdefgh"), int(rng.integers(1, 6)))) for _ in range(2 * int(rng.integers(1, 5)))))
    for _ in range(30)
  ]
  c = dataclasses.replace(ALL, length=length, align=align)
  for packing in (False, True):
    together = rows_of(talks, dataclasses.replace(c, packing=packing))
    one = dataclasses.replace(c, replies="one", packing=False)
    apart = rows_of(talks, one, every_turn=True)
    found = [x for row in range(len(together)) for x in learnt_in(*together.row(row, 0, 0), align)]
    wanted = []
    of_its = np.bincount(apart._of_R)
    for turn in range(len(apart)):
      tokens_L, segment_L, weight_L = apart.row(turn, 0, 0)
      ((given, reply, share),) = learnt_in(tokens_L, segment_L, weight_L, tokens_L, align)
      wanted.append((given, reply, share / of_its[apart._of_R[turn]]))
    key = lambda x: x[:2]  # noqa: E731
    assert sorted(map(key, found)) == sorted(map(key, wanted))
    for (*_, a), (*_, b) in zip(sorted(found), sorted(wanted), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-12)
    assert len(together) < len(apart) or length == 12 or align == length
    total = sum(together.shape(row, 0)[0] for row in range(len(together)))
    np.testing.assert_allclose(total, len(rows_of(talks, one)))  # each dialogue counts once
    assert all(together.shape(row, 0)[1] <= length for row in range(len(together)))


def learnt_in(tokens_L, segment_L, weight_L, clean_L, align):
  """(what a reply is given, the reply with what fills its last block, what it counts) of all replies of a row."""
  for number in range(1, segment_L.max() + 1):
    (at_N,) = np.nonzero(segment_L == number)
    assert at_N[0] % align == 0 and (np.diff(at_N) == 1).all()
    place, stop = at_N[0], at_N[-1] + 1
    while place < stop:
      if not weight_L[place]:
        place += 1
        continue
      end = place
      while end < stop and weight_L[end] and not (end > place and tokens_L[end] and not tokens_L[end - 1]):
        end += 1
      block = place // align * align  # what the blocks before hold is clean, what its own holds is given
      assert (tokens_L[block:place] == clean_L[block:place]).all()
      for later in range(block + align, end, align):  # of itself, later blocks see what it is
        assert (tokens_L[place:later] == clean_L[place:later]).all()
      yield spelled(clean_L[at_N[0] : place]), spelled(tokens_L[place:end]), weight_L[place:end].sum()
      place = end


def test_what_a_template_leaves_out_of_earlier_replies_has_a_copy_of_its_own():
  c = dataclasses.replace(ALL, length=64)
  source = dialogues.Dialogues([talk("ab", "cd", "e", "f")], Foreign(), c, seed=0)
  assert [spelled(source.row(i, 0, 0)[3]).rstrip("0") for i in range(2)] == ["4ab15cd1", "4ab14e15f1"]
  assert [source.shape(i, 0)[0] for i in range(2)] == [0.5, 0.5]


def test_a_batch_of_dialogues_holds_what_is_seen_and_what_is_learnt():
  c = dataclasses.replace(ALL, length=64, batch_size=3, packing=True)
  rng = np.random.default_rng(1)
  source = rows_of([talk(*("x" * int(n) for n in rng.integers(1, 9, 6))) for _ in range(40)], c)
  for batch in draw([source], c):
    assert batch["clean"].dtype == np.int32 and batch["clean"].shape == (3, 64)
    assert (batch["clean"] != batch["tokens"]).any() and (batch["tokens"][batch["clean"] != batch["tokens"]] == 0).all()
    np.testing.assert_allclose(batch["weight"].sum(), 1.0, rtol=1e-5)
  whole, parts = draw([source], c), [draw([source], c, rows=np.array(rows)) for rows in ([0, 2], [1])]
  for a, b, d in zip(whole, *parts, strict=True):
    assert_same({name: x[[0, 2]] for name, x in a.items()}, b)
    assert_same({name: x[[1]] for name, x in a.items()}, d)


@pytest.mark.parametrize(("changes", "said"), [
  ({"format": "text"}, "data.replies='all' is for data.format=chat"),
  ({"eos_padding": "none"}, "data.replies='all': behind a reply its dialogue goes on: data.eos_padding='none'"),
  ({"replies": "some"}, "data.replies='some': use one, all"),
  ({"replies": "one", "eos_padding": "row", "packing": True}, "data.packing=True leaves no room for EOS"),
])  # fmt: skip
def test_what_does_not_go_with_all_replies(changes, said):
  with pytest.raises(ValueError, match=f"^{said}"):
    dataclasses.replace(ALL, **changes)


def test_packing_is_a_partition_into_few_rows():
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 33, 500).tolist()
  rows = dialogues.pack(lengths, 64)
  assert sorted(itertools.chain.from_iterable(rows)) == list(range(500))
  sizes = [sum(lengths[i] for i in row) for row in rows]
  assert max(sizes) <= 64
  assert len(rows) <= 1.02 * math.ceil(sum(lengths) / 64)


def test_a_packed_batch_counts_every_reply_the_same():
  rng = np.random.default_rng(0)
  conversations = [talk("q" * int(rng.integers(1, 9)), "r" * int(rng.integers(1, 9))) for _ in range(50)]
  c = DataConfig(format="chat", length=64, batch_size=3, eos_padding="none", packing=True)
  source = rows_of(conversations, c)
  assert len(source) < 50 / 2
  for batch in draw([source], c):
    replies = [
      batch["weight"][b][batch["segment"][b] == s].sum()
      for b in range(3)
      for s in range(1, batch["segment"][b].max() + 1)
    ]
    np.testing.assert_allclose(replies, 1 / len(replies), rtol=1e-5)
