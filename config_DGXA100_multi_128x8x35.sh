# shellcheck shell=bash
# 128 x DGX A100: 1024 x A100-SXM4-80GB, global batch 35840.
# NVIDIA's v2.1 submission: 0.56 minutes (Olympic mean), 56 or 60 epochs.
source "$(dirname "${BASH_SOURCE[0]}")/config_DGXA100_common.sh"

export DGXNGPU=8
export DGXNNODES=128
export WALLTIME=15
export SBATCH_NETWORK=sharp

export BATCHSIZE=35
export LR=21.9
export WD=2.5e-5
export MOM=0.94
export WARMUP_EPOCHS=17
export NUMEPOCHS=${NUMEPOCHS:-60}
export EVAL_OFFSET=3

export NETWORK=resnet-v1b-fl
export MXNET_CUDNN_NHWC_BN_ADD_HEURISTIC_FWD=1
export MXNET_CUDNN_NHWC_BN_ADD_HEURISTIC_BWD=1
export HOROVOD_NUM_NCCL_STREAMS=1

export DALI_THREADS=3
export DALI_PREFETCH_QUEUE=3
export DALI_HW_DECODER_LOAD=0.7
export DALI_CACHE_SIZE=12288 # MiB
export DALI_ROI_DECODE=0
export DALI_TMP_BUFFER_HINT=30502185 # bytes
export INPUT_BATCH_MULTIPLIER=8
