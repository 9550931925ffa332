"""AdamW with decoupled weight decay on matrices only, clipping by global norm, and a schedule of straight pieces."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lladax.mistake import Mistake


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW and its learning rate.

  Each piece of the schedule is a straight line from where the last one ended, from 0 on. LLaDA's warmup-stable-decay
  with its drop at 1.2T tokens is five such pieces.
  """

  # Straight pieces (length, learning rate at the end); length: steps, or a fraction of all steps (0 < x < 1), or -1
  # for the rest; 0: a jump.
  schedule: tuple[tuple[float, float], ...] = ((0.05, 1e-3), (-1, 1e-3), (0.2, 0.0))
  b1: float = 0.9  # decay of the gradient's running mean
  b2: float = 0.95  # decay of the running mean of its square
  eps: float = 1e-8  # added to the root of the mean square
  weight_decay: float = 0.1  # of matrices
  clip: float = 1.0  # global norm of the gradient; 0: none

  def __post_init__(self):
    for piece in self.schedule:
      if len(piece) != 2 or (piece[0] < 0 and piece[0] != -1) or piece[1] < 0:
        raise Mistake(f"optimizer.schedule: {piece} is not (steps, learning rate at the end)")
    if sum(piece[0] == -1 for piece in self.schedule) > 1:
      raise Mistake("optimizer.schedule: only one piece can take the rest of the steps (-1)")
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise Mistake(f"optimizer.{name}={getattr(self, name)}: must lie in [0, 1)")


def lengths(given: Sequence[float], steps: int, field: str) -> list[int]:
  """Lengths in steps of pieces that are given as steps, as fractions of all steps (0 < x < 1), or as -1, the rest."""
  if any(not n < math.inf or (n < 0 and n != -1) for n in given) or list(given).count(-1) > 1:
    raise Mistake(f"{field}: a length is a number of steps, a fraction, or (one of them) -1 for the rest")
  found = [round(n * steps) if 0 < n < 1 else int(n) for n in given]
  rest = steps - sum(n for n in found if n >= 0)
  if -1 in found and rest < 0:
    raise Mistake(
      f"{field}: its pieces take {steps - rest} steps, more than steps={steps};"
      " shorten them, or give their lengths as fractions"
    )
  return [max(rest, 0) if n == -1 else n for n in found]


def schedule(c: OptimizerConfig, steps: int) -> optax.Schedule:
  """Step -> learning rate. The last piece's end value holds for ever."""
  pieces, boundaries, at, value = [], [], 0, 0.0
  for n, (_, end) in zip(lengths([n for n, _ in c.schedule], steps, "optimizer.schedule"), c.schedule, strict=True):
    if n:
      pieces.append(optax.linear_schedule(value, end, n))
      at += n
      boundaries.append(at)
    value = end
  pieces.append(optax.constant_schedule(value))
  return optax.join_schedules(pieces, boundaries)


def _adam(c: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_adam`, whose moments stay where `good` is false (the count goes on).

  The moments are chosen before the update is made of them: chosen after it, the old ones would be needed beside the
  new, and be copied, a third of the state.
  """

  def update(updates, state, params=None, *, good=True):
    stay = lambda new, old: jax.tree.map(functools.partial(jnp.where, good), new, old)  # noqa: E731
    mu = stay(optax.tree.update_moment(updates, state.mu, c.b1, 1), state.mu)
    nu = stay(optax.tree.update_moment_per_elem_norm(updates, state.nu, c.b2, 2), state.nu)
    count = optax.safe_increment(state.count)
    mean, square = optax.tree.bias_correction(mu, c.b1, count), optax.tree.bias_correction(nu, c.b2, count)
    updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + c.eps), mean, square)
    return updates, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformationExtraArgs(optax.scale_by_adam().init, update)


def gradients(updates: Any) -> Any:
  """What are gradients of these: 0 in the place of a choosing bias of experts, which has their loads (`experts`)."""
  return _map_choices(lambda x: jnp.zeros_like(x), updates)


def _map_choices(fn: Any, tree: Any, *others: Any) -> Any:
  """`fn` of the choosing biases, the others as they are."""

  def one(path, x, *y):
    return fn(x, *y) if path and getattr(path[-1], "key", None) == "choice" else x

  return jax.tree_util.tree_map_with_path(one, tree, *others)


def _rebalancing(tx: Any, rate: float) -> optax.GradientTransformationExtraArgs:
  """`tx`, and for choosing biases a step of that size towards balance, whatever the learning rate."""

  def update(updates, state, params=None, **extra):
    found, state = tx.update(gradients(updates), state, params, **extra)
    toward = lambda _, load_NE: rate * jnp.sign(load_NE.mean(-1, keepdims=True) - load_NE)  # noqa: E731
    return _map_choices(toward, found, updates), state

  return optax.GradientTransformationExtraArgs(tx.init, update)


def create(
  c: OptimizerConfig, steps: int, letters: Any, balance_rate: float = 0.0
) -> optax.GradientTransformationExtraArgs:
  """The optimizer. Its update with `good=False` lets the moments stay; the parameters are the caller's to keep.

  Args:
    c: its settings.
    steps: of the whole run, for the schedule.
    letters: the dimension letters of every parameter; those with two or more besides the layer axis are matrices, but
      for biases.
    balance_rate: a step of the bias that chooses experts (Ling's balancing, arXiv 2408.15664).
  """
  bias = lambda path: str(getattr(path[-1], "key", "")).endswith("_bias") if path else False  # noqa: E731
  matrices = jax.tree_util.tree_map_with_path(lambda path, x: len(x.replace("N", "")) > 1 and not bias(path), letters)
  tx = optax.chain(
    optax.clip_by_global_norm(c.clip) if c.clip else optax.identity(),
    _adam(c),
    optax.add_decayed_weights(c.weight_decay, mask=matrices),
    optax.scale_by_learning_rate(schedule(c, steps)),
  )
  return _rebalancing(tx, balance_rate) if balance_rate else tx
