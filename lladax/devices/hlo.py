"""The text of a compiled program (HLO), read: computations, shapes, how often loops run, who is in a collective.

`jax.stages.Compiled.as_text()` gives it for CPUs and GPUs; libtpu writes the same language to a file. Instructions
stand in the order in which a device starts them.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# Bits of an element, where they are not the number in its name.
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0, "tuple": 0}


class Array(NamedTuple):
  """The shape of an array."""

  dtype: str
  dims: tuple[int, ...]
  near: bool = False  # it stands in a TPU's own memory, not in that of the device

  @property
  def size(self) -> int:
    """Elements."""
    return math.prod(self.dims)

  @property
  def nbytes(self) -> int:
    """Its bytes, padding not counted."""
    number = re.search(r"\d+", self.dtype)  # of f8e4m3fn the 8
    return -(-self.size * _BITS.get(self.dtype, int(number[0]) if number else 64) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a program."""

  name: str
  op: str
  results: tuple[Array, ...]  # more than one: a tuple, flattened
  operands: tuple[str, ...]  # names of instructions of the same computation
  rest: str  # the attributes, as written
  literal: str = ""  # of a constant, of a parameter its number
  root: bool = False
  result: str = ""  # the type, as written

  def attribute(self, pattern: str) -> str:
    """The first group of a pattern in the attributes; "" if it is not there."""
    found = re.search(pattern, self.rest)
    return found[1] if found else ""

  def called(self) -> list[str]:
    """The computations that it runs: a fusion's, a loop's body, a call's, the branches of a condition."""
    names = re.findall(r"(?:calls|body|to_apply|called_computation|true_computation|false_computation)=%?([\w.\-]+)",
                       self.rest)  # fmt: skip
    several = self.attribute(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
    return names + re.findall(r"[\w.\-]+", several)

  @property
  def nbytes(self) -> int:
    """Of its results."""
    return sum(x.nbytes for x in self.results)

  @property
  def collective(self) -> str:
    """The kind of collective that it is, or starts; "" for any other, and for the end of one."""
    kind = self.op.removesuffix("-start")
    return kind if kind in COLLECTIVES else ""


class Frame(NamedTuple):
  """A line of the source."""

  file: str
  function: str
  line: int


@dataclasses.dataclass(frozen=True)
class Program:
  """A program that was read."""

  computations: Mapping[str, tuple[Instruction, ...]]
  entry: str
  frames: Mapping[int, tuple[Frame, int]]  # id -> the line, and the id of the one that called it

  @functools.cached_property
  def named(self) -> dict[str, dict[str, Instruction]]:
    """Computation -> name -> instruction."""
    return {name: {x.name: x for x in lines} for name, lines in self.computations.items()}

  def trips(self, loop: Instruction) -> int:
    """How often a loop runs: what the compiler knows, `rounds` says, or condition and counter do; 1 if none does."""
    said = r'op_name="[^"]*\brounds:(\d+)\b[^"]*/while"'
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"') or loop.attribute(said):
      return int(known)
    condition, body = (self.named.get(loop.attribute(rf"{name}=%?([\w.\-]+)"), {}) for name in ("condition", "body"))
    limits = [int(x.literal) for x in condition.values() if x.op == "constant" and re.match(r"[su]32\[\]", x.result)]
    # libtpu unrolls loops by two: the counter is the element of the body's result that the condition reads.
    at = [int(x.attribute(r"index=(\d+)")) for x in condition.values() if x.op == "get-tuple-element"]
    root = next((x for x in body.values() if x.root and x.op == "tuple"), None)
    counter = body.get(root.operands[at[0]]) if root and len(at) == 1 else None
    steps = [body[name] for name in counter.operands if name in body] if counter and counter.op == "add" else []
    step = next((int(x.literal) for x in steps if x.op == "constant"), 1)
    return -(-max(limits, default=1) // max(step, 1))

  def inside(self, name: str) -> Iterator[tuple[str, Instruction]]:
    """(computation, instruction) of a computation, and of all that it calls."""
    for x in self.computations.get(name, ()):
      yield name, x
      for called in x.called():
        yield from self.inside(called)

  def stack(self, x: Instruction) -> list[Frame]:
    """Where in the source an instruction comes from, the innermost line first."""
    at, found = int(x.attribute(r"stack_frame_id=(\d+)") or 0), []
    while at in self.frames and len(found) < 100:
      frame, at = self.frames[at]
      found.append(frame)
    return found


def rounds(n: int) -> str:
  """The scope of a loop whose rounds are counted as it runs, and that has about so many: for `Program.trips`."""
  return f"rounds:{n}"


def parse(text: str) -> Program:
  """Reads a program; what is no program has no computations."""
  computations: dict[str, list[Instruction]] = {}
  entry, lines = "", None
  tables: dict[str, dict[int, str]] = {}
  table: dict[int, str] = {}
  for line in text.splitlines():
    if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line) if line[:1] not in ("", " ", "}") else None:
      lines = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif lines is not None and line != "}":
      if found := _instruction(line):
        lines.append(found)
      elif lines and line:  # a library's words may hold line breaks
        lines[-1] = dataclasses.replace(lines[-1], rest=lines[-1].rest + line)
    elif re.fullmatch(r"FileNames|FunctionNames|FileLocations|StackFrames", line):
      table = tables.setdefault(line, {})
    elif row := re.match(r"(\d+) (.*)", line):
      table[int(row[1])] = row[2]
  return Program({name: tuple(x) for name, x in computations.items()}, entry, _frames(tables))


def _instruction(line: str) -> Instruction | None:
  head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
  if not head:
    return None
  line = re.sub(r"/\*.*?\*/", "", line[head.end() :])
  end = _closing(line, 0) if line.startswith("(") else line.index(" ")
  result, line = line[:end], line[end:].lstrip()
  op, _, _ = line.partition("(")
  end = _closing(line, len(op))
  inner = line[len(op) + 1 : end - 1]
  return Instruction(
    head[2], op, tuple(_arrays(result)), tuple(re.findall(r"%([\w.\-]+)", inner)), line[end:],
    inner if op in ("constant", "parameter") else "", bool(head[1]), result,
  )  # fmt: skip


def _closing(text: str, at: int) -> int:
  """The place behind the bracket that closes the one at `at`."""
  depth = 0
  for found in re.compile(r"[()]").finditer(text, at):
    depth += 1 if found[0] == "(" else -1
    if not depth:
      return found.end()
  return len(text)


def _arrays(result: str) -> Iterator[Array]:
  for dtype, dims, layout in re.findall(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?", result):
    yield Array(dtype, tuple(map(int, re.findall(r"\d+", dims))), bool(re.search(r"S\([1-9]", layout)))


def _frames(tables: Mapping[str, Mapping[int, str]]) -> dict[int, tuple[Frame, int]]:
  if "StackFrames" not in tables:
    return {}

  def field(row: str, name: str) -> int:
    found = re.search(rf"\b{name}=(\d+)", row)
    return int(found[1]) if found else 0

  frames = {}
  for number, row in tables["StackFrames"].items():
    at = tables["FileLocations"][field(row, "file_location_id")]
    file, function = (tables[f"{x.title()}Names"][field(at, f"{x}_name_id")] for x in ("file", "function"))
    # A frame without a caller names the first one, the others the one behind their caller's.
    frames[number] = Frame(file.strip('"'), function.strip('"'), field(at, "line")), field(row, "parent_frame_id") - 1
  return frames


def members(x: Instruction) -> list[int]:
  """The devices of one group of a collective, by their place in the mesh; [] where all take part, or it is not known.

  Three spellings: {{0,1},{2,3}}, [groups,size]<=[dims]T(order), and mesh['a'=2,'b'=4] {'b'}.
  """
  if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", x.rest):
    return [int(found[1]), int(found[2])]
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", x.rest):
    return [int(n) for n in found[1].split(",")]
  if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", x.rest):
    shape, dims, order = ([int(n) for n in part.split(",")] if part else [] for part in found.groups())
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (ids.transpose(order) if order else ids).reshape(shape)[0].tolist()
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) \{([^}]*)\}", x.rest):
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
    ids = np.arange(math.prod(sizes.values()))
    if permuted := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?", found[2]):
      dims, order = ([int(n) for n in part.split(",")] if part else [] for part in permuted.groups())
      ids = ids.reshape(dims).transpose(order) if order else ids
    ids = ids.reshape(list(sizes.values()))
    taken = re.findall(r"'(\w+)'", found[3])
    return ids[tuple(slice(None) if name in taken else 0 for name in sizes)].ravel().tolist()
  return []


def whole(x: Instruction, computation: Mapping[str, Instruction]) -> int:
  """Bytes of the whole arrays of a collective: what a gather gives, what the others take."""
  sizes, n = [a.nbytes for a in x.results], max(len(x.operands), 1)
  if x.op.endswith("-start") and x.collective != "all-reduce":  # it lists its operands before its results
    return max(sum(sizes[:n]), sum(sizes[n : 2 * n]))
  if x.collective == "reduce-scatter":
    return sum(computation[name].nbytes for name in x.operands if name in computation) or sum(sizes)
  return sum(sizes)


def collectives(program: Program) -> dict[str, tuple[int, int]]:
  """How often a device takes part in each kind of collective, loops multiplied, and the bytes of the whole arrays."""

  @functools.cache
  def count(name: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(kind, channel) -> (how many, bytes); the fusions that start, carry and end one collective share its channel."""
    total: dict[tuple[str, str], tuple[int, int]] = {}
    for x in program.computations.get(name, ()):
      if x.collective:
        # libtpu writes a reduce-scatter as a fusion of this name around an all-reduce.
        kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else x.collective
        total[kind, x.attribute(r"channel_id=(\d+)") or x.name] = (1, whole(x, program.named[name]))
      times = program.trips(x) if x.op == "while" else 1
      for called in x.called():
        total |= {key: (times * n, times * size) for key, (n, size) in count(called).items()}
    return total

  result: dict[str, tuple[int, int]] = {}
  for (kind, _), (n, size) in count(program.entry).items():
    before = result.get(kind, (0, 0))
    result[kind] = (before[0] + n, before[1] + size)
  return result
