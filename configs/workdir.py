"""The config that a workdir was trained with, as in --config=configs/workdir.py:runs/chat.

It is that of a command that sets fields and names none:
`lladax --workdir=runs/chat --mode=sample --config.sample.steps=8`.
"""

import json
from pathlib import Path

from configs import base


def get_config(workdir):
  path = Path(workdir).expanduser() / "config.json"
  if not path.is_file():
    raise ValueError(f"--workdir={workdir}: there is no run in it; train one first with --mode=train")
  values, config = json.loads(path.read_text()), base.get_config()
  del values["mesh"]  # of the devices there, not here
  config.update({name: value for name, value in values.items() if name in config})
  return config
