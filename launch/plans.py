"""The table "What fits where" of launch/README.md: every topology that the configs have settings for, compiled.

From the root of the checkout, with `pip install -e '.[plan,plan-gpu]'`:

python launch/plans.py                   # all rows: about half an hour on two cores
python launch/plans.py llada_1b:v5e_4x4  # some; fields behind them, --config.model.N=1, are of each
"""

import json
import os
import subprocess
import sys

from lladax.devices.gpus import GPUS

ROWS = [
  "llada_8b:v5p_4x4x4", "llada_8b:v6e_16x16", "llada_8b:v5p_4x4x4_x2", "llada_1b:v5p_1x1x1", "llada_1b:v5e_4x4",
  "llada_1b:h100_1", "llada_8b:h100_8", "llada_8b:h100_8x8", "llada_8b_sft:lora@h100_1",
  "llada_moe_sft:lora_h100_1@h100_1", "llada_moe_sft:h100_8", "llada_moe_sft:v5p_2x2x4",
  "llada2_mini_sft:lora_h100_8@h100_8", "llada2_mini_sft:h100_8x8", "llada2_mini_sft:v5p_4x4x4",
  "llada2_mini_sft:flash_lora_h100_8x8@h100_8x8", "llada2_mini_sft:flash_v5p_8x8x8@v5p_8x8x8",
  "qwen3_to_blocks:h100_8", "qwen3_to_blocks:v5p_4x4x4",
]  # fmt: skip
FIELDS = [x for x in sys.argv[1:] if x.startswith("--")]


def row(name: str) -> str:
  """One line of the table, of CONFIG:TOPOLOGY, or of CONFIG:SETTINGS@TOPOLOGY: h100_8x8 is eight nodes of eight."""
  config, _, settings = name.partition(":")
  settings, _, topology = settings.partition("@")
  kind, shape, *slices = (topology or settings).split("_")
  if kind in GPUS:
    shape, _, nodes = shape.partition("x")
    slices = [f"x{nodes}"] if nodes else []
  command = [
    sys.executable, "-m", "lladax.main", "--mode=plan", "--json", f"--config=configs/{config}.py:{settings}",
    f"--topology={kind}:{shape}", f"--slices={slices[0][1:] if slices else 1}", *FIELDS,
  ]  # fmt: skip
  env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"} | os.environ  # as flags.sh has it
  plan = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env).stdout)
  set_, train, sample = plan["settings"], plan["train"], plan["sample"]
  gib = [f"{x / 2**30:.1f}" for x in (train["arguments"], train["total"], plan["limit"], sample["total"])]
  moved = ", ".join(
    f"{kind} {size / 2**30:.0f}" for kind, (_, size) in sorted(train["collectives"].items()) if size > 2**29
  )
  return (
    f"| `{name}` | {plan['chips']} | {set_['micro_batches']} | {set_['remat']} | {gib[0]} | {gib[1]} of {gib[2]} |"
    f" {gib[3]} | {moved or 'none'} | {plan['seconds_per_step']:.2f} | {plan['hours'] / 24:.1f} |"
    f" {plan['chip_hours']:,.0f} | {train['seconds'] + sample['seconds']:.0f} |"
  )


if __name__ == "__main__":
  head = "config, devices, micro-batches, remat, state GiB, step GiB a device, sampler GiB, collectives of a step GiB"
  head = [*head.split(", "), "s a step", "days", "device-hours", "s to compile"]
  print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
  for name in [x for x in sys.argv[1:] if x not in FIELDS] or ROWS:
    print(row(name), flush=True)
