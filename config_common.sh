# shellcheck shell=bash
# Settings that all configurations share. config_<system>.sh sources this file, then exports what
# differs. Every exported name is a setting of mxresnet (python -m mxresnet --help), of a launcher,
# or of a library. The settings of the launchers:
#   DGXNGPU        ranks on a machine
#   DGXNNODES      machines
#   WALLTIME       minutes that one trial may take under Slurm (run.sub)
#   BIND           arguments of bind.sh (default: ranks are not bound)
#   BUILTIN_DATA   name of the data set that run_and_time.sh makes itself
#
# A configuration is complete: it sets every hyperparameter, and it sets or unsets every variable
# that any configuration sets. So the caller's shell cannot change a run, even if another
# configuration was sourced in it. The caller chooses the data, the seed, the machine's devices,
# what is measured, and, where a configuration has the form ${NAME:-value}, that variable.
#
# The values here are mxresnet's defaults, unless a comment names another reason.

unset WALLTIME BIND BUILTIN_DATA SBATCH_NETWORK
unset MXNET_DETERMINISTIC MXNET_ENABLE_CUDA_GRAPHS MXNET_ENGINE_TYPE
unset MXNET_EXEC_BULK_EXEC_MAX_NODE_TRAIN_BWD MXNET_EXEC_BULK_EXEC_MAX_NODE_TRAIN_FWD
unset MXNET_EXTENDED_NORMCONV_SUPPORT MXNET_FUSE_CONV_BN_DUAL_ADD_RELU MXNET_FUSE_CONV_BN_RELU
unset MXNET_CUDNN_NHWC_BN_ADD_HEURISTIC_BWD MXNET_CUDNN_NHWC_BN_ADD_HEURISTIC_FWD
unset MXNET_CUDNN_NHWC_BN_HEURISTIC_BWD MXNET_CUDNN_NHWC_BN_HEURISTIC_FWD
unset MXNET_CUDNN_NHWC_BN_HEURISTIC_GBN MXNET_CUDNN_WARN_ON_IGNORED_FLAGS
unset MXNET_GPU_COPY_NTHREADS MXNET_GPU_WORKER_NTHREADS MXNET_OPTIMIZER_AGGREGATION_SIZE
unset HOROVOD_CYCLE_TIME HOROVOD_FUSION_THRESHOLD HOROVOD_NUM_NCCL_STREAMS
unset NCCL_GRAPH_REGISTER NCCL_MAX_RINGS
unset MALLOC_MMAP_MAX_ MALLOC_TRIM_THRESHOLD_ OMPI_MCA_mpi_yield_when_idle

# Network
export NETWORK=resnet-v1b-fl
export NUM_LAYERS=50
export NUM_CLASSES=0
export IMAGE_SHAPE=3,224,224
export DTYPE=float32
export INPUT_LAYOUT=NCHW
export CONV_LAYOUT=NCHW
export BATCHNORM_LAYOUT=NCHW
export POOLING_LAYOUT=NCHW
export BATCHNORM_EPS=1e-5
export BATCHNORM_MOM=0.9
export BN_GROUP=1
export BN_GAMMA_INIT0=0
export FUSE_BN_RELU=0
export FUSE_BN_ADD_RELU=0
export CONV_ALGO=-1
export FORCE_TENSOR_CORE=0
export VERBOSE=0
export E2E_CUDA_GRAPHS=0
export MXNET_SUBGRAPH_VERBOSE=0 # quiet; MXNet's default is 1

# Optimizer. All configurations use LARS with polynomial decay and label smoothing. Batch size,
# learning rate, weight decay, warm-up and epochs have no common value.
export OPTIMIZER=sgdwfastlars
export LARSETA=0.001
export LARS_EPS=0
export MOM=0.9
export LABELSMOOTHING=0.1
export LRSCHED=pow2
export LR_FACTOR=0.1
export WARMUP_STRATEGY=linear
export KVSTORE=horovod
export MXNET_HOROVOD_NUM_GROUPS=1

# Evaluation and stop
export THR=0.759
export EVAL_PERIOD=4
export EVAL_OFFSET=2
export SEPAR_VAL=0
export TOP_K=0

# Input
export USE_DALI=1
export LAZY_INIT_SANITY=0
export INPUT_BATCH_MULTIPLIER=1
export RESIZE=256
export MIN_RANDOM_AREA=0.05
export MAX_RANDOM_AREA=1
export MIN_RANDOM_ASPECT_RATIO=0.75
export MAX_RANDOM_ASPECT_RATIO=1.3333333333333333
export RAND_MIRROR=1
export DALI_THREADS=3
export DALI_PREFETCH_QUEUE=2
export DALI_DONT_USE_MMAP=0
export DALI_ROI_DECODE=0
export DALI_CACHE_SIZE=0 # MiB
export DALI_HW_DECODER_LOAD=0
export DALI_NVJPEG_MEMPADDING=64     # MiB
export DALI_TMP_BUFFER_HINT=25273239 # bytes
export DALI_DECODER_BUFFER_HINT=1315942
export DALI_CROP_BUFFER_HINT=165581
export DALI_NORMALIZE_BUFFER_HINT=441549
export DALI_PREALLOCATE_WIDTH=0 # pixels
export DALI_PREALLOCATE_HEIGHT=0

# NCCL reports warnings unless the caller wants more, as with NVIDIA's run_and_time.sh.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
