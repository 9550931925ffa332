"""Every field with its default; other configs start from here and change what makes them what they are.

It is made from `lladax.config.Config` and the classes of its groups, where each default and its comment stand once;
`lladax --config=base --mode=show` prints them all.
"""

import dataclasses
import typing
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from lladax.config import DECIDED, Config


def get_config() -> ConfigDict:
  """The defaults; model sizes and the corpus are for the other configs to say."""
  return _group(Config)


def _group(cls: Any, path: str = "") -> ConfigDict:
  group, kinds = ConfigDict(), typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    name, kind = field.name, kinds[field.name]
    if dataclasses.is_dataclass(kind):
      group[name] = _group(kind, f"{path}{name}.")
    elif type(None) in typing.get_args(kind):
      group[name] = FieldReference(field.default, field_type=object)  # may be None, on the command line too
    elif path + name not in DECIDED:
      group[name] = field.default
  return group
