#!/usr/bin/env bash
# One timed training run.
#
#   ./run_and_time.sh [flags of python -m mxresnet]
#
# Started by hand, it creates the environment and the built-in data if needed, and runs the ranks of
# this machine. Started by mpirun or srun, it runs one rank. In the launcher of an MPIJob, it starts
# itself on the workers, once for each rank.
# DGXSYSTEM=<name> selects config_<name>.sh; if it is not set, the configuration is chosen from the
# GPUs found. LOGDIR is the folder of the log; not set: results in this project's folder.
# mxresnet/launch/run.py does the work and describes the exit statuses.
set -euo pipefail
script=${BASH_SOURCE[0]}
[ ! -L "$script" ] || script=$(command readlink -f "$script")
source "$(command dirname -- "$script")/mxresnet/launch/start.sh"
start_launcher run "$@"
