"""Prepared records: a corpus as token ids on disk, of which any part can be read by its number.

FOLDER/
  manifest.json            what was prepared from what, and the counts; written last
  tokenizer/               the tokenizer of the ids
  records-SPLIT.array_record-00000-of-00016, ...      SPLIT: train, validation
  turns-SPLIT.int32-00000-of-00016, ...               of conversations: where the replies of a shard lie, in one table
  dataset_info.json, features.json                    make the folder a data set of TFDS (`tfds.data_source`)

A record is a tf.train.Example of int32 arrays, in bytes. Of text it is a window: `tokens` and `segment` [length], the
number of the document within the record, 0 = padding. Of conversations it is a whole one, rendered in the chat
template, for rows of any length: `tokens` and `turns` [replies, 4], see `dialogues.Talk`. Neither TensorFlow nor TFDS
is needed to read it.
"""

import dataclasses
import functools
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import grain
import numpy as np
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf import message as protobuf

from lladax import address, fields
from lladax.data import tokenizer as tokenizers
from lladax.data.windows import DataConfig, Row
from lladax.mistake import Missing, Mistake

NAME = "records"
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
_COUNTS = ("documents", "bytes", "tokens", "records")  # of a split, that a manifest must have


def file_name(split: str, shard: int, shards: int) -> str:
  """Of a shard, as TFDS names them."""
  return f"{NAME}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def turns_name(split: str, shard: int, shards: int) -> str:
  """Of the table of a shard of conversations."""
  return f"turns-{split}.int32-{shard:05d}-of-{shards:05d}"


def encode(tokens_L: np.ndarray, segment_L: np.ndarray) -> bytes:
  """A record of text; equal arrays give equal bytes."""
  return _encode(segment=segment_L, tokens=tokens_L)


def decode(record: bytes) -> tuple[np.ndarray, np.ndarray]:
  """(tokens, segment) int32 [length] of a record of text."""
  tokens_L, segment_L = _decode(record, "tokens", "segment")
  return tokens_L, segment_L


# A row of the table: the part of the corpus that the conversation stands in, its number there, the checksum of its ids,
# and a turn of it.
_COLUMNS = ("part", "number", "checksum", "begin", "reply", "end", "bytes")


def encode_talk(place: tuple[int, int], ids: Any, turns: Any) -> tuple[bytes, np.ndarray]:
  """(a record of a conversation, its rows of the table); `place`: part and number."""
  ids_T, turns_RC = np.asarray(ids, "<i4"), np.asarray(turns, "<i4")
  about = np.array([*place, _checksum(ids_T)], "<i4")
  return _encode(tokens=ids_T, turns=turns_RC), np.concatenate([np.tile(about, (len(turns_RC), 1)), turns_RC], axis=1)


def encode_table(rows: list[np.ndarray]) -> tuple[bytes, str]:
  """(the file of the rows of a shard, its digest)."""
  content = b"".join(x.astype("<i4").tobytes() for x in rows)
  return content, _digest(content)


def _digest(content: bytes) -> str:
  return hashlib.blake2b(content, digest_size=16).hexdigest()


def _checksum(ids_T: np.ndarray) -> int:
  return zlib.crc32(ids_T.astype("<i4").tobytes()) - 2**31  # as an int32


def _encode(**arrays: Any) -> bytes:
  example = _example()()
  for name, x in arrays.items():
    example.features.feature[name].bytes_list.value.append(np.asarray(x, "<i4").tobytes())
  return example.SerializeToString(deterministic=True)


def _decode(record: bytes, *names: str) -> list[np.ndarray]:
  feature = _example().FromString(record).features.feature
  return [np.frombuffer(feature[name].bytes_list.value[0], "<i4") for name in names]


@functools.cache
def _example() -> Any:
  """tf.train.Example with bytes alone, under a name of its own."""
  kind = descriptor_pb2.FieldDescriptorProto
  proto = descriptor_pb2.FileDescriptorProto(name="lladax/example.proto", package="lladax", syntax="proto3")

  def message(name, field, type, label=kind.LABEL_OPTIONAL, holds=None):
    made = proto.message_type.add(name=name)
    made.field.add(name=field, number=1, type=type, label=label, type_name=holds)
    return made

  message("BytesList", "value", kind.TYPE_BYTES, kind.LABEL_REPEATED)
  message("Feature", "bytes_list", kind.TYPE_MESSAGE, holds=".lladax.BytesList")
  features = message("Features", "feature", kind.TYPE_MESSAGE, kind.LABEL_REPEATED, ".lladax.Features.FeatureEntry")
  entry = features.nested_type.add(name="FeatureEntry")
  entry.options.map_entry = True
  entry.field.add(name="key", number=1, type=kind.TYPE_STRING, label=kind.LABEL_OPTIONAL)
  entry.field.add(
    name="value", number=2, type=kind.TYPE_MESSAGE, label=kind.LABEL_OPTIONAL, type_name=".lladax.Feature"
  )
  message("Example", "features", kind.TYPE_MESSAGE, holds=".lladax.Features")
  return message_factory.GetMessages([proto])["lladax.Example"]


@dataclasses.dataclass(frozen=True)
class Folder:
  """A finished preparation."""

  path: Path
  manifest: dict[str, Any]

  def check_holds(self, name: str, format: str) -> None:
    """Raises Mistake where these are not records for such a run."""
    holds = self.manifest.get("holds", "text")
    if format != holds:
      raise Mistake(f"data.format={format!r}: data.corpus={name!r} was prepared with data.format={holds!r}")

  @functools.cached_property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """Of the ids."""
    found = tokenizers.load(self.path / "tokenizer")
    if found.fingerprint != self.manifest["tokenizer_fingerprint"]:
      raise Mistake(f"{self.path / 'tokenizer'} is not the tokenizer that these records were made with")
    return found

  def source(self, split: str) -> Any:
    """Random access to the records of a split, as bytes."""
    paths, shards = [], self.manifest["shards"]
    for shard in range(shards):
      paths.append(path := self.path / file_name(split, shard, shards))
      if not path.is_file():
        raise Mistake(f"{path} is missing: prepare these records again")
    try:
      found: Any = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
    except (RuntimeError, ValueError) as error:  # of a shard, which the library does not name
      raise Mistake(f"{self.path}: a shard of {split} is damaged ({error}): prepare these records again") from error
    if len(found) != (stated := self.manifest["splits"][split]["records"]):
      raise Mistake(f"{self.path} holds {len(found)} records of {split}, its manifest says {stated}: prepare it again")
    return found

  def turns(self, split: str) -> np.ndarray:
    """The table of a split of conversations: int32 [replies, 7], record by record."""
    found, shards = [], self.manifest["shards"]
    for shard in range(shards):
      path = self.path / turns_name(split, shard, shards)
      if not path.is_file():
        raise Mistake(f"{path} is missing: prepare these records again")
      content = path.read_bytes()
      if _digest(content) != self.manifest["turns"][split][shard] or len(content) % (4 * len(_COLUMNS)):
        raise Mistake(f"{path} is damaged: prepare these records again")
      found.append(np.frombuffer(content, "<i4").reshape(-1, len(_COLUMNS)))
    return np.concatenate(found)

  @property
  def digest(self) -> str:
    """Of the manifest."""
    return hashlib.blake2b(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()


def open_folder(path: str | Path) -> Folder:
  """The records that `--mode=prepare` wrote to a folder.

  Raises:
    Missing: there is no such folder.
    Mistake: the preparation was not finished.
  """
  if "://" in str(path) and not address.is_address(path):
    raise Mistake(f"data.corpus=records:{path}: records are read from a mounted file system, or at gs:// and s3://")
  folder = address.mirror(path)  # all of it: grain reads files
  if not (folder / MANIFEST).is_file():
    if any(folder.glob(f"{NAME}-*")):
      raise Mistake(f"data.corpus=records:{path} is not finished: run --mode=prepare with --target={path} again")
    raise Missing(f"data.corpus=records:{path}: there are no records; make them with --mode=prepare")
  manifest = fields.read_json(folder / MANIFEST)
  try:
    talks = manifest.get("holds", "text") == "chat"
    of_kind = (("turns", dict),) if talks else (("length", int),)
    for name, kind in (("shards", int), ("tokenizer_fingerprint", str), ("splits", dict), *of_kind):
      fields.typed(manifest[name], kind, name)
    counts = {f"splits.{x}.{name}": manifest["splits"][x][name] for x in SPLITS for name in _COUNTS}
    sizes = {name: manifest[name] - 1 for name in ("length", "shards") if name in manifest}
    for name, count in (sizes | counts).items():
      if fields.typed(count, int, name) < 0:
        raise Mistake(f"{name} is too small")
    for split in SPLITS if talks else ():
      if len(fields.typed(manifest["turns"][split], list, f"turns.{split}")) != manifest["shards"]:
        raise Mistake(f"turns.{split} is not one for each shard")
  except (Mistake, KeyError, TypeError) as error:  # a name that is not there, an object that is none
    raise Mistake(f"{folder / MANIFEST} is damaged ({error}): prepare these records again") from None
  return Folder(folder, manifest)


class Records:
  """Prepared records; the number of tokens of a shard's last one may be less than `length`."""

  def __init__(self, name: str, c: DataConfig, split: str = "train"):
    self._folder, self._c = open_folder(name.removeprefix("records:")), c
    self._folder.check_holds(name, "text")
    manifest = self._folder.manifest
    if manifest["length"] != c.length:
      raise Mistake(f"data.length={c.length}: data.corpus={name!r} was prepared with data.length={manifest['length']}")
    counts = manifest["splits"][split]
    if not counts["records"]:
      raise Mistake(f"data.corpus={name!r} holds no {split} records: prepare it with another data.held_out")
    self._source = self._folder.source(split)
    self.tokenizer = self._folder.tokenizer
    self.num_bytes = counts["bytes"] + counts["documents"]  # a separator each, as in the held-out text of files
    self.num_tokens = counts["tokens"]
    self.about = "{documents:,} documents ({bytes:,} bytes, {tokens:,} tokens) as {records:,} records".format(**counts)

  @property
  def digest(self) -> str:
    """Of the manifest."""
    return self._folder.digest

  def __len__(self) -> int:
    return len(self._source)

  def shape(self, row: int, epoch: int) -> tuple[float, int]:
    """As `Source.shape`."""
    return 1, self._c.length

  def row(self, row: int, epoch: int, end: int) -> Row:
    """As `Source.row`."""
    try:
      tokens_L, segment_L = decode(self._source[row])
    except (RuntimeError, ValueError, IndexError, protobuf.DecodeError) as error:  # of the file's own checksums, too
      raise Mistake(f"{self._folder.path}: record {row} is damaged ({error}): prepare these records again") from None
    of_length = len(tokens_L) == len(segment_L) == self._c.length
    if not of_length or tokens_L.min() < 0 or tokens_L.max() >= self.tokenizer.vocab_size or segment_L.max() < 1:
      raise Mistake(f"{self._folder.path}: record {row} is none of these records: prepare them again")
    kept_L = segment_L > 0
    return tokens_L, segment_L if self._c.segments else kept_L.astype(np.int32), kept_L / kept_L.sum()


class Conversations:
  """Prepared conversations, in the order that they have in the corpus, as `dialogues.Talks` says."""

  def __init__(self, name: str, split: str = "train"):
    self._folder = open_folder(name.removeprefix("records:"))
    self._folder.check_holds(name, "chat")
    counts = self._folder.manifest["splits"][split]
    if not counts["records"]:
      raise Mistake(f"data.corpus={name!r} holds no {split} records: prepare it with another data.held_out")
    self._source, table_RC = self._folder.source(split), self._folder.turns(split)
    part_R, number_R, checksum_R, begin_R, reply_R, end_R, _ = table_RC.T
    begins_R = np.ones(len(table_RC), bool)
    begins_R[1:] = (np.diff(part_R) != 0) | (np.diff(number_R) != 0)
    (first_N,) = np.nonzero(begins_R)
    in_order = (begin_R >= 0) & (begin_R <= reply_R) & (reply_R <= end_R)
    if len(first_N) != len(self._source) or not in_order.all():
      raise Mistake(f"{self._folder.path}: the turns of {split} are not those of its records: prepare these again")
    place_N = (part_R[first_N].astype(np.int64) << 32) + number_R[first_N]
    self._record_C = np.argsort(place_N, kind="stable")
    self._checksum_C = checksum_R[first_N][self._record_C]
    turns_C = np.diff(first_N, append=len(table_RC))[self._record_C]
    behind_C = np.cumsum(turns_C) - turns_C  # how many turns come before a conversation's
    order_R = np.repeat(first_N[self._record_C] - behind_C, turns_C) + np.arange(len(table_RC))
    of_R = np.repeat(np.arange(len(turns_C)), turns_C)
    self.turns_RC = np.concatenate([of_R[:, None], table_RC[order_R, 3:]], axis=1, dtype=np.int64)
    self._size_C = self.turns_RC[np.cumsum(turns_C) - 1, 3]  # the last reply is the end of a conversation

  @property
  def digest(self) -> str:
    """Of the manifest, which has those of the tables, which have the checksums of all ids."""
    return self._folder.digest

  def __len__(self) -> int:
    return len(self._record_C)

  def ids(self, number: int) -> np.ndarray:
    """Those of one conversation."""
    record = int(self._record_C[number])
    try:
      (ids_T,) = _decode(self._source[record], "tokens")
    except (RuntimeError, ValueError, IndexError, protobuf.DecodeError) as error:  # of the file's own checksums, too
      raise Mistake(f"{self._folder.path}: record {record} is damaged ({error}): prepare these records again") from None
    whole = len(ids_T) == self._size_C[number] and _checksum(ids_T) == self._checksum_C[number]
    if not whole or ids_T.min() < 0 or ids_T.max() >= self._folder.tokenizer.vocab_size:
      raise Mistake(f"{self._folder.path}: record {record} is none of these records: prepare them again")
    return ids_T
