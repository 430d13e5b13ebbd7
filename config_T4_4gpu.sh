# shellcheck shell=bash
# 4 x T4, global batch 408.
# UNTESTED on such a machine, and not from a published run. Global batch, learning rate and weight
# decay are those of the v2.1 submission on 2 x A30. It is an estimate that the batch fits in
# memory.
source "$(dirname "${BASH_SOURCE[0]}")/config_DGXA100_common.sh"

export DGXNGPU=4
export DGXNNODES=1

export BATCHSIZE=102
export LR=3.0
export WD=5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=${NUMEPOCHS:-37}
