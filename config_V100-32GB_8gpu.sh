# shellcheck shell=bash
# 8 x V100-32GB, global batch 1024.
# UNTESTED on such a machine, and not from a published run. Global batch, learning rate and weight
# decay are those of the v2.1 submission on 4 x A100-SXM4-40GB. It is an estimate that the batch
# fits in memory.
source "$(dirname "${BASH_SOURCE[0]}")/config_DGXA100_common.sh"

export DGXNGPU=8
export DGXNNODES=1
# On a V100, NVIDIA's convolutions that also compute statistics do not support 1 x 1 at stride 2,
# which the shortcuts of resnet-v1b-stats-fl use.
export NETWORK=resnet-v1b-fl

export BATCHSIZE=128
export LR=6.0
export WD=2.5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=${NUMEPOCHS:-37}
