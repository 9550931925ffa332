"""The door: bad input is one line, whatever the mode; the modes print what they say."""

import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console

import lladax
from lladax import config, configs, main
from lladax.inference import show
from lladax.storage import checkpoint, writing
from lladax.training import setup

ROOT = pathlib.Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures("quick_compiles")


def run(*flags, stdin=""):
  command = [sys.executable, "-m", "lladax.main", *map(str, flags)]
  return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=300)


def complaint(*flags):
  """The one line, after what it reports of its progress, in which the command line refuses."""
  done = run(*flags)
  assert done.returncode == 1 and not done.stdout, done
  lines = done.stderr.splitlines()
  assert [line.startswith("lladax: ") for line in lines] == [False] * (len(lines) - 1) + [True], done.stderr
  assert len(lines) <= 3 and "Traceback" not in done.stderr, done.stderr
  return lines[-1].removeprefix("lladax: ")


@pytest.fixture
def workdir(tiny_workdir, tmp_path):
  """A finished tiny run that may be changed."""
  return shutil.copytree(tiny_workdir, tmp_path / "run")


def truncate(folder):
  for path in folder.glob("**/d/*"):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 10])


def change_config(workdir, **model):
  path = workdir / "config.json"
  values = json.loads(path.read_text())
  values["model"] |= model
  path.write_text(json.dumps(values))


def change_tokenizer(workdir, **names):
  path = workdir / "tokenizer" / "lladax_tokenizer.json"
  values = json.loads(path.read_text())
  values["names"] |= names
  path.write_text(json.dumps(values))


def plain(c):
  """A config as plain values."""
  return json.loads(json.dumps(dataclasses.asdict(c)))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"nosie": {}}, "config.nosie: there is no such field; did you mean config.noise?"),
    ({"model": {"DD": 3}}, "config.model.DD: there is no such field; did you mean config.model.D?"),
    ({"steps": "many"}, "config.steps='many': expected int, not str"),
    ({"steps": 1.5}, "config.steps=1.5: expected int, not float"),
    ({"steps": True}, "config.steps=True: expected int, not bool"),
    ({"data": {"segments": 1}}, "config.data.segments=1: expected bool, not int"),
    ({"data": 3}, "config.data=3: expected a group of fields"),
    ({"evaluate": {"canvases": (1,)}}, "config.evaluate.canvases[0]=1: expected str, not int"),
    ({"optimizer": {"schedule": (1, 2)}}, "config.optimizer.schedule[0]=1: expected tuple, not int"),
    ({"optimizer": {"schedule": ((1, "x"),)}}, "config.optimizer.schedule[0][1]='x': expected float, not str"),
  ],
)
def test_unknown_fields_and_wrong_types(tiny, changes, message):
  values = plain(tiny())
  for name, value in changes.items():
    values[name] = values[name] | value if isinstance(value, dict) and name in values else value
  with pytest.raises(ValueError) as error:
    config.parse(values)
  assert str(error.value) == message


def test_a_field_that_is_missing(tiny):
  values = plain(tiny())
  del values["seed"]
  with pytest.raises(ValueError, match="^config.seed is missing$"):
    config.parse(values)


def test_plain_values_come_back_as_the_same_config(tiny, tiny_workdir):
  assert config.parse(plain(tiny())) == tiny()
  assert config.load(tiny_workdir) == tiny({"model.V": 384})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data.corpus": "files:/nowhere/*.txt"}, "data.corpus=files:/nowhere/.*: no file matches"),
    ({"data.corpus": "poems"}, "data.corpus='poems' is unknown"),
    ({"data.corpus": "files:{tmp}/empty.txt"}, "data.corpus=.* holds no text"),
    ({"data.length": 5000}, "data.length=5000 is longer than model.max_length=4096"),
    ({"data.length": 4000}, "data.length=4000 is longer than the corpus: .* tokens; use a smaller length"),
    ({"data.batch_size": 12}, "data.batch_size.*=12 does not divide over .* 8 devices: use 8 or 16"),
    ({"micro_batches": 8}, "data.batch_size / micro_batches=4 does not divide over .* 8 devices: use 8"),
    ({"micro_batches": 5}, "data.batch_size=32 is not a multiple of micro_batches=5"),
    ({"noise.times": "antithetic", "micro_batches": 32}, "noise.times='antithetic' pairs .* must be even"),
    ({"noise.times": "twice"}, "noise.times='twice': use"),
    ({"mesh.fsdp": 3}, "mesh.fsdp=3.* do not multiply to the 8 devices"),
    ({"objective": "gan"}, "objective='gan': use diffusion or autoregressive"),
    ({"model.V": 128}, "model.V=128 is smaller than the tokenizer's vocabulary of 261 ids"),
    ({"model.K": 7}, "model.K=7: RoPE"),
    ({"steps": 0}, "steps=0"),
    ({"steps": 4, "optimizer.schedule": ((5, 0.1), (-1, 0.0))}, "optimizer.schedule: its pieces take 5 steps"),
    ({"data.held_out": 1.0}, "data.held_out=1.0: must be"),
    ({"checkpoint.every": 0}, "checkpoint.every=0: must be"),
    ({"checkpoint.keep": 0}, "checkpoint.keep=0: must be"),
    ({"checkpoint.keep_every": -1}, "checkpoint.keep_every=-1: must be"),
    ({"log.every": 0}, "log.every=0: must be"),
    ({"evaluate.num_samples": 0}, "evaluate.num_samples=0: must be"),
    ({"tokenizer.kind": "letters"}, "tokenizer.kind='letters' is unknown"),
    ({"tokenizer.kind": "huggingface", "tokenizer.path": "/nowhere"}, "tokenizer.path='/nowhere': no such file"),
  ],
)  # fmt: skip
def test_bad_input_stops_before_any_long_work(tiny, tmp_path, changes, message):
  (tmp_path / "empty.txt").touch()
  changes = {name: x.format(tmp=tmp_path) if isinstance(x, str) else x for name, x in changes.items()}
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    setup.prepare(tiny(changes), tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_not_the_checkpoint_s(tiny, workdir):
  change_tokenizer(workdir, mask="<another>")
  with pytest.raises(ValueError, match="tokenizer holds another tokenizer than the one this model was trained with"):
    lladax.load(workdir)
  with pytest.raises(ValueError, match="another config .tokenizer_fingerprint: "):
    setup.prepare(tiny(), workdir)


def test_a_vocabulary_that_is_not_the_checkpoint_s(workdir):
  change_config(workdir, V=128)
  with pytest.raises(ValueError, match="model.V=128 is smaller than the tokenizer's vocabulary of 261 ids"):
    lladax.load(workdir)
  change_config(workdir, V=512)
  with pytest.raises(ValueError, match=r"params/embedding is of shape \(384, 16\), expected \(512, 16\)"):
    lladax.load(workdir)


def test_load_of_what_is_not_there(tmp_path, workdir):
  with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
    lladax.load(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match=r"has no checkpoint of step 7 \(there are: \[15, 20\]\)"):
    lladax.load(workdir / "checkpoints" / "7")
  shutil.rmtree(workdir / "checkpoints")
  with pytest.raises(FileNotFoundError, match=r"has no checkpoint \(there are: none\)"):
    lladax.load(workdir)


# The same through the door, where the flags are at fault or a library might speak up.


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--config.steps=abc"], "flag --config.steps=abc: invalid literal for int"),
    (["--config.data.corpus=files:/nowhere/*"], "data.corpus=files:/nowhere/.*: no file matches"),
  ],
)
def test_flags(tiny_flags, tmp_path, flags, message):
  line = complaint(*tiny_flags, f"--workdir={tmp_path / 'run'}", *flags)
  assert re.search(message, line), line
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_config_than_the_workdir_s(tiny_flags, workdir):
  line = complaint(*tiny_flags, "--config.model.F=64", "--config.seed=3", f"--workdir={workdir}")
  assert "model.F: 32 there, 64 here; seed: 0 there, 3 here" in line


@pytest.mark.slow
def test_checkpoints_that_cannot_be_read(tiny_flags, workdir):
  truncate(workdir)
  for given in (tiny_flags, ["--mode=sample", "--prompt=red"]):
    line = complaint(*given, f"--workdir={workdir}")
    assert f"no checkpoint of {workdir} can be read; the newest: {workdir}/checkpoints/20 cannot be read" in line


@pytest.mark.slow
def test_falls_back_to_the_checkpoint_before(tiny_flags, workdir):
  truncate(workdir / "checkpoints" / "20")
  done = run(*tiny_flags, f"--workdir={workdir}")
  assert done.returncode == 0 and "Traceback" not in done.stderr
  (line,) = [line for line in done.stderr.splitlines() if line.startswith("lladax: ")]
  assert "checkpoints/20 cannot be read" in line and "falling back to step 15" in line
  assert "continuing from step 15" in done.stderr
  assert checkpoint.steps(workdir) == [15, 20] and (workdir / "checkpoints" / "20.unreadable").is_dir()


def test_evaluate(workdir):
  done = run("--mode=evaluate", f"--workdir={workdir}")
  assert done.returncode == 0, done.stderr
  for shown in ("bits per byte", "lladax (bound)", "unigram", "xz -9"):
    assert shown in done.stderr
  at_the_end, again = map(json.loads, (workdir / "evaluations.jsonl").read_text().splitlines())
  assert again == pytest.approx(at_the_end, rel=1e-5)


@pytest.mark.slow
def test_fields_without_a_config_are_those_of_the_workdir(workdir, tmp_path):
  (tmp_path / "couplets.json").write_text(json.dumps([{"first": "red", "second": "blue"}]))
  values = (f"--config.evaluate.tasks=('poems:{tmp_path}/couplets.json',)", "--config.evaluate.num_samples=1")
  done = run("--mode=evaluate", f"--workdir={workdir}", *values)
  assert done.returncode == 0, done.stderr
  assert "poems" in done.stderr and "backward" in done.stderr
  lost = run("--mode=sample", f"--workdir={workdir}/nothing", "--config.sample.steps=1", "--prompt=x")
  assert lost.returncode == 1 and lost.stderr.startswith(f"lladax: --workdir={workdir}/nothing: there is no run in it")


def test_sample_continues_and_fills_in(workdir, tmp_path):
  page = tmp_path / "page.html"
  prompts = ["--prompt=red and", "--prompt=bl[MASK][MASK] and"]
  done = run("--mode=sample", f"--workdir={workdir}", *prompts, f"--html={page}")
  assert done.returncode == 0, done.stderr
  llada = lladax.load(workdir)
  c = config.load(workdir).sample
  continued = llada.sample("red and", gen_length=c.gen_length, block_length=c.block_length, steps=c.steps).text[0]
  filled = llada.infill("bl[MASK][MASK] and", steps=c.steps).text[0]
  assert done.stdout == f"{continued}\n{filled}\n"
  assert filled.startswith("bl") and filled.endswith(" and")
  assert page.read_text().count("<") > 10 and "run" in page.read_text()


@pytest.mark.slow
def test_sample_reads_standard_input(workdir):
  done = run("--mode=sample", f"--workdir={workdir}", stdin="[MASK]ed\ngree[MASK]\n")
  assert done.returncode == 0, done.stderr
  first, second = done.stdout.splitlines()
  assert first.endswith("ed") and second.startswith("gree")


def test_sample_without_any_prompt(workdir, monkeypatch):
  monkeypatch.setattr(sys, "stdin", io.StringIO())
  with pytest.raises(ValueError, match="--prompt is missing, and nothing came from standard input"):
    show.show_samples(config.load(workdir), workdir, [], None)


# The command line itself: parsed and refused within this process.


@pytest.fixture
def refusal(capsys, monkeypatch, tmp_path):
  """refusal(option, ...) -> the one line in which the command is refused, in a folder of its own."""
  monkeypatch.setattr(main.distributed, "leave", lambda code: None)
  monkeypatch.chdir(tmp_path)

  def refusal(*given):
    there = sorted(tmp_path.iterdir())
    with flagsaver.flagsaver():
      try:
        code = main.guard(main.main, main.parse(["lladax", *map(str, given)]))
      except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr()
    assert (code, told.out) == (1, "") and re.fullmatch("lladax: [^\n]+\n", told.err), (code, told)
    assert sorted(tmp_path.iterdir()) == there
    return told.err.removeprefix("lladax: ").rstrip("\n")

  return refusal


def fields(*given):
  """The config that a command line comes to, as plain values; and its options."""
  with flagsaver.flagsaver():
    main.parse(["lladax", *map(str, given)])
    return flags.FLAGS.config and flags.FLAGS.config.to_dict(), flags.FLAGS.flag_values_dict()


@pytest.mark.parametrize(
  "given",
  [
    "--config=quickstart --workdir=run --mode=train --config.steps=7 --config.log.tensorboard=False",
    "--config quickstart --workdir run --mode train --config.steps 7 --config.log.tensorboard=false",
    "-config=quickstart -workdir run -mode=train -config.steps=7 -noconfig.log.tensorboard",
    "--config.steps=7 --noconfig.log.tensorboard --workdir=run --config=quickstart",
    "--config=stdlib --config.steps=9 --workdir=x --config=quickstart --config.steps=7 --noconfig.log.tensorboard "
    "--workdir=run",
  ],
)
def test_an_option_is_written_with_a_space_or_one_dash_and_the_last_one_counts(given):
  values, options = fields(*given.split())
  assert values == fields("--config=quickstart")[0] | {"steps": 7, "log": values["log"]}
  assert values["log"]["tensorboard"] is False and options["workdir"] == "run" and options["mode"] == "train"


@pytest.mark.parametrize("name", ["threshold", "factor", "cache", "gen_length"])
def test_a_field_that_may_be_none_is_switched_off(name, tmp_path, tiny_values, tiny):
  run = tmp_path / "run"
  run.mkdir()
  value = {"cache": "dual", "gen_length": 8}.get(name, 0.5)
  saved = plain(tiny({f"sample.{name}": value})) | {"tokenizer_fingerprint": "", "base": ""}
  (run / "config.json").write_text(json.dumps(saved))
  for given in (["--mode", "sample", "--workdir", run], ["-workdir", run, "-mode=chat"]):
    sample = fields(*given, f"--config.sample.{name}=None", "--config.sample.steps", 8)[0]["sample"]
    assert json.loads(json.dumps(sample)) == saved["sample"] | {name: None, "steps": 8}


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("sample.gen_length 32", 32),
    ("sample.threshold 0.5", 0.5),
    ("evaluate.tasks=reversal", ("reversal",)),
    ("evaluate.tasks=('reversal','poems:x')", ("reversal", "poems:x")),
    ("evaluate.tasks ('reversal',)", ("reversal",)),
    ("evaluate.tasks=reversal --config.evaluate.tasks=poems:x", ("poems:x",)),  # the last one counts
    ("evaluate.tasks=reversal --config.evaluate.tasks ('poems:x','y')", ("poems:x", "y")),
    ("sample.seed -1", -1),
    ("tokenizer.mask=--x", "--x"),
  ],
)
def test_a_field_from_its_text(text, value):
  group, name = text.replace("=", " ").split()[0].split(".")
  assert fields("--config=base", *f"--config.{text}".split())[0][group][name] == value


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ("--config= --workdir=run", "--config= is empty: name a recipe or a file"),
    ("--config --workdir=run", "--config=--workdir=run: there is no such recipe or file"),
    ("--workdir=run --config", "Missing value for flag --config"),
    ("--config=quickstart --workdir", "Missing value for flag --workdir"),
    ("--config=quickstart --workdir=run --config.steps", "Missing value for flag --config.steps"),
    ("--config=quickstart --workdir= ", "--workdir is missing"),
    ("--workdir=run --config.steps=3", "--config is missing: name a recipe"),
    ("--mode=show", "--config is missing: name a recipe"),
    ("--mode=show --config.steps=3", "--config is missing: name a recipe"),
    ("--mode=show --workdir=run", "--workdir=run: there is no run in it"),
    ("--mode=show --config=quickstart --config.stpes=3", "config.stpes: there is no such field; did you mean"),
    ("--mode=show --config=quickstart --config.data.length=5000", "data.length=5000 is longer than model.max_length"),
    ("--mode=sample --config.sample.steps=3", "--workdir is missing"),
    ("--mode=sample --workdir run --config.sample.steps 3", "--workdir=run: there is no run in it"),
    ("--mode=smaple --workdir=run", "flag --mode=smaple: value should be one of <train"),
    ("--wrokdir=run", "--wrokdir: there is no such option; did you mean --workdir?"),
    ("--nowhere run", "--nowhere: there is no such option"),
    ("--config=quickstart run", "unexpected argument 'run': options are written --name=value"),
    ("--config=quickstart --workdir=run -- run", "unexpected argument 'run'"),
    ("--config=configs/nowhere.py --workdir=run --config.steps=2", "--config=configs/nowhere.py: there is no such rec"),
    ("--config=quickstart --workdir=run --config.data.batch_size=12", "data.batch_size.*=12 does not divide over .* 8"),
    ("--config=quickstart --workdir=run --mode=evaluate", "--workdir=run: there is no run in it; train one first"),
    ("--mode=import --workdir=run", "--source is missing: --mode=import needs it"),
    ("--mode=export --workdir=run", "--target is missing: --mode=export needs it"),
    ("--config=quickstart --workdir=run --config.stpes 3", "config.stpes: there is no such field; did you mean"),
    ("--config=quickstart --config.data.batch_size=None", "flag --config.data.batch_size=None: invalid literal"),
    ("--config=base --workdir=run --config.sample.threshold=high", "config.sample.threshold=.high.: expected float"),
    ("--config=quickstart --config.log.tensorboard=2", "flag --config.log.tensorboard=2: .*Non-boolean"),
    ("--config=base --workdir=run --config.sample.gen_length=x", "config.sample.gen_length='x': expected int, not str"),
    ("--config=quickstart --config.steps]=7", ".*steps]"),
    ("--config=quickstart --config.log.tensorboard[0]=7", r".*log.tensorboard\[0]"),
    (f"--config=quickstart --{'x' * 5000}=7", "--x{38}…: there is no option with a name of more than 200 characters"),
    ("--shards=many", "flag --shards=many: invalid literal"),
    ("--flagfile=nowhere", ".*nowhere"),
    ("--mode=export --workdir=run --target=x --config.sample.steps=3", "--config.sample.steps: --mode=export"),
    ("--config=quickstart --workdir=file", "--workdir: .*/file cannot be written: .* is a file, where a f"),
    ("--config=quickstart --workdir=file/run", "--workdir: .*/file/run cannot be written: .*/file is a file"),
    ("--config=quickstart --workdir=lost", "--workdir: .*/lost cannot be written: .*lost is a link to nowhere"),
    ("--mode=import --source=x --workdir=file", "--workdir: .*file is a file, where"),
    ("--mode=sample --workdir=file", "--workdir=file: it is a file"),
    ("--mode=export --workdir=run --target=file", "--target: .*/file cannot be written: .*file is a file"),
    ("--mode=prepare --config=quickstart --target=file/x", "--target: .*/file/x cannot be written: .*/file is a file"),
    ("--config=quickstart --workdir=/proc/run", "--workdir: /proc/run cannot be written: No such file"),
  ],
)
def test_a_command_line_is_refused_in_one_line(refusal, tmp_path, given, message):
  (tmp_path / "file").touch()
  (tmp_path / "lost").symlink_to(tmp_path / "nothing")
  line = refusal(*given.split())
  assert re.match(message.replace("?", r"\?"), line), line


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_a_workdir_that_cannot_be_written_to(mode, refusal, workdir, monkeypatch):
  def refuse(dir):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(writing.tempfile, "TemporaryFile", refuse)  # root may write anywhere
  line = refusal("--config=quickstart", f"--mode={mode}", f"--workdir={workdir}")
  assert line == f"--workdir: {workdir} cannot be written: Permission denied"


def test_a_page_that_cannot_be_written(refusal, workdir, tmp_path):
  (tmp_path / "file").touch()
  given = ("--mode=sample", f"--workdir={workdir}", "--prompt=x")
  assert refusal(*given, "--html=file/page.html").endswith("file is a file, where a folder is needed")
  assert refusal(*given, f"--html={tmp_path}") == f"--html: {tmp_path} cannot be written: it is a folder"


@pytest.mark.slow
def test_a_page_in_a_folder_that_is_not_there_yet(workdir, tmp_path):
  page = tmp_path / "new" / "folder" / "page.html"
  done = run("--mode", "sample", "--workdir", workdir, "--prompt", "red", "--html", page, "--config.sample.steps", "2")
  assert done.returncode == 0 and page.is_file(), done.stderr


def test_what_goes_wrong_in_a_config_of_the_user_s_is_a_crash_of_its_own(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(main.distributed, "leave", lambda code: None)
  (tmp_path / "own.py").write_text("def get_config():\n  return {}['steps']\n")
  with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
    main.parse(["lladax", f"--config={tmp_path / 'own.py'}"])
  assert stop.value.code == 70 and 'own.py", line 2' in capsys.readouterr().err


@pytest.fixture
def shown(capsys, monkeypatch):
  """shown(option, ...) -> {field: (value, set by, meaning)} of --mode=show, in the order of the lines."""
  monkeypatch.setattr(main.distributed, "leave", lambda code: None)

  def shown(*given):
    with flagsaver.flagsaver():
      assert main.main(main.parse(["lladax", "--mode=show", *map(str, given)])) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    starts = [head.index(title) for title in ("field", "value", "set by", "meaning")]
    rows, last = {}, ""
    for line in lines:
      name, *cells = (line[i:j].strip() for i, j in zip(starts, [*starts[1:], None], strict=True))
      last = name or last
      rows[last] = [f"{x} {y}".strip() for x, y in zip(rows.get(last, ("", "", "")), cells, strict=True)]
    return rows

  return shown


def test_every_field_is_shown_with_its_value_who_set_it_and_what_it_means(shown):
  rows = shown(
    "--config=quickstart", "--config.sample.cache", "dual", "--noconfig.log.tensorboard", "--config.model.N=4"
  )
  base = dict(main._fields(configs.load("base")))
  groups = {name.partition(".")[0] for name in base if "." in name}
  assert rows.keys() == base.keys() | groups and all(cells[2] for cells in rows.values())
  assert list(rows)[:7] == ["seed", "objective", "init_from", "steps", "micro_batches", "model", "model.D"]
  assert rows["steps"] == ["800", "recipe", "updates"] and rows["seed"][:2] == ["0", "default"]
  assert rows["sample.cache"][:2] == ["'dual'", "command line"] and "around it" in rows["sample.cache"][2]
  assert rows["log.tensorboard"][:2] == ["False", "command line"]
  assert rows["model.N"] == ["4", "command line", "layers"]  # what it would be without
  assert rows["optimizer.schedule"][:2] == ["((0.05, 0.003), (-1.0, 0.0))", "recipe"]
  assert rows["optimizer"] == ["", "", "AdamW and its learning rate."]
  assert rows["tokenizer.mask"] == ["'<|mdm_mask|>'", "default", "name of [MASK]"]  # no markup
  assert shown("--config=quickstart")["sample.cache"][:2] == ["None", "default"]


def test_the_config_of_a_workdir_is_shown(shown, workdir):
  values = json.loads((workdir / "config.json").read_text())
  values["mesh"]["fsdp"] = 4
  (workdir / "config.json").write_text(json.dumps(values))
  rows = shown(f"--workdir={workdir}", "--config.sample.steps=8")
  assert rows["mesh.fsdp"][:2] == ["4", "workdir"] and rows["sample.steps"][:2] == ["8", "command line"]
  assert rows["model.D"][:2] == ["16", "workdir"] and rows["model.V"][:2] == ["384", "workdir"]
  assert rows["noise.times"][1] == "default" and not any(cells[1] == "recipe" for cells in rows.values())


def test_what_is_shown_is_cut_off_nowhere():
  console = Console(width=60, file=io.StringIO(), markup=False)
  console.print(config.table(config.parse(configs.load("llada_8b").to_dict()), {"": "recipe"}))
  assert "…" not in console.file.getvalue()


def test_what_is_shown_can_be_piped():
  done = run("--config=poems", "--mode=show")
  assert done.returncode == 0 and not done.stderr and done.stdout.startswith("field ")
  assert "\x1b" not in done.stdout and "\nsteps                          4000 " in done.stdout


@pytest.mark.parametrize("flags", [["--help"], pytest.param(["--config=poems", "--mode=show"], marks=pytest.mark.slow)])
def test_who_has_read_enough_is_told_no_more(flags):
  read, write = os.pipe()
  os.close(read)
  done = subprocess.run(
    [sys.executable, "-m", "lladax.main", *flags], stdout=write, stderr=subprocess.PIPE, check=False
  )
  os.close(write)
  assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_of_our_own_options(flag, capsys):
  with pytest.raises(SystemExit) as stop:
    main.parse(["lladax", "--mode=train", flag])
  told = capsys.readouterr().out
  assert stop.value.code == 0 and "--config=quickstart" in told and "--workdir" in told and "--[no]json" in told
  assert told.endswith("lladax --config=quickstart --mode=show\n")
  assert "logtostderr" not in told  # absl's


@pytest.mark.slow
def test_a_log_that_nothing_takes_ends_no_run(tiny_flags, tmp_path):
  """Standard error on a full disk: of its lines nothing is left, of the run everything."""
  with open("/dev/full", "w") as full:
    run = subprocess.run([sys.executable, "-m", "lladax.main", *tiny_flags, f"--workdir={tmp_path}"], stderr=full)
  assert run.returncode == 0
  assert (tmp_path / "metrics.jsonl").read_text().count("\n") >= 10
