"""The step: what a batch does to the state, where the state lives, and what it costs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lladax import optimizer
from lladax.config import Config
from lladax.devices import sharding
from lladax.mistake import Mistake
from lladax.model import attention, experts
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.storage import metrics


class State(NamedTuple):
  """What a step updates, and what it does not. `params` and Adam's moments are float32."""

  step: jax.Array
  params: Any  # what is trained
  opt_state: Any
  guard: Any  # what `judge` remembers, and what the loop does about it: scalars, from `guard()` on
  frozen: Any = {}  # the other parameters, where adapters are trained; in the compute dtype


def guard() -> dict[str, jax.Array]:
  """What a run knows of its good and bad steps before the first one.

  Of good ones how many there were (`seen`), and `mean` and `variance` of log |gradient|; of bad ones how many there
  were in all (`skipped`) and are now in a `row`; how often the run went back to a checkpoint (`returns`), and how many
  batches it is `ahead` of its steps since.
  """
  kinds = dict.fromkeys(("seen", "skipped", "row", "returns", "ahead"), jnp.int32)
  return {name: jnp.zeros((), kind) for name, kind in (kinds | {"mean": jnp.float32, "variance": jnp.float32}).items()}


_WINDOW = 100  # good steps before a spike is called one; the memory of the running mean is as long


def train_step(
  state: State, batch: dict[str, jax.Array], *, config: Config, tx: optax.GradientTransformationExtraArgs, mask_id: int,
  eos_id: int, vocab_size: int,
) -> tuple[State, dict[str, jax.Array]]:  # fmt: skip
  """One update. Noise is drawn here, on the device, from (seed, step, example index).

  Of a bad step (see `judge`) only the counters go on: parameters and moments stay, bit for bit.
  """
  B, L, M = config.data.batch_size, config.data.length, config.micro_batches
  letters, _ = config.model.split(config.model.letters())

  def gradient(batch, state):
    batch = {name: sharding.constrain(x, "BL"[: x.ndim]) for name, x in batch.items()}
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step)

    def loss_fn(params):
      visible = config.model.visible(
        L, batch["segment"] if config.masks_attention else None, right_padded=not config.data.separates, aligned=True
      )
      model = config.model.bind(config.model.join(params, state.frozen))
      told: list[Any] = []  # by the experts of each pass
      weighted_nll = functools.partial(
        model.weighted_nll, visible=visible, per_pair=config.aim.targets_per_pair(L),
        share_B=batch["weight"].sum(axis=1), tell=told.append,
      )  # fmt: skip
      ids = {"mask_id": mask_id, "eos_id": eos_id, "vocab_size": vocab_size}
      loss, aux = config.aim.loss(weighted_nll, batch, rng, batch_size=B, **ids)
      return loss, (aux, jax.tree.map(lambda *x: sum(x), *told) if told else None)

    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return jax.tree.map(sharding.constrain, grads, letters), loss, aux

  def add_up(batch, state):  # weights are normalised over the whole batch: the parts simply add up
    parts = {name: sharding.constrain(x.reshape(M, -1, *x.shape[1:]), ".BL"[: x.ndim + 1]) for name, x in batch.items()}
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts), state)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(part, state)), None)  # noqa: E731
    return jax.lax.scan(add, zeros, parts)[0]

  learning = state._replace(opt_state=(), guard=())
  grads, loss, (means, routed) = (
    gradient(batch, learning) if M == 1 else sharding.sum_over_copies(add_up, batch, learning)
  )
  scalars = {"loss": loss} | {name: total / jnp.maximum(count, 1) for name, (total, count) in means.items()}
  scalars |= experts.metrics(routed) if routed else {}
  scalars |= {"grad_norm": optax.tree.norm(optimizer.gradients(grads))}
  good, judged = judge(state.guard, loss, scalars["grad_norm"], config.guard.spike)
  updates, opt_state = tx.update(grads, state.opt_state, state.params, good=good)
  params = jax.tree.map(functools.partial(jnp.where, good), optax.apply_updates(state.params, updates), state.params)
  scalars |= {name: judged[name] for name in ("skipped", "row")}
  return State(state.step + 1, params, opt_state, judged, state.frozen), scalars


def judge(
  guard: dict[str, jax.Array], loss: jax.Array, grad_norm: jax.Array, spike: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """(whether a step is good, what is known after it): all of its numbers are, and its gradient is no spike.

  A spike is a norm whose logarithm lies more than `spike` (0: never) standard deviations above its mean. Both forget
  exponentially, with weights 1/n at first (Welford's recurrences), and learn from good steps alone.
  """
  apart = jnp.where(grad_norm > 0, jnp.log(grad_norm) - guard["mean"], 0.0)
  good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  if spike:
    good &= (guard["seen"] < _WINDOW) | (apart <= spike * jnp.sqrt(guard["variance"]))
  seen = guard["seen"] + 1
  a = 1 / jnp.minimum(seen, _WINDOW)
  learnt = {
    "seen": seen, "mean": guard["mean"] + a * apart, "variance": (1 - a) * (guard["variance"] + a * apart**2),
    "row": jnp.zeros_like(seen),
  }  # fmt: skip
  bad = {"skipped": guard["skipped"] + 1, "row": guard["row"] + 1}
  return good, {name: jnp.where(good, learnt.get(name, x), bad.get(name, x)) for name, x in guard.items()}


def check_trains(c: MaskPredictorConfig) -> None:
  """Raises Mistake for a model that cannot be trained as it is to be kept, or computed in."""
  if c.weights != "full" and not c.lora_rank:
    raise Mistake(
      f"model.weights={c.weights!r}: what is in bits has no gradient: train adapters over it, as in model.lora_rank=16,"
      " or leave it at full"
    )
  if c.compute_dtype == jnp.float16:
    raise Mistake(f"model.dtype={c.dtype!r} is float16 here, whose gradients vanish unscaled: set model.dtype=float32")


def check_balances(c: MaskPredictorConfig) -> None:
  """Raises Mistake for what balances experts where there are none; a base's shape, with its experts, is known here."""
  for name in ("balance", "balance_rate", "z_loss"):
    if getattr(c, name) and not c.E:
      raise Mistake(f"model.{name}={getattr(c, name)}: there are no experts: set model.E, or leave it out")


def check_mesh(config: Config, mesh: Mesh) -> None:
  """Raises Mistake if the batch or the model cannot be shared out over the mesh, or the kernel is not for it."""
  part, field = config.data.batch_size // config.micro_batches, "data.batch_size / micro_batches"
  # The two rows of an antithetic pair live on one device.
  sharding.check_batch(mesh, part, field, multiple=2 if config.noise.times == "antithetic" else 1)
  L = config.data.length
  segment_BL = jax.ShapeDtypeStruct((part, L), jnp.int32)
  for c in (config.of_block(block).model for block in {x.block for x in config.phases}):
    c.check_mesh(mesh, L)
    visible = c.visible(L, segment_BL, right_padded=not config.data.separates, aligned=True)
    attention.choose(
      c.attention, visible, K=c.K, dtype=c.compute_dtype, platform=mesh.devices.flat[0].platform,
      capability=sharding.capability(mesh.devices.flat[0]), context=mesh.shape["context"],
    )  # fmt: skip


_PARAMETERS = 0x1217  # folded into the seed that they are drawn from: the noise of a step has the step folded in


def program(
  config: Config, mesh: Mesh
) -> tuple[optax.GradientTransformationExtraArgs, Callable[[], State], State, Any]:
  """(optimizer, how the state begins, where it lives, where the columns of a batch live)."""
  c = config.model
  letters, frozen_letters = c.split(c.letters())
  tx = optimizer.create(config.optimizer, config.steps, letters, c.balance_rate)

  def init() -> State:
    params, frozen = c.split(c.init(jax.random.fold_in(jax.random.key(config.seed), _PARAMETERS)))
    return State(jnp.int32(0), params, tx.init(params), guard(), c.freeze(frozen) if c.lora_rank else frozen)

  shapes = jax.eval_shape(init)
  everywhere = sharding.shardings(mesh, "")
  params_at = sharding.shardings(mesh, letters)
  opt_at = jax.tree.map(lambda _: everywhere, shapes.opt_state)
  opt_at = optax.tree_utils.tree_set(opt_at, mu=params_at, nu=params_at)
  columns = {"tokens": "BL", "weight": "BL", "segment": "BL", "index": "B"}
  columns |= {"clean": "BL"} if config.data.replies == "all" else {}
  guard_at = jax.tree.map(lambda _: everywhere, shapes.guard)
  at = State(everywhere, params_at, opt_at, guard_at, sharding.shardings(mesh, frozen_letters))
  return tx, init, at, sharding.shardings(mesh, columns)


def jit_step(
  config: Config, tx: optax.GradientTransformationExtraArgs, at: State, *, mask_id: int, eos_id: int,
  vocab_size: int = 0,
) -> Any:  # fmt: skip
  """`train_step`, jitted: the state is donated, and stays where it lives; `vocab_size` 0: all rows of the embedding."""
  ids = {"mask_id": mask_id, "eos_id": eos_id, "vocab_size": vocab_size or config.model.V}
  step = functools.partial(train_step, config=config, tx=tx, **ids)
  return sharding.jit(step, trains=True, donate_argnums=0, out_shardings=(at, at.step))


def flops_per_token(config: Config) -> float:
  """Model FLOPs of a training step per token, `metrics.flops_per_token` of the config's model.

  A pass over noised and clean blocks runs the layers twice a token and the head once; together the two look at L + n
  keys: n and (L - n) / 2 of blocks before, and (L + n) / 2. Complements are a second pass.
  """
  c, n = config.model, config.model.block
  all_of_it, frozen, head = matmuls(config), frozen_matmuls(config), c.V * c.D
  found = metrics.flops_per_token(all_of_it, c.N, c.H * c.K, config.data.length + n, frozen)
  if n:  # the layers once more
    found += metrics.flops_per_token(all_of_it - head, 0, 0, 0, max(frozen - head, 0))
  return found * (1 + config.noise.complements)


def matmuls(config: Config) -> int:
  """Parameters in a token's matmuls: all but the embedding, where that is not the head; of experts those it meets."""
  c = config.model
  return c.num_params(active=True) - (0 if c.tied else c.V * c.D)


def frozen_matmuls(config: Config) -> int:
  """Parameters in matmuls that have no gradient."""
  c = config.model
  return matmuls(dataclasses.replace(config, model=dataclasses.replace(c, lora_rank=0))) if c.lora_rank else 0


def to_tree(state: State, *, copy: bool = True) -> dict[str, Any]:
  """The state as the plain dict that is saved."""
  mu, nu = (optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu"))
  tree = {"step": state.step, "params": state.params, "mu": mu, "nu": nu, "guard": state.guard}
  # On a CPU an array on the host is the array on the device: the next step would overwrite it under the writer.
  return jax.tree.map(jnp.copy, tree) if copy and jax.default_backend() == "cpu" else tree


def from_tree(tree: dict[str, Any], like: State) -> State:
  """The state that was saved, of arrays or shapes `like` it; what is frozen is never saved."""
  opt_state = optax.tree_utils.tree_set(like.opt_state, mu=tree["mu"], nu=tree["nu"], count=tree["step"])
  # The optimizer's counters and the step must be arrays of their own: the whole state is donated.
  opt_state = jax.tree.map(lambda x: jnp.copy(x) if x is tree["step"] else x, opt_state)
  return State(tree["step"], tree["params"], opt_state, tree["guard"], like.frozen)
