"""Every program, of every config and both objectives, lowered for CPUs, GPUs and TPUs that are not here.

Shapes alone: nothing is allocated, compiled or run, and layers are scanned, so models of 8B are as quick as small ones.
What a program holds is read in its text, so that a kernel which was meant and quietly did not come is a failure. By
default every config's step for accelerators, and what samples and scores in all its forms there; slow are CPUs, where
other tests run the same programs, and what differs in sizes alone.
"""

import dataclasses
import functools
import inspect
import itertools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lladax import configs, sampling
from lladax.config import parse
from lladax.devices import sharding
from lladax.evaluation import held_out
from lladax.inference import engine
from lladax.sampling import SamplerConfig
from lladax.training import step

DEVICES = {
  "cpu": AbstractDevice("cpu", None, "cpu"),
  "cuda": AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"),
  "tpu": AbstractDevice("TPU v5 lite", 1, "tpu"),
}
OBJECTIVES = ("diffusion", "autoregressive")
AXES = tuple(field.name for field in dataclasses.fields(sharding.MeshConfig))


@pytest.fixture(autouse=True)
def cudnn(monkeypatch):
  """JAX asks cuDNN for its version when it lowers and, for documents by their beginnings, the GPU what it can."""
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91400)
  monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)


@functools.cache
def config_of(name, objective="diffusion"):
  values = configs.load(name).to_dict() | {"objective": objective}
  if objective == "autoregressive":  # which knows little of what others sample by
    values["sample"] = dataclasses.asdict(SamplerConfig())
  config = parse(values)
  model = dataclasses.replace(config.model, V=config.model.V or config.tokenizer.vocab_size)
  return dataclasses.replace(config, model=model)


def on(platform):
  """One device of a platform, which programs are traced for."""
  kind = (AxisType.Auto,) * len(AXES)
  mesh = AbstractMesh((1,) * len(AXES), AXES, axis_types=kind, abstract_device=DEVICES[platform])
  return jax.sharding.use_abstract_mesh(mesh)


def shapes(tree, at=None):
  """Shapes in the place of arrays; they must lie somewhere: on the device at hand, which nobody asks what it is."""
  at = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), tree) if at is None else at
  return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, at)


def array(*shape, dtype=jnp.int32):
  return shapes(jax.ShapeDtypeStruct(shape, dtype))


def params_of(model):
  return shapes(jax.eval_shape(model.init, jax.random.key(0)))


def lower(platform, jitted, *args, **static):
  return jitted.trace(*args, **static).lower(lowering_platforms=(platform,)).as_text()


def kernels(text):
  """The fused kernels that a program calls: (forward, backward)."""
  forward = {f"splash{told}" for told in re.findall(r'"splash_mha_fwd(_segmented)?_(?:no_)?residuals"', text)}
  backward = {f"splash{told}" for told in re.findall(r'"splash_mha_dq(_segmented)?_no_residuals"', text)}
  for bias, behind, mask in re.findall(
    r"custom_call @__cudnn\$fmha(ScaleBias)?Softmax(Backward)?\(.*?mask_type\\22: \\22(\w+)", text
  ):
    (backward if behind else forward).add(f"cudnn {'BIAS' if bias else mask}")
  return [forward, backward]


def meant(platform, segments, *, causal=False):
  """The fused kernel for these segments, and what of them it is told; on a CPU there is none.

  Blocks are causal to it: what is not is no kernel's.
  """
  if platform == "tpu":
    return {"splash" if segments == "none" else "splash_segmented"}
  padding = ("PADDING", "PADDING_CAUSAL")
  masks = {"none": ("NO_MASK", "CAUSAL"), "right": padding, "run": padding, "any": ("BIAS", "BIAS")}
  if platform == "cuda" and segments == "any" and not causal and jax.__version_info__ >= (0, 11, 2):
    return {"cudnn BIAS", "cudnn PADDING"}  # by their beginnings, or where they do not fit
  return {f"cudnn {masks[segments][causal]}"} if platform == "cuda" else set()


# What attention is told of a row's segments, and the accelerators on which it is fused: lengths that are no multiple of
# 128 are not on a TPU, nor on a GPU the few scores of short packed rows.
STEPS = {
  "base": ("none", "cuda"),
  "blocks": ("none", "cuda tpu"),
  "chat_tiny": ("right", "cuda tpu"),
  "chat_tiny:base": ("none", "cuda tpu"),
  "illada_8b": ("right", "cuda tpu"),
  "llada_1b": ("right", "cuda tpu"),
  "llada_8b": ("right", "cuda tpu"),
  "llada_8b_sft": ("right", "cuda tpu"),
  "llada_8b_sft:lora": ("right", "cuda tpu"),
  "llada_8b_sft:qlora": ("right", "cuda tpu"),
  "llada_8b_sft:illada": ("any", "cuda tpu"),
  "llada2_mini_sft": ("any", "cuda tpu"),
  "llada2_mini_sft:lora": ("any", "cuda tpu"),
  "llada_moe_sft": ("right", "cuda tpu"),
  "qwen3_to_blocks": ("any", "cuda tpu"),
  "qwen3_to_blocks:fast": ("any", "cuda tpu"),
  "poems": ("any", ""),
  "quickstart": ("none", "cuda"),
  "reversal": ("any", ""),
  "stdlib": ("none", "cuda tpu"),
}


def lower_step(config, platform, mesh=None):
  """The text of the real step; with a mesh, sliced over it."""
  tx, init, at, columns_at = step.program(config, mesh or sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))
  B, L = config.data.batch_size, config.data.length
  columns = {"tokens": array(B, L), "weight": array(B, L, dtype=jnp.float32), "segment": array(B, L), "index": array(B)}
  state = shapes(jax.eval_shape(init), at if mesh else None)
  columns = shapes(columns, columns_at if mesh else None)
  if mesh is None:
    at = step.State(*[state.step.sharding] * len(at))
  return lower(platform, step.jit_step(config, tx, at, mask_id=0, eos_id=1), state, columns)


def test_every_config_is_here():
  assert sorted({name.partition(":")[0] for name in STEPS}) == configs.names()


def steps():
  for name, objective, platform in itertools.product(STEPS, OBJECTIVES, DEVICES):
    if name.endswith(":fast") and objective == "autoregressive":  # complements are of noise
      continue
    # One of each kind of segments by default, all of them with the slow ones.
    slow = name not in ("quickstart", "llada_8b", "llada_8b_sft:illada", "poems")
    slow |= platform == "cpu" and name != "quickstart"
    yield pytest.param(name, objective, platform, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("name", "objective", "platform"), list(steps()))
def test_the_step_of_every_config(name, objective, platform):
  if name.endswith(":qlora"):
    pytest.importorskip("qwix")
  segments, fused = STEPS[name]
  config = config_of(name, objective)
  with on(platform):
    text = lower_step(config, platform)
  causal = config.model.causal or config.model.block > 0
  expected = meant(platform, segments, causal=causal) if platform in fused.split() else set()
  assert kernels(text) == [expected, expected]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
  ("objective", "axes", "fused"),
  [
    ("diffusion", {"fsdp": 2, "tensor": 2, "context": 2}, True),
    pytest.param("autoregressive", {"fsdp": 4, "tensor": 2}, True, marks=pytest.mark.slow),
    ("autoregressive", {"data": 4, "context": 2}, False),  # later keys of a slice are no triangle
  ],
)
def test_the_step_on_eight_devices(monkeypatch, platform, objective, axes, fused):
  """Of the devices here, which say that they are others: the call of cuDNN wants some that are there."""
  monkeypatch.setattr(sharding, "platform", lambda: DEVICES[platform].platform)
  config = config_of("llada_1b", objective)
  mesh = sharding.make_mesh(sharding.MeshConfig(**({"data": 1} | axes)))
  with jax.set_mesh(mesh):
    text = lower_step(config, platform, mesh)
  expected = meant(platform, "right", causal=objective == "autoregressive") if fused else set()
  assert kernels(text) == [expected, expected]


def lower_sampler(model, c, platform, *, segments, first=512, L=1024, B=2):
  """The text of the program that fills canvases."""
  with on(platform):
    shape, settings = sampling.split(c, B)
    tokens_BL = jnp.zeros((B, L), jnp.int32)
    state = shapes(jax.eval_shape(lambda: sampling.start(tokens_BL, settings.steps, shape, mask_id=0, first=first)))
    if c.cache:
      rows = B * (2 if c.guidance_scale else 1)
      state = state._replace(cache=shapes(jax.eval_shape(lambda: model.new_cache(rows, L))))
    return lower(
      platform, engine.unmask_until, params_of(model), state, None if segments == "none" else array(B, L),
      shapes(settings), 0, 0, 0, model=model, shape=shape, mask_id=0, ends=(1, 2), vocab_size=model.V, first=first,
    )  # fmt: skip


def samplers():
  known = itertools.product((None, "prefix", "dual"), (0.0, 1.0), ((64, "none"), (64, "run"), (None, "run")), DEVICES)
  for cache, guidance, (gen_length, segments), platform in known:
    slow = platform == "cpu" or cache == "prefix" or (guidance > 0 and (cache, segments) != ("dual", "run"))
    yield pytest.param(cache, guidance, gen_length, segments, platform, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("cache", "guidance", "gen_length", "segments", "platform"), list(samplers()))
def test_the_sampler(cache, guidance, gen_length, segments, platform):
  """With a cache the first pass of a block is fused as well, and padding costs no bias; the windows that read it are
  not fused.
  """
  c = SamplerConfig(gen_length=gen_length, block_length=128, cache=cache, guidance_scale=guidance)
  text = lower_sampler(config_of("llada_1b").model, c, platform, segments=segments)
  assert kernels(text) == [meant(platform, segments), set()]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_canvas_without_a_prompt_whose_window_is_all_of_it(platform):
  """As many queries as the canvas has positions, but keys of the cache and of the window: no fused kernel for that."""
  c = SamplerConfig(block_length=512, cache="prefix")
  text = lower_sampler(config_of("llada_1b").model, c, platform, segments="none", first=0)
  assert kernels(text) == [meant(platform, "none"), set()]


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("cache", [None, "dual", "blocks"])
def test_a_pass_of_the_server_within_a_block(cache, platform):
  """What the passes read comes from outside: no program writes a cache, nor hands it through."""
  B, L, model = 2, 256, config_of("llada_1b").model
  model = dataclasses.replace(model, block=32) if cache == "blocks" else model
  c = SamplerConfig(cache="dual" if cache == "dual" else None)
  with on(platform):
    shape, settings = engine.compiled_for(model, *sampling.split(c, B))
    tokens_BL = jnp.zeros((B, L), jnp.int32)
    state = shapes(jax.eval_shape(lambda: sampling.start(tokens_BL, settings.steps, shape, mask_id=0)))
    read = cache and shapes(jax.eval_shape(lambda: model.reading(model.new_cache(B, L))))
    text = lower(
      platform, engine.unmask_until, params_of(model), state, array(B, L), shapes(settings), array(B), 0, 0, read,
      model=model, shape=shape, mask_id=0, ends=(1, 2), vocab_size=model.V, first=0,
    )  # fmt: skip
  assert kernels(text) == [set() if cache else meant(platform, "run"), set()]
  of_cache = f"{model.N}x{B}x{L}x{model.G}x{model.K}"  # among what comes in, and not among what is returned
  assert of_cache not in text.partition("->")[2].partition("{\n")[0]


@pytest.mark.slow
@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("name", configs.names())
def test_the_sampler_of_every_config(name, platform):
  config = config_of(name)
  length = config.sample.gen_length or config.sample.block_length
  text = lower_sampler(config.model, config.sample, platform, segments="none", first=length, L=2 * length)
  fused = platform == "cuda" or 2 * length % 128 == 0
  assert kernels(text) == [meant(platform, "none", causal=config.model.block > 0) if fused else set(), set()]


# Programs, what attention is told of segments, and what else is asked.
DIFFUSION_SCORES = [(engine._next, "right", {"guided": guided}) for guided in (False, True)] + [
  (engine._likelihood, "right", {"guided": guided, "method": method})
  for guided, method in ((True, "monte_carlo"), (False, "chain_rule"), (True, "chain_rule"))
]
SCORES = [
  (engine._logits, "none", {}),
  (engine._logits, "any", {}),
  (held_out._score, "right", {"num_samples": 2, "right_padded": True}),
  (held_out._score, "any", {"num_samples": 2, "right_padded": False}),
  (engine._likelihood, "right", {"guided": False, "method": "monte_carlo"}),
]


def scores():
  for objective, platform in itertools.product(OBJECTIVES, DEVICES):
    for program, segments, options in SCORES + DIFFUSION_SCORES * (objective == "diffusion"):
      name = " ".join([program.__name__, segments, *map(str, options.values()), objective, platform])
      slow = [pytest.mark.slow] * (platform == "cpu")
      yield pytest.param(program, segments, options, objective, platform, id=name, marks=slow)


@pytest.mark.parametrize(("program", "segments", "options", "objective", "platform"), list(scores()))
def test_what_judges_text(program, segments, options, objective, platform, B=2, L=1024):
  model = config_of("llada_1b", objective).model
  with on(platform):
    given = {"params": params_of(model), "tokens_BL": array(B, L), "scored_BL": array(B, L, dtype=bool), "seed": 0}
    given |= {"segment_BL": None if segments == "none" else array(B, L), "row_B": array(B), "at_B": array(B), "draw": 0}
    given |= {"sample_B": array(B), "samples_B": array(B), "model": model, "mask_id": 0, "eos_id": 1}
    given |= {"guidance": 1.5} | options
    text = lower(platform, program, **{name: given[name] for name in inspect.signature(program).parameters})
  assert kernels(text) == [meant(platform, segments, causal=objective == "autoregressive"), set()]


@pytest.mark.parametrize("platform", DEVICES)
def test_the_causal_sampler(platform):
  """Windows over a cache, all of them."""
  model = config_of("llada_1b", "autoregressive").model
  _, settings = sampling.split(SamplerConfig(temperature=0.5), 2)
  with on(platform):
    text = lower(
      platform, engine._autoregressive_sample, params_of(model), array(2, 1024), array(2, 1024), shapes(settings),
      model=model, prompt_length=512, eos_id=1, mask_id=0, vocab_size=model.V, chooses=False,
    )  # fmt: skip
  assert kernels(text) == [set(), set()]


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.slow
def test_a_plan_of_the_causal_baseline():
  """Compiled for a TPU, as a user asks."""
  command = "--mode=plan --config=configs/quickstart.py --topology=v5e:1x1 --config.objective=autoregressive"
  command += " --config.data.length=128 --config.model.V=4096"
  result = subprocess.run(
    [sys.executable, "-m", "lladax.main", *command.split()], capture_output=True, text=True, env=os.environ, timeout=900
  )
  assert result.returncode == 0, result.stderr
  assert "attention kernel: splash" in result.stderr
