# shellcheck shell=bash
# What the CPU configurations share. Set DGXNGPU, the ranks on a machine, before sourcing it.
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"

# Batch norm and its ReLU as oneDNN's one operator: a pass over memory less.
export FUSE_BN_RELU=1

# Threads: the cores shared out among the ranks. MXNet would take half of all cores in each of them.
threads=$(($(nproc) / DGXNGPU))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# Operators run one after the other in the thread that asks for them: handing them to another thread costs 2 to 3 percent of a
# step, and a CPU has nothing to do in the meantime.
export MXNET_ENGINE_TYPE=NaiveEngine
# On a CPU an optimizer kernel over several tensors takes longer than one for each.
export MXNET_OPTIMIZER_AGGREGATION_SIZE=1
# Memory that was used once is kept: fresh pages cost several percent of a step.
export MALLOC_MMAP_MAX_=0
export MALLOC_TRIM_THRESHOLD_=17179869184
# More ranks than cores may be waiting for each other.
export OMPI_MCA_mpi_yield_when_idle=1
