import dataclasses

import pytest
from vocabularies import SAMPLES, trained

from lladax.data import tokenizer, vocabularies


def test_trained_vocab_size_counts_the_special_tokens():
  assert trained(384).vocab_size == trained(384).rows == 384
  assert trained(384, pad="<pad>").vocab_size == 384


def test_training_is_deterministic_and_fingerprinted():
  first = trained()
  assert first.fingerprint == trained().fingerprint
  different = [
    trained(399),
    trained(pad="<pad>"),
    trained(eos="</s>"),
    tokenizer.create(tokenizer.TokenizerConfig(vocab_size=400), SAMPLES[3:]),
    tokenizer.create(tokenizer.TokenizerConfig(kind="bytes")),
  ]
  assert len({first.fingerprint, *(other.fingerprint for other in different)}) == 6


def test_training_compresses_and_is_quiet(capfd):
  this = trained(640)
  assert sum(map(len, map(this.encode, SAMPLES))) < 0.5 * sum(len(text.encode()) for text in SAMPLES)
  assert capfd.readouterr() == ("", "")


def test_training_on_more_characters_than_pieces():
  texts = ["".join(map(chr, range(0x4E00, 0x4E00 + 3000))) + "的" * 9, *SAMPLES]
  this = tokenizer.create(tokenizer.TokenizerConfig(vocab_size=400), texts)
  assert this.decode(this.encode(texts[0])) == texts[0]
  assert len(this.encode("的")) == 1


def test_training_reads_a_long_line():
  this = tokenizer.create(tokenizer.TokenizerConfig(vocab_size=265), ["的" * 5000])
  assert len(this.encode("的")) == 1


def test_training_on_a_part_reaches_the_end_of_the_corpus(monkeypatch):
  monkeypatch.setattr(vocabularies, "_TRAINING_BYTES", 100)
  texts = ["的\n"] * 500 + ["居\n"] * 500
  this = tokenizer.create(tokenizer.TokenizerConfig(vocab_size=265), texts)
  assert len(this.encode("的居")) == 2


@pytest.mark.parametrize("texts", [["aaa bbb"] * 9, SAMPLES[:1], SAMPLES[1:2]])
def test_too_small_a_corpus_says_which_size_is_possible(texts):
  config = tokenizer.TokenizerConfig(vocab_size=4096)
  with pytest.raises(ValueError, match="tokenizer.vocab_size=4096: this corpus allows at most") as error:
    tokenizer.create(config, texts)
  possible = int(str(error.value).split()[-1])
  assert tokenizer.create(dataclasses.replace(config, vocab_size=possible), texts).rows >= possible


@pytest.mark.parametrize("texts", [None, [], ["\n\n"]])
def test_nothing_to_train_on(texts):
  with pytest.raises(ValueError, match="tokenizer.path='': no text"):
    tokenizer.create(tokenizer.TokenizerConfig(), texts)


def test_too_small_a_vocabulary_says_how_many_it_needs():
  with pytest.raises(ValueError, match="tokenizer.vocab_size=200: needs 264"):
    trained(200)
  assert trained(264).decode(trained(264).encode("a\nb")) == "a\nb"
