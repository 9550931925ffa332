"""A tiny model, questions to it, and files that would run if they were read by a pickle."""

import dataclasses
import json
import lzma
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np

from lladax.data import tokenizer
from lladax.inference.llada import LLaDA
from lladax.model.mask_predictor import MaskPredictorConfig


def tiny(**fields):
  """A tiny random LLaDA over bytes."""
  text = tokenizer.create(tokenizer.TokenizerConfig(kind="bytes"))
  shape = {"D": 12, "N": 1, "H": 2, "G": 1, "K": 6, "F": 16, "V": text.rows, "max_length": 96, "dtype": "float32"}
  c = MaskPredictorConfig(**(shape | fields))
  rng, shapes = np.random.default_rng(0), jax.eval_shape(c.init, jax.random.key(0))
  params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32), shapes)
  return LLaDA(c, params, text, text.mask_id, text.eos_id, text.vocab_size, text.eot_id)


def requests(kind, *arguments):
  from lm_eval.api.instance import Instance

  where = [("task", 10 + i, 1) for i in range(len(arguments))]
  rows = zip(where, arguments, strict=True)
  return [Instance(request_type=kind, doc={}, arguments=x, idx=0, metadata=metadata) for metadata, x in rows]


def write(folder, name, rows):
  path = folder / f"{name}.jsonl.xz"
  path.parent.mkdir(parents=True, exist_ok=True)
  with lzma.open(path, "wt") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)


def bombs(marker):
  """Contents that make the folder `marker` if something that reads them runs what they hold."""

  class Bomb:
    def __reduce__(self):
      return os.mkdir, (str(marker),)

  call = f"__import__('os').mkdir({str(marker)!r})"
  return pickle.dumps(Bomb(), 2), call.encode(), f"!!python/object/apply:os.mkdir [{str(marker)!r}]".encode()


class Words:
  """A tokenizer whose tokens are words, so that tokens and bytes differ."""

  eos_id, mask_id, vocab_size, rows = 0, 1, 40, 128
  words: list[str] = []

  def encode(self, text):
    self.words += [word for word in dict.fromkeys(text.split()) if word not in self.words]
    return [2 + self.words.index(word) for word in text.split()]


def random_model(config, text, scale=0.3):
  """A model with random parameters, drawn without compiling anything."""
  model = dataclasses.replace(config.model, V=text.rows)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  params = jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32), shapes)
  return LLaDA(model, params, text, text.mask_id, text.eos_id, text.vocab_size)
