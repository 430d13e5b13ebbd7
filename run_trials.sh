#!/usr/bin/env bash
# Run NEXP timed runs one after another, each with a dropped page cache and its own seed, and
# summarize them.
#
#   ./run_trials.sh [flags of python -m mxresnet]
#
#   NEXP          number of trials (5, as MLPerf requires for this benchmark)
#   SEEDS         their seeds, all different; not set: SEED, SEED+1, ...; without SEED: random
#   CLEAR_CACHES  1 (default): drop the page cache before each trial, which needs root; where that
#                 fails, a note is shown and the log has cache_clear false. 0: do not drop it
#   LOGDIR        folder (./results) of <stamp>_<trial>.log, the output of the official checker
#                 (.check), <stamp>_summary.txt and <stamp>_package, the folder for MLPerf's
#                 package_checker and result_summarizer
#   DATESTAMP     the stamp; not set: now
#   SUBMISSION_ORG, SUBMISSION_PLATFORM, ...  values for the log
#   and the variables of run_and_time.sh
#
# mxresnet/launch/trials.py does the work and describes the exit statuses.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=$(./setup_env.sh --launcher-python)
# Signals during the start of Python stay pending until it has its own handlers (coreutils 8.31).
block=(env "--block-signal=INT,TERM,HUP")
"${block[@]}" true 2>/dev/null || block=()
exec "${block[@]}" "$python" -m mxresnet.launch.trials local "$@"
