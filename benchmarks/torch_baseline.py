"""The opponent: LLaDA in plain PyTorch, our own, as a good PyTorch user would write it.

The same model, training step and fixed-schedule sampler as lladax, for the performance table:

  python benchmarks/torch_baseline.py train --D 192 --N 6 --B 64 --L 64 --threads 2 --json
  python benchmarks/torch_baseline.py sample --prompt 64 --gen 64 --block 32 --steps 64 --B 4

Parameters are named as in the published checkpoint, so `load_state_dict` takes its tensors as they
are. Shapes are in the names: B batch, L length, V vocabulary, D width, N layers, H query heads, G
key/value heads, K head width, F feed-forward width. Not part of lladax, which never imports torch.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lladax.mistake import Mistake


class RMSNorm(nn.Module):
  """Root-mean-square norm, computed in float32 inside PyTorch's own (on a GPU: fused) kernel."""

  def __init__(self, D: int, eps: float):
    super().__init__()
    self.weight, self.eps = nn.Parameter(torch.ones(D)), eps

  def forward(self, x: Tensor) -> Tensor:
    """The same shape and dtype."""
    return functional.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps).to(x.dtype)


def rope_table(L: int, K: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
  """Cosines and sines [L, 1, K/2] of the rotary angles, in float32."""
  frequency = theta ** (-torch.arange(0, K, 2, device=device, dtype=torch.float32) / K)
  angle = torch.outer(torch.arange(L, device=device, dtype=torch.float32), frequency)
  return angle.cos()[:, None], angle.sin()[:, None]


def rotate(x_BLHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
  """Rotary embedding, half-split, in float32, cast back."""
  a, b = x_BLHK.float().chunk(2, dim=-1)
  return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BLHK.dtype)


class Block(nn.Module):
  """Pre-norm Transformer block: bidirectional attention, then SwiGLU; no biases."""

  def __init__(self, D: int, H: int, G: int, K: int, F: int, norm_eps: float):
    super().__init__()
    self.H, self.G, self.K = H, G, K
    self.attn_norm, self.ff_norm = RMSNorm(D, norm_eps), RMSNorm(D, norm_eps)
    linear = partial(nn.Linear, bias=False)
    self.q_proj, self.attn_out = linear(D, H * K), linear(H * K, D)
    self.k_proj, self.v_proj = linear(D, G * K), linear(D, G * K)
    self.ff_proj, self.up_proj, self.ff_out = linear(D, F), linear(D, F), linear(F, D)

  def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, allowed: Tensor | None) -> Tensor:
    """One layer; `allowed` is the attention mask, bool, broadcast to [B, H, L, L]."""
    B, L, _ = x_BLD.shape
    n_BLD = self.attn_norm(x_BLD)
    q_BLHK = rotate(self.q_proj(n_BLD).view(B, L, self.H, self.K), cos, sin)
    k_BLGK = rotate(self.k_proj(n_BLD).view(B, L, self.G, self.K), cos, sin)
    v_BLGK = self.v_proj(n_BLD).view(B, L, self.G, self.K)
    attended_BHLK = functional.scaled_dot_product_attention(
      q_BLHK.transpose(1, 2),
      k_BLGK.transpose(1, 2),
      v_BLGK.transpose(1, 2),
      attn_mask=allowed,
      enable_gqa=self.G != self.H,
    )
    x_BLD = x_BLD + self.attn_out(attended_BHLK.transpose(1, 2).reshape(B, L, self.H * self.K))
    n_BLD = self.ff_norm(x_BLD)
    return x_BLD + self.ff_out(functional.silu(self.ff_proj(n_BLD)) * self.up_proj(n_BLD))


class MaskPredictor(nn.Module):
  """LLaDA's Transformer: token ids, some of them [MASK], to logits over the vocabulary."""

  def __init__(
    self,
    V: int,
    D: int,
    N: int,
    H: int,
    G: int,
    K: int,
    F: int,
    tied: bool = False,
    rope_theta: float = 500000.0,
    norm_eps: float = 1e-5,
  ):
    super().__init__()
    self.K, self.rope_theta, self.remat = K, rope_theta, False  # remat: blocks are computed again in the backward pass
    transformer = nn.ModuleDict(
      {
        "wte": nn.Embedding(V, D),
        "blocks": nn.ModuleList(Block(D, H, G, K, F, norm_eps) for _ in range(N)),
        "ln_f": RMSNorm(D, norm_eps),
      }
    )
    if not tied:
      transformer["ff_out"] = nn.Linear(D, V, bias=False)
    self.model = nn.ModuleDict({"transformer": transformer})
    self.reset_parameters()

  @torch.no_grad()
  def reset_parameters(self) -> None:
    """LLaDA's `mitchell` init: sigma = 1/sqrt(d_in), cut at 3 sigma; smaller on a block's exits."""
    for name, weight in self.named_parameters():
      if weight.ndim == 2:
        sigma = weight.shape[1] ** -0.5
        if "blocks" in name and name.endswith("_out.weight"):
          sigma /= (2 * (int(name.split(".")[3]) + 1)) ** 0.5
        nn.init.trunc_normal_(weight, std=sigma, a=-3 * sigma, b=3 * sigma)

  def hidden(self, tokens_BL: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The normed last layer [B, L, D]; `attention_mask` is bool [B, L], True at real tokens."""
    transformer = self.model["transformer"]
    cos, sin = rope_table(tokens_BL.shape[1], self.K, self.rope_theta, tokens_BL.device)
    allowed = None if attention_mask is None else attention_mask[:, None, None, :]
    x_BLD = transformer["wte"](tokens_BL)
    if torch.is_autocast_enabled(x_BLD.device.type):  # the residual stream too
      x_BLD = x_BLD.to(torch.get_autocast_dtype(x_BLD.device.type))
    for block in transformer["blocks"]:
      if self.remat and self.training:
        x_BLD = checkpoint(block, x_BLD, cos, sin, allowed, use_reentrant=False)
      else:
        x_BLD = block(x_BLD, cos, sin, allowed)
    return transformer["ln_f"](x_BLD)

  def head(self, x: Tensor) -> Tensor:
    """Logits [..., V] of normed states [..., D]."""
    transformer = self.model["transformer"]
    return functional.linear(x, transformer["ff_out" if "ff_out" in transformer else "wte"].weight)

  def forward(self, tokens_BL: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Logits [B, L, V]; `attention_mask` is bool [B, L], True at real tokens."""
    return self.head(self.hidden(tokens_BL, attention_mask))


def loss(
  model: MaskPredictor, tokens_BL: Tensor, t_B: Tensor, noise_BL: Tensor, mask_id: int, eps: float = 1e-3
) -> Tensor:
  """The published loss: mask where noise < p = (1-eps) t + eps; the sum of CE / p, over B L.

  `noise_BL` is uniform. The head is computed at the masked positions only, the others weigh 0.
  """
  p_BL = ((1 - eps) * t_B + eps)[:, None].expand_as(noise_BL)
  masked_BL = noise_BL < p_BL
  x_BLD = model.hidden(tokens_BL.masked_fill(masked_BL, mask_id))
  logits_MV = model.head(x_BLD[masked_BL]).float()  # M masked tokens in the batch
  nll_M = functional.cross_entropy(logits_MV, tokens_BL[masked_BL], reduction="none")
  return (nll_M / p_BL[masked_BL]).sum() / tokens_BL.numel()


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
  """Fused AdamW; matrices decay, norm weights do not."""
  groups = [
    {"params": [p for p in model.parameters() if (p.ndim >= 2) == decays], "weight_decay": weight_decay * decays}
    for decays in (True, False)
  ]
  return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def train_step(
  model: MaskPredictor,
  optimizer: torch.optim.Optimizer,
  tokens_BL: Tensor,
  mask_id: int,
  autocast: torch.dtype | None = None,
) -> Tensor:
  """One update on fresh noise, gradients clipped to global norm 1; returns the loss."""
  t_B = torch.rand(tokens_BL.shape[0], device=tokens_BL.device)
  noise_BL = torch.rand(tokens_BL.shape, device=tokens_BL.device)
  with torch.autocast(tokens_BL.device.type, autocast, enabled=autocast is not None):
    value = loss(model, tokens_BL, t_B, noise_BL, mask_id)
  value.backward()
  torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
  optimizer.step()
  optimizer.zero_grad(set_to_none=True)
  return value.detach()


@torch.inference_mode()
def generate(
  model: MaskPredictor,
  prompt_BL: Tensor,
  gen_length: int,
  block_length: int,
  steps: int,
  temperature: float = 0.0,
  cfg_scale: float = 0.0,
  *,
  mask_id: int,
  attention_mask: Tensor | None = None,
  block_head: bool = False,
) -> Tensor:
  """The published fixed-schedule sampler, low-confidence remasking; returns prompt and answer.

  As in the published code the head is computed at all positions at every step, and [MASK] itself
  is not banned; unlike it, only the active block is scored, and all rows are scored at once.
  `block_head` computes the head for the active block alone (the answer is the same). Prompts of
  different lengths are left-padded; `attention_mask` is bool [B, P], True at real tokens.
  """
  B, P = prompt_BL.shape
  if gen_length % block_length or steps % (gen_length // block_length):
    raise Mistake(f"{gen_length=} in blocks of {block_length} does not go into {steps=}")
  block_steps = steps // (gen_length // block_length)
  canvas_BL = functional.pad(prompt_BL, (0, gen_length), value=mask_id)
  if attention_mask is not None:
    attention_mask = functional.pad(attention_mask.bool(), (0, gen_length), value=True)
    attention_mask = attention_mask.repeat(2 if cfg_scale else 1, 1)
  for start in range(P, P + gen_length, block_length):
    span = slice(start, start + block_length)
    block_BA = canvas_BL[:, span]  # a view: committing to it fills the canvas
    for step in range(block_steps):
      input_BL = canvas_BL
      if cfg_scale:  # below the conditional rows, the same ones with the prompt masked
        input_BL = canvas_BL.repeat(2, 1)
        input_BL[B:, :P] = mask_id
      x_BLD = model.hidden(input_BL, attention_mask)
      logits_BAV = model.head(x_BLD[:, span]) if block_head else model.head(x_BLD)[:, span]
      logits_BAV = noised_BAV = logits_BAV.float()
      if cfg_scale:
        conditional, unconditional = logits_BAV.chunk(2)
        logits_BAV = noised_BAV = torch.lerp(unconditional, conditional, cfg_scale + 1)
      if temperature:  # Gumbel noise, in float64 as published
        noise_BAV = torch.empty_like(logits_BAV, dtype=torch.float64).exponential_().log_()
        noised_BAV = logits_BAV - temperature * noise_BAV
      choice_BA = noised_BAV.argmax(-1)
      confidence_BA = logits_BAV.gather(-1, choice_BA[..., None])[..., 0] - logits_BAV.logsumexp(-1)
      confidence_BA.masked_fill_(block_BA != mask_id, -torch.inf)  # of its logarithm
      quota = block_length // block_steps + (step < block_length % block_steps)
      commit_BQ = confidence_BA.topk(quota).indices
      block_BA.scatter_(1, commit_BQ, choice_BA.gather(1, commit_BQ))
  return canvas_BL


def measure(call: Callable[[], object], warmup: int, repeats: int, device: str) -> float:
  """Median seconds of a call, after the warm-up."""
  seconds = []
  for _ in range(warmup + repeats):
    start = time.perf_counter()
    call()
    if device == "cuda":
      torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds[warmup:])


def main() -> None:
  """Times training or sampling on random tokens and prints the median.

  --bf16 is autocast in training and bfloat16 weights in sampling; --block-head and --cfg (the
  guidance scale) are the sampler's; --compile is torch.compile of all but the head and the loss.
  """
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("mode", choices=("train", "sample"))
  numbers = {
    "V": 1024,
    "D": 256,
    "N": 4,
    "H": 4,
    "G": None,
    "K": 64,
    "F": 768,
    "B": 4,
    "L": 128,
    "prompt": 64,
    "gen": 64,
    "block": 32,
    "steps": 20,
    "repeats": 3,
    "warmup": 3,
    "threads": 2,
  }  # G: as H; L and repeats are of train and of sample alone
  for name, default in numbers.items():
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--cfg", type=float, default=0.0)
  parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
  for name in ("tied", "block-head", "bf16", "compile", "json"):
    parser.add_argument(f"--{name}", action="store_true")
  a = parser.parse_args()

  torch.manual_seed(0)
  torch.set_num_threads(a.threads)
  if a.device == "cuda":
    torch.set_float32_matmul_precision("high")  # TF32, as JAX by default
  with torch.device(a.device):
    model = MaskPredictor(a.V, a.D, a.N, a.H, a.G or a.H, a.K, a.F, a.tied)
    length = a.L if a.mode == "train" else a.prompt
    tokens_BL = torch.randint(0, a.V - 1, (a.B, length))  # V - 1 is [MASK]
  if a.bf16 and a.mode == "sample":
    model.bfloat16()
  if a.compile:
    model.hidden = torch.compile(model.hidden)

  if a.mode == "train":
    call = partial(
      train_step,
      model,
      make_optimizer(model, lr=1e-3, weight_decay=0.1),
      tokens_BL,
      a.V - 1,
      torch.bfloat16 if a.bf16 else None,
    )
    seconds = measure(call, a.warmup, a.steps, a.device)
    result = {"ms_per_step": 1e3 * seconds, "tokens_per_second": tokens_BL.numel() / seconds}
  else:
    call = partial(
      generate, model, tokens_BL, a.gen, a.block, a.steps, cfg_scale=a.cfg, mask_id=a.V - 1, block_head=a.block_head
    )
    seconds = measure(call, a.warmup, a.repeats, a.device)
    result = {
      "ms_per_step": 1e3 * seconds / a.steps,
      "ms_per_call": 1e3 * seconds,
      "tokens_per_second": a.B * a.gen / seconds,
    }  # generated ones only
  result |= {"parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__}
  result |= vars(a)
  print(json.dumps(result) if a.json else "  ".join(f"{k}={v}" for k, v in result.items()))


if __name__ == "__main__":
  main()
