#!/usr/bin/env bash
# A run on several nodes of 8 GPUs, one process per GPU, from the root of the checkout:
#
#   sbatch --nodes=8 launch/slurm.sh --config=configs/llada_8b.py:h100_8x8 --workdir=/shared/runs/llada_8b
#
# h100_8x8 keeps a copy of the parameters in each of eight nodes, so that only gradients cross the network; for another
# number of nodes add --config.mesh.slices=-1. Without either, the mesh of this config cuts them over all nodes.
#
# JAX reads Slurm's variables: no flags for the coordinator or the processes. The workdir must be on a file system
# that all nodes share.
#SBATCH --job-name=lladax
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# A lost node or a preemption puts the job back into the queue.
#SBATCH --requeue
# Ten minutes before the time limit the processes (not this script) get SIGTERM: checkpoint, exit code 143.
#SBATCH --signal=TERM@600
# GPUs are not bound to tasks (no --gpus-per-task): each process takes the one of its local rank, and NCCL still sees
# all of the node, as its direct copies need.
set -u

VENV="${VENV:-.venv}"             # `python -m venv .venv && .venv/bin/pip install -e '.[cuda13]'`
CONTAINER="${CONTAINER:-}"        # an image with lladax in it, in place of VENV (needs Slurm's pyxis plugin)
MOUNTS="${MOUNTS:-$PWD:$PWD}"     # SRC:DST[,SRC:DST], for CONTAINER: the checkout, the data, the workdir
MAX_RESTARTS="${MAX_RESTARTS:-5}" # after crashes, within this allocation

cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
# shellcheck source=launch/flags.sh
source launch/flags.sh gpu || exit 1
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-12}" # srun does not inherit it from sbatch

# The first process that ends gives the others two minutes, to write their part of a checkpoint or to say what they
# have seen; --kill-on-bad-exit would take that time away.
srun=(srun --wait=120 --kill-on-bad-exit=0 --label)
if [[ -n "$CONTAINER" ]]; then
  srun+=(--container-image="$CONTAINER" --container-mounts="$MOUNTS" --container-workdir="$PWD")
else
  # shellcheck source=/dev/null
  source "$VENV/bin/activate" || exit 1
fi

for ((restart = 0; ; restart++)); do
  "${srun[@]}" python -m lladax.main "$@"
  code=$?
  case $code in
    0 | 1 | 130) exit "$code" ;; # done; bad input or a loss that is not a number; Ctrl-C
    143)
      # Near the time limit: again from the queue, for another --time. Otherwise somebody stopped the run.
      if ((${SLURM_JOB_END_TIME:-0} - $(date +%s) < 900)); then
        echo "launch/slurm.sh: time limit, back into the queue" >&2
        scontrol requeue "$SLURM_JOB_ID" && sleep 60 # Slurm ends this script
      fi
      exit "$code"
      ;;
  esac
  if ((restart >= MAX_RESTARTS)); then exit "$code"; fi
  echo "launch/slurm.sh: exit code $code, restart $((restart + 1)) of $MAX_RESTARTS" >&2
done
