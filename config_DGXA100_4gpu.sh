# shellcheck shell=bash
# 4 x A100-SXM4-80GB of a DGX A100, global batch 3264.
# NVIDIA's v2.1 repository has this file without the common file that it sources, and no result of
# it was published. The settings of the common file are those of config_DGXA100.sh.
# config_A100-80GB_4gpu.sh has settings that were submitted.
source "$(dirname "${BASH_SOURCE[0]}")/config_DGXA100_common.sh"

export DGXNGPU=4
export DGXNNODES=1
export WALLTIME=120
export NCCL_MAX_RINGS=4

export BATCHSIZE=816
export LR=10.5
export WD=5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=${NUMEPOCHS:-37}

# No hints to DALI: its defaults.
export DALI_TMP_BUFFER_HINT=25273239 # bytes
export DALI_PREALLOCATE_WIDTH=0      # pixels
export DALI_PREALLOCATE_HEIGHT=0
