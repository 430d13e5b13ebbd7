# shellcheck shell=bash
# 4 x T4, global batch 408.
# UNTESTED, and not from a published run: nothing here was tried on such a machine. Global batch, rate and decay are those
# that 2 x A30 were submitted with; that the batch fits is an estimate.
source "$(dirname "${BASH_SOURCE[0]}")/config_DGXA100_common.sh"

export DGXNGPU=4

export BATCHSIZE=102
export LR=3.0
export WD=5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=37
