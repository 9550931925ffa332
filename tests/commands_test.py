"""Every command of the pages and the benchmarks runs; those of large models and long runs as tiny ones.

A command is found in its page (fenced, or between backticks) or in the head of its file, and meets the first rule that
knows it: a command without a rule fails, and so does a rule without a command. They run in the order of the rules, in
one folder that looks like a checkout: what one makes, a later one finds.
"""

import ast
import contextlib
import functools
import json
import lzma
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import conftest
import numpy as np
import prose
import pytest
import served
import tokenizers

from lladax.data import reading
from lladax.inference import convert

ROOT = prose.ROOT


def documented():
  """(page, command) of all pages and heads of files."""
  found = []
  for page, text in prose.PAGES.items():
    if page != "CHANGELOG.md":  # it tells of commands that were
      found += [(page, x) for x in prose.commands("\n".join([prose.shell(text), *prose.inline(text)]))]
  for path in sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("docs/*.py")]):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    found += [(str(path.relative_to(ROOT)), x) for x in prose.commands(text)]
  for path in sorted((ROOT / "benchmarks").glob("*.sh")):
    head = "".join(line[1:] for line in path.read_text().splitlines(True) if line.startswith("#"))
    found += [(f"benchmarks/{path.name}", x) for x in prose.commands(head)]
  return found


# A model and a run of seconds. A `lladax` that is called, by a script too, gets INSIDE behind its flags.
RUN = shlex.split(
  "--config.steps=3 --config.data.batch_size=8 --config.micro_batches=1 --config.evaluate.num_samples=1"
  " --config.evaluate.every=0 --config.log.tensorboard=False --config.tokenizer.vocab_size=280"
  " --config.optimizer.schedule='((1, 0.001), (-1, 0.0))' --config.sample.gen_length=16"
  " --config.sample.block_length=8 --config.sample.steps=16 --config.data.held_out=0.2"
)
TINY = RUN + [f"--config.model.{x}" for x in ("D=16", "N=2", "H=2", "G=2", "K=8", "F=32", "V=0", "remat=none")]
TINY += ["--config.data.length=64"]
PLAN = [f"--config.model.{x}" for x in ("D=128", "N=2", "H=2", "G=2", "K=64", "F=256", "V=1024")]
PLAN += ["--config.data.length=256", "--config.sample.gen_length=32", "--config.sample.block_length=32"]
CPU = shlex.split(
  "--B 2 --L 16 --V 128 --D 16 --N 1 --H 2 --K 8 --F 32 --prompt 8 --gen 8 --block 4 --steps 4 --rounds 1 --rows 1"
)
FRONTIER = shlex.split("--limit=2 --batch_size=2 --gen_length=8 --blocks=8 --steps=4 --thresholds=0.9 --caches=none")
ASKED = ["--config.evaluate.limit=1", "--config.evaluate.tasks=('lladax_arc_challenge', 'lladax_gsm8k')"]


class Rule(NamedTuple):
  """What becomes of the commands in which `pattern` is found."""

  pattern: str
  more: Sequence[str] = ()  # flags that stand behind it; a text: why it is not run
  change: Mapping[str, str] = {}  # noqa: RUF012  text -> what stands there instead
  makes: str = ""  # is there afterwards
  inside: Sequence[str] = ()  # flags of every `lladax`
  needs: str = ""  # packages, without which it is skipped
  asks: str = ""  # a workdir: that is served where the command thinks that a server is


RULES = [
  Rule(
    r"^pip install -e \S+( && (\S*pip|pytest|pre-commit).*)?$|^python3 -m venv|^pip wheel",
    "CI installs, in a fresh environment",
  ),
  Rule(r"sphinx-build", "docs_test.py builds them"),
  Rule(r"^pip install torch==\S+$|^pip install -e \S+ torch$", "a benchmark's own package"),
  Rule(r"^(gcloud|kubectl|sbatch|launch/tpu_vm\.sh)", "launch_test.py plays the cluster"),
  Rule(r"^(docker|export|scancel|tail|xpk) ", "on a cluster, beside what launch_test.py plays"),
  Rule(r"^(ruff|deno|\.ci/run)", "that is CI"),
  Rule(r"^(lladax|python -m lladax.main)( --config=\.\.\. --workdir=\.\.\.)?$", "the name of a command"),
  Rule(r"^python benchmarks/scaling.py$", "its fields stand in the command below it"),
  Rule(r"\.\.\.|\[flags|^benchmarks/\w+\.sh.*FIELD=VALUE", "in full, and run, in README"),
  Rule(r"^pytest( -m slow)?$", "that is CI"),
  Rule(r"^pytest", shlex.split("--collect-only -q -p no:cacheprovider -n 0")),
  Rule(
    r"--config=\S*quickstart(\.py)? --workdir=runs/quickstart$", RUN, {"pip install -e . && ": ""},
    "runs/quickstart/samples.html",
  ),
  Rule(r"--allow=optimizer.schedule", [x for x in RUN if "schedule" not in x], makes="runs/quickstart/runs.jsonl"),
  Rule(r"--config=runs/quickstart/config.json", RUN, makes="runs/again/samples.html"),
  Rule(r"^lladax --workdir=runs/quickstart --mode=sample", makes="out.html"),
  Rule(r"^lladax --workdir=runs/quickstart --mode=evaluate", makes="runs/quickstart/evaluation.html"),
  Rule(r"--mode=serve", "serve_test.py starts servers, and what follows asks one"),
  Rule(r"^curl .*127.0.0.1:8000", shlex.split("-s --fail-with-body"), asks="runs/quickstart", needs="uvicorn"),
  Rule(
    r"lladax.harness --model local", shlex.split("--gen_kwargs max_gen_toks=16"), {"--limit 10": "--limit 1"},
    asks="runs/quickstart", needs="lm_eval tenacity aiohttp uvicorn",
  ),
  Rule(r"^python docs/unmasking.py", change={" docs/unmasking.svg": " unmasking.svg"}, makes="unmasking.svg"),
  Rule(r"--workdir=runs/mine --config.data", TINY, makes="runs/mine/samples.html"),
  Rule(r"--workdir=runs/mine --mode=sample|--mode=verify"),
  Rule(r"--workdir=runs/blocks --config.noise", TINY, makes="runs/blocks/samples.html"),
  Rule(
    r"--workdir=runs/phases --config.noise",
    [*TINY, "--config.steps=12", "--config.sample.block_length=32", "--config.sample.gen_length=32"],
    {"(0.1, 4), ": ""}, "runs/phases/samples.html",
  ),
  Rule(r"--mode=sample --workdir=runs/blocks"),
  Rule(r"--workdir=runs/causal", [x for x in TINY if "sample.block" not in x], makes="runs/causal/checkpoints/3"),
  Rule(r"--workdir=runs/becomes", [x for x in TINY if "sample.block" not in x], makes="runs/becomes/samples.html"),
  Rule(r"--workdir=runs/experts", TINY, {"X=96": "X=16"}, "runs/experts/samples.html"),
  Rule(r"--workdir=runs/poems ", TINY, makes="runs/poems/samples.html"),
  Rule(r"--workdir=runs/base ", TINY, makes="runs/base/checkpoints/3"),
  Rule(r"--workdir=runs/chat .*alpaca", TINY, makes="runs/chat/checkpoints/3"),
  Rule(
    r"--workdir=runs/chat_blocks .*alpaca", [*TINY, "--config.data.length=256"],
    makes="runs/chat_blocks/checkpoints/3",
  ),
  Rule(r"--workdir=runs/chat_blocks --mode=chat", ["< questions.txt"]),
  Rule(r"^lladax --workdir=runs/chat --mode=chat --system", ["< questions.txt"]),
  Rule(r"--mode=chat < questions.txt > replies.txt", makes="replies.txt"),
  Rule(r"--mode=import --source=downloads", makes="runs/imported/config.json"),
  Rule(
    r"--workdir=gs://", RUN, {"gs://BUCKET/runs/quickstart": "runs/far", "=/mnt/disk": "=near", "every=50": "every=2"},
    "runs/far/checkpoints/3",
  ),
  Rule(r"--mode=show"),
  Rule(r"--mode=export", makes="downloads/exported/model.safetensors"),
  Rule(r"--mode=import --source=hf://", makes="runs/llada_8b_base/config.json"),
  Rule(r"llada_8b_sft.py:lora --workdir", [*RUN, "--config.data.length=64"], makes="runs/mine_lora/checkpoints/3"),
  Rule(
    r"--mode=prepare .*/data/records/web", (),
    {"/data/": "data/", "--shards=1024": "--shards=2", "num_workers=8": "num_workers=2",
     " -- ": " --config.data.length=64 --config.data.held_out=0.2 -- "},
    "data/records/web/manifest.json",
  ),
  Rule(
    r"--config.data.mixture=.*records/code", TINY, 
    {"/data/records/code": "data/records/web", "/data/records/web": "data/records/web", "/shared/": "shared/"},
    "shared/runs/llada_8b/checkpoints/3",
  ),
  Rule(
    r"--mode=prepare .*/data/records/chat", (),
    {"/data/records": "data/records", "--shards=64": "--shards=2", "num_workers=8": "num_workers=2",
     " -- ": " --config.data.held_out=0.2 -- "},
    "data/records/chat/manifest.json",
  ),
  Rule(r"--workdir=runs/chat_records", TINY, {"/data/records": "data/records"}, "runs/chat_records/checkpoints/3"),
  Rule(r"benchmarks/conversations.py OUT", "in full, and run, in results"),
  Rule(r"benchmarks/conversations.py runs", change={"=40000": "=300"}),
  Rule(r"benchmarks/loader.py --config=CONFIG", TINY, {"CONFIG": "configs/quickstart.py"}),
  Rule(r"--workdir=runs/stdlib ", [*TINY, "--config.mesh.fsdp=1"], makes="runs/stdlib/samples.html"),
  Rule(r"--mode=plan .*=(t4|l4)", PLAN, needs="jax_plugins.xla_cuda13 qwix"),
  Rule(
    r"llada_8b_sft.py:qlora --workdir", [*RUN, "--config.data.length=64"], makes="runs/mine_qlora/checkpoints/3",
    needs="qwix",
  ),
  Rule(r"benchmarks/quantize.py runs/quickstart \[", "its command stands in results"),
  Rule(r"benchmarks/quantize.py runs/quickstart$", ["64"], needs="qwix"),
  Rule(r"--mode=plan .*=h100", PLAN, {"micro_batches=40": "data.batch_size=16"}, needs="jax_plugins.xla_cuda13"),
  Rule(r"--mode=plan", PLAN, {"v5e:16x16": "v5e:4x4 --config.data.batch_size=64"}, needs="libtpu"),
  Rule(r"launch/rooflines.py", "roofline_test.py runs it"),
  Rule(r"launch/plans.py", ["llada_1b:v5e_4x4", *PLAN], {"pip install -e '.[plan,plan-gpu]' && ": ""}, needs="libtpu"),
  Rule(
    r"--mode=evaluate .*llada_base/gsm8k", [*ASKED, "--config.evaluate.data_dir=DIR", "--config.sample.gen_length=8"],
    {"=runs/imported": "=runs/chat"}, "runs/chat/evaluation.html", needs="lm_eval",
  ),
  Rule(
    r"python -m lladax.harness", (),
    {"runs/imported,mc_num=128,gen_length=256": "runs/chat,mc_num=2,gen_length=8", "--limit 100": "--limit 1"},
    needs="lm_eval",
  ),
  Rule(
    r"gsm8k.sh OUT INSTRUCTIONS GSM8K_TRAIN BOOKS$", (),
    {"OUT INST": "runs/gsm8k INST", "INSTRUCTIONS": "alpaca_data.json", "GSM8K_TRAIN": "DIR/math/gsm8k_train.jsonl",
     "BOOKS": "DIR/en/books_children.jsonl"},
    "runs/gsm8k/sft/checkpoints/3", TINY, "apache_beam",
  ),
  Rule(
    r"harness.sh OUT DATA$", [*ASKED, "--config.sample.gen_length=8"], {"OUT DATA": "runs/harness DIR"},
    "runs/harness/model/evaluation.html", TINY, "apache_beam",
  ),
  Rule(  # reversal_test.py asks the facts
    r"benchmarks/reversal.py$", [*TINY, "--config.evaluate.tasks=poems:couplets.json"],
    makes="runs/reversal/reversal.md",
  ),
  Rule(  # which the next one goes on with
    r"--workdir=runs/family/1$",
    [*(x for x in TINY if "sample" not in x), "--config.data.corpus=files:data/a.jsonl.zst", "--config.data.length=32"],
    makes="runs/family/1/checkpoints/3",
  ),
  Rule(
    r"benchmarks/blocks.py$",
    [*(x for x in TINY if "sample" not in x), "--config.data.corpus=files:data/a.jsonl.zst", "--config.data.length=32"],
    makes="runs/family/blocks.svg",
  ),
  Rule(r"benchmarks/conversion.py$", "in full, and run, in results"),
  Rule(
    r"benchmarks/experts.py", shlex.split("--T 64 --D 16 --E 4 --J 2 --X 8 --rounds 1 --only experts,loop,dense"),
    {"pip install torch==2.13.0 && ": "", " --only experts,loop,dense,torch": ""},
  ),
  Rule(
    r"benchmarks/conversion.py --config",
    ["--causal_steps=2", *(x for x in TINY if "sample" not in x), "--config.data.corpus=files:data/a.jsonl.zst"],
    makes="runs/conversion/conversion.svg",
  ),
  Rule(
    r"benchmarks/experts_lm.py$",
    ["--balance_rates=0.01", *(x for x in TINY if "sample" not in x), "--config.data.corpus=files:data/a.jsonl.zst"],
    makes="runs/experts_lm/experts_lm.svg",
  ),
  Rule(
    r"poems.sh OUT TANG_POEMS COUPLETS$", [*TINY, "--config.data.held_out=0.0"],
    {"OUT TANG_POEMS COUPLETS": "runs/couplets poems.jsonl.xz couplets.json"},
    "runs/couplets/reversal.md",
  ),
  Rule(r"scaling.py --config", "scaling_test.py runs a study"),
  Rule(
    r"frontier.py --path=runs/gsm8k", FRONTIER, {"=runs/gsm8k": "=runs/poems --out=runs/frontier_gsm8k"},
    "runs/frontier_gsm8k/frontier.md", needs="lm_eval",
  ),
  Rule(
    r"frontier.py --path", FRONTIER, {"=runs/poems/diffusion": "=runs/poems"}, "runs/frontier/frontier.md",
    needs="lm_eval",
  ),
  Rule(
    r"meshes.py$",
    ["--config.steps=2", "--config.data.held_out=0.0", "--config.evaluate.canvases=()",
     "--config.tokenizer.vocab_size=280", *TINY[len(RUN):-1]],
  ),
  Rule(r"^python benchmarks/cpu.py$", [*CPU, "--only=lladax"]),
  Rule(r"cpu.py", [*CPU, "--only=exact|lladax$"], {"pip install torch==2.13.0 && ": ""}),
  Rule(r"torch_baseline.py", CPU[:12], needs="torch"),
  Rule(r"benchmarks/gpu.py", "gpu_test.py runs it"),
  Rule(r"benchmarks/fuzz.py", ["--inputs=3", "--only=index,metrics"]),
  Rule(r"benchmarks/faults.py", "faults_test.py runs a small one"),
  Rule(r"guards.py --B", "with other sizes, in the command above it"),
  Rule(r"guards.py", shlex.split("--B 1 --L 16 --V 128 --D 16 --N 1 --H 2 --K 8 --F 32 --rounds 1")),
  Rule(r"soak.py .* -- ", "with other times, in the command above it"),
  Rule(
    r"soak.py", ["--minutes=0.1", "--", "--config.checkpoint.keep=99", *[x for x in TINY if x != "--config.steps=3"]],
    {"pip install -e '.[figures]' && ": ""}, "runs/soak/soak.svg", needs="matplotlib",
  ),
  Rule(r"serving.py throughput .*--prompt=32", "with other numbers, the command above it"),
  Rule(
    r"serving.py throughput",
    shlex.split("--blocks 0 4 --concurrency 1 2 --rounds 1 --requests 1 --V 384 --D 16 --N 1 --H 2 --K 8 --F 32"
                " --prompt 8 --gen 8 --block_length 8"),
    makes="runs/serving/throughput.json", needs="uvicorn starlette prometheus_client",
  ),
  Rule(
    r"serving.py load",
    shlex.split("--minutes=0.05 --burst=1 --rows=2 --queue=4 --warm=6 --warmup=1 --D 16 --N 1 --H 2 --K 8 --F 32"),
    makes="runs/serving/serving.svg", needs="uvicorn starlette prometheus_client matplotlib",
  ),
  Rule(r"launch/local.sh", "launch_test.py trains with it"),
]  # fmt: skip


def rule(command):
  return next((x for x in RULES if re.search(x.pattern, command)), None)


def test_every_line_of_the_shell_is_a_command():
  """One that is not known for a command would go past the rules."""
  for page, text in prose.PAGES.items():
    lines = [line for line in prose.lines(prose.shell(text)) if line.strip()]
    assert [line for line in lines if not prose.commands(line)] == [], page


def test_every_command_has_a_rule_and_every_rule_a_command():
  found = [command for _, command in documented()]
  assert len(found) > 60  # they are found
  assert not [command for command in found if not rule(command)]
  assert not [x.pattern for x in RULES if x not in map(rule, found)]


def test_what_is_changed_stands_in_a_command():
  found = [(command, rule(command)) for _, command in documented()]
  for x in RULES:
    text = " ".join(command for command, y in found if y is x)
    assert not [old for old in x.change if old not in text], x.pattern


def as_run(command):
  """The command as it is run."""
  x = rule(command)
  for old, new in x.change.items():
    command = command.replace(old, new)
  return command + "".join(f" {flag if flag.startswith('<') else shlex.quote(flag)}" for flag in x.more)


FOUND = sorted({(RULES.index(rule(x)), x) for _, x in documented() if rule(x) and not isinstance(rule(x).more, str)})
COMMANDS = list({as_run(command): command for _, command in FOUND}.values())  # what comes to the same runs once
# The flags of INSIDE, a line each, stand behind the others, and before what is Beam's.
LLADAX = """mapfile -t inside <<<"$INSIDE"
[[ -n "$INSIDE" ]] || inside=()
flags=()
while (($#)) && [[ "$1" != -- ]]; do flags+=("$1"); shift; done
exec python -m lladax.main "${flags[@]}" "${inside[@]}" "$@"
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, quick_compiles, quickstart_workdir):
  """A folder like a checkout, with the files that the pages speak of, and a `lladax` that knows it."""
  folder = tmp_path_factory.mktemp("checkout")
  files = "README.md CONTRIBUTING.md CHANGELOG.md pyproject.toml"
  for name in f"{files} lladax configs benchmarks docs launch notebooks tests".split():
    (folder / name).symlink_to(ROOT / name)
  for name in ("bin", "data/records", "downloads", "runs", "shared", "texts"):
    (folder / name).mkdir(parents=True)
  for name, body in (("lladax", LLADAX), ("python", f'exec "{sys.executable}" "$@"')):
    (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / "bin" / name).chmod(0o755)

  rng = np.random.default_rng(0)
  texts = [" ".join(rng.choice("red green blue yellow sun moon sea hill".split(), 40)) + "." for _ in range(80)]
  for i, text in enumerate(texts[:20]):
    (folder / "texts" / f"{i}.txt").write_text(text)
  (folder / "questions.txt").write_text("What is red?\n")
  write(folder / "data" / "a.jsonl.zst", [{"text": text} for text in texts])
  write(
    folder / "poems.jsonl.xz",
    [{"lines": [f"{x[:9]}，{x[9:18]}。"]} for x in texts] + [{"lines": ["春，夏。", *texts[:3]]}],
  )
  talks = [{"instruction": x[:16], "input": "", "output": x[16:24]} for x in texts]
  write(folder / "mine.jsonl", talks)
  (folder / "alpaca_data.json").write_text(json.dumps(talks))
  (folder / "couplets.json").write_text(json.dumps([{"first": "春", "second": "夏"}]))
  write(folder / "DIR" / "en" / "books_children.jsonl", [{"text": text} for text in texts])
  choice = [{"question": f"{i}?", "choices": ["a", "b", "cd"], "answer": i % 3} for i in range(6)]
  sums = [{"question": f"{i} + 1?", "answer": f"so\n#### {i + 1}"} for i in range(200)]
  for split in ("test", "train"):
    write(folder / "DIR" / "eval" / f"arc_challenge_{split}.jsonl", choice)
    write(folder / "DIR" / "math" / f"gsm8k_{split}.jsonl", sums)
  write(folder / "DIR" / "eval" / "lambada_openai.jsonl", [{"context": "one two", "continuation": "three"}] * 2)
  write(folder / "DIR" / "zh" / "poem_data.jsonl", [{"first": "ab", "second": "cd"}] * 3)

  text = tokenizers.Tokenizer(tokenizers.models.BPE())
  text.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  text.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
  text.train_from_iterator(texts, trainer)
  text.save(str(folder / "data" / "tokenizer.json"))

  convert.to_published(quickstart_workdir, folder / "downloads" / "LLaDA-8B-Base")
  repository = folder / "hub" / "models--GSAI-ML--LLaDA-8B-Base"  # as it lies in the hub's cache
  (repository / "refs").mkdir(parents=True)
  (repository / "refs" / "main").write_text("1" * 40)
  (repository / "snapshots").mkdir()
  (repository / "snapshots" / ("1" * 40)).symlink_to(folder / "downloads" / "LLaDA-8B-Base")
  return folder


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  with {".xz": lzma.open, ".zst": reading.zstd.open}.get(path.suffix, open)(path, "wt", encoding="utf-8") as file:
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture(scope="module")
def serve(checkout):
  """The address at which a workdir of the checkout is served, by its name."""
  with contextlib.ExitStack() as stack:
    yield functools.cache(lambda workdir: stack.enter_context(served.command(checkout / workdir))[1])


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_it_runs(checkout, command, request):
  x = rule(command)
  for name in x.needs.split():
    pytest.importorskip(name)
  if x.needs == "libtpu":
    request.getfixturevalue("quick_plans")
  command = as_run(command)
  if x.asks:
    command = command.replace("http://127.0.0.1:8000", request.getfixturevalue("serve")(x.asks))
  env = os.environ | {
    "PATH": f"{checkout / 'bin'}{os.pathsep}{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT), "XLA_FLAGS": conftest.XLA_FLAGS, "INSIDE": "\n".join(x.inside), "MPLBACKEND": "agg",
    "HF_HUB_CACHE": str(checkout / "hub"), "HF_HUB_OFFLINE": "1", "LLADAX_EVAL_DATA": "",
  }  # fmt: skip
  run = subprocess.run(
    ["bash", "-euo", "pipefail", "-c", command], cwd=checkout, env=env, timeout=900, capture_output=True, text=True
  )
  assert run.returncode == 0, f"{command}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}"
  assert not x.makes or (checkout / x.makes).exists(), command
