# shellcheck shell=bash
# ImageNet on the CPU of one machine, float32: 4 ranks, global batch 408, about 10 GB of memory a rank.
# NOT from a published run: global batch, rate and decay are those that 2 x A30 were submitted with in v2.1. It takes days on
# most machines; a few steps of it show that data and installation are right.
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"

export DGXNGPU=${DGXNGPU:-4}
export BIND=--cpu=node

export BATCHSIZE=102
export LR=3.0
export WD=5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=37

# Threads: the cores shared out among the ranks. MXNet would take half of all cores in each of them.
threads=$(($(nproc) / DGXNGPU))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export DALI_ROI_DECODE=1
export MXNET_OPTIMIZER_AGGREGATION_SIZE=1

# More ranks than cores may be waiting for each other.
export OMPI_MCA_mpi_yield_when_idle=1
