# shellcheck shell=bash
# What all configurations share. Sourced by config_<system>.sh. Every exported name is a setting of mxresnet
# (python -m mxresnet --help), of a launcher, or of a library. The launchers' are
#   DGXNGPU        ranks on a machine
#   DGXNNODES      machines (1 where it is not set)
#   WALLTIME       minutes that one trial may take under Slurm (run.sub)
#   BIND           arguments of bind.sh; not set: ranks are not bound
#   BUILTIN_DATA   data set that run_and_time.sh makes itself
[[ ${DGXNGPU:-1} =~ ^[1-9][0-9]*$ && ${DGXNNODES:-1} =~ ^[1-9][0-9]*$ ]] || {
    mistake="DGXNGPU=${DGXNGPU:-} ranks on each of DGXNNODES=${DGXNNODES:-1} machines: both must be whole numbers from 1 on"
    ! declare -F die >/dev/null || die "$mistake"
    echo "config_common.sh: $mistake" >&2
    exit 2
}
export KVSTORE=horovod
export OPTIMIZER=sgdwfastlars
export LRSCHED=pow2
export LABELSMOOTHING=0.1
export MXNET_SUBGRAPH_VERBOSE=0
