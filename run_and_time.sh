#!/usr/bin/env bash
# One timed training run.
#
#   ./run_and_time.sh [flags of python -m mxresnet]
#
# Started by hand it makes the environment and the built-in data if needed, and runs the ranks of this machine. Started by
# mpirun or srun it runs one rank. In the launcher of an MPIJob it runs itself as every rank on the workers.
# DGXSYSTEM=<name> picks config_<name>.sh; without it the hardware decides. LOGDIR (./results) gets the log.
# The exit statuses are described in mxresnet/launch/run.py, which does the work.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# PID 1 of a container ignores signals without a handler. Python installs its own.
for signal in INT TERM HUP; do
    # shellcheck disable=SC2064  # expand the name and number now
    trap "echo 'run_and_time.sh: stopped by SIG$signal' >&2; exit $((128 + $(kill -l "$signal")))" "$signal"
done
python=$(./setup_env.sh --launcher-python)
exec "$python" -m mxresnet.launch.run "$@"
