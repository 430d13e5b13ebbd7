# shellcheck shell=bash
# 4 x A100-SXM4-80GB, global batch 1632.
# As logged in the v2.1 submissions of ASUSTeK (ESCN4A-E11) and Dell (XE8545x4A100-SXM-80GB):
# 54 to 55 minutes, 35 epochs. Both set NCCL_MAX_RINGS and MXNET_DETERMINISTIC (deterministic
# algorithms, supported only by NVIDIA's build of MXNet).
source "$(dirname "${BASH_SOURCE[0]}")/config_DGXA100_common.sh"

export DGXNGPU=4
export DGXNNODES=1
export WALLTIME=120
export NCCL_MAX_RINGS=4
export MXNET_DETERMINISTIC=1

export BATCHSIZE=408
export LR=7.5
export WD=5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=${NUMEPOCHS:-37}
