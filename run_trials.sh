#!/usr/bin/env bash
# NEXP timed runs one after another, each from a dropped page cache and with its own seed, then what they say together.
#
#   ./run_trials.sh [flags of python -m mxresnet]
#
#   NEXP           trials (5, as MLPerf asks for this benchmark)
#   SEEDS          their seeds, as many as trials, all different; not set: SEED, SEED+1, ... or, without SEED, drawn
#   CLEAR_CACHES   1 (default): drop the page cache before each trial, which takes root; where that cannot be done it is
#                  said, and the log says cache_clear false. 0: do not, and log so
#   LOGDIR         (./results) gets <stamp>_<trial>.log, the official checker's words on it (.check), <stamp>_summary.txt and
#                  <stamp>_package, the folder that MLPerf's package_checker and result_summarizer take
#   DATESTAMP      the stamp; not set: now
#   SUBMISSION_ORG, SUBMISSION_PLATFORM, ... go into the logs; what run_and_time.sh reads (DGXSYSTEM, DATAROOT, ...) works here
#
# A trial that misses its target does not stop the others; one that fails does, and what was not run is said.
# Exit status: 0 every trial reached its target and the official checker accepts every log; 3 some missed or had none;
# 4 none missed, but the checker refuses a log; 2 a mistake in settings or data; anything else is that of the failed trial.
#
# Sourced, it only defines functions: run.sub and run_with_docker.sh replace one_trial, drop_caches and run_python.
set -euo pipefail
# shellcheck source=launch_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

self=${0##*/}

say() { printf '%s\n' "$*" >&2; }
die() { say "$self: $*"; exit 2; }

# Drops this machine's page cache.
drop_caches() { sync && { echo 3 >/proc/sys/vm/drop_caches; } 2>/dev/null; }

# Becomes a trial, with the exported DATESTAMP, TRIAL, SEED and CACHE_CLEARED; arguments are flags of mxresnet. Runs in a
# subshell and must replace it (exec), or else a signal would end the subshell only.
one_trial() { exec ./run_and_time.sh "$@"; }

# Prints the settings of a trial, or says in one line what is wrong with them.
show_settings() { one_trial --print-config "$@"; }

leave_early() { [ -z "$stopped_by" ] || say "$self: stopped by SIG$stopped_by"; exit "$1"; }

# Runs the environment's python where the trials run. $there is what LOGDIR is called there.
run_python() { "$(./setup_env.sh)" "$@"; }

# Prints what the official checker says of a log; its status is the verdict.
check_log() { run_python -m mlperf_logging.compliance_checker --usage training --ruleset 2.1.0 --log_output /dev/null "$there/${1##*/}"; }

# Lays the logs out as MLPerf's rcp_checker, package_checker and result_summarizer want them.
lay_out() {
    local system=() logs
    mapfile -t logs < <(seq -f "$there/${DATESTAMP}_%g.log" "$NEXP")
    [[ ! ${SUBMISSION_PLATFORM:-} =~ ^[A-Za-z0-9_.+-]+$ ]] || system=(--system "$SUBMISSION_PLATFORM")
    run_python -m mxresnet.results.submission "$there/${DATESTAMP}_package" "${logs[@]}" \
        "${system[@]}" --nodes "${DGXNNODES:-1}" >/dev/null
    say "for MLPerf's package_checker and result_summarizer: $LOGDIR/${DATESTAMP}_package"
}

# Sets seeds, one for each trial.
choose_seeds() {
    local seed
    if [ -n "${SEEDS:-}" ]; then
        read -ra seeds <<<"${SEEDS//,/ }"
    elif [ -n "${SEED:-}" ]; then
        [[ $SEED =~ ^[0-9]{1,9}$ ]] || die "SEED=$SEED is not a whole number below 1000000000"
        mapfile -t seeds < <(seq "$((10#$SEED))" $((10#$SEED + NEXP - 1)))
    else
        mapfile -t seeds < <(shuf -i 0-65535 -n "$NEXP")
    fi
    for seed in "${seeds[@]}"; do [[ $seed =~ ^[0-9]{1,9}$ ]] || die "SEEDS=$SEEDS: $seed is not a whole number below 1000000000"; done
    [ ${#seeds[@]} = "$NEXP" ] || die "SEEDS=$SEEDS are ${#seeds[@]} seeds for NEXP=$NEXP trials"
    [ "$(printf '%s\n' "${seeds[@]}" | sort -nu | wc -l)" = "$NEXP" ] || die "SEEDS=$SEEDS: every trial needs a seed of its own"
}

# Refuses flags that a single run may have and trials may not.
check_flags() {
    local word
    refuse_log_file "$@"
    for word in "$@"; do
        case $word in
            --seed | --seed=*) die "--seed: every trial has its own; set SEED or SEEDS" ;;
            --help | -h | --print-config) die "$word: ./run_and_time.sh shows that" ;;
        esac
    done
}

check_settings() {
    check_flags "$@"
    NEXP=${NEXP:-5} CLEAR_CACHES=${CLEAR_CACHES:-1} LOGDIR=${LOGDIR:-./results} DATESTAMP=${DATESTAMP:-$(date +%y%m%d%H%M%S)}
    [[ $NEXP =~ ^[1-9][0-9]{0,3}$ ]] || die "NEXP=$NEXP is not a number of trials"
    [[ $CLEAR_CACHES =~ ^[01]$ ]] || die "CLEAR_CACHES=$CLEAR_CACHES is neither 0 nor 1"
    choose_seeds
    mkdir -p "$LOGDIR" 2>/dev/null && [ -w "$LOGDIR" ] || die "LOGDIR=$LOGDIR cannot be written: name a folder that this user may write"
    ! compgen -G "$LOGDIR/${DATESTAMP}_*" >/dev/null || die "DATESTAMP=$DATESTAMP: $LOGDIR has files of that stamp"
    export DATESTAMP LOGDIR
    # Before anything is done to the machine.
    TRIAL=0 SEED=${seeds[0]} CACHE_CLEARED=0 run_to_its_end show_settings "$@" >/dev/null || leave_early $?
}

# Sets CACHE_CLEARED for the trial's log to what was done.
clear_caches() {
    export CACHE_CLEARED=0
    if [ "$CLEAR_CACHES" = 1 ]; then
        if drop_caches; then
            CACHE_CLEARED=1
        else
            say "note: the page cache could not be dropped (it takes root), so the log says cache_clear false; CLEAR_CACHES=0 does not try"
        fi
    fi
}

# Prints "minutes epochs accuracy" of a log, with - for what it does not have.
figures_of() {
    awk '
        function field(name) { return match($0, "\"" name "\": *[-0-9.e]+") ? substr($0, RSTART + length(name) + 3, RLENGTH - length(name) - 3) + 0 : "-" }
        !/^:::MLLOG / {next}
        /"key": "run_start"/ {start = field("time_ms")}
        /"key": "run_stop"/ {stop = field("time_ms")}
        /"key": "eval_accuracy"/ {accuracy = field("value"); epoch = field("epoch_num")}
        END {print (start && stop ? sprintf("%.3f", (stop - start) / 60000) : "-"), (epoch ? epoch : "-"), (epoch ? sprintf("%.5f", accuracy) : "-")}
    ' "$1" 2>/dev/null || echo "- - -"
}

# Prints the mean of the minutes on its input without the fastest and the slowest; a run that missed ("inf") is the slowest.
olympic_mean() { sort -g | sed '1d;$d' | awk '/inf/ {missed = 1} {sum += $1} END {print (missed ? "none" : sprintf("%.3f", sum / NR))}'; }

# One line a trial, and their mean. Reads the arrays outcomes and verdicts; trials without an outcome were not run.
summary() {
    local i figures minutes mean
    local -a of_trials=()
    printf '%-5s %9s %9s %6s %8s  %-8s %s\n' trial seed minutes epochs accuracy checker outcome
    for ((i = 1; i <= NEXP; i++)); do
        read -ra figures <<<"$(figures_of "$LOGDIR/${DATESTAMP}_$i.log")"
        printf '%-5s %9s %9s %6s %8s  %-8s %s\n' "$i" "${seeds[i - 1]}" "${figures[@]}" "${verdicts[i]:--}" "${outcomes[i]:-NOT RUN}"
        minutes=${figures[0]}
        [ "${outcomes[i]:-}" = reached ] || minutes=inf
        of_trials+=("$minutes")
    done
    if [ "$NEXP" -ge 3 ] && [ "${#outcomes[@]}" = "$NEXP" ]; then
        mean=$(printf '%s\n' "${of_trials[@]}" | olympic_mean)
        [ "$mean" = none ] && echo "no Olympic mean: more than one trial did not reach its target" ||
            echo "Olympic mean of $NEXP trials, fastest and slowest dropped: $mean minutes"
    fi
}

# Runs the trials and sets outcomes, verdicts and the status to leave with.
run_trials() {
    local i status log missed=0 refused=0
    for ((i = 1; i <= NEXP; i++)); do
        export TRIAL=$i SEED=${seeds[i - 1]}
        log=$LOGDIR/${DATESTAMP}_$i.log
        say "trial $i of $NEXP, seed $SEED"
        clear_caches
        status=0
        run_to_its_end one_trial "$@" || status=$?
        if [ "$status" != 0 ] && [ "$status" != 3 ]; then
            outcomes[i]="FAILED (status $status)"
            say "$self: trial $i failed (status $status): the rest is not run"
            return "$status"
        fi
        if check_log "$log" >"${log%.log}.check" 2>&1; then verdicts[i]=accepts; else verdicts[i]=REFUSES; fi
        if [ "$status" = 3 ]; then
            outcomes[i]="target MISSED" missed=1
        elif [[ $(figures_of "$log") == *" -" ]]; then
            outcomes[i]="nothing EVALUATED" missed=1
        else
            outcomes[i]=reached
            [ "${verdicts[i]}" = accepts ] || refused=1
        fi
    done
    if [ $missed = 1 ]; then return 3; elif [ $refused = 1 ]; then return 4; fi
}

# Everything, once one_trial, drop_caches, run_python and there are what they should be.
trials() {
    local status=0
    local -a seeds=() outcomes=() verdicts=()
    check_settings "$@"
    local there=${there:-$LOGDIR}
    run_trials "$@" || status=$?
    summary >"$LOGDIR/${DATESTAMP}_summary.txt"
    cat "$LOGDIR/${DATESTAMP}_summary.txt"
    [ "${#outcomes[@]}" != "$NEXP" ] || [[ $status != [034] ]] || lay_out
    say "logs: $LOGDIR/${DATESTAMP}_*.log"
    return "$status"
}

# Refuses a configuration that is not for this machine alone.
check_machines() {
    local machines
    [ -n "${DGXSYSTEM:-}" ] || return 0
    check_system
    # shellcheck disable=SC2016  # for the other shell
    machines=$(from_config 'echo "${DGXNNODES:-1}"') || exit
    [ "$machines" = 1 ] || die "DGXSYSTEM=$DGXSYSTEM is for $machines machines: ./run.sub starts it under Slurm, k8s/ on Kubernetes"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    cd "$(dirname "${BASH_SOURCE[0]}")"
    check_machines
    trials "$@"
fi
