"""What a layer of experts costs beside a dense one that multiplies as much a token, here.

  python benchmarks/experts.py                     # a CPU's size
  python benchmarks/experts.py --T 8192 --D 2048 --E 64 --J 8 --X 1024 --dtype bfloat16   # LLaDA-MoE's, for a GPU

Contenders: `experts`, as the model runs them; `ragged`, the same with `jax.lax.ragged_dot` in the place of its tiles;
`dense`, a feed-forward network of width J * X; `all`, every expert for every token. Milliseconds forward, and forward
and backward, by the gradient of stream and weights; medians over rounds in which they take turns. Loads are those of a
router as it is initialised.
"""

import argparse
import functools
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


def all_experts(n_BWD, weights, c):
  """Every expert for every token."""
  n_TD = n_BWD.reshape(-1, c.D)
  expert_TJ, weight_TJ, *_ = experts.route(n_TD, weights["router"], None, c)
  weight_TE = jnp.einsum("TJE,TJ->TE", jax.nn.one_hot(expert_TJ, c.E), weight_TJ).astype(c.compute_dtype)
  gate, up, down = (weights[f"experts_{name}"].astype(c.compute_dtype) for name in ("gate", "up", "down"))
  inner_TEX = jax.nn.silu(jnp.einsum("TD,EDX->TEX", n_TD, gate)) * jnp.einsum("TD,EDX->TEX", n_TD, up)
  return jnp.einsum("TEX,TE,EXD->TD", inner_TEX, weight_TE, down).reshape(n_BWD.shape)


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
  "all": all_experts,
}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  sizes = {"T": 2048, "D": 256, "E": 16, "J": 2, "X": 256, "rounds": 9}
  for name, size in sizes.items():
    parser.add_argument(f"--{name}", type=int, default=size)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, separated by commas")
  a = parser.parse_args()
  c, rng = config(a), np.random.default_rng(0)
  n_BWD = jnp.asarray(rng.standard_normal((1, a.T, a.D)), c.compute_dtype)
  shapes = {name: tuple(getattr(c, letter) for letter in x) for name, x in experts.letters(c).items()}
  weights = {name: jnp.asarray(rng.standard_normal(x) * x[-2] ** -0.5, jnp.float32) for name, x in shapes.items()}

  programs = {}
  for name in a.only.split(","):
    fn = functools.partial(CONTENDERS[name], c=c)
    back = jax.grad(lambda n, w, fn=fn: fn(n, w).astype(jnp.float32).sum(), argnums=(0, 1))
    programs[name, "forward"], programs[name, "both"] = sharding.jit(fn), sharding.jit(back, trains=True)
  for program in programs.values():
    jax.block_until_ready(program(n_BWD, weights))
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
