# shellcheck shell=bash
# 4 x A100-PCIe-80GB, global batch 1632.
# As logged in Dell's v2.1 submission (R750xax4A100-PCIE-80GB-NVBRIDGE): 61.3 minutes, 35 epochs.
# Azure's submission (NC96ads_A100_v4) has LR=10.5: 60.0 minutes, 35 epochs.
source "$(dirname "${BASH_SOURCE[0]}")/config_DGXA100_common.sh"

export DGXNGPU=4
export DGXNNODES=1
export WALLTIME=120

export BATCHSIZE=408
export LR=6.32
export WD=5e-5
export WARMUP_EPOCHS=2
export NUMEPOCHS=${NUMEPOCHS:-37}
