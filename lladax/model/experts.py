"""Feed-forward networks of which every token uses a few: mixtures of experts (LLaDA-MoE, arXiv 2509.24389).

A token's life in here: the router scores the experts for it, in float32; the best J are chosen; its J pairs with them
are laid out expert by expert; every expert multiplies the rows that are its own; the J results come back and are added
up. No token is dropped, however many want the same expert: arrays are as long as the worst case asks, and the
multiplication stops at what there is.

On a mesh each device runs its own experts (axis `tensor`) on the tokens that it sees, and the results are added up.

Letters besides those of mask_predictor.py:
  E experts             J chosen for a token               X width of an expert         R rank of adapters
  T tokens of a device  M pairs of token and expert, T * J  P rows of the pairs laid out, an expert's in whole tiles
  Q tiles               C tiles that are multiplied at once  I, O width of a matrix's input and output
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lladax.devices import hlo, sharding

LETTERS = {"router": "DE", "choice": "E", "experts_gate": "EDX", "experts_up": "EDX", "experts_down": "EXD"}
MATRICES = {"experts_gate": "D", "experts_up": "D", "experts_down": "X"}  # what may have adapters, and its input
FLOAT32 = ("router", "choice")  # whatever the compute dtype is


def letters(c: Any) -> dict[str, str]:
  """The dimension letters of a layer's parameters, adapters (NAME_a, NAME_b) included."""
  found = {name: x for name, x in LETTERS.items() if name != "choice" or c.router_bias}
  for name in MATRICES if c.lora_rank else ():
    if name.rpartition("_")[2] in c.lora_targets:
      inputs, outputs = LETTERS[name][1:]
      found |= {name + "_a": f"E{inputs}R", name + "_b": f"ER{outputs}"}
  return found


class Statistics(NamedTuple):
  """What the tokens of each row did in a router, as float32 sums [..., B] or [..., B, E]; layers stand before."""

  load_BE: jax.Array  # how often each expert was chosen
  probability_BE: jax.Array  # what the router gave it; of sigmoids, its part of their sum
  z_B: jax.Array  # the square of the logits' logsumexp
  entropy_B: jax.Array  # of the router's distribution, in nats
  tokens_B: jax.Array  # that were counted


def balance_loss(stats: Statistics, c: Any) -> jax.Array:
  """E * sum_e f_e P_e of every row (Switch, arXiv 2101.03961, equation 4, J of a token chosen); the mean of the layers.

  J where loads are even, or more. A row's own, so that neither a mesh nor micro-batches change it.
  """
  tokens_B = jnp.maximum(stats.tokens_B, 1.0)[..., None]
  f_BE = jax.lax.stop_gradient(stats.load_BE) / tokens_B
  return _mean_of_layers(c.E * (f_BE * stats.probability_BE / tokens_B).sum(-1))


def z_loss(stats: Statistics) -> jax.Array:
  """The mean square of the logits' logsumexp of every row (ST-MoE, arXiv 2202.08906, equation 5); likewise."""
  return _mean_of_layers(stats.z_B / jnp.maximum(stats.tokens_B, 1.0))


def _mean_of_layers(loss_B: jax.Array) -> jax.Array:
  return loss_B.reshape(-1, loss_B.shape[-1]).mean(0)


def auxiliary(stats: Statistics, share_B: jax.Array, choice_NE: jax.Array | None, c: Any) -> jax.Array:
  """What is added to a loss: the balance loss and the z-loss, weighted, of rows that have these shares of the batch.

  Of the choosing bias it adds 0, with the experts' loads as its gradient: they add up as gradients do, and
  `optimizer` makes of them what moves the bias.
  """
  total = jnp.zeros(())
  if c.balance:
    total += c.balance * (share_B * balance_loss(stats, c)).sum()
  if c.z_loss:
    total += c.z_loss * (share_B * z_loss(stats)).sum()
  if choice_NE is not None and c.balance_rate:
    load_NE = jax.lax.stop_gradient(stats.load_BE.sum(-2))
    total += (load_NE * (choice_NE - jax.lax.stop_gradient(choice_NE))).sum()
  return total


def summed(stats: Statistics) -> Statistics:
  """Of all rows; these add up over micro-batches."""
  return Statistics(*(x.sum(-2 if name.endswith("BE") else -1) for name, x in stats._asdict().items()))


def metrics(stats: Statistics) -> dict[str, jax.Array]:
  """Of `summed` stacked layers, the worst: the largest load in units of the mean one; the least entropy, in nats."""
  load_E, tokens = stats.load_BE, jnp.maximum(stats.tokens_B, 1.0)
  largest = (load_E.max(-1) / jnp.maximum(load_E.mean(-1), 1e-9)).max()
  entropy = (stats.entropy_B / tokens).min()
  return {"expert_load": largest, "router_entropy": entropy, "dropped": jnp.zeros(())}


def route(n_TD: jax.Array, router_DE: jax.Array, choice_E: jax.Array | None, c: Any) -> tuple[jax.Array, ...]:
  """Who is asked, and what the answers count: (expert_TJ, weight_TJ, logits_TE, score_TE), the floats in float32.

  `choice_E` is a bias that chooses and does not weigh. With groups of experts, those of the groups with the best two
  of them alone are chosen from.
  """
  logits_TE = jnp.matmul(n_TD.astype(jnp.float32), router_DE.astype(jnp.float32), precision="highest")
  score_TE = jax.nn.sigmoid(logits_TE) if c.router == "sigmoid" else jax.nn.softmax(logits_TE)
  wish_TE = jax.lax.stop_gradient(score_TE if choice_E is None else score_TE + choice_E[None].astype(jnp.float32))
  if c.router_groups:
    T, groups = wish_TE.shape[0], c.router_groups
    wish_TGE = wish_TE.reshape(T, groups, -1)
    group_TG = jax.lax.top_k(wish_TGE, min(2, wish_TGE.shape[-1]))[0].sum(-1)
    kept_TK = jax.lax.top_k(group_TG, c.router_topk_groups)[1]
    kept_TG = (kept_TK[:, :, None] == jnp.arange(groups)[None, None]).any(1)
    wish_TE = jnp.where(kept_TG[:, :, None], wish_TGE, -jnp.inf).reshape(T, -1)
  expert_TJ = jax.lax.top_k(wish_TE, c.J)[1]
  weight_TJ = jnp.take_along_axis(score_TE, expert_TJ, axis=1)
  if c.router_renormalise:
    weight_TJ /= weight_TJ.sum(-1, keepdims=True) + 1e-20
  return expert_TJ, weight_TJ * c.router_scale, logits_TE, score_TE


def _statistics(expert_TJ, logits_TE, score_TE, counted_BW) -> Statistics:
  counted_BW = counted_BW.astype(jnp.float32)
  chosen_TE = (expert_TJ[:, :, None] == jnp.arange(logits_TE.shape[1])[None, None]).sum(1).astype(jnp.float32)
  p_TE = score_TE / (score_TE.sum(-1, keepdims=True) + 1e-20)  # of a softmax, as it is
  entropy_T = jax.scipy.special.entr(jax.lax.stop_gradient(p_TE)).sum(-1)

  def summed(x_T):
    x_BW = x_T.reshape(*counted_BW.shape, *x_T.shape[1:])
    return jnp.einsum("BW,BW...->B...", counted_BW, x_BW, precision="highest")

  z_T = jax.nn.logsumexp(logits_TE, axis=-1) ** 2
  return Statistics(summed(chosen_TE), summed(p_TE), summed(z_T), summed(entropy_T), counted_BW.sum(1))


class Layout(NamedTuple):
  """Where each pair's row is. Experts follow each other; the last tile of each is filled up with rows of zeros."""

  pair_P: jax.Array  # t * J + j of a row; M: none
  place_M: jax.Array  # the row of a pair; P: the expert is on another device
  expert_Q: jax.Array  # of each tile
  tiles_E: jax.Array  # of each expert; tiles behind their sum are not multiplied

  @property
  def tile(self) -> int:
    """Rows of a tile."""
    return self.pair_P.size // self.expert_Q.size


def lay_out(expert_M: jax.Array, E: int, tile: int, chunk: int) -> Layout:
  """Sorts pairs by expert; those of experts beyond 0 .. E - 1 are another device's. See `tiling`."""
  M = expert_M.size
  expert_M = jnp.where((expert_M >= 0) & (expert_M < E), expert_M, E)
  order_M = jnp.argsort(expert_M, stable=True)
  find = functools.partial(jnp.searchsorted, method="scan_unrolled")
  start_E = find(expert_M[order_M], jnp.arange(E + 1)).astype(jnp.int32)
  size_E, start_E = jnp.diff(start_E), start_E[:-1]
  tiles_E = (size_E + tile - 1) // tile if chunk else jnp.ones_like(size_E)
  end_E = jnp.cumsum(tiles_E)
  most = (M + min(E, M) * (tile - 1)) // tile
  Q = -(-most // chunk) * chunk if chunk else E
  expert_Q = jnp.minimum(find(end_E, jnp.arange(Q), side="right"), E - 1).astype(jnp.int32)
  # Of each row: how far behind its expert's first it is, and which of the sorted pairs that makes it.
  behind_P = (jnp.arange(Q * tile).reshape(Q, tile) - ((end_E - tiles_E) * tile)[expert_Q][:, None]).reshape(-1)
  expert_P = jnp.repeat(expert_Q, tile)
  pair_P = jnp.where(behind_P < size_E[expert_P], order_M.at[start_E[expert_P] + behind_P].get(mode="clip"), M)
  place_M = jnp.full(M, Q * tile, jnp.int32).at[pair_P].set(jnp.arange(Q * tile, dtype=jnp.int32), mode="drop")
  return Layout(pair_P, place_M, expert_Q, tiles_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _moved(x: Any, source: Any, target: Any, copies: int) -> Any:
  """Rows of `x`, each of `copies` in a row, in another order, zeros where there is none; `target` is the way back.

  (A gather both ways: of its own, the gradient would be a scatter.)
  """
  return x.at[source // copies].get(mode="fill", fill_value=0)


def _moved_back(copies, target, gradient):
  back = gradient.at[target].get(mode="fill", fill_value=0)
  if copies > 1:
    back = back.reshape(-1, copies, *back.shape[1:]).sum(1, dtype=jnp.float32).astype(gradient.dtype)
  return back, None, None


_moved.defvjp(lambda x, source, target, copies: (_moved(x, source, target, copies), target), _moved_back)


def tiling(T: int, c: Any) -> tuple[int, int]:
  """(rows of a tile, tiles that are multiplied at once), where the program runs; 0 at once: a tile for each expert.

  Larger tiles read an expert less often, and waste half a tile for each of them. A GPU copies the matrices of what it
  multiplies at once, and asks the host after it: for few tokens it is quicker to read every expert, whoever wants it.
  """
  platform, load = sharding.platform(), T * c.J // c.E
  if platform == "gpu" and T <= 128:
    return T, 0  # no expert is chosen twice by a token
  most, chunk = {"cpu": (128, 1), "gpu": (256, 32), "tpu": (256, 1)}[platform]
  return min(most, max(16, (1 << load.bit_length()) // 4)), chunk  # half of a mean load, or less


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(x_PI: Any, w_EIO: Any, layout: Any, chunk: int, dtype: Any) -> Any:
  """Every row times its expert's matrix, in `dtype`.

  On a TPU that is `jax.lax.ragged_dot`. On a CPU, and in jaxlib 0.10 on a GPU, that would multiply all rows by all
  experts; and everywhere where its gradient is taken, of the matrices.
  """
  return _multiply(x_PI, w_EIO, layout, chunk, dtype, by=1)


def _multiply(x_PI, w, layout, chunk, dtype, by):
  """Of a row and its matrix, summed over this axis of the matrices."""
  if sharding.platform() == "tpu":
    ragged = jax.lax.RaggedDotDimensionNumbers(
      dot_dimension_numbers=(([1], [by]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    sizes_E = layout.tiles_E * layout.tile
    return jax.lax.ragged_dot_general(x_PI, w, sizes_E, ragged, preferred_element_type=dtype)

  def one(at, out_PO):
    w_C, rows_CTI = w, _cut(x_PI, at, chunk, layout)
    if chunk:
      expert_C = jax.lax.dynamic_slice_in_dim(layout.expert_Q, at, chunk)
      w_C = jax.lax.dynamic_slice_in_dim(w, expert_C[0], 1) if chunk == 1 else w[expert_C]
    rows = jax.lax.dot_general(rows_CTI, w_C, (([2], [by]), ([0], [0])), preferred_element_type=dtype)
    rows = rows.reshape(-1, rows.shape[-1])
    return jax.lax.dynamic_update_slice_in_dim(out_PO, rows, at * layout.tile, 0)

  return _each_chunk(layout, chunk, one, jnp.zeros((x_PI.shape[0], w.shape[3 - by]), dtype))


def _each_chunk(layout, chunk, fn, start):
  """Chunks of tiles one after the other, as many as there are: `fn(first tile, carry)`."""
  if not chunk:
    return fn(0, start)
  chunks = (layout.tiles_E.sum() + chunk - 1) // chunk
  return jax.lax.fori_loop(0, chunks, lambda i, carry: fn(i * chunk, carry), start)


def _cut(x_PI, at, chunk, layout):
  """The rows of some tiles, [C, rows, I]."""
  rows = jax.lax.dynamic_slice_in_dim(x_PI, at * layout.tile, chunk * layout.tile) if chunk else x_PI
  return rows.reshape(-1, layout.tile, x_PI.shape[1])


def _multiply_back(chunk, dtype, residuals, gradient_PO):
  x_PI, w_EIO, layout = residuals
  gradient_PO = gradient_PO.astype(x_PI.dtype)

  def one(at, sum_EIO):
    x_CTI, gradient_CTO = (_cut(x, at, chunk, layout) for x in (x_PI, gradient_PO))
    part_CIO = jnp.einsum("CTI,CTO->CIO", x_CTI, gradient_CTO, preferred_element_type=jnp.float32)
    if not chunk:
      return part_CIO
    expert_C = jax.lax.dynamic_slice_in_dim(layout.expert_Q, at, chunk)
    if chunk > 1:
      return sum_EIO.at[expert_C].add(part_CIO)
    part_CIO += jax.lax.dynamic_slice_in_dim(sum_EIO, expert_C[0], 1)
    return jax.lax.dynamic_update_slice_in_dim(sum_EIO, part_CIO, expert_C[0], 0)

  gradient_EIO = _each_chunk(layout, chunk, one, jnp.zeros(w_EIO.shape, jnp.float32))
  gradient_PI = _multiply(gradient_PO, w_EIO, layout, chunk, x_PI.dtype, by=2)
  return gradient_PI, gradient_EIO.astype(w_EIO.dtype), None


grouped_matmul.defvjp(
  lambda x_PI, w_EIO, layout, chunk, dtype: (
    grouped_matmul(x_PI, w_EIO, layout, chunk, dtype), (x_PI, w_EIO, layout)
  ), _multiply_back,
)  # fmt: skip


def feed_forward(
  n_BWD: jax.Array, weights: dict[str, jax.Array], c: Any, counted_BW: jax.Array | None = None
) -> tuple[jax.Array, Statistics]:
  """What the experts add to the stream, and what their router did.

  Args:
    n_BWD: the normed stream, in the compute dtype.
    weights: of one layer, by the names of `letters(c)`, as they are stored.
    c: a MaskPredictorConfig.
    counted_BW: False where a token is none (padding): it is routed, and not counted; None: all are.

  Returns:
    (out_BWD in the stream dtype, Statistics of every row).
  """
  counted_BW = jnp.ones(n_BWD.shape[:2], bool) if counted_BW is None else counted_BW
  of, dtype, stream_dtype = letters(c), c.compute_dtype, c.stream_dtype
  # Cast before they travel.
  stored = {name: x.astype(jnp.float32 if name in FLOAT32 else dtype) for name, x in weights.items()}
  parts = {name: sharding.fit(of[name], x.shape) for name, x in stored.items()}
  # The axes of the mesh that share out the experts, and those that share out a row.
  own, seen = sharding.sliced("E", (c.E,)), sharding.sliced("L", counted_BW.shape[1:])

  def on_device(n_BWD, counted_BW, *given):
    held = dict(zip(stored, given, strict=True))

    def gathered(name, only="D"):  # back, the gradient is scattered in the same movement
      x = held[name]
      for axis, (letter, names) in enumerate(zip(of[name], parts[name], strict=True)):
        if names and letter in only:
          x = jax.lax.all_gather(x, names, axis=axis, tiled=True)
      return checkpoint_name(x, "gathered")

    n_TD = n_BWD.reshape(-1, c.D)
    choice_E = gathered("choice", "E") if "choice" in held else None
    expert_TJ, weight_TJ, logits_TE, score_TE = route(n_TD, gathered("router", "DE"), choice_E, c)
    stats = _statistics(expert_TJ, logits_TE, score_TE, counted_BW)

    E = held["experts_gate"].shape[0]
    tile, chunk = tiling(n_TD.shape[0], c)
    first = jax.lax.axis_index(own) * E if own else 0
    layout = lay_out(expert_TJ.reshape(-1) - first, E, tile, chunk)

    # Where loads are even; of an expert's last tile a half is filled.
    tiles = expert_TJ.size * E // c.E // tile + E // 2

    def multiply(x_PI, name, dtype):
      with jax.named_scope(hlo.rounds(-(-tiles // max(chunk, 1)))):
        return grouped_matmul(x_PI, gathered(name), layout, chunk, dtype)

    def project(x_PI, name):
      out = multiply(x_PI, name, stream_dtype)
      if name + "_a" in held:
        low = multiply(x_PI, name + "_a", dtype)
        high = multiply(low, name + "_b", stream_dtype)
        out += (c.lora_alpha / c.lora_rank) * high
      return out

    x_PD = _moved(n_TD, layout.pair_P, layout.place_M, c.J)
    gate_PX, up_PX = (checkpoint_name(project(x_PD, name), "grouped") for name in ("experts_gate", "experts_up"))
    # Weighed before `down` and not behind it, which is the same: the backward pass needs nothing of width D then.
    weight_P: Any = _moved(weight_TJ.reshape(-1), layout.pair_P, layout.place_M, 1)
    inner_PX = jax.nn.silu(gate_PX) * up_PX * weight_P[:, None]
    if dtype != stream_dtype:  # as in Block: float16 has no larger number
      inner_PX = jnp.clip(inner_PX, -jnp.finfo(dtype).max, jnp.finfo(dtype).max)
    out_PD = project(inner_PX.astype(dtype), "experts_down")
    out_MD: Any = _moved(out_PD, layout.place_M, layout.pair_P, 1)
    out_BWD = out_MD.reshape(-1, c.J, c.D).sum(1, dtype=jnp.float32).astype(stream_dtype).reshape(n_BWD.shape)
    if seen:
      stats = jax.lax.psum(stats, seen)
    return jax.lax.psum(out_BWD, own) if own else out_BWD, stats

  arrays = ((n_BWD, "BLD"), (counted_BW, "BL"), *((x, of[name]) for name, x in stored.items()))
  return sharding.on_each_device(on_device, *arrays, beside="B")
