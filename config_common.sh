# shellcheck shell=bash
# Settings that all configurations share. config_<system>.sh sources this file. Every exported name
# is a setting of mxresnet (python -m mxresnet --help), of a launcher, or of a library. The settings
# of the launchers:
#   DGXNGPU        ranks on a machine
#   DGXNNODES      machines (default: 1)
#   WALLTIME       minutes that one trial may take under Slurm (run.sub)
#   BIND           arguments of bind.sh (default: ranks are not bound)
#   BUILTIN_DATA   name of the data set that run_and_time.sh makes itself
[[ ${DGXNGPU:-1} =~ ^[1-9][0-9]*$ && ${DGXNNODES:-1} =~ ^[1-9][0-9]*$ ]] || {
    echo "DGXNGPU=${DGXNGPU:-} ranks on each of DGXNNODES=${DGXNNODES:-1} machines:" \
        "both must be whole numbers from 1 on" >&2
    exit 2
}
export KVSTORE=horovod
export OPTIMIZER=sgdwfastlars
export LRSCHED=pow2
export LABELSMOOTHING=0.1
export MXNET_SUBGRAPH_VERBOSE=0
