# shellcheck shell=bash
# 8 x V100-16GB, global batch 816.
# UNTESTED on such a machine, and not from a published run. Global batch, learning rate and weight
# decay are those of the v2.1 submission on 2 x A100-PCIe-80GB. It is an estimate that the batch
# fits in memory.
source "$(dirname "${BASH_SOURCE[0]}")/config_DGXA100_common.sh"

export DGXNGPU=8
export DGXNNODES=1
# On a V100, NVIDIA's convolutions that also compute statistics do not support 1 x 1 at stride 2,
# which the shortcuts of resnet-v1b-stats-fl use.
export NETWORK=resnet-v1b-fl

export BATCHSIZE=102
export LR=5.3
export WD=5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=${NUMEPOCHS:-37}
