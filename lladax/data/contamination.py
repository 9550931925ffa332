"""Which documents hold a text of a test, and are not to be learnt.

As GPT-3's data were cleaned (arXiv 2005.14165, appendix C): case and punctuation are ignored, and a document that
shares 13 words in a row with a text of the test holds it. Where no spaces part the words 50 characters are as much (the
measure of GPT-4, arXiv 2303.08774, appendix C). A shorter text is looked for as a whole, from 8 words (GPT-3's least N)
or 31 characters on; what is shorter still, such as the answer "A", is looked for only in a field that the user names.
"""

import functools
import itertools
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lladax.data import reading
from lladax.mistake import Mistake

_FIELD = "data.exclude="
_WORD, _CHARACTER = 50, 13  # weights: 13 words are as much as 50 characters
_WINDOW, _LEAST = 13 * _WORD, 8 * _WORD
# Thai and Lao, Burmese, Khmer, kana, Han: scripts without spaces.
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x30FF), (0x31F0, 0x31FF),
             (0x3400, 0x9FFF), (0x20000, 0x3FFFF))  # fmt: skip
_IN_WORD, _ALONE = 1, 2  # a character of a word; one that is a token of its own; 0: parts tokens
_PART = 2**16  # characters that are looked at together: as many as a processor keeps at hand
_ODD = 0x9E3779B97F4A7C15  # who multiplies by an odd number modulo 2^64 can divide by it
_GLANCE = 24  # bits of a hash that a first, quick look compares


class Test:
  """The texts of a test: every window of the long ones, and the short ones as a whole, as hashes of their tokens.

  Hashes have 64 bits, and are the same on every machine: that one of 10^12 windows is taken for one of a million others
  has a probability of 5%.

  Attributes: `used`, how many texts are looked for; `too_short`, how many say too little to be.
  """

  def __init__(self, texts: Iterable[tuple[str, str]], named: bool = False):
    """(text, name of its test) each; `named`: all are looked for, however short."""
    found = [item for item in texts if item[0].strip()]
    tokens = _Tokens([text for text, _ in found])
    edges, weights = tokens.edges, np.diff(tokens.weights[tokens.edges])
    used = weights >= (1 if named else _LEAST)
    self.used, self.too_short = int(used.sum()), int((~used).sum())
    begins, ends = tokens.windows(_WINDOW)
    wholes = np.flatnonzero(used & (weights < _WINDOW))
    begins, ends = np.append(begins, edges[wholes]), np.append(ends, edges[wholes + 1])
    names = [found[i][1] for i in tokens.text_T[begins].tolist()]
    hashes = tokens.runs(begins, ends)
    self._names = dict(zip(hashes.tolist(), names, strict=True))  # hash of a run -> its test
    enough = tokens.weights[ends] - tokens.weights[begins] >= _LEAST
    self._lengths = sorted(set((ends - begins)[~enough].tolist()))  # of the runs that are short
    heads = tokens.runs(begins[enough], tokens.ends(begins[enough], _LEAST))
    self._begun: dict[int, int] = {}  # hash of how a longer run begins -> bit n: there is one of n tokens
    for head, n in zip(heads.tolist(), (ends - begins)[enough].tolist(), strict=True):
      self._begun[head] = self._begun.get(head, 0) | 1 << n
    self._glance = np.zeros(2**_GLANCE, bool)  # the first bits of these beginnings, and of the short runs
    self._glance[np.append(heads, hashes[~enough]) >> (64 - _GLANCE)] = True

  @property
  def about(self) -> str:
    """One line for the console."""
    short = "; {:,} shorter than 8 words or 31 characters are not used: name their field (FILE:FIELD) to use them"
    return f"{self.used:,} texts" + short.format(self.too_short) * bool(self.too_short)

  def held_by(self, documents: Sequence[str]) -> list[str | None]:
    """For each document the name of a test of which it holds a text; None where it holds none."""
    tokens, found = _Tokens(documents), list[str | None]([None] * len(documents))
    if self._begun:
      begins, ends = tokens.windows(_LEAST)
      for i, head in self._glimpsed(tokens, begins, ends):
        lengths, room = self._begun.get(head, 0), int(tokens.edges[tokens.text_T[i] + 1]) - i
        ns = np.array([n for n in range(min(lengths.bit_length(), room + 1)) if lengths >> n & 1], int)
        for x in tokens.runs(np.array([i]), i + ns).tolist():
          if x in self._names:
            found[tokens.text_T[i]] = self._names[x]
    for n in self._lengths:
      begins = np.arange(max(0, len(tokens.text_T) - n + 1))
      begins = begins[begins + n <= tokens.edges[tokens.text_T[begins] + 1]]
      for i, x in self._glimpsed(tokens, begins, begins + n):
        if x in self._names:
          found[tokens.text_T[i]] = self._names[x]
    return found

  def _glimpsed(self, tokens: "_Tokens", begins: np.ndarray, ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """(begin, hash) of the runs that may be looked for."""
    hashes = tokens.runs(begins, ends)
    seen = np.flatnonzero(self._glance[hashes >> (64 - _GLANCE)])
    return zip(begins[seen].tolist(), hashes[seen].tolist(), strict=True)


def excluded(exclude: str) -> Test:
  """The test whose texts no document may hold.

  Args:
    exclude: "GLOB[,GLOB...][:FIELD,...]", files of any kind that a corpus can be. All strings in them count, at any
      depth, if they are long enough to mean something (see above); of named fields, which may stand at any
      depth, too, all of them, however short, and no others.

  Raises:
    Missing, Mistake: there is no such file, or it cannot be read; it lacks a field; no text is long enough.
  """
  return _test(exclude, stamp(exclude))


@functools.lru_cache(maxsize=2)
def _test(exclude: str, _: object) -> Test:
  globs, fields = _fields(exclude)
  texts, met = list[tuple[str, str]](), set[str]()
  try:
    for path in reading.match(globs, _FIELD):
      name = pathlib.PurePath(path).name
      for _, record in reading.records(path, reading.Tally(), field=_FIELD):
        waiting = [(record, not fields)]  # (value, whether its strings count)
        while waiting:
          value, counts = waiting.pop()
          if isinstance(value, str) and counts:
            texts.append((value, name))
          elif isinstance(value, dict):
            met.update(value)
            waiting += [(x, counts or field in fields) for field, x in value.items()]
          elif isinstance(value, list):
            waiting += [(x, counts) for x in value]
  except Mistake as error:
    raise type(error)(str(error).partition("; mend")[0]) from None
  if missing := [field for field in fields if field not in met]:
    raise Mistake(f"data.exclude={exclude!r}: no record has the field {missing[0]!r}; there are {sorted(met)[:20]}")
  test = Test(texts, bool(fields))
  if not test.used:
    short = f": {test.too_short:,} are shorter than 8 words or 31 characters; name their field, FILE:FIELD, to use them"
    raise Mistake(f"data.exclude={exclude!r} holds no text to look for{short if test.too_short else ''}")
  return test


def _fields(exclude: str) -> tuple[str, list[str]]:
  """(globs, fields) of "GLOB[,GLOB...][:FIELD,...]"; what follows the colon of an address is no field."""
  globs, colon, fields = exclude.rpartition(":")
  if not colon or "/" in fields or "\\" in fields:
    return exclude, []
  return globs, [field.strip() for field in fields.split(",")]


def stamp(exclude: str) -> Any:
  """What changes when the files of `excluded` do: a key for what was read of them."""
  return reading.stamp(_fields(exclude)[0], _FIELD)


class _Tokens:
  """The tokens of texts, as sums of their hashes, each times a power of its place: a run is the difference of two.

  Attributes: `edges`, the tokens where texts begin, and the end; `text_T`, the text of each token; `weights`, of the
  first 0, 1, ... tokens.
  """

  def __init__(self, texts: Sequence[str]):
    texts = [unicodedata.normalize("NFKC", x).casefold().replace("'", "").replace("\u2019", "") for x in texts]
    text, cuts = "\n".join(texts), [0]
    while cuts[-1] < len(text):
      gap = re.compile(r"[\s,.，。]").search(text, cuts[-1] + _PART)
      cuts.append(gap.start() if gap else len(text))
    parts = [_tokens(text[i:j], i) for i, j in itertools.pairwise(cuts)] or [_tokens("", 0)]
    hashes, weights, places = (np.concatenate(column) for column in zip(*parts, strict=True))
    self.edges = np.searchsorted(places, np.cumsum([0, *(len(x) + 1 for x in texts)]))
    self.text_T = np.repeat(np.arange(len(texts)), np.diff(self.edges))
    self.weights = _before(weights)
    self._sums, self._undo = _prefix(hashes)

  def windows(self, weight: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the shortest runs of a text that weigh so much begin (one from each token) and end."""
    begins = np.arange(np.searchsorted(self.weights, self.weights[-1] - weight, side="right"))
    ends = self.ends(begins, weight)
    within = ends <= self.edges[self.text_T[begins] + 1]
    return begins[within], ends[within]

  def ends(self, begins: np.ndarray, weight: int) -> np.ndarray:
    """Where the shortest runs from these tokens on that weigh so much end."""
    return np.searchsorted(self.weights, self.weights[begins] + weight)

  def runs(self, begins: Any, ends: Any) -> Any:
    """Hashes of the tokens begin .. end - 1."""
    return (self._sums[ends] - self._sums[begins]) * self._undo[begins]


def _tokens(text: str, place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(hashes, weights, places) of the words, and of the characters that are tokens of their own."""
  codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
  kinds = _kinds()[codes]
  inside = kinds == _IN_WORD
  inside[1:] &= kinds[:-1] == _IN_WORD  # a word goes on
  inside[:1] = False
  begins = np.flatnonzero((kinds > 0) & ~inside)
  sums, undo = _prefix(np.where(kinds > 0, _mixed(codes.astype(np.uint64)), np.uint64(0)))
  ends = np.append(begins[1:], len(codes))  # what parts two tokens counts nothing
  hashes = _mixed((sums[ends[: len(begins)]] - sums[begins]) * undo[begins])
  return hashes, np.where(kinds[begins] == _ALONE, _CHARACTER, _WORD), place + begins


@functools.cache
def _kinds() -> np.ndarray:
  """What each code point is: letters, numbers and marks make tokens."""
  found = np.array([unicodedata.category(chr(code))[0] in "LNM" for code in range(0x110000)], np.uint8)
  for first, last in _UNSPACED:
    found[first : last + 1] *= _ALONE
  return found


def _prefix(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(sums of the first 0, 1, ... hashes, each times odd^place; odd^-place)."""
  powers, undo = _powers(len(hashes).bit_length())
  return _before(hashes * powers[: len(hashes)]), undo


@functools.lru_cache(maxsize=32)
def _powers(bits: int) -> list[np.ndarray]:
  return [np.cumprod(np.full(2**bits, x, np.uint64)) for x in (_ODD, pow(_ODD, -1, 2**64))]


def _before(x: np.ndarray) -> np.ndarray:
  """Sums of the first 0, 1, ... elements."""
  return np.concatenate([np.zeros(1, x.dtype), np.cumsum(x)])


def _mixed(x: np.ndarray) -> np.ndarray:
  """Every bit depends on every bit (the end of SplitMix64)."""
  x = (x ^ (x >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> 27)) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> 31)
