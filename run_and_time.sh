#!/usr/bin/env bash
# One timed training run.
#
#   ./run_and_time.sh [flags of python -m mxresnet]
#
# Started by hand, it creates the environment and the built-in data if needed, and runs the ranks of
# this machine. Started by mpirun or srun, it runs one rank. In the launcher of an MPIJob, it starts
# itself on the workers, once for each rank.
# DGXSYSTEM=<name> selects config_<name>.sh; if it is not set, the configuration is chosen from the
# GPUs found. LOGDIR (./results) is the folder of the log. mxresnet/launch/run.py does the work and
# describes the exit statuses.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# PID 1 of a container ignores signals that it has no handler for.
for signal in INT TERM HUP; do
    status=$((128 + $(kill -l "$signal")))
    # shellcheck disable=SC2064  # expand the name and number now
    trap "echo 'run_and_time.sh: stopped by SIG$signal' >&2; exit $status" "$signal"
done
python=$(./setup_env.sh --launcher-python)
# Signals during the start of Python stay pending until it has its own handlers (coreutils 8.31).
block=(env "--block-signal=INT,TERM,HUP")
"${block[@]}" true 2>/dev/null || block=()
exec "${block[@]}" "$python" -m mxresnet.launch.run "$@"
