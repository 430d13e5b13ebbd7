# shellcheck shell=bash
# What run_and_time.sh and run_trials.sh share: which configurations there are and what they say, which flags and variables a
# rank may have, and how a command is run that must not outlive the script which started it. Uses their die.
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "${0##*/}: bash $BASH_VERSION is too old: 4.4 or newer is needed" >&2; exit 2; }

stopped_by=""       # the signal that told the script to stop
stop_is_noted_in="" # a file that then gets the line "told to stop"; none when empty

systems() { local file; for file in config_*.sh; do [[ $file == *common.sh ]] || printf '%s ' "${file:7:-3}"; done | sed 's/ $//'; }

# Refuses a DGXSYSTEM that has no configuration file of its own.
check_system() { [[ " $(systems) " == *" $DGXSYSTEM "* ]] || die "DGXSYSTEM=$DGXSYSTEM has no config_$DGXSYSTEM.sh: use one of: $(systems)"; }

# Prints what a command prints once the configuration has been read. In a shell of its own: nothing of it stays here.
from_config() {
    # shellcheck disable=SC2016  # for the inner shell
    bash -c 'set -euo pipefail; source "$1"; eval "$2"' - "./config_$DGXSYSTEM.sh" "$1"
}

# Refuses another place for the log, given the flags of a run.
refuse_log_file() {
    local word
    for word in "$@"; do
        [[ $word != --log-file && $word != --log-file=* ]] || die "--log-file: the logs go to LOGDIR, named by DATESTAMP and TRIAL"
    done
    [ -z "${LOG_FILE:-}" ] || die "LOG_FILE=$LOG_FILE: the logs go to LOGDIR, named by DATESTAMP and TRIAL"
}

# Prints the variables here that a rank reads: settings (the arguments), what scripts hand on, and what libraries read.
read_by_a_rank() {
    local name
    for name in $(compgen -e); do
        case " $* DGXSYSTEM DGXNGPU DGXNNODES BIND LOGDIR DATESTAMP TRIAL " in
            *" $name "*) echo "$name" ;;
            *) case $name in MXNET_* | HOROVOD_* | NCCL_* | OMP_* | DALI_* | UCX_* | MALLOC_* | DMLC_*) echo "$name" ;; esac ;;
        esac
    done
}

note_stop() {
    stopped_by=$1
    [ -z "$running" ] || kill -TERM "$running" 2>/dev/null || true
    [ -z "$stop_is_noted_in" ] || echo "told to stop" >>"$stop_is_noted_in"
}

# Runs a command and ends it when this script is told to stop; returns its status.
run_to_its_end() {
    local status=0 running="" signal
    # shellcheck disable=SC2064  # the signal's name as it is now
    for signal in INT TERM HUP; do trap "note_stop $signal" "$signal"; done
    "$@" </dev/null &
    running=$!
    [ -z "$stopped_by" ] || kill -TERM "$running" 2>/dev/null || true # told so before there was anything to end
    while kill -0 "$running" 2>/dev/null; do
        status=0
        wait "$running" 2>/dev/null || status=$?
    done
    trap - INT TERM HUP
    [ -z "$stopped_by" ] || status=$((128 + $(kill -l "$stopped_by")))
    return "$status"
}
