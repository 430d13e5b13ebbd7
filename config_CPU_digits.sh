# shellcheck shell=bash
# ResNet-50 on the built-in handwritten digits, on any CPU: 2 ranks, a few minutes on 2 cores.
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"

export BUILTIN_DATA=digits
export DATAROOT=${DATAROOT:-$PWD/data/digits}
export DGXNGPU=${DGXNGPU:-2}          # ranks on this machine

# The target: far above what chance (0.10) or a broken network, label order or optimizer reaches.
export THR=0.97
export IMAGE_SHAPE=3,32,32
export RESIZE=32
export BATCHSIZE=64
export LR=4
export WD=0.0001
export WARMUP_EPOCHS=1
export NUMEPOCHS=12
export EVAL_PERIOD=1
export EVAL_OFFSET=0
export DISP_BATCHES=0

# Digits fill their image and mean something else in a mirror.
export RAND_MIRROR=0
export MIN_RANDOM_AREA=0.5

# Threads: the cores shared out among the ranks. MXNet would take half of all cores in each of them.
threads=$(($(nproc) / DGXNGPU))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export DALI_THREADS=1
export MXNET_OPTIMIZER_AGGREGATION_SIZE=1

# More ranks than cores may be waiting for each other.
export OMPI_MCA_mpi_yield_when_idle=1
