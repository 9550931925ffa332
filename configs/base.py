"""Every field once. Other configs start from here and change what makes them what they are.

A field that no config changes from this file's value has no business being here.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference


def _optional(value=None) -> FieldReference:
  """A field that may be None, on the command line too."""
  return FieldReference(value, field_type=object)


def get_config() -> ConfigDict:
  """The defaults; model sizes and the corpus are for the other configs to say."""
  config = ConfigDict()
  config.seed = 0  # of the parameters, the data order and the noise
  config.objective = "diffusion"  # | "autoregressive": the causal baseline on the same batches
  config.init_from = ""  # WORKDIR (its last checkpoint) or WORKDIR/checkpoints/STEP: parameters, their shape, tokenizer
  config.steps = 1000  # updates
  config.micro_batches = 1  # parts of a batch whose gradients are added up before the update

  config.model = ConfigDict()
  config.model.D = 256  # model width
  config.model.N = 4  # layers
  config.model.H = 4  # query heads
  config.model.G = 4  # key/value heads; fewer than H: grouped-query attention
  config.model.K = 64  # head width
  config.model.F = 768  # feed-forward width (SwiGLU, three matrices)
  config.model.V = 0  # rows of the embedding; 0: what the tokenizer needs
  config.model.tied = False  # one matrix for embedding and head
  config.model.rope_theta = 500_000.0
  config.model.norm_eps = 1e-5
  config.model.max_length = 4096  # longest canvas
  config.model.dtype = "auto"  # of the computation: bfloat16 on accelerators, float32 on a CPU
  config.model.attention = "auto"  # kernel of full passes: the fastest exact one | "xla" | "cudnn" | "splash"
  # What the backward pass computes again: "none" | "dots" (all but matmuls) | "attention" (all but it) | "full" (all).
  config.model.remat = "none"
  config.model.head_chunk = 8192  # tokens of a device whose logits exist at once
  config.model.lora_rank = 0  # of adapters (LoRA), which alone are trained then, on init_from; 0: none
  config.model.lora_alpha = 16.0  # their product counts alpha / rank times
  config.model.lora_targets = ("q", "k", "v", "out", "gate", "up", "down")  # the matrices that have them

  config.tokenizer = ConfigDict()
  config.tokenizer.kind = "sentencepiece"  # | "bytes" | "huggingface" (a tokenizer.json)
  config.tokenizer.path = ""  # of a .model or tokenizer.json; "": train SentencePiece on the corpus
  config.tokenizer.vocab_size = 1024  # to train, special tokens included
  config.tokenizer.eos = "<|endoftext|>"  # names of special tokens; added behind the vocabulary if it lacks them
  config.tokenizer.mask = "<|mdm_mask|>"
  config.tokenizer.pad = ""  # "": the EOS

  config.data = ConfigDict()
  # | "stdlib" | "facts" | "files:GLOB_OR_FOLDER[,...]" (text, JSON, Parquet) | "tfds:NAME[:SPLIT]" | "records:FOLDER"
  config.data.corpus = "unicode"
  config.data.mixture = ()  # ((corpus, weight), ...): several, in place of corpus
  config.data.stages = ()  # ((length, (weight, ...)), ...): weights of each stage; lengths as in optimizer.schedule
  config.data.format = "text"  # | "chat": conversations, of which replies are learnt (fine-tuning)
  config.data.text_field = "text"  # of records, in text
  config.data.prompt_field = ""  # of records, in chat, together with response_field; "": known names
  config.data.response_field = ""
  config.data.bad_lines = "stop"  # at the first line that cannot be used | "skip", and count them
  # FILE of a test: documents that share 13 words (50 characters, where no spaces part them) with a text in it, or hold
  # a whole one of 8 (31), are left out. FILE:FIELD,...: the texts of these fields alone, and the shorter ones, too.
  config.data.exclude = ""
  config.data.held_out = 0.05  # fraction of the documents kept for evaluation; of records: as they were prepared
  config.data.length = 64  # tokens of a row
  config.data.batch_size = 64  # rows of an update
  config.data.segments = False  # documents of a row do not see each other; False: concatenated, as published
  config.data.random_lengths = 0.0  # fraction of rows cut to a random length; LLaDA: 0.01
  # In chat a reply is filled up with EOS, which count: to the "batch"'s longest row, as published, or the "row"'s end;
  # "none": it ends with one.
  config.data.eos_padding = "batch"
  config.data.packing = False  # several conversations in a row, which do not see each other; with eos_padding="none"

  config.noise = ConfigDict()
  config.noise.masking = "independent"  # as published | "exact": exactly l of L tokens, less variance
  config.noise.times = "uniform"  # as published | "stratified" | "antithetic", less variance
  config.noise.eps = 1e-3  # smallest mask probability

  config.optimizer = ConfigDict()
  # Straight pieces (length, learning rate at the end); length: steps, or a fraction of all steps, or -1 for the rest.
  config.optimizer.schedule = ((0.05, 1e-3), (-1, 1e-3), (0.2, 0.0))
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.eps = 1e-8
  config.optimizer.weight_decay = 0.1  # of matrices
  config.optimizer.clip = 1.0  # global norm of the gradient; 0: none

  config.mesh = ConfigDict()  # devices along each axis; -1: the rest
  config.mesh.slices = 1  # groups that only the network joins: slices of TPUs, nodes of GPUs; -1: as many as there are
  config.mesh.data = -1  # copies of the parameters, each with its part of the batch
  config.mesh.fsdp = 1  # parameters and batch sliced
  config.mesh.tensor = 1  # heads, feed-forward and vocabulary sliced
  config.mesh.context = 1  # the canvas sliced

  config.checkpoint = ConfigDict()
  config.checkpoint.every = 1000  # steps
  config.checkpoint.keep = 2  # the newest so many
  config.checkpoint.keep_every = 0  # and, for good, those whose step is a multiple of this; 0: none

  config.log = ConfigDict()
  config.log.every = 1  # steps between lines of metrics.jsonl
  config.log.console_every = 50  # steps between lines on the console
  config.log.tensorboard = True
  config.log.profile_first = 0  # profiler trace from this step ...
  config.log.profile_last = 0  # ... up to this one; 0: none
  # A step, its compilation, a save, or a batch of an evaluation that takes longer ends the run; 0: nothing does.
  config.log.hang_seconds = 1800.0

  config.evaluate = ConfigDict()
  config.evaluate.every = 0  # steps between evaluations of the held-out bound; 0: at the end only
  config.evaluate.num_samples = 16  # masks per row
  config.evaluate.rows = 0  # rows used before the end; 0: all
  config.evaluate.batch_size = 64  # rows of a forward pass
  # "reversal" (of the facts), "poems:FILE" (couplets; "poems_chat:FILE": in a conversation), or lm-eval's:
  # "llada_base/gsm8k" (as published), "lladax_gsm8k" (with what `sample` sets besides the defaults).
  config.evaluate.tasks = ()
  config.evaluate.data_dir = ""  # folder of local benchmarks for lm-eval's tasks; "": it fetches its own
  config.evaluate.limit = 0  # questions of each of lm-eval's tasks; 0: all
  config.evaluate.allow_code = False  # generated code may be run, in a sandbox
  config.evaluate.canvases = ()  # texts with "[MASK]"s, filled at the end; in chat: what the user says, answered

  config.sample = ConfigDict()
  config.sample.gen_length = _optional(64)  # tokens after a prompt; None: blocks until EOS
  config.sample.block_length = 32  # filled together
  config.sample.steps = 64  # forward passes
  config.sample.temperature = 0.0  # 0: the most probable token
  config.sample.remasking = "low_confidence"  # | "random" | "low_margin" | "high_entropy"
  config.sample.threshold = _optional()  # keep all that is more confident; or
  config.sample.factor = _optional()  # keep the most candidates k with (k + 1)(1 - k-th confidence) < factor
  config.sample.guidance_scale = 0.0
  config.sample.cache = _optional()  # "prefix" | "dual"
  config.sample.early_stop = False  # a block with an EOS ends its row
  config.sample.logits_eos_inf = False  # EOS is never drawn
  config.sample.confidence_eos_eot_inf = False  # EOS and EoT wait until the last
  config.sample.seed = 0
  return config
