# shellcheck shell=bash
# Compiler and runtime settings of an 8B run, sourced by the other scripts: source launch/flags.sh v5p
#
#   v4 | v5e | v5p | v6e   FSDP inside a slice, data parallelism between slices
#   gpu                    FSDP inside a node, data parallelism between nodes
#   cpu                    nothing but the compilation cache
#
# What is already set in the environment stays. A flag that the compiler does not know ends the process at once:
# XLA_FLAGS is read by jaxlib on every platform, LIBTPU_INIT_ARGS by libtpu alone.

case "${1:-}" in
  # No flag of the compiler's for TPUs either: what was set here leaves the program as it is, or has nothing to show for
  # it (the table in launch/README.md).
  v4 | v5e | v5p | v6e) ;;
  gpu)
    # No flag of the compiler's: its defaults hide all but 2% of a step's communication, and of those that promise more
    # each leaves the program as it is, or makes it worse (the table in launch/README.md).
    # XLA's pool takes 0.75 of the memory if not told otherwise; NCCL's buffers and cuBLAS live in what is left.
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
    ;;
  cpu) ;;
  *)
    echo "launch/flags.sh: '${1:-}' is none of v4, v5e, v5p, v6e, gpu, cpu" >&2
    return 1
    ;;
esac

# A restart compiles nothing anew. Where all processes see the folder, all of them read what the first one wrote.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/lladax/jax}"
