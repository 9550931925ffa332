"""Rooflines beside each other, as in docs/plan.md: what `--mode=plan --explain --json` said of several programs.

python launch/rooflines.py "1B, before=before.json" "1B, after=after.json"            # a table
python launch/rooflines.py "1B, before=before.json" "1B, after=after.json" 1b.svg    # and a picture
"""

import json
import sys
from pathlib import Path

from lladax.training import explanation
from lladax.training.roofline import KINDS, Device, Roofline


def read(path: str) -> tuple[dict, Roofline]:
  """A plan, and its roofline."""
  plan = json.loads(Path(path).read_text())
  found = plan["roofline"]
  model = found["utilisation_at_most"] * found["estimated_seconds"]
  return plan, Roofline((), found["seconds"], Device(1.0, 1.0, 1.0, 1.0, 1), model)


if __name__ == "__main__":
  given = [x.rpartition("=") for x in sys.argv[1:] if "=" in x]
  rows = {title: read(path) for title, _, path in given}
  kinds = [x for x in (*KINDS, "collectives, hidden", "collectives, exposed")
           if any(found.seconds.get(x) for _, found in rows.values())]  # fmt: skip
  head = ["program", "GiB a device", *kinds, "at least", "of the peak at most"]
  print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
  for title, (plan, found) in rows.items():
    times = [explanation.clock(found.seconds[kind]) for kind in kinds]
    size = f"{plan['train']['total'] / 2**30:.1f}"
    print(f"| {' | '.join([title, size, *times, explanation.clock(found.total), f'{found.utilisation:.1%}'])} |")
  for path in sys.argv[1:]:
    if path.endswith(".svg"):
      Path(path).write_text(explanation.picture({title: found for title, (_, found) in rows.items()}), "utf-8")
