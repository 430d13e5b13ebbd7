# shellcheck shell=bash
# 8 x A100-SXM4-40GB, global batch 1632.
# As logged in Dell's v2.1 submission of two 4-GPU machines (2xXE8545x4A100-SXM-40GB): 33.5 minutes,
# 35 epochs, one of five runs missed the target. No machine with eight of these GPUs was submitted.
# Dell also set NCCL_MAX_RINGS=4, for the links between the four GPUs of its machines, and
# MXNET_DETERMINISTIC=1.
source "$(dirname "${BASH_SOURCE[0]}")/config_DGXA100_common.sh"

export DGXNGPU=8
export DGXNNODES=1
export WALLTIME=80

export BATCHSIZE=204
export LR=7.3
export WD=5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=${NUMEPOCHS:-37}
