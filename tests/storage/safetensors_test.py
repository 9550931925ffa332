import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from layouts import LLADA, complaint, publish, shapes

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("quick_compiles")


HEADER = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
  ("header", "content", "length"),
  [
    ({"a": HEADER | {"shape": [3]}}, 8, None),  # the shape says more than the offsets
    ({"a": HEADER, "b": HEADER | {"data_offsets": [4, 12]}}, 12, None),  # they overlap
    ({"a": HEADER, "b": HEADER | {"data_offsets": [12, 20]}}, 20, None),  # a gap
    ({"a": HEADER}, 4, None),  # past the end
    ({"a": HEADER}, 12, None),  # more than there should be
    ({"a": HEADER | {"data_offsets": [-8, 0]}}, 8, None),
    ({"a": HEADER | {"dtype": "Q7"}}, 8, None),
    ({"a": HEADER}, 8, 4 * 2**30),  # a header of 4 GiB
    ({"a": HEADER}, 8, 2**64 - 1),
    ({"x" * 10**6: HEADER | {"shape": [3]}}, 8, None),
    ([1], 8, None),
  ],
)
def test_a_header_that_lies(tmp_path, header, content, length):
  text = json.dumps(header).encode()
  length = len(text) if length is None else length
  (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text + b"\0" * content)
  (tmp_path / "config.json").write_text(json.dumps(LLADA))
  said = complaint(tmp_path)
  assert "model.safetensors is no whole safetensors file" in said and len(said) < 500


@pytest.mark.parametrize(
  ("index", "said"),
  [
    ("{", "model.safetensors.index.json is no JSON"),
    ("[]", "model.safetensors.index.json holds [], expected a JSON object"),
    ("{}", "has no weight_map"),
    ('{"weight_map": {}}', "has no weight_map"),
    ('{"weight_map": ["a"]}', "has no weight_map"),
    ('{"weight_map": {"a": 3}}', "has no weight_map"),
    ('{"weight_map": {"a": "../model.safetensors"}}', 'names "../model.safetensors", which is no *.safetensors of'),
    ('{"weight_map": {"a": "/etc/passwd"}}', 'names "/etc/passwd", which is no *.safetensors of this folder'),
    ('{"weight_map": {"a": ".."}}', 'names "..", which is no *.safetensors'),
    (json.dumps({"weight_map": {"a": "x" * 5000 + ".safetensors"}}), "… is missing, and model.safetensors.index.json"),
    (json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(999)}}), "; and 991 more"),
  ],
)
def test_a_damaged_index(tmp_path, index, said):
  source = publish(tmp_path / "source", LLADA, files=1)
  (tmp_path / "model.safetensors").touch()
  (source / "pytorch_model.bin").touch()
  (source / "model.safetensors.index.json").write_text(index)
  assert said in complaint(source) and len(complaint(source)) < 1000


MEASURE = """
import sys, jax
import lladax
def status(name):
  return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
jax.block_until_ready(jax.numpy.zeros(8))
before = status("VmRSS")
{what}
print((status("VmHWM") - before) / {size})
"""


def peak(what, size):
  """Peak memory over that of a process that has imported jax, in units of `size`."""
  env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  code = MEASURE.format(what=what, size=size)
  return float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, stdout=-1).stdout)


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_rows_are_read_alone(tmp_path):
  """16 MiB of a tensor of 1 GiB: at most those, mapped and copied."""
  path, shape = tmp_path / "model.safetensors", (2**16, 2**13)
  header = json.dumps({"a": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 2**30]}}).encode()
  path.write_bytes(len(header).to_bytes(8, "little") + header)
  os.truncate(path, path.stat().st_size + 2**30)
  imports = "from lladax.storage import safetensors; from pathlib import Path"
  tensor = f"safetensors.headers(Path({str(tmp_path)!r}), [])['a']"
  assert peak(f"{imports}; x = {tensor}.rows(1000, 1024); assert x.shape == (1024, 8192)", 2**30) < 0.1


SHAPES = {
  "270M": {"d_model": 1024, "n_layers": 16, "n_heads": 16, "n_kv_heads": 16, "mlp_hidden_size": 2816,
           "vocab_size": 32000, "embedding_size": 32000},
  # Of the 1B model every third layer: what is held twice would show the more.
  "0.8B": {"d_model": 2048, "n_layers": 7, "n_heads": 32, "n_kv_heads": 4, "mlp_hidden_size": 5634,
           "vocab_size": 126464, "embedding_size": 126464},
}  # fmt: skip


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_while_importing(tmp_path, shape):
  config = LLADA | SHAPES[shape]
  source = publish(tmp_path / "source", config, files=4, seed=None)
  size = 2 * sum(int(np.prod(x)) for x in shapes(config).values())
  assert peak(f"llada = lladax.load({str(source)!r})", size) < 1.3
  if shape == "0.8B":
    imports = (
      "from lladax.inference import convert; from lladax.storage import published, transfer; from pathlib import Path"
    )
    wide = f"transfer.load_params(published.read(Path({str(source)!r})), dtype='float32')"
    assert peak(f"{imports}; params = {wide}", 2 * size) < 1.3
    values, workdir = {"model": {}, "tokenizer": {}}, str(tmp_path / "workdir")
    assert peak(f"{imports}; convert.from_published({str(source)!r}, Path({workdir!r}), {values!r})", size) < 1.3


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.slow
def test_memory_while_quantising(tmp_path):
  """On a CPU host and device are one. int8 keeps 0.53 of the files; beside them it were 1.53."""
  pytest.importorskip("qwix")
  config = LLADA | SHAPES["270M"] | {"vocab_size": 2000, "embedding_size": 2000, "mask_token_id": 1999}
  source = publish(tmp_path / "source", config, files=4, seed=None)
  size = 2 * sum(int(np.prod(x)) for x in shapes(config).values())
  assert peak(f"llada = lladax.load({str(source)!r}, weights='int8', dtype='bfloat16')", size) < 1.2
