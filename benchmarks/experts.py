"""What a layer of experts costs beside a dense one that multiplies as much a token, here.

  python benchmarks/experts.py                     # a CPU's size
  python benchmarks/experts.py --T 8192 --D 2048 --E 64 --J 8 --X 1024 --dtype bfloat16   # LLaDA-MoE's, for a GPU

Contenders: `experts`, as the model runs them; `ragged`, the same with `jax.lax.ragged_dot` in the place of its tiles;
`dense`, a feed-forward network of width J * X; `loop`, one expert after the other for every token; `torch`, where it is
installed, a loop over experts in eager PyTorch that picks the tokens of each, as transformers writes it. Milliseconds
forward, and forward and backward, by the gradient of stream and weights; medians over rounds in which they take turns.
Loads are those of a router as it is initialised.
"""

import argparse
import functools
import importlib
import os
import statistics
import time
import types

import jax
import jax.numpy as jnp
import numpy as np

from lladax.devices import sharding
from lladax.model import experts


def config(a: argparse.Namespace) -> types.SimpleNamespace:
  """What experts read of a model's config."""
  dtype = jnp.dtype(a.dtype)
  return types.SimpleNamespace(
    D=a.D, E=a.E, J=a.J, X=a.X, router="softmax", router_groups=0, router_topk_groups=0, router_renormalise=True,
    router_scale=1.0, router_bias=False, compute_dtype=dtype, stream_dtype=dtype, lora_rank=0, lora_targets=(),
  )  # fmt: skip


def dense(n_BWD, weights, c):
  """A dense network as Block has one; its matrices are J of the experts'."""
  gate_DF, up_DF = (
    weights[name][: c.J].swapaxes(0, 1).reshape(c.D, -1).astype(c.compute_dtype)
    for name in ("experts_gate", "experts_up")
  )
  down_FD = weights["experts_down"][: c.J].reshape(-1, c.D).astype(c.compute_dtype)
  return (jax.nn.silu(n_BWD @ gate_DF) * (n_BWD @ up_DF)) @ down_FD


def loop(n_BWD, weights, c):
  """One expert after the other, each for every token, weighed by 0 where it was not chosen."""
  n_TD = n_BWD.reshape(-1, c.D)
  expert_TJ, weight_TJ, *_ = experts.route(n_TD, weights["router"], None, c)

  def add(out_TD, expert):
    number, gate_DX, up_DX, down_XD = expert
    weight_T = jnp.where(expert_TJ == number, weight_TJ, 0).sum(1).astype(c.compute_dtype)
    inner_TX = jax.nn.silu(n_TD @ gate_DX) * (n_TD @ up_DX)
    return out_TD + weight_T[:, None] * (inner_TX @ down_XD), None

  matrices = (weights[f"experts_{name}"].astype(c.compute_dtype) for name in ("gate", "up", "down"))
  return jax.lax.scan(add, jnp.zeros_like(n_TD), (jnp.arange(c.E), *matrices))[0].reshape(n_BWD.shape)


def ragged(n_BWD, weights, c):
  """`experts` with XLA's own grouped product."""
  ours = experts.grouped_matmul

  def theirs(x_PI, w_EIO, layout, chunk, dtype):
    return jax.lax.ragged_dot(x_PI, w_EIO, layout.tiles_E * layout.tile, preferred_element_type=dtype)

  experts.grouped_matmul = theirs  # while it is traced
  try:
    return experts.feed_forward(n_BWD, weights, c)[0]
  finally:
    experts.grouped_matmul = ours


CONTENDERS = {
  "experts": lambda n_BWD, weights, c: experts.feed_forward(n_BWD, weights, c)[0],
  "dense": dense,
  "ragged": ragged,
  "loop": loop,
}


def in_torch(n_BWD, weights, c):
  """(forward, forward and backward) of PyTorch on the same numbers, and what forward gives."""
  torch = importlib.import_module("torch")
  torch.set_num_threads(os.cpu_count() or 1)
  n_TD = torch.tensor(np.asarray(n_BWD, np.float32)).reshape(-1, c.D).requires_grad_()
  w = {name: torch.tensor(np.asarray(x)).requires_grad_() for name, x in weights.items()}
  silu = torch.nn.functional.silu

  def forward():
    p_TE = torch.softmax(n_TD @ w["router"], dim=-1)
    weight_TJ, expert_TJ = torch.topk(p_TE, c.J, dim=-1)
    weight_TJ = weight_TJ / weight_TJ.sum(-1, keepdim=True)
    out_TD = torch.zeros_like(n_TD)
    for number in range(c.E):
      token, place = torch.where(expert_TJ == number)
      x = n_TD[token]
      x = (silu(x @ w["experts_gate"][number]) * (x @ w["experts_up"][number])) @ w["experts_down"][number]
      out_TD = out_TD.index_add(0, token, weight_TJ[token, place, None] * x)
    return out_TD

  def without_gradient():
    with torch.no_grad():
      return forward()

  def both():
    forward().sum().backward()
    for x in (n_TD, *w.values()):
      x.grad = None

  return without_gradient, both


def as_program(fn):
  """As our own are called."""
  return lambda *_: fn()


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  sizes = {"T": 2048, "D": 256, "E": 16, "J": 2, "X": 256, "rounds": 9}
  for name, size in sizes.items():
    parser.add_argument(f"--{name}", type=int, default=size)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, separated by commas, torch too")
  a = parser.parse_args()
  c, rng = config(a), np.random.default_rng(0)
  n_BWD = jnp.asarray(rng.standard_normal((1, a.T, a.D)), c.compute_dtype)
  shapes = {name: tuple(getattr(c, letter) for letter in x) for name, x in experts.letters(c).items()}
  weights = {name: jnp.asarray(rng.standard_normal(x) * x[-2] ** -0.5, jnp.float32) for name, x in shapes.items()}

  programs = {}
  for name in a.only.split(","):
    if name == "torch":
      programs[name, "forward"], programs[name, "both"] = map(as_program, in_torch(n_BWD, weights, c))
      continue
    fn = functools.partial(CONTENDERS[name], c=c)
    back = jax.grad(lambda n, w, fn=fn: fn(n, w).astype(jnp.float32).sum(), argnums=(0, 1))
    programs[name, "forward"], programs[name, "both"] = sharding.jit(fn), sharding.jit(back, trains=True)
  for program in programs.values():
    jax.block_until_ready(program(n_BWD, weights))
  answers = {name: np.asarray(program(n_BWD, weights)) for (name, way), program in programs.items() if way == "forward"}
  near = (1e-3 if c.compute_dtype == jnp.float32 else 0.05) * np.abs(answers.get("experts", 0)).max()
  for name in answers.keys() & {"ragged", "loop", "torch"} if "experts" in answers else ():
    np.testing.assert_allclose(answers[name].reshape(-1, c.D), answers["experts"].reshape(-1, c.D), atol=near)
  seconds = {key: [] for key in programs}
  for _ in range(a.rounds):
    for key, program in programs.items():
      began = time.perf_counter()
      jax.block_until_ready(program(n_BWD, weights))
      seconds[key].append(time.perf_counter() - began)
  load_E = experts.summed(experts.feed_forward(n_BWD, weights, c)[1]).load_BE
  print(f"{jax.devices()[0].device_kind}, {a.dtype}: T={a.T} D={a.D} E={a.E} J={a.J} X={a.X},", end=" ")
  print(f"the largest load is {float(load_E.max() / load_E.mean()):.2f} of the mean")
  print(f"{'':10}{'forward':>10}{'both':>10}")
  for name in dict.fromkeys(name for name, _ in programs):
    times = (1000 * statistics.median(seconds[name, way]) for way in ("forward", "both"))
    print(f"{name:10}" + "".join(f"{x:10.1f}" for x in times), "ms")


if __name__ == "__main__":
  main()
