#!/usr/bin/env bash
# Run NEXP timed runs one after another, each with a dropped page cache and its own seed, and
# summarize them.
#
#   ./run_trials.sh [flags of python -m mxresnet]
#
#   NEXP          number of trials (5, as MLPerf requires for this benchmark)
#   SEEDS         their seeds, all different; not set: SEED, SEED+1, ...; without SEED: random
#   CLEAR_CACHES  1 (default): drop the page cache before each trial, which needs root; where that
#                 fails, a note is shown and the log has cache_clear false. sudo: the same, through
#                 sudo without a password. 0: do not drop it
#   LOGDIR        folder (./results) of <stamp>_<trial>.log, the output of the official checker
#                 (.check), <stamp>_summary.txt and <stamp>_package, the folder for MLPerf's
#                 package_checker and result_summarizer
#   DATESTAMP     the stamp; not set: now
#   SUBMISSION_ORG, SUBMISSION_PLATFORM, ...  values for the log
#   and the variables of run_and_time.sh
#
# mxresnet/launch/trials.py does the work and describes the exit statuses.
set -euo pipefail
script=${BASH_SOURCE[0]}
[ ! -L "$script" ] || script=$(command readlink -f "$script")
source "$(command dirname -- "$script")/mxresnet/launch/start.sh"
start_launcher trials local "$@"
