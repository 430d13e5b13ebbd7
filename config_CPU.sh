# shellcheck shell=bash
# ImageNet on the CPU of one machine, float32: 4 ranks, global batch 408, about 10 GB of memory a rank.
# NOT from a published run: global batch, rate and decay are those that 2 x A30 were submitted with in v2.1. It takes days on
# most machines; a few steps of it show that data and installation are right.

export DGXNGPU=${DGXNGPU:-4}
source "$(dirname "${BASH_SOURCE[0]}")/config_CPU_common.sh"

export BIND=--cpu=node

export BATCHSIZE=102
export LR=3.0
export WD=5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=37

export DALI_ROI_DECODE=1
