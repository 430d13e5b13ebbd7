# shellcheck shell=bash
# Settings that the GPU configurations share: NVIDIA's MLPerf Training v2.1 settings for one machine
# of A100s.
# Source of the values, unless a comment names another one: NVIDIA's v2.1 results repository,
# resnet/implementations/mxnet-22.04 (its config_DGXA100_common.sh, config_DGXA100.sh, and the
# constants of its run_and_time.sh and Dockerfile).
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"

# Network
export NETWORK=resnet-v1b-stats-fl
export DTYPE=float16
export IMAGE_SHAPE=4,224,224
export INPUT_LAYOUT=NHWC
export CONV_LAYOUT=NHWC
export BATCHNORM_LAYOUT=NHWC
export POOLING_LAYOUT=NHWC

# Supported by NVIDIA's build of MXNet and by this project's batch norms.
export FUSE_BN_RELU=1
export FUSE_BN_ADD_RELU=1

# Supported only by NVIDIA's build of MXNet.
export CONV_ALGO=1
export FORCE_TENSOR_CORE=1
export MXNET_EXTENDED_NORMCONV_SUPPORT=1
export MXNET_CUDNN_WARN_ON_IGNORED_FLAGS=0
export MXNET_CUDNN_NHWC_BN_HEURISTIC_FWD=1
export MXNET_CUDNN_NHWC_BN_HEURISTIC_BWD=1
export MXNET_CUDNN_NHWC_BN_ADD_HEURISTIC_FWD=0
export MXNET_CUDNN_NHWC_BN_ADD_HEURISTIC_BWD=0

# Engine
export MXNET_ENABLE_CUDA_GRAPHS=1
export MXNET_EXEC_BULK_EXEC_MAX_NODE_TRAIN_FWD=999
export MXNET_EXEC_BULK_EXEC_MAX_NODE_TRAIN_BWD=999
export MXNET_OPTIMIZER_AGGREGATION_SIZE=54
export MXNET_GPU_WORKER_NTHREADS=1
export MXNET_GPU_COPY_NTHREADS=1
export OMP_NUM_THREADS=1

# Gradient exchange
export HOROVOD_CYCLE_TIME=0.1            # milliseconds
export HOROVOD_FUSION_THRESHOLD=67108864 # bytes
export HOROVOD_NUM_NCCL_STREAMS=2
export OMPI_MCA_btl=^openib

# Input
export DALI_THREADS=6
export DALI_PREFETCH_QUEUE=5
export DALI_ROI_DECODE=1
export DALI_NVJPEG_MEMPADDING=256     # MiB
export DALI_TMP_BUFFER_HINT=355568328 # bytes
export DALI_PREALLOCATE_WIDTH=5980    # pixels
export DALI_PREALLOCATE_HEIGHT=6430

# Bind each rank to cores near its GPU, and to one network adapter.
export BIND="--cpu=exclusive --ib=single"
