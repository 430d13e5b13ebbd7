# shellcheck shell=bash
# What all configurations share. Sourced by config_<system>.sh. Every exported name is a setting of mxresnet
# (python -m mxresnet --help), of run_and_time.sh (DGXNGPU: ranks on a machine, BUILTIN_DATA) or of a library.
export KVSTORE=horovod
export OPTIMIZER=sgdwfastlars
export LRSCHED=pow2
export LABELSMOOTHING=0.1
export MXNET_SUBGRAPH_VERBOSE=0
