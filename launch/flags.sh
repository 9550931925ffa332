# shellcheck shell=bash
# Compiler and runtime settings of an 8B run, sourced by the other scripts: source launch/flags.sh v5p
#
#   v4 | v5e | v5p | v6e   FSDP inside a slice, data parallelism between slices
#   gpu                    FSDP inside a node, data parallelism between nodes
#   cpu                    nothing but the compilation cache
#
# What is already set in the environment comes last on each line, and so wins. A flag that the compiler does not
# know ends the process at once: XLA_FLAGS is read by jaxlib on every platform, LIBTPU_INIT_ARGS by libtpu alone.

# TPUs need few: the latency-hiding scheduler, asynchronous collectives and collective matmuls are libtpu's defaults.
# The four below are defaults too as of libtpu 0.0.42, and are said because an 8B run cannot do without them.
lladax_tpu=(
  # FSDP: weights are gathered under the matmuls that come before, not in front of them.
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  # Several slices: the all-reduce of the gradients over the data-center network, far slower than the links inside a
  # slice, is split off and runs under the backward pass, whatever the sizes of the arrays.
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)

lladax_v6e=(
  # v6e has 128 MiB of vector memory and the compiler gives a kernel 16 of them. With 96, matmuls of this width use
  # larger tiles and read the weights fewer times.
  --xla_tpu_scoped_vmem_limit_kib=98304
)

case "${1:-}" in
  v4 | v5e | v5p) export LIBTPU_INIT_ARGS="${lladax_tpu[*]} ${LIBTPU_INIT_ARGS:-}" ;;
  v6e) export LIBTPU_INIT_ARGS="${lladax_tpu[*]} ${lladax_v6e[*]} ${LIBTPU_INIT_ARGS:-}" ;;
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
unset lladax_tpu lladax_v6e

# A restart compiles nothing anew. Where all processes see the folder, all of them read what the first one wrote.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/lladax/jax}"
