# shellcheck shell=bash
# 8 x DGX A100: 64 x A100-SXM4-80GB, global batch 3264.
# NVIDIA's v2.1 submission: 4.5 minutes (Olympic mean), 35 epochs.
source "$(dirname "${BASH_SOURCE[0]}")/config_DGXA100_common.sh"

export DGXNGPU=8
export DGXNNODES=8
export WALLTIME=20

export BATCHSIZE=51
export LR=10.5
export WD=5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=${NUMEPOCHS:-37}

export NETWORK=resnet-v1b-fl
export MXNET_CUDNN_NHWC_BN_ADD_HEURISTIC_FWD=1
export MXNET_CUDNN_NHWC_BN_ADD_HEURISTIC_BWD=1

export DALI_PREFETCH_QUEUE=3
export DALI_HW_DECODER_LOAD=0.7
export DALI_CACHE_SIZE=12288 # MiB
export DALI_ROI_DECODE=0
