# shellcheck shell=bash
# 527 x DGX A100: 4216 x A100-SXM4-80GB, global batch 67456, batch norms over pairs of GPUs.
# NVIDIA's v2.1 submission: 0.32 minutes (Olympic mean), 86 epochs.
# Functional only: here BN_GROUP=2 sums the statistics of every batch norm through the hosts, 159
# times a step, so that this time cannot be reached (docs/launching.md, "Batch norm over a group of
# GPUs").
source "$(dirname "${BASH_SOURCE[0]}")/config_DGXA100_common.sh"

export DGXNGPU=8
export DGXNNODES=${DGXNNODES:-527}
export WALLTIME=15
export SBATCH_NETWORK=sharp

export OPTIMIZER=sgdwfastlarsv2
export BN_GROUP=2
export BATCHSIZE=16
export LR=24.699
export WD=1e-4
export MOM=0.951807
export WARMUP_EPOCHS=31
export NUMEPOCHS=${NUMEPOCHS:-90}
export EVAL_OFFSET=1

export NETWORK=resnet-v1b-fl
export MXNET_CUDNN_NHWC_BN_ADD_HEURISTIC_FWD=1
export MXNET_CUDNN_NHWC_BN_ADD_HEURISTIC_BWD=1
export MXNET_CUDNN_NHWC_BN_HEURISTIC_GBN=3
export MXNET_FUSE_CONV_BN_RELU=1
export MXNET_FUSE_CONV_BN_DUAL_ADD_RELU=1
export HOROVOD_NUM_NCCL_STREAMS=1
export NCCL_GRAPH_REGISTER=1

# One CUDA graph for the whole step (NVIDIA's build only) instead of one for each segment.
export E2E_CUDA_GRAPHS=1
export MXNET_ENABLE_CUDA_GRAPHS=0

export DALI_THREADS=3
export DALI_PREFETCH_QUEUE=3
export DALI_HW_DECODER_LOAD=0.7
export DALI_CACHE_SIZE=12288 # MiB
export DALI_ROI_DECODE=0
export DALI_TMP_BUFFER_HINT=118522776 # bytes
export INPUT_BATCH_MULTIPLIER=16
