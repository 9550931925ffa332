"""The command itself: what it refuses at once, that it answers, and how it ends."""

import concurrent.futures
import dataclasses
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest
from served import command, until

from lladax import config
from lladax.mistake import Mistake
from lladax.serving import serve
from lladax.serving.settings import ServeConfig
from lladax.storage import checkpoint

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")
import httpx  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_it_answers_finishes_what_runs_and_ends_well(tiny_workdir):
  options = ("--rows=2", "--config.sample.gen_length=8", "--config.sample.block_length=8")
  with command(tiny_workdir, "--warmup", *options) as (process, url):
    assert httpx.get(f"{url}/healthz").json() == {"status": "ready"}
    name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    assert name == "unbroken"
    body = {"model": name, "prompt": "red", "seed": 1, "max_tokens": 8, "n": 8}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      coming = pool.submit(lambda: httpx.post(f"{url}/v1/completions", json=body, timeout=60))
      until(lambda: httpx.get(f"{url}/healthz").status_code == 200)
      process.send_signal(signal.SIGTERM)
      answer = coming.result()
    assert answer.status_code in (200, 503)  # it may have been faster than we
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "SIGTERM: finishing what runs" in err and "Traceback" not in err
    assert re.search(r"compiled \d+ programs in \d+ s", err)


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(tiny_workdir):
  with command(tiny_workdir) as (process, _):
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (0, 128 + signal.SIGINT)  # the first may have been enough


def test_what_cannot_be_served_is_told_at_once(tiny, tiny_workdir, tmp_path, monkeypatch):
  c = config.load(tiny_workdir)
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(Mistake, match=f"--port={port}: cannot listen at 127.0.0.1: .*in use"):
      serve.run(c, tiny_workdir, ServeConfig(port=port))
  with pytest.raises(Mistake, match="--host=nowhere.invalid: there is no such address"):
    serve.run(c, tiny_workdir, ServeConfig(host="nowhere.invalid"))
  with pytest.raises(Mistake, match="--api_key_file=.*cannot be read"):
    serve.run(c, tiny_workdir, ServeConfig(api_key_file=str(tmp_path / "none")))
  monkeypatch.setitem(sys.modules, "uvicorn", None)
  monkeypatch.delitem(sys.modules, "lladax.serving.app")
  with pytest.raises(Mistake, match=r"pip install 'lladax\[serve\]'"):
    serve.run(c, tiny_workdir, ServeConfig())


@pytest.mark.parametrize(("change", "why"), [
  ({"tokenizer_fingerprint": ""}, "has no tokenizer"), ({"causal": True}, "a causal model is not served"),
])  # fmt: skip
def test_models_that_cannot_be_served(tiny_workdir, monkeypatch, change, why):
  c, saved = config.load(tiny_workdir), checkpoint.config(tiny_workdir)
  saved = saved | change if "causal" not in change else saved | {"model": saved["model"] | change}
  monkeypatch.setattr(checkpoint, "config", lambda workdir: saved)
  with pytest.raises(Mistake, match=why):
    serve.run(c, tiny_workdir, ServeConfig(port=0))


def test_what_does_not_load_ends_it(tiny_workdir, monkeypatch):
  def fails(*args, **kwargs):
    raise Mistake("this checkpoint is torn")

  monkeypatch.setattr(serve, "load", fails)
  with pytest.raises(Mistake, match="is torn"):
    serve.run(config.load(tiny_workdir), tiny_workdir, ServeConfig(port=0))


def test_its_options_are_for_it_alone():
  for flag, said in (("--port=8000", "--port=8000: only --mode=serve has it"), ("--log_text", "only --mode=serve")):
    line = [sys.executable, "-m", "lladax.main", "--mode=chat", "--workdir=nowhere", flag]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and said in result.stderr
  line = [sys.executable, "-m", "lladax.main", "--mode=serve", "--workdir=nowhere", "--rows=0"]
  result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 1 and result.stderr == "lladax: --rows=0: must be from 1 to 1024\n"


def test_what_a_package_without_the_extra_imports():
  code = "import sys, lladax, lladax.main, lladax.serving.serve; print(*sys.modules)"
  loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
  assert not {"starlette", "uvicorn", "prometheus_client"} & set(loaded.split())
  assert json.dumps(dataclasses.asdict(ServeConfig()))
