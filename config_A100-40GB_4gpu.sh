# shellcheck shell=bash
# 4 x A100-SXM4-40GB, global batch 1024.
# As logged in the v2.1 submissions of Lenovo (SR670v2-4xA100_SXM4_40GB_400W) and Dell
# (XE8545x4A100-SXM-40GB): 62 minutes, 35 epochs. NCCL_MAX_RINGS is Dell's. Dell also set
# MXNET_DETERMINISTIC=1, which Lenovo did not; the two took the same time.
source "$(dirname "${BASH_SOURCE[0]}")/config_DGXA100_common.sh"

export DGXNGPU=4
export DGXNNODES=1
export WALLTIME=120
export NCCL_MAX_RINGS=4

export BATCHSIZE=256
export LR=6.0
export WD=2.5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=${NUMEPOCHS:-37}
