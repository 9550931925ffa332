"""Published checkpoints, both ways: a folder of config.json and *.safetensors, as LLaDA and iLLaDA come.

The life of a tensor: rows of a mapped file -> the device, in the file's shape and dtype -> one compiled program
that reshapes, transposes, casts and writes them into their place in the stacked parameter, where they stay. The
host never holds more than one tensor of a layer, or `_ROWS` rows of the vocabulary; export is the same backwards.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers as hf_tokenizers
from jax.sharding import NamedSharding, PartitionSpec

from lladax import checkpoint, safetensors
from lladax import template as templates
from lladax import tokenizer as tokenizers
from lladax.mask_predictor import MaskPredictorConfig, Params
from lladax.mistake import Missing, Mistake

_ROWS = 8192  # of the vocabulary that are moved at once
KEPT = (".json", ".jinja", ".model", ".py", ".txt")  # of a published folder, beside its tensors

# Our parameter, its letters on disk (a space between the axes; matrices are [out, in]), and its names: LLaDA, iLLaDA.
NAMES = (
  ("embedding", "V D", "model.transformer.wte", "model.embed_tokens"),
  ("blocks/attention_norm", "D", "model.transformer.blocks.{}.attn_norm", "model.layers.{}.input_layernorm"),
  ("blocks/q", "HK D", "model.transformer.blocks.{}.q_proj", "model.layers.{}.self_attn.q_proj"),
  ("blocks/k", "GK D", "model.transformer.blocks.{}.k_proj", "model.layers.{}.self_attn.k_proj"),
  ("blocks/v", "GK D", "model.transformer.blocks.{}.v_proj", "model.layers.{}.self_attn.v_proj"),
  ("blocks/out", "D HK", "model.transformer.blocks.{}.attn_out", "model.layers.{}.self_attn.o_proj"),
  ("blocks/ff_norm", "D", "model.transformer.blocks.{}.ff_norm", "model.layers.{}.post_attention_layernorm"),
  ("blocks/gate", "F D", "model.transformer.blocks.{}.ff_proj", "model.layers.{}.mlp.gate_proj"),
  ("blocks/up", "F D", "model.transformer.blocks.{}.up_proj", "model.layers.{}.mlp.up_proj"),
  ("blocks/down", "D F", "model.transformer.blocks.{}.ff_out", "model.layers.{}.mlp.down_proj"),
  ("final_norm", "D", "model.transformer.ln_f", "model.norm"),
  ("head", "V D", "model.transformer.ff_out", "lm_head"),
)
# Our field, and its names in config.json: LLaDA, iLLaDA.
FIELDS = (
  ("D", "d_model", "hidden_size"),
  ("N", "n_layers", "num_hidden_layers"),
  ("H", "n_heads", "num_attention_heads"),
  ("G", "n_kv_heads", "num_key_value_heads"),
  ("F", "mlp_hidden_size", "intermediate_size"),
  ("V", "embedding_size", "vocab_size"),
  ("tied", "weight_tying", "tie_word_embeddings"),
  ("rope_theta", "rope_theta", "rope_theta"),
  ("norm_eps", "rms_norm_eps", "rms_norm_eps"),
  ("max_length", "max_sequence_length", "max_position_embeddings"),
)
# What the mask predictor computes; a config.json that says otherwise is refused. LLaDA's first, then iLLaDA's.
_LLADA_OPTIONS: dict[str, tuple] = {
  "block_type": ("llama",), "activation_type": ("silu",), "layer_norm_type": ("rms",), "rope": (True,),
  "layer_norm_with_affine": (True,), "bias_for_layer_norm": (False, None), "include_bias": (False,),
  "include_qkv_bias": (False, None), "alibi": (False,), "input_emb_norm": (False,), "scale_logits": (False,),
  "attention_layer_norm": (False,), "clip_qkv": (None,), "multi_query_attention": (None, False),
  "block_group_size": (1,), "attention_dropout": (0.0,), "residual_dropout": (0.0,), "embedding_dropout": (0.0,),
}  # fmt: skip
_OPTIONS = _LLADA_OPTIONS | {
  "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "layer_norm_eps": (None,),
  "resid_pdrop": (0.0,), "embd_pdrop": (0.0,), "quantization_config": (None,), "rope_scaling": (None, {}),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Published:
  """A published folder that has passed every check; no tensor is read yet."""

  folder: Path
  family: int  # column of the tables: 0 LLaDA, 1 iLLaDA
  model: MaskPredictorConfig
  tensors: dict[str, safetensors.Tensor]
  identity: dict[str, Any]  # what LLaDA has beside model and params: tokenizer, mask_id, eos_id, ...


def is_published(folder: Path) -> bool:
  """Whether the folder's config.json is a published one, and not a workdir's."""
  path = folder / "config.json"
  return path.is_file() and _family(_json(path)) is not None


def find(source: str | Path) -> Path:
  """The folder itself, or the folder of a hub name (OWNER/NAME), downloaded.

  Raises:
    Missing: it is neither.
    Mistake: it may be a hub name, but huggingface_hub is not installed.
  """
  folder = Path(source).expanduser()
  if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
    return folder
  try:
    hub = importlib.import_module("huggingface_hub")
  except ImportError:
    raise Mistake(
      f"{source}: there is no such folder; if it is a name on the Hugging Face hub: pip install huggingface_hub"
    ) from None
  try:
    return Path(hub.snapshot_download(str(source), allow_patterns=["*.safetensors", *(f"*{x}" for x in KEPT)]))
  except Exception as error:  # of the network, of the hub, of the name: one line serves for all
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise Missing(f"{source}: there is no such folder, and not on the hub either: {why}") from error


def read(folder: Path) -> Published:
  """Reads config.json, the tokenizer and the headers of the tensors' files, and checks them against each other.

  Raises:
    Missing: no config.json, or no file of tensors.
    Mistake: everything that is wrong, in one line.
  """
  if not (folder / "config.json").is_file():
    raise Missing(f"{folder}: there is no config.json in it")
  config = _json(folder / "config.json")
  problems: list[str] = []
  family = _family(config)
  if family is None:
    raise Mistake(f"{folder}: config.json is not LLaDA's: there is neither d_model nor hidden_size in it")
  model, tensors = _model(config, family, problems), safetensors.headers(folder, problems)
  if model is not None:
    _compare(model, family, tensors, problems)
  if problems or model is None:
    raise Mistake(f"{folder}: {'; '.join(problems)}")
  return Published(folder, family, model, tensors, identity(folder, model))


def identity(folder: Path, model: MaskPredictorConfig, text: tokenizers.Tokenizer | None = None) -> dict[str, Any]:
  """Tokenizer (None without its files) and special ids of a published folder, under their names in LLaDA."""
  config = _json(folder / "config.json")
  said = [config.get("eos_token_id"), templates.read(folder / "generation_config.json").get("eos_token_id")]
  ends = [i for x in said for i in (x if isinstance(x, list) else [x]) if i is not None]
  eos_id, mask_id = ends[0] if ends else None, config.get("mask_token_id")
  if text is None and (folder / tokenizers.SETTINGS).is_file():
    text = tokenizers.load(folder)
  elif text is None and (folder / "tokenizer.json").is_file():
    names = _tokenizer_config(folder / "tokenizer.json", eos_id, mask_id, config.get("pad_token_id"))
    text = tokenizers.published(names, ends)
  if text is not None:
    if text.vocab_size > model.V:  # of an import that appended chat tokens behind the last row
      text = text.bare()
    found = {name: getattr(text, name) for name in ("mask_id", "eos_id", "eot_id", "vocab_size")}
    found["vocab_size"], ends = min(text.vocab_size, model.V), [*text.ends, *ends]
  else:
    eot_id = 126348 if mask_id == 126336 else None  # LLaDA's own vocabulary
    vocab_size = min(config.get("vocab_size") or model.V, model.V)
    found = {"mask_id": mask_id, "eos_id": eos_id, "eot_id": eot_id, "vocab_size": vocab_size}
  for name in ("mask_id", "eos_id"):
    if not isinstance(found[name], int) or not 0 <= found[name] < model.V:
      field = name.replace("_id", "_token_id")
      raise Mistake(f"{folder}/config.json: {field}={found[name]}, and the embedding has {model.V} rows")
  ends = [i for i in (found["eos_id"], found["eot_id"], *ends) if i is not None]
  for i in ends:
    if not isinstance(i, int) or not 0 <= i < model.V:
      raise Mistake(f"{folder}: token {json.dumps(i)} ends a text, and the embedding has {model.V} rows")
  return {"tokenizer": text, "ends": tuple(dict.fromkeys(ends))} | found


def _tokenizer_config(path: Path, eos_id, mask_id, pad_id) -> tokenizers.TokenizerConfig:
  """The special tokens' names, looked up by the ids of config.json (iLLaDA's names no mask)."""
  vocabulary = hf_tokenizers.Tokenizer.from_file(str(path))
  if mask_id is None:
    known = [name for name in ("<|mdm_mask|>", "<[MASK]>") if vocabulary.token_to_id(name) is not None]
    if not known:
      raise Mistake(f"{path.parent}/config.json: mask_token_id is missing, and the tokenizer names no mask either")
    mask_id = vocabulary.token_to_id(known[0])
  names = {}
  for field, id in (("eos_token_id", eos_id), ("mask_token_id", mask_id), ("pad_token_id", pad_id)):
    name = None if id is None else vocabulary.id_to_token(id)
    if name is None and not (field == "pad_token_id" and id is None):
      raise Mistake(f"{path.parent}/config.json: {field}={id} is no token of {path.name}")
    names[field] = name or ""
  eos, mask, pad = names.values()
  return tokenizers.TokenizerConfig("huggingface", str(path), eos=eos, mask=mask, pad=pad if pad != eos else "")


def _json(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text("utf-8"))
  except ValueError as error:
    raise Mistake(f"{path} is no JSON: {error}") from None


def _family(config: dict[str, Any]) -> int | None:
  """Which column of the tables: 0 LLaDA, 1 iLLaDA; None: neither."""
  return 0 if "d_model" in config else 1 if "hidden_size" in config else None


def _model(config: dict[str, Any], family: int, problems: list[str]) -> MaskPredictorConfig | None:
  """The model of a config.json; what is wrong with it is added to `problems`."""
  for name, allowed in _OPTIONS.items():
    value = config.get(name, allowed[0])
    if name == "rope_scaling" and isinstance(value, dict):  # spelled out, but none
      kind = value.get("rope_type", value.get("type", "default"))
      value = {} if kind == "default" and value.get("factor", 1.0) == 1.0 else value
    if value not in allowed:
      problems.append(f"{name}={json.dumps(value)} is not supported, only {json.dumps(allowed[0])}")
  fields: dict[str, Any] = {}
  stand_in = {"G": config.get("n_heads", config.get("num_attention_heads")), "V": config.get("vocab_size")}
  if family == 0 and isinstance(config.get("mlp_ratio"), int) and isinstance(config["d_model"], int):
    stand_in["F"] = config["mlp_ratio"] * config["d_model"]
  for field, *names in FIELDS:
    name, value = names[family], config.get(names[family])
    value = stand_in.get(field) if value is None else value
    kind = MaskPredictorConfig.__annotations__[field]
    if value is None:
      problems.append(f"{name} is missing")
    elif isinstance(value, bool) != (kind is bool) or not isinstance(value, int | kind):
      problems.append(f"{name}={json.dumps(value)}: expected {kind.__name__}")
    else:
      fields[field] = kind(value)
  if len(fields) < len(FIELDS):
    return None
  head_width = config.get("head_dim") or fields["D"] // max(fields["H"], 1)
  if head_width * fields["H"] != fields["D"]:
    names = [names[family] for field, *names in FIELDS if field in ("D", "H")]
    problems.append(f"{names[0]}={fields['D']} is not {names[1]}={fields['H']} heads of one width")
    return None
  try:
    return MaskPredictorConfig(**fields, K=head_width)
  except Mistake as error:
    problems.append(f"config.json: {error}")
    return None


class _Piece(NamedTuple):
  """A published tensor, and its place in a parameter."""

  name: str
  path: str
  disk: str  # its letters on disk
  letters: str  # the parameter's letters
  layer: int

  @property
  def axis(self) -> int:
    """Of the parameter, along which the tensor is moved: by layers, or by rows of the vocabulary."""
    return max(self.letters.find("V"), 0)

  def moves(self, c: MaskPredictorConfig, rows: int) -> list[tuple[int, int]]:
    """(start, size) along the axis."""
    if "V" not in self.letters:
      return [(self.layer, 1 if self.letters[0] == "N" else c.D)]
    return [(start, min(rows, c.V - start)) for start in range(0, c.V, rows)]


def _pieces(c: MaskPredictorConfig, family: int) -> Iterator[_Piece]:
  letters = dict(checkpoint.flat(c.letters()))
  for path, disk, *names in NAMES:
    for layer in range(c.N) if path.startswith("blocks/") else (0,):
      if path in letters:  # a tied model has no head
        yield _Piece(f"{names[family].format(layer)}.weight", path, disk, letters[path], layer)


def _disk_shape(c: MaskPredictorConfig, disk: str) -> tuple[int, ...]:
  return tuple(math.prod(getattr(c, letter) for letter in axis) for axis in disk.split())


def _compare(c: MaskPredictorConfig, family: int, tensors: dict[str, safetensors.Tensor], problems: list[str]) -> None:
  """Missing, misshapen and extra tensors, each by name."""
  expected = {piece.name: _disk_shape(c, piece.disk) for piece in _pieces(c, family)}
  for name, shape in expected.items():
    found = tensors.get(name)
    if found is None:
      problems.append(f"{name} is missing")
    elif found.shape != shape:
      problems.append(f"{name} is of shape {list(found.shape)}, expected {list(shape)}")
    elif found.dtype not in safetensors.DTYPES:
      problems.append(f"{name} is of dtype {found.dtype}, expected one of {', '.join(safetensors.DTYPES)}")
  tied_head = NAMES[-1][2 + family] + ".weight"
  for name in sorted(tensors.keys() - expected.keys()):
    if name != tied_head or not c.tied:
      problems.append(f"{name} is not known")
    elif not problems:  # some writers spell a tied head out: it must be the embedding
      head, embedding = tensors[name], tensors[NAMES[0][2 + family] + ".weight"]
      slabs = [(start, min(_ROWS, c.V - start)) for start in range(0, c.V, _ROWS)]
      same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
      if not same or any((head.rows(*slab) != embedding.rows(*slab)).any() for slab in slabs):
        problems.append(f"{name} is not the embedding, and the two are tied")


def load_params(published: Published, shardings: Any = None, dtype: Any = None) -> Params:
  """Reads the tensors into stacked parameters; every device reads what it keeps.

  Args:
    published: what `read` returned.
    shardings: tree like the parameters', as from `sharding.shardings(mesh, model.letters())`; None: on one device.
    dtype: of the parameters; None keeps that of the files.
  """
  c, flat = published.model, {}
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  at = dict(checkpoint.flat(shardings or jax.tree.map(lambda _: here, c.letters())))
  for path, group in itertools.groupby(_pieces(c, published.family), key=lambda piece: piece.path):
    pieces = list(group)
    letters, disk = pieces[0].letters, pieces[0].disk
    kept = dtype or functools.reduce(
      jnp.promote_types, {safetensors.DTYPES[published.tensors[x.name].dtype] for x in pieces}
    )
    disk_at, where = at[path], {}
    if isinstance(disk_at, NamedSharding):  # the axes of the file are cut as ours will be
      where = dict(zip(letters, disk_at.spec, strict=False))
      disk_at = NamedSharding(disk_at.mesh, PartitionSpec(*(where.get(axis[0]) for axis in disk.split())))
    rows = _ROWS if where.get("V") is None else c.V
    new = functools.partial(jnp.zeros, tuple(getattr(c, letter) for letter in letters), kept)
    x = jax.jit(new, out_shardings=at[path])()
    fill = functools.partial(_fill, c=c, disk=disk, letters=letters, axis=pieces[0].axis)
    fill = jax.jit(fill, out_shardings=at[path], donate_argnums=0)
    for piece in pieces:
      tensor = published.tensors[piece.name]
      for start, size in piece.moves(c, rows):
        slab = tensor.rows(start, size) if "V" in letters else tensor.rows()
        slab = jax.make_array_from_callback(slab.shape, disk_at, slab.__getitem__)
        x = jax.block_until_ready(fill(x, slab, start))  # or slabs would pile up
    flat[path] = x
  blocks = {path.removeprefix("blocks/"): x for path, x in flat.items() if path.startswith("blocks/")}
  return {path: x for path, x in flat.items() if "/" not in path} | {"blocks": blocks}


def _fill(x: jax.Array, slab: jax.Array, start, *, c: MaskPredictorConfig, disk: str, letters: str, axis: int):
  """Writes a tensor of a file, or some rows of it, into its place in a parameter."""
  sizes = [
    [getattr(c, letter) for letter in group] if group[1:] else [n]
    for group, n in zip(disk.split(), slab.shape, strict=True)
  ]
  order = disk.replace(" ", "")
  slab = slab.reshape(list(itertools.chain(*sizes))).transpose([order.index(letter) for letter in letters.lstrip("N")])
  slab = slab[None] if letters[0] == "N" else slab
  return jax.lax.dynamic_update_slice_in_dim(x, slab.astype(x.dtype), start, axis)


@functools.partial(jax.jit, static_argnames=("disk", "letters", "axis", "size", "dtype"))
def _take(x: jax.Array, start, *, disk: str, letters: str, axis: int, size: int, dtype: np.dtype) -> jax.Array:
  """The inverse of `_fill`."""
  slab = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
  slab, letters = (slab[0], letters[1:]) if letters[0] == "N" else (slab, letters)
  slab = slab.transpose([letters.index(letter) for letter in disk.replace(" ", "")])
  sizes = iter(slab.shape)
  return slab.reshape([math.prod(itertools.islice(sizes, len(group))) for group in disk.split()]).astype(dtype)


def export(
  params: Params,
  model: MaskPredictorConfig,
  folder: Path,
  config: dict[str, Any],
  *,
  dtype: Any = None,
  max_shard_bytes: int = 4 * 2**30,
) -> None:
  """Writes parameters in the published layout: files of tensors, an index if there are several, config.json.

  Args:
    params: of the model.
    model: its shape.
    folder: new, or without tensors.
    config: to be config.json; its names decide between LLaDA's and iLLaDA's.
    dtype: of the tensors; None keeps that of the parameters.
    max_shard_bytes: of the tensors of a file.

  Raises:
    Mistake: the layout cannot say this, or the folder holds tensors already.
  """
  check_exportable(model)
  if any(folder.glob("*.safetensors")):
    raise Mistake(f"{folder} holds *.safetensors already: name a new folder")
  family, flat = _family(config), dict(checkpoint.flat(params))
  assert family is not None
  shards, sizes = [[]], [0]
  for piece in _pieces(model, family):
    kept = np.dtype(dtype or flat[piece.path].dtype)
    size = math.prod(_disk_shape(model, piece.disk)) * kept.itemsize
    if sizes[-1] and sizes[-1] + size > max_shard_bytes:
      shards.append([])
      sizes.append(0)
    shards[-1].append((piece, kept))
    sizes[-1] += size

  def slabs(shard) -> Iterator[np.ndarray]:
    for piece, kept in shard:
      options = {"disk": piece.disk, "letters": piece.letters, "axis": piece.axis, "dtype": kept}
      for start, size in piece.moves(model, _ROWS):
        yield np.asarray(_take(flat[piece.path], start, size=size, **options))

  folder.mkdir(parents=True, exist_ok=True)
  index = {}
  for number, shard in enumerate(shards, 1):
    name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
    shapes = {piece.name: (kept, _disk_shape(model, piece.disk)) for piece, kept in shard}
    safetensors.write(folder / name, shapes, slabs(shard))
    index |= dict.fromkeys(shapes, name)
  if len(shards) > 1:
    values = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
    (folder / safetensors.INDEX).write_text(json.dumps(values, indent=2) + "\n")
  (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def check_exportable(model: MaskPredictorConfig) -> None:
  """Raises Mistake for a model that the published layout cannot say."""
  if model.causal:
    raise Mistake("model.causal=True: the published layout is that of mask predictors")
  if model.H * model.K != model.D:
    raise Mistake(f"model.H={model.H} times model.K={model.K} is not model.D={model.D}, as the published layout wants")


def new_config(model: MaskPredictorConfig, text: tokenizers.Tokenizer) -> dict[str, Any]:
  """The config.json, in LLaDA's words, of a model that was not imported."""
  config: dict[str, Any] = {"model_type": "llada", "architectures": ["LLaDAModelLM"]}
  config |= {name: allowed[0] for name, allowed in _LLADA_OPTIONS.items()}
  config |= {name: getattr(model, field) for field, name, _ in FIELDS}
  config |= {f"{name}_token_id": getattr(text, f"{name}_id") for name in ("mask", "eos", "pad")}
  return config | {"vocab_size": text.vocab_size}
