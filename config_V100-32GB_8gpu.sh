# shellcheck shell=bash
# 8 x V100-32GB, global batch 1024.
# UNTESTED, and not from a published run: nothing here was tried on such a machine. Global batch, rate and decay are those
# that 4 x A100-SXM4-40GB were submitted with; that the batch fits is an estimate.
source "$(dirname "${BASH_SOURCE[0]}")/config_DGXA100_common.sh"

export DGXNGPU=8
# On a V100 NVIDIA's convolutions with sums refuse 1 x 1 at stride 2, which resnet-v1b-stats-fl projects its shortcuts with.
export NETWORK=resnet-v1b-fl

export BATCHSIZE=128
export LR=6.0
export WD=2.5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=37
