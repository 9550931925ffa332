"""What 8 and 4 bits cost a model: bits per byte of held-out text, and agreement with the model as it was trained.

python benchmarks/quantize.py runs/quickstart [GROUPS]   # as in 32,64,128,0; 0: a scale for all inputs of an output

Every kind of bits times every width of groups, of the same workdir, on the same masks: bits per byte (the bound) with
its difference from full weights, and its standard error over rows; at masked places of the held-out rows, half of each
row masked, how often the likeliest token is the same, and the mean divergence of the two distributions.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

import lladax
from lladax import config
from lladax.data import sources
from lladax.evaluation import held_out
from lladax.inference.llada import LLaDA
from lladax.model import quantized
from lladax.model.mask_predictor import Block


def likeliest(llada: LLaDA, tokens_RL: np.ndarray, masked_RL: np.ndarray) -> np.ndarray:
  """Log p [places, V] of what is masked."""
  logits = [
    llada.logits(np.where(masked, llada.mask_id, tokens))[masked][:, : llada.vocab_size]
    for tokens, masked in zip(np.split(tokens_RL, 4), np.split(masked_RL, 4), strict=True)
  ]
  return np.asarray(jax.nn.log_softmax(np.concatenate(logits)))


def measured(llada: LLaDA, c: config.Config, tokens_RL: np.ndarray, masked_RL: np.ndarray) -> tuple[dict, np.ndarray]:
  """The bound on as many held-out rows, without yardsticks, and what `likeliest` says."""
  return held_out.bound(llada, c, rows=len(tokens_RL)), likeliest(llada, tokens_RL, masked_RL)


def bits_per_weight(params, weights: int) -> float:
  """Of the matrices in bits, with their scales."""
  matrices = [x for x in params["blocks"].values() if isinstance(x, dict)]
  return 8 * sum(x["bits"].nbytes + x["scale"].nbytes for x in matrices) / weights


def main(workdir: str, groups: list[int]) -> list[dict]:
  c, full = config.load(Path(workdir)), lladax.load(workdir, weights="full")
  found = sources.held_out(c.data, full.tokenizer)
  assert found is not None
  rows = min(found.num_rows - 1, 128) // 4 * 4
  tokens_RL = found.take(np.linspace(0, found.num_rows - 1, rows).round().astype(int))[0]
  masked_RL = np.random.default_rng(0).permuted(np.tile(np.arange(tokens_RL.shape[1]) % 2 == 0, (rows, 1)), axis=1)
  bound, log_p = measured(full, c, tokens_RL, masked_RL)
  print(f"{full.model.num_params():,} parameters, {rows} rows, {masked_RL.sum():,} masked places; full weights:"
        f" {bound['bits_per_byte']:.4f} ± {bound['bits_per_byte_stderr']:.4f} bits per byte\n")  # fmt: skip
  print(
    "| weights | group | bits a weight | bits per byte | more than full | same token | nats apart |\n|" + "---|" * 7
  )
  table, weights = [], sum(full.params["blocks"][name].size for name in Block.MATRICES)
  for kind in quantized.KINDS[1:]:
    for group in groups:
      model = dataclasses.replace(full.model, weights=kind)
      params = jax.jit(model.freeze, static_argnames="group")(full.params, group=group)
      # Multiplied out it says the same (a test), and one program does for all.
      whole = {
        name: quantized.dequantize(quantized.Matrix(**x), kind, np.float32) if isinstance(x, dict) else x
        for name, x in params["blocks"].items()
      }
      llada = dataclasses.replace(full, params=params | {"blocks": whole})
      there, log_q = measured(llada, c, tokens_RL, masked_RL)
      table.append({
        "weights": kind, "group": group, "bits": bits_per_weight(params, weights),
        "bits_per_byte": there["bits_per_byte"],
        "more": there["bits_per_byte"] - bound["bits_per_byte"],
        "same": float(np.mean(log_p.argmax(axis=1) == log_q.argmax(axis=1))),
        "divergence": float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1))),
      })  # fmt: skip
      x = table[-1]
      print(f"| {kind} | {group or 'all'} | {x['bits']:.2f} | {x['bits_per_byte']:.4f} | {x['more']:+.4f} |"
            f" {x['same']:.1%} | {x['divergence']:.4f} |", flush=True)  # fmt: skip
  return table


if __name__ == "__main__":
  workdir, *rest = sys.argv[1:]
  result = main(workdir, [int(x) for x in (rest[0] if rest else "32,64,128,0").split(",")])
  print("\n" + json.dumps(result))
