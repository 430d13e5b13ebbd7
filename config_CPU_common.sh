# shellcheck shell=bash
# Settings that the CPU configurations share. Set DGXNGPU, the number of ranks on a machine, before
# sourcing this file. The caller may choose it, DGXNNODES and OMP_NUM_THREADS.
export DGXNNODES=${DGXNNODES:-1}
[[ ${DGXNGPU:-} =~ ^[1-9][0-9]{0,4}$ && $DGXNNODES =~ ^[1-9][0-9]{0,4}$ ]] || {
    echo "DGXNGPU=${DGXNGPU:-} ranks on each of DGXNNODES=$DGXNNODES machines:" \
        "both must be whole numbers from 1 to 99999" >&2
    exit 2
}
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"

# One oneDNN operator for batch norm and ReLU saves one pass over memory.
export FUSE_BN_RELU=1

# Threads: the ranks divide the cores. By default MXNet uses half of all cores in each rank.
threads=$(($(nproc) / DGXNGPU))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# Run each operator in the thread that calls it. Passing operators to another thread costs 2 to 3
# percent of a step, and on a CPU nothing else could run in the meantime.
export MXNET_ENGINE_TYPE=NaiveEngine
# On a CPU one optimizer kernel over several tensors is slower than one kernel for each tensor.
export MXNET_OPTIMIZER_AGGREGATION_SIZE=1
# Keep freed memory: new pages cost several percent of a step.
export MALLOC_MMAP_MAX_=0
export MALLOC_TRIM_THRESHOLD_=17179869184
# Ranks that wait yield the CPU, because there may be more ranks than cores.
export OMPI_MCA_mpi_yield_when_idle=1
