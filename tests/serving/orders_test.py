"""Two processes of two devices each are one server."""

import itertools
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest

import lladax

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")
import httpx  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]


def start(workdir, *flags):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  line = [sys.executable, "-m", "lladax.main", "--mode=serve", f"--workdir={workdir}", "--port=0", *flags]
  line += [f"--coordinator=localhost:{port}", "--num_processes=2"]
  env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  return [
    subprocess.Popen([*line, f"--process_id={i}"], cwd=ROOT, stdout=-1, stderr=-1, text=True, env=env) for i in (0, 1)
  ]


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_two_processes_are_one_server(tiny_workdir, told):
  """On a mesh over both; the answers are those of one process, and a signal to either ends both, well."""
  llada = lladax.load(tiny_workdir)
  processes = start(tiny_workdir, "--config.mesh.tensor=2", "--config.mesh.fsdp=2")
  try:
    assert processes[0].stdout
    lines = itertools.takewhile(bool, iter(processes[0].stdout.readline, None))  # of Gloo, too
    url = next((x for line in lines if (x := re.search(r"http://\S+", line))), None)
    assert url, [(x.wait(60), x.stderr and x.stderr.read()) for x in processes]
    for seed, prompt in enumerate(["red", "blue and", "x" * 40]):
      body = {"model": "unbroken", "prompt": prompt, "seed": seed, "max_tokens": 16, "temperature": 0.8, "n": 1 + seed}
      text = [x["text"] for x in httpx.post(f"{url[0]}/v1/completions", json=body, timeout=120).json()["choices"]]
      options = {"gen_length": 16, "block_length": 16, "early_stop": True, "temperature": 0.8, "seed": [seed]}
      assert text[0] == llada.sample(prompt, **options).text[0] and len(text) == 1 + seed
    scored = {"model": "unbroken", "prompt": "red and", "echo": True, "logprobs": 1, "max_tokens": 0}
    log_p = httpx.post(f"{url[0]}/v1/completions", json=scored, timeout=120).json()["choices"][0]["logprobs"]
    ids = llada.tokenizer.encode("red and")
    expected = llada.log_likelihood(ids[:1], ids[1:], method="chain_rule")
    assert sum(log_p["token_logprobs"][1:]) == pytest.approx(expected, rel=1e-4)
    processes[told].send_signal(signal.SIGTERM)
    ends = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
  finally:
    for process in processes:
      process.kill()
