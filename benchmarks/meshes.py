"""The same run on every mesh: losses of 20 steps, and how far they are from those of one device.

python benchmarks/meshes.py [flags of lladax]   # on the CPU, whose devices are simulated

Each run is a command of its own, as a user starts it; the two processes find each other on this machine.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = [
  "--config=configs/quickstart.py", "--config.steps=20", "--config.data.length=64", "--config.data.batch_size=32",
  "--config.evaluate.num_samples=1", "--config.checkpoint.every=1000", "--config.log.tensorboard=False",
]  # fmt: skip
RUNS = [  # (name, devices of a process, processes, mesh)
  ("1 device", 1, 1, {}),
  ("8 devices: data 8", 8, 1, {"data": 8}),
  ("8 devices: fsdp 8", 8, 1, {"data": 1, "fsdp": 8}),
  ("8 devices: fsdp 4, tensor 2", 8, 1, {"data": 1, "fsdp": 4, "tensor": 2}),
  ("8 devices: fsdp 2, tensor 2, context 2", 8, 1, {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}),
  ("8 devices: slices 2, fsdp 4", 8, 1, {"slices": 2, "data": 1, "fsdp": 4}),
  ("2 processes x 4 devices: fsdp 8", 4, 2, {"data": 1, "fsdp": 8}),
]


def run(workdir: str, devices: int, processes: int, mesh: dict[str, int]) -> tuple[list[float], list[float]]:
  """(loss, gradient norm) of every step."""
  env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "lladax.main", *FLAGS, *sys.argv[1:], f"--workdir={workdir}"]
  command += [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
  with socket.socket() as free:
    free.bind(("localhost", 0))
    coordinator = f"--coordinator=localhost:{free.getsockname()[1]}"
  each = [[coordinator, f"--num_processes={processes}", f"--process_id={i}"] for i in range(processes)]
  children = [
    subprocess.Popen(
      [*command, *(flags if processes > 1 else [])], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for flags in each
  ]
  if any([child.wait() for child in children]):
    raise SystemExit(f"{mesh}: a run failed")
  lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
  return [line["loss"] for line in lines], [line["grad_norm"] for line in lines]


if __name__ == "__main__":
  print(
    "| run | loss of step 1 | of the last | largest relative difference of a loss | of a gradient norm |\n|"
    + "---|" * 5
  )
  one: tuple[list[float], list[float]] = ([], [])
  for name, *settings in RUNS:
    with tempfile.TemporaryDirectory() as workdir:
      found = run(workdir, *settings)
    one = found if name == RUNS[0][0] else one
    apart = [max(abs(a - b) / b for a, b in zip(x, y, strict=True)) for x, y in zip(found, one, strict=True)]
    print(f"| {name} | {found[0][0]:.6f} | {found[0][-1]:.6f} | {apart[0]:.1e} | {apart[1]:.1e} |", flush=True)
