#!/usr/bin/env bash
# Run trials, as run_trials.sh does, in a container on this machine.
#
#   CONT=<image> DATADIR=<folder> DGXSYSTEM=<name> ./run_with_docker.sh [flags of mxresnet]
#
#   CONT         image with this project in its working directory, MXNet and Horovod in its python
#   DATADIR      folder of the data set, mounted as /data, read-only
#   DGXSYSTEM    selects config_<name>.sh of this checkout; its variables are set in the container
#   COPY_DATASET folder of a data set to copy to DATADIR first
#   LOGDIR       (./results), mounted as /results
#   DOCKER_GPUS  GPUs of the container, as in docker run --gpus (all; none for CPU configurations)
#   CLEAR_CACHES_IMAGE  image whose container drops the page cache if this user may not (none)
#   NEXP, SEED, SEEDS, CLEAR_CACHES, DATESTAMP, SUBMISSION_*  as for run_trials.sh
set -euo pipefail
script=${BASH_SOURCE[0]}
[ ! -L "$script" ] || script=$(command readlink -f "$script")
source "$(command dirname -- "$script")/mxresnet/launch/start.sh"
start_launcher trials docker "$@"
