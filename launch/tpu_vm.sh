#!/usr/bin/env bash
# A run on TPU VMs: one host, a pod, or several slices, with queued resources. In this order; variables in the
# environment override those below, and must be the same in every command:
#
#   launch/tpu_vm.sh create          asks for the machines, and returns
#   launch/tpu_vm.sh status          ACTIVE: they are there
#   launch/tpu_vm.sh setup           copies and installs lladax on every worker, mounts the shared file system
#   launch/tpu_vm.sh run FLAGS...    starts `python -m lladax.main FLAGS...` on every worker
#   launch/tpu_vm.sh log             follows the output of the first worker
#   launch/tpu_vm.sh stop            SIGTERM: a checkpoint, then the end; `run` with the same flags goes on
#   launch/tpu_vm.sh delete          gives the machines back
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NAME="${NAME:-lladax}"
ZONE="${ZONE:-us-east5-a}"
ACCELERATOR="${ACCELERATOR:-v5p-128}" # v4 and v5p count two cores a chip: v5p-128 is 64 chips, 4x4x4; v6e-256 is 16x16
RUNTIME="${RUNTIME:-v2-alpha-tpuv5}"  # v6e: v2-alpha-tpuv6e, v5e: v2-alpha-tpuv5-lite, v4: tpu-ubuntu2204-base
SLICES="${SLICES:-1}"
CREATE_FLAGS="${CREATE_FLAGS:-}" # for example: --spot, or --reserved, or --network=NETWORK
REPO="${REPO:-}"                 # URL to clone; empty: the files of this checkout that git knows, as they are
COMMIT="${COMMIT:-HEAD}"         # of REPO
NFS="${NFS:-}"                   # IP:/SHARE, Filestore for one; a pod needs one, or a workdir at gs://
MOUNT="${MOUNT:-/mnt/lladax}"    # where it is mounted

usage() {
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' launch/tpu_vm.sh >&2
  exit 1
}

queued() { # queued SUBCOMMAND ARGS...
  local subcommand=$1
  shift
  gcloud compute tpus queued-resources "$subcommand" "$NAME" --zone="$ZONE" "$@"
}

on_all() { # on_all COMMAND: every worker of every slice, at once
  queued ssh --node=all --worker=all --command="$1"
}

create() {
  local nodes=(--node-id="$NAME") flags
  if ((SLICES > 1)); then nodes=(--node-count="$SLICES" --node-prefix="$NAME"); fi
  read -ra flags <<<"$CREATE_FLAGS"
  queued create "${nodes[@]}" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${flags[@]}"
}

setup() {
  local fetch="git clone -q $REPO lladax && git -C lladax checkout -q $COMMIT"
  if [[ -z "$REPO" ]]; then
    local archive
    archive=$(mktemp --suffix=.tgz)
    git ls-files -z | tar --null --files-from=- -czf "$archive"
    gcloud compute tpus queued-resources scp "$archive" "$NAME:lladax.tgz" --zone="$ZONE" --node=all --worker=all
    rm "$archive"
    fetch="mkdir lladax && tar -xzf lladax.tgz -C lladax"
  fi
  # The images' own Python is too old for lladax; uv brings one.
  on_all "set -e; rm -rf lladax; $fetch
    python3 -m pip install -q --user uv
    ~/.local/bin/uv venv -q --clear --python=3.12 venv
    ~/.local/bin/uv pip install -q --python=venv/bin/python -e './lladax[tpu,gs]'"
  if [[ -n "$NFS" ]]; then
    on_all "set -e; sudo apt-get update -qq; sudo apt-get install -qq -y nfs-common; sudo mkdir -p $MOUNT
      mountpoint -q $MOUNT || sudo mount -t nfs $NFS $MOUNT; sudo chmod 1777 $MOUNT"
  fi
}

run() {
  (($#)) || usage
  local cache="" flags
  if [[ -n "$NFS" ]]; then cache="export JAX_COMPILATION_CACHE_DIR=$MOUNT/jax_cache; "; fi
  printf -v flags '%q ' "$@"
  # What one worker runs, as a line for its shell. `exec`: the signal of `stop` must reach Python.
  local command="${cache}source launch/flags.sh ${ACCELERATOR%%-*} && exec ~/venv/bin/python -m lladax.main $flags"
  # systemd keeps the run when the connection ends, holds its output, and restarts it: one worker that fails takes the
  # others down, and all of them come back to the last checkpoint; so does SIGTERM to one of them (for systemd that is a
  # good end, where it comes before Python listens). Bad input (1) and Ctrl-C (130) are final.
  on_all "sudo systemd-run --quiet --collect --unit=lladax --uid=\$(id -un) --working-directory=\$HOME/lladax \
    --setenv=HOME=\$HOME --setenv=PYTHONUNBUFFERED=1 --property=Restart=on-failure --property=RestartSec=20 \
    --property='RestartPreventExitStatus=1 130' --property=RestartForceExitStatus=SIGTERM --property=StartLimitIntervalSec=3600 --property=StartLimitBurst=10 \
    --property=TimeoutStopSec=900 --property=KillMode=mixed --property=LimitNOFILE=1048576 \
    bash -c $(printf '%q' "$command")"
}

if (($# == 0)); then usage; fi
action=$1
shift
case "$action" in
  create | setup | run) "$action" "$@" ;;
  status) queued describe --format='value(state.state)' ;;
  log) queued ssh --node=0 --worker=0 --command="sudo journalctl --unit=lladax --output=cat --lines=200 --follow" ;;
  stop) on_all "sudo systemctl stop lladax" ;;
  delete) queued delete --force ;;
  *) usage ;;
esac
