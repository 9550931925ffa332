"""Plans for TPUs and GPUs that are not here: libtpu and XLA compile, nothing runs."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from lladax import configs, diffusion
from lladax.config import parse
from lladax.devices import ahead
from lladax.training import plan, roofline, step


@pytest.fixture(scope="module")
def small(tiny):
  """A config whose kernels are those of a large one: splash attention, chunks, pairs, a mesh."""
  return tiny(
    {"model.D": 256, "model.F": 256, "model.K": 128, "model.V": 512, "model.max_length": 4096, "data.length": 256,
     "data.batch_size": 16, "model.head_chunk": 128, "mesh.data": 1, "mesh.fsdp": -1, "sample.gen_length": 128,
     "sample.cache": "dual"}
  )  # fmt: skip


@pytest.mark.usefixtures("libtpu")
@pytest.mark.slow
def test_a_plan_of_the_real_programs(small):
  found = plan.make(small, "v5e:2x2")
  assert found.fits and (found.chips, found.devices) == (4, 4)
  state = 4 * 3 * small.model.num_params()
  assert state / 4 <= found.train.arguments <= state / 4 + 2**20  # parameters and moments, sliced
  assert found.train.temporaries > 0 and found.train.total <= found.limit
  gathers, size = found.train.collectives["all-gather"]
  once = 2 * (small.model.num_params() - small.model.V * small.model.D)  # in bfloat16; the embedding is not gathered
  # The backward pass may gather the layers again.
  assert gathers > small.model.N and 0.99 * once <= size <= 2.5 * once
  assert found.sample is not None and 0 < found.sample.arguments < found.train.arguments
  c = small.model
  flops = 6 * (c.num_params() - c.V * c.D) + 12 * c.N * c.H * c.K * 256
  assert found.flops_per_step == flops * 16 * 256
  assert found.seconds_per_step == pytest.approx(found.flops_per_step / (4 * 197e12 * 0.4))
  report = json.loads(json.dumps(found.to_dict()))
  assert report["fits"] and report["chip_hours"] == pytest.approx(found.seconds_per_step * small.steps / 900)


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.slow
def test_a_plan_of_adapters(small):
  """What is frozen lies there in bfloat16, without moments."""
  c = dataclasses.replace(small.model, lora_rank=4)
  found = plan.make(dataclasses.replace(small, model=c, init_from="base"), "v5e:2x2", sampler=False)
  adapters = c.num_params() - small.model.num_params()
  state = 2 * small.model.num_params() + 4 * 3 * adapters
  assert state / 4 <= found.train.arguments <= state / 4 + 2**20
  assert found.flops_per_step < 16 * 256 * step.flops_per_token(small)


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.slow
def test_a_plan_of_phases_is_that_of_the_largest_program(small):
  """[x_t, x_0] is twice as long as a row; time and FLOPs are of the whole run."""
  phases = diffusion.NoiseConfig(blocks=((0.25, 32), (-1, 0)))
  found = plan.make(dataclasses.replace(small, noise=phases), "v5e:2x2", sampler=False)
  blocks, whole = (step.flops_per_token(found.config.of_block(block)) for block in (32, 0))
  assert found.block == 32 and found.flops_per_step == (blocks + 3 * whole) / 4 * found.tokens_per_step
  assert [name for name, _ in found.programs] == ["train step, blocks of 32"]
  alone = plan.make(small, "v5e:2x2", sampler=False)
  assert alone.block == 0 and [name for name, _ in alone.programs] == ["train step"]
  assert found.train.temporaries > alone.train.temporaries


@pytest.mark.usefixtures("libtpu")
def test_what_a_plan_needs(small):
  with pytest.raises(ValueError, match="model.V=0: a plan needs the rows of the embedding"):
    plan.make(dataclasses.replace(small, model=dataclasses.replace(small.model, V=0)), "v5e:2x2")
  with pytest.raises(ValueError, match="= 256 devices: use 256"):
    plan.make(small, "v6e:16x16")


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.slow
def test_what_does_not_fit_and_the_nearest_that_does(tmp_path):
  """As a user asks: exit code 1, the compiler's words, and a change that was compiled."""
  flags = {"D": 256, "F": 1024, "N": 8, "H": 2, "G": 2, "K": 128, "V": 32768, "head_chunk": 1024, "remat": "none"}
  command = [
    sys.executable,
    "-m",
    "lladax.main",
    "--mode=plan",
    "--config=configs/base.py",
    "--topology=v5e:1x1",
    "--json",
  ]
  command += [f"--config.model.{name}={value}" for name, value in flags.items()]
  command += ["--config.data.length=4096", "--config.data.batch_size=64", "--config.sample.gen_length=128"]
  result = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=900)
  assert result.returncode == 1, result.stderr
  report = json.loads(result.stdout)
  assert not report["fits"] and "exceeds" in report["train"]["refusal"]
  nearest = report["nearest"]
  assert nearest["fits"] and nearest["train"]["total"] <= nearest["limit"]
  assert "remat=full" in nearest["change"]


@pytest.mark.usefixtures("libtpu")
@pytest.mark.slow
@pytest.mark.parametrize(("config", "topology"), [("llada_1b", "v5e_4x4"), ("llada_8b", "v5p_4x4x4")])
def test_a_published_config_fits(config, topology):
  kind, shape = topology.split("_")
  command = [sys.executable, "-m", "lladax.main", "--mode=plan", f"--config=configs/{config}.py:{topology}"]
  result = subprocess.run(
    [*command, f"--topology={kind}:{shape}", "--json"], capture_output=True, text=True, timeout=1500
  )
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout)["fits"]


@pytest.mark.usefixtures("gpu_compiler")
def test_the_quickstart_on_a_gpu():
  c = configs.load("quickstart")
  c.update_from_flattened_dict({"model.V": 4096, "model.N": 2})
  c = parse(c.to_dict())
  found = plan.make(c, "h100:1", sampler=False)
  assert found.fits and found.train.attention == "cudnn" and not found.train.collectives
  state, batch = 12 * c.model.num_params(), 32 * (2 * 64 + 1) * 4  # which has no use for segments
  assert state + batch <= found.train.arguments <= state + batch + 64
  assert 0 < found.train.temporaries < 2**28
  assert found.seconds_per_step == pytest.approx(found.flops_per_step / (989e12 * 0.4))
  report = json.loads(json.dumps(found.to_dict()))
  assert report["limit"] == found.limit and "0.75 of 79.11 GiB" in report["because"] and "hlo" not in report["train"]
  estimate = roofline.analyse(found.train.hlo, roofline.device(ahead.devices("h100:1")[0], 1), found.flops_per_step)
  assert 0 < estimate.utilisation < 1 and estimate.seconds[roofline.EXPOSED] == 0
  # cuDNN computes the scores again in its backward pass: 14 L d in place of 12.
  width = found.config.model.N * found.config.model.H * found.config.model.K
  assert estimate.flops["attention"] == 14 * width * found.config.data.length * found.tokens_per_step


@pytest.mark.usefixtures("gpu_compiler")
@pytest.mark.slow
def test_what_does_not_fit_a_gpu_and_the_nearest_that_does(tmp_path):
  """As a user asks, with the flags that the user set for the compiler, and nothing said of platforms."""
  command = [sys.executable, "-m", "lladax.main", "--mode=plan", "--config=configs/quickstart.py", "--topology=t4:1"]
  command += ["--config.model.V=4096", "--config.model.N=1", "--config.sample.gen_length=16", "--json"]
  env = os.environ | {"XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"}
  env |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.0685"}
  del env["JAX_PLATFORMS"]
  result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
  assert result.returncode == 1, result.stderr
  assert "Traceback" not in result.stderr and "CUDA_ERROR" not in result.stderr
  report = json.loads(result.stdout)
  assert not report["fits"] and report["train"]["attention"] == "xla"
  assert report["nearest"]["fits"] and report["nearest"]["change"] == "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9"
  assert list(tmp_path.glob("*sm_7.5*"))


@pytest.mark.usefixtures("gpu_compiler")
@pytest.mark.slow
def test_the_8b_on_a_node_of_gpus():
  c = configs.load("llada_8b")
  c.update_from_flattened_dict({"data.batch_size": 32})
  c = parse(c.to_dict())
  found = plan.make(c, "h100:8", sampler=False)
  assert found.fits and found.train.attention == "cudnn"
  state = 12 * c.model.num_params() / 8
  assert state <= found.train.arguments <= state + 2**21
  once = 2 * c.model.num_params()  # in bfloat16
  layers = once - 2 * 2 * c.model.V * c.model.D
  gathers, size = found.train.collectives["all-gather"]
  assert gathers > 2 * c.model.N and 2 * layers <= size <= 2 * once  # the layers forward and again backward
  _, size = found.train.collectives["reduce-scatter"]
  assert layers <= size <= 2 * once
