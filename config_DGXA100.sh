# shellcheck shell=bash
# One DGX A100: 8 x A100-SXM4-80GB, global batch 3264.
# NVIDIA's v2.1 submission: 28.7 minutes (Olympic mean), 35 epochs.
source "$(dirname "${BASH_SOURCE[0]}")/config_DGXA100_common.sh"

export DGXNGPU=8
export DGXNNODES=1
export WALLTIME=40

export BATCHSIZE=408
export LR=10.5
export WD=5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=${NUMEPOCHS:-37}
