#!/usr/bin/env bash
# One run as N processes on this machine; also the way to debug what only happens with several processes.
#
#   XLA_FLAGS=--xla_force_host_platform_device_count=4 \
#     launch/local.sh 2 --config=configs/quickstart.py --workdir=runs/two
#
# Each line of output starts with the number of its process. SIGINT and SIGTERM are passed on to all. When one
# process fails the others are ended, and its exit code is the one of this script. A crash is restarted, and so is a
# run that SIGTERM to one of its processes ended, as on a machine that is taken away (143); the same command resumes
# from the last checkpoint. Bad input (1), Ctrl-C (130), and what a signal to this script ended, are not.
set -u

PYTHON="${PYTHON:-python}"
MAX_RESTARTS="${MAX_RESTARTS:-0}"
GRACE="${GRACE:-10}" # seconds that the others have to end after one has failed
ACCELERATOR="${ACCELERATOR:-cpu}" # an argument of flags.sh; gpu: process I gets GPU I

if [[ ! "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: [MAX_RESTARTS=0] [GRACE=10] [PYTHON=python] $0 NUM_PROCESSES [lladax flags...]" >&2
  exit 1
fi
num_processes=$1
shift
# shellcheck source=launch/flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh" "$ACCELERATOR" || exit 1
export PYTHONUNBUFFERED=1

pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT
pids=() # of the processes that run
stopped=0
# shellcheck disable=SC2329 # the traps call it
pass_on() {
  stopped=1
  kill "-$1" "${pids[@]}" 2>/dev/null # not to their groups: a helper of theirs must outlive the last checkpoint
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM

free_port() {
  local port
  while port=$((20000 + RANDOM % 12000)) && (: <>"/dev/tcp/localhost/$port") 2>/dev/null; do :; done
  echo "$port"
}

# Starts all processes, waits for all, and sets `code` to the first exit code that is not 0.
run_once() {
  local i port exit_code deadline=0 prefixers=() groups
  port=$(free_port)
  pids=()
  code=0
  for ((i = 0; i < num_processes && !stopped; i++)); do
    rm -f "$pipes/$i" && mkfifo "$pipes/$i"
    (trap '' TERM && exec sed -u "s/^/[$i] /") <"$pipes/$i" & # it ends with its process, not before
    prefixers+=($!)
    # A session of its own: Ctrl-C in a terminal reaches this script alone, which passes it on, once. Bash has
    # background commands ignore SIGINT, hence the trap.
    (
      trap - INT
      if [[ "$ACCELERATOR" == gpu ]]; then export CUDA_VISIBLE_DEVICES=$i; fi
      exec setsid "$PYTHON" -m lladax.main --coordinator="localhost:$port" --num_processes="$num_processes" \
        --process_id="$i" "$@"
    ) </dev/null >"$pipes/$i" 2>&1 &
    pids+=($!)
  done
  groups=("${pids[@]}")

  while ((${#pids[@]})); do
    sleep 0.2
    for i in "${!pids[@]}"; do
      kill -0 "${pids[i]}" 2>/dev/null && continue
      wait "${pids[i]}" 2>/dev/null
      exit_code=$?
      unset "pids[i]"
      ((exit_code == 0 || code)) && continue
      code=$exit_code
      # A signal that was passed on: all leave together, behind a checkpoint that the others may still be writing. One
      # that a process got alone, it has told the others; those that had not met it wait for it in vain.
      if ((stopped)); then continue; fi
      if ((code != 130 && code != 143)); then kill -TERM "${pids[@]}" 2>/dev/null; fi
      deadline=$((SECONDS + GRACE))
    done
    if ((deadline && SECONDS >= deadline)); then kill -KILL "${pids[@]}" 2>/dev/null; fi
  done
  for i in "${groups[@]}"; do kill -KILL -- "-$i" 2>/dev/null; done # helpers that were left behind
  for i in "${prefixers[@]}"; do # to the last line; a signal interrupts `wait`
    while kill -0 "$i" 2>/dev/null; do wait "$i"; done
  done
}

for ((restart = 0; ; restart++)); do
  run_once "$@"
  case $code in 0 | 1 | 130) break ;; esac
  if ((stopped || restart >= MAX_RESTARTS)); then break; fi
  echo "$0: exit code $code, restart $((restart + 1)) of $MAX_RESTARTS" >&2
done
exit "$code"
