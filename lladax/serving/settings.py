"""How the server is to be: its address, its keys, its limits."""

import dataclasses
import functools
import math
import re
from pathlib import Path

from lladax import fields
from lladax.mistake import Mistake
from lladax.storage.writing import reason


@dataclasses.dataclass(frozen=True)
class ServeConfig:
  """The options of `--mode=serve`."""

  host: str = "127.0.0.1"  # where it listens; another than this machine's own is heard by others
  port: int = 8000  # 0: any that is free
  api_key_file: str = ""  # a key a line; "": nobody needs one
  cors: str = ""  # the origin of other pages that may ask, as http://localhost:3000
  rows: int = 8  # answered at once
  queue: int = 64  # that may wait
  timeout: float = 600.0  # seconds that an answer may take
  drain_seconds: float = 30.0  # that answers may still take when the server goes down
  max_body: int = 4 * 2**20  # bytes of a request
  connections: int = 1024  # at once
  warmup: bool = False  # compile before the first request
  log_text: bool = False  # write what is asked and answered into the log

  def __post_init__(self):
    fields.check(self, "serve")
    for name, least, most in (("port", 0, 65535), ("rows", 1, 1024), ("queue", 1, 2**20), ("max_body", 1, 2**31),
                              ("connections", 1, 2**20)):  # fmt: skip
      if not least <= getattr(self, name) <= most:
        raise Mistake(f"--{name}={getattr(self, name)}: must be from {least} to {most}")
    for name, least in (("timeout", 0), ("drain_seconds", -1)):
      if not least < getattr(self, name) < math.inf:
        raise Mistake(f"--{name}={getattr(self, name)}: give a number of seconds")
    if not self.host:
      raise Mistake("--host is empty: give an address, as 127.0.0.1, or 0.0.0.0 for all that this machine has")
    if self.cors and not re.fullmatch(r"https?://[\w.\-\[\]:]+", self.cors):
      raise Mistake(f"--cors={self.cors}: give one origin, as http://localhost:3000")

  @functools.cached_property
  def keys(self) -> list[bytes]:
    """The API keys, read once; raises Mistake if the file has none, or cannot be read."""
    if not self.api_key_file:
      return []
    try:
      lines = fields.read_bytes(Path(self.api_key_file).expanduser()).splitlines()
    except OSError as error:
      raise Mistake(f"--api_key_file={self.api_key_file} cannot be read: {reason(error)}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith(b"#")]
    if not keys:
      raise Mistake(f"--api_key_file={self.api_key_file}: there is no key in it; write one a line")
    return keys
