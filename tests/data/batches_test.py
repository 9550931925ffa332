import dataclasses
import itertools
import math

import numpy as np
import pytest

from lladax.data import batches, dialogues, sources, tokenizer, windows
from lladax.data.windows import DataConfig

EOS = 0
SMALL = DataConfig(length=4, batch_size=3)


def numbered(total):
  """A stream in which every token is its own position."""
  return np.arange(1, total + 1, dtype=np.int32)


def draw(sources, c, *, start=0, stop=8, seed=0, rows=None, steps=1000):
  return list(batches.of_steps(sources, c, eos_id=EOS, seed=seed, steps=steps, start=start, stop=stop, rows_R=rows))


def made(stream_T, c=SMALL, *, seed=0, **options):
  return draw([windows.Windows(stream_T, c, eos_id=EOS, seed=seed)], c, seed=seed, **options)


def epoch(stream_T, number, c=SMALL):
  """Rows of one epoch, in order."""
  count = -(-len(stream_T) // c.length)
  found = made(stream_T, c, stop=-(-(number + 1) * count // c.batch_size))
  rows = np.concatenate([batch["tokens"] for batch in found])
  return rows[number * count : (number + 1) * count]


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], strict=True)


@pytest.mark.parametrize("random_lengths", [0.0, 0.5, 1.0])
def test_columns(random_lengths):
  c = DataConfig(length=8, batch_size=4, random_lengths=random_lengths)
  for step, batch in enumerate(made(numbered(100), c)):
    described = {name: (x.dtype.name, x.shape) for name, x in batch.items()}
    row = (4, 8)
    assert described == {
      "tokens": ("int32", row), "weight": ("float32", row), "segment": ("int32", row), "index": ("int32", (4,)),
    }  # fmt: skip
    assert batch["weight"].sum() == pytest.approx(1.0)
    np.testing.assert_allclose(batch["weight"].sum(axis=1), 1 / 4, rtol=1e-6)  # rows count the same
    np.testing.assert_array_equal(batch["weight"] > 0, batch["segment"] > 0)
    np.testing.assert_array_equal(batch["index"], step * 4 + np.arange(4))


def test_random_lengths_cut_the_right_end():
  whole = DataConfig(length=8, batch_size=64)
  cut = dataclasses.replace(whole, random_lengths=0.5)
  for a, b in zip(made(numbered(999), whole), made(numbered(999), cut), strict=True):
    kept = b["segment"] > 0
    assert (np.diff(kept.astype(int), axis=1) <= 0).all() and kept[:, 0].all()
    np.testing.assert_array_equal(b["tokens"], np.where(kept, a["tokens"], EOS))
    assert 0.2 < (kept.sum(axis=1) < 8).mean() < 0.7  # 7/16 expected


def test_segments_number_the_documents_of_a_row():
  stream_T = np.array([5, 6, EOS, 7, EOS, 8, 9, 9], np.int32)
  starts = np.array([0, 6])
  _, together_RL = windows.at(starts, stream_T, DataConfig(length=8), EOS)
  assert (together_RL == 1).all()
  tokens_RL, apart_RL = windows.at(starts, stream_T, DataConfig(length=8, segments=True), EOS)
  np.testing.assert_array_equal(tokens_RL, [[5, 6, EOS, 7, EOS, 8, 9, 9], [9, 9, 5, 6, EOS, 7, EOS, 8]])
  np.testing.assert_array_equal(apart_RL, [[1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 2, 2, 3]])


def test_a_document_ends_with_eos():
  class Letters:
    eos_id = EOS

    def encode(self, text):
      return [ord(letter) for letter in text]

  np.testing.assert_array_equal(windows.stream(["ab", "c"], Letters()), [97, 98, EOS, 99, EOS])


@pytest.mark.parametrize("total", [40, 37])
def test_an_epoch_is_the_whole_stream(total):
  for number in range(3):
    seen = np.bincount(epoch(numbered(total), number).ravel(), minlength=total + 1)[1:]
    assert seen.min() == 1 and seen.max() <= 2
    assert (seen == 2).sum() == -total % SMALL.length  # the last window goes round


def test_windows_are_contiguous_and_circular():
  rows = epoch(numbered(37), 1) - 1
  np.testing.assert_array_equal(rows, (rows[:, :1] + np.arange(4)) % 37)


def test_every_epoch_has_another_order_and_another_cut():
  epochs = [epoch(numbered(400), number) for number in range(3)]
  starts = [rows[:, 0] for rows in epochs]
  for a, b in itertools.combinations(starts, 2):
    assert (a // 4 != b // 4).mean() > 0.9
  assert len({int(start[0]) % 4 for start in starts}) > 1
  other_seed = np.concatenate([batch["tokens"] for batch in made(numbered(400), seed=1)])
  assert (other_seed != epochs[0][: len(other_seed)]).mean() > 0.9


def test_the_batch_of_a_step_does_not_depend_on_the_start():
  c = dataclasses.replace(SMALL, random_lengths=0.5, segments=True)
  unbroken = made(numbered(37), c)
  for start in (1, 5, 7):
    for a, b in zip(unbroken[start:], made(numbered(37), c, start=start), strict=True):
      assert_same(a, b)


def test_the_rows_of_the_processes_are_the_batch():
  c = DataConfig(length=4, batch_size=6, random_lengths=0.5)
  whole = made(numbered(37), c)
  parts = [np.array([0, 3, 4]), np.array([1, 2, 5])]
  for rows in parts:
    for a, b in zip(whole, made(numbered(37), c, rows=rows), strict=True):
      assert_same({name: x[rows] for name, x in a.items()}, b)


def test_a_corpus_shorter_than_a_row():
  with pytest.raises(ValueError, match="data.length=4 is longer than the corpus: .* has 3 tokens"):
    made(numbered(3))
  assert made(numbered(4))  # a stream of one row is enough


@pytest.mark.parametrize("total", [8, 9, 3])
def test_held_out_rows_are_the_stream_once_and_in_order(total):
  tokens_RL, segment_RL = windows.in_order(numbered(total), SMALL, EOS)
  np.testing.assert_array_equal(tokens_RL[segment_RL > 0], numbered(total))
  assert tokens_RL.shape == segment_RL.shape == (-(-total // 4), 4)
  assert (tokens_RL[segment_RL == 0] == EOS).all()


@pytest.mark.parametrize("field", ["length", "batch_size", "random_lengths"])
def test_bad_fields_are_named(field):
  with pytest.raises(ValueError, match=f"data.{field}=-1: must"):
    DataConfig(**{field: -1})


class Letters:
  """A tokenizer of characters, with LLaDA's template in short: [role] text <EoT>."""

  eos_id, eot_id, bos_id, template = EOS, 1, 2, None
  role = {"system": 3, "user": 4, "assistant": 5}

  def encode(self, text):
    return [ord(letter) for letter in text]

  def reply(self, text):
    return [*self.encode(text), self.eot_id]

  def message(self, message):
    return [self.role[message["role"]], *self.reply(message["content"])]

  def chat(self, messages, ask=True):
    return [self.bos_id, *itertools.chain.from_iterable(map(self.message, messages)), *([5] if ask else [])]


def talk(*texts):
  return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


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
    c = dataclasses.replace(CHAT, length=length)
    source = dialogues.Dialogues([talk("ab", "cd", "e", "f")], Foreign(), c, seed=0, every_turn=True)
    assert ["|".join(map(spelled, source.ids(turn))) for (turn,) in source._turns] == wanted
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


def test_a_file_that_was_edited_is_read_anew_and_one_that_is_gone_is_kept(tmp_path):
  path, test = tmp_path / "a.txt", tmp_path / "test.txt"
  test.write_text("never")
  c = DataConfig(corpus=f"files:{path}", length=4, held_out=0.0, exclude=f"{test}")
  text = Letters()
  test.write_text("one two three four five six seven eight")
  for content in ("first", "other"):  # as long as before
    path.write_text(content)
    assert sources.texts(c) == ([content], [])
    np.testing.assert_array_equal(sources.training(c, text, 0)[0].stream_T, [*map(ord, content), EOS])
  path.unlink()
  assert sources.texts(c) == (["other"], [])
  assert len(sources.training(c, text, 0)[0].stream_T) == 6
  path.write_text("x one two three four five six seven eight")
  with pytest.raises(ValueError, match="every document was left out"):
    sources.texts(c)
  test.write_text("one two three four five six seven NINE")
  assert len(sources.texts(c)[0]) == 1
  test.unlink()
  assert len(sources.texts(c)[0]) == 1


def test_what_was_read_and_left_out_is_said(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "abcdefg"}\noh\n{"text": "one two three four five six seven eight"}\n')
  (tmp_path / "b.txt").write_text("plain")
  (tmp_path / "test.json").write_text('["one two three four five six seven eight", "A"]')
  c = DataConfig(corpus=f"files:{tmp_path}/a.jsonl,{tmp_path}/b.txt", length=4, held_out=0.0, bad_lines="skip")
  about = sources.training(dataclasses.replace(c, exclude=f"{tmp_path}/test.json"), Letters(), 0)[0].about
  assert about.startswith("2 documents (12 bytes, 14 tokens); 1 bad lines left out; 1 left out: they hold a text of")
  assert "; files: 1 .jsonl, 1 .txt; looked for: 1 texts; 1 shorter than 8 words or 31 characters are not used" in about


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"format": "poem"}, "data.format='poem': use text, chat"),
    ({"corpus": "records:x", "exclude": "y.json"}, "data.exclude='y.json': records hold what was prepared"),
    ({"bad_lines": "hide"}, "data.bad_lines='hide': use stop, skip"),
    ({"format": "chat", "segments": True}, "data.segments=True is for data.format=text"),
    ({"format": "chat", "random_lengths": 0.1}, "data.random_lengths=0.1 is for data.format=text"),
    ({"format": "chat", "packing": True}, "data.eos_padding='batch' must be none"),
    ({"format": "chat", "corpus": "records:x"}, "data.corpus='records:x' holds text"),
    ({"packing": True}, "data.packing=True is for data.format=chat"),
    ({"prompt_field": "question"}, "data.prompt_field='question', response_field='': name both"),
    ({"stages": ((-1, (1.0,)),)}, "data.stages is for a mixture"),
    ({"mixture": (("unicode", 1.0),), "stages": ((-1, (1.0, 1.0)),)}, "data.stages: the weights .* must be 1"),
    ({"mixture": (("unicode", 1.0), ("stdlib", -1.0))}, "data.mixture: the weights .* none negative"),
  ],
)
def test_fields_that_do_not_go_together(fields, message):
  with pytest.raises(ValueError, match=message):
    DataConfig(**fields)


MIXED = DataConfig(length=4, batch_size=10, mixture=(("a", 0.5), ("b", 0.3), ("c", 0.2)))


def mixed(c=MIXED, **options):
  """Batches of a mixture of streams whose tokens tell the source and the place."""
  streams = [numbered(400) + 1000 * i for i in range(3)]
  sources = [windows.Windows(stream_T, c, eos_id=EOS, seed=0) for stream_T in streams]
  return draw(sources, c, **options)


def sources_of(found):
  return np.concatenate([batch["tokens"][:, 0] for batch in found]) // 1000


def test_a_mixture_is_exact_and_in_no_pattern():
  found = sources_of(mixed(stop=300))
  np.testing.assert_array_equal(np.bincount(found[:1000]), [500, 300, 200])
  np.testing.assert_array_equal(np.bincount(found[1000:2000]), [500, 300, 200])
  assert (found[:1000] != found[1000:2000]).mean() > 0.5
  correlation = [np.corrcoef(found[:-lag] == 0, found[lag:] == 0)[0, 1] for lag in range(1, 50)]
  assert np.abs(correlation).max() < 0.1


def test_every_source_of_a_mixture_goes_through_its_epochs():
  rows = np.concatenate([batch["tokens"] for batch in mixed(stop=100)])
  for source, count in enumerate([500, 300, 200]):
    taken = rows[rows[:, 0] // 1000 == source] - 1000 * source
    assert len(taken) == count
    for first in range(0, count, 100):  # 400 tokens in rows of 4
      np.testing.assert_array_equal(np.sort(taken[first : first + 100].ravel()), numbered(400))


def test_stages_change_the_weights_and_lose_no_row():
  c = dataclasses.replace(MIXED, stages=((30, (1.0, 0.0, 1.0)), (0.25, (0.0, 1.0, 0.0)), (-1, (1.0, 2.0, 1.0))))
  found = mixed(c, stop=200, steps=200)
  source_R = sources_of(found)
  assert abs((source_R[:300] == 0).sum() - 150) < 40 and (source_R[:300] == 1).sum() == 0
  assert (source_R[300:800] == 1).all()
  np.testing.assert_array_equal(np.bincount(source_R[800:1800]), [250, 500, 250])
  rows = np.concatenate([batch["tokens"] for batch in found])
  first = rows[rows[:, 0] // 1000 == 0]
  np.testing.assert_array_equal(np.sort(first[:100].ravel()), numbered(400))  # an epoch, over the stages
  for a, b in zip(found[150:], mixed(c, start=150, stop=200, steps=200), strict=True):
    assert_same(a, b)


def test_a_weight_too_small_to_be_kept_is_refused():
  with pytest.raises(ValueError, match="data.mixture: the weight 0.0001 of 'b' is less than 1 in 1000 rows"):
    batches.Mixture(DataConfig(mixture=(("a", 1.0), ("b", 0.0001))), seed=0, steps=10)


def test_the_millionth_step_reads_its_own_rows_alone():
  class Counted(windows.Windows):
    read = 0

    def row(self, *args):
      Counted.read += 1
      return super().row(*args)

  source = Counted(numbered(40_000), SMALL, eos_id=EOS, seed=0)
  batch = draw([source], SMALL, start=1_000_000, stop=1_000_001, steps=2_000_000)[0]
  assert Counted.read == SMALL.batch_size
  np.testing.assert_array_equal(batch["index"], 3_000_000 + np.arange(3))
