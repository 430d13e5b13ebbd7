# shellcheck shell=bash
# ImageNet on the CPU of one machine: 4 ranks, global batch 408. Computes in bfloat16 if the CPU has
# instructions for it (6 GB of memory a rank), else in float32 (11 GB).
# NOT from a published run: global batch, learning rate and weight decay are those of the v2.1
# submission on 2 x A30. A whole run takes days on most machines; a few steps of it test the data
# and the installation.

export DGXNGPU=${DGXNGPU:-4}
source "$(dirname "${BASH_SOURCE[0]}")/config_CPU_common.sh"

export BIND=--cpu=node

if grep -qsE '\b(avx512_bf16|amx_bf16)\b' /proc/cpuinfo; then
    export DTYPE=bfloat16
    # The fourth channel is zero: for three, oneDNN has no bfloat16 kernel of the first convolution.
    export IMAGE_SHAPE=4,224,224
fi

export BATCHSIZE=102
export LR=3.0
export WD=5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=${NUMEPOCHS:-37}

export DALI_ROI_DECODE=1
