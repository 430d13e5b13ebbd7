# shellcheck shell=bash
# 8 x V100-16GB, global batch 816.
# UNTESTED, and not from a published run: nothing here was tried on such a machine. Global batch, rate and decay are those
# that 2 x A100-PCIe-80GB were submitted with; that the batch fits is an estimate.
source "$(dirname "${BASH_SOURCE[0]}")/config_DGXA100_common.sh"

export DGXNGPU=8
# On a V100 NVIDIA's convolutions with sums refuse 1 x 1 at stride 2, which resnet-v1b-stats-fl projects its shortcuts with.
export NETWORK=resnet-v1b-fl

export BATCHSIZE=102
export LR=5.3
export WD=5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=37
