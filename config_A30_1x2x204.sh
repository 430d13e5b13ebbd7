# shellcheck shell=bash
# 2 x A30, global batch 408.
# NVIDIA's v2.1 configuration; submitted by Fujitsu (rx_A30x2): 239 minutes, 35 epochs, one of five
# runs missed the target.
source "$(dirname "${BASH_SOURCE[0]}")/config_DGXA100_common.sh"

export DGXNGPU=2
export DGXNNODES=1
export WALLTIME=360

export BATCHSIZE=204
export LR=3.0
export WD=5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=${NUMEPOCHS:-37}

export HOROVOD_NUM_NCCL_STREAMS=1
# No hints to DALI: its defaults.
export DALI_TMP_BUFFER_HINT=25273239 # bytes
export DALI_PREALLOCATE_WIDTH=0      # pixels
export DALI_PREALLOCATE_HEIGHT=0
