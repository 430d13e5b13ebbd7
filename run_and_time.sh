#!/usr/bin/env bash
# One timed training run.
#
#   ./run_and_time.sh [flags of python -m mxresnet]
#
# Started by hand it makes the environment, gets the built-in data ready where the configuration asks for it, starts the
# ranks of this machine and shows their progress. Started by mpirun or srun it runs just that rank.
# DGXSYSTEM=<name> picks config_<name>.sh; without it the hardware decides. LOGDIR (./results) gets the log.
# Exit status: 0 target accuracy reached, 3 missed, 2 a mistake in settings or data, anything else a failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf '%s\n' "$*" >&2; }
die() { say "run_and_time.sh: $*"; exit 2; }

systems() { local file; for file in config_*.sh; do file=${file#config_}; printf '%s ' "${file%.sh}"; done | sed 's/common //; s/ $//'; }

choose_system() {
    local gpus
    gpus=$(nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null || true)
    if [ -z "$gpus" ]; then
        echo CPU_digits
        return
    fi
    die "no configuration is known for these GPUs ($(sort <<<"$gpus" | uniq -c | tr -s ' ' | paste -sd ';')): set DGXSYSTEM to one of: $(systems)"
}

prepare_builtin_data() {
    local python=$1 images=$DATAROOT.images
    [ ! -f "$DATAROOT/val.json" ] || [ ! -f "$DATAROOT/train.json" ] || return 0
    [ "$BUILTIN_DATA" = digits ] || die "BUILTIN_DATA=$BUILTIN_DATA is not a built-in data set: use digits"
    mkdir -p "$(dirname "$DATAROOT")"
    "$python" -m prepare.digits "$images" >&2
    "$python" -m prepare.imagenet "$images" "$DATAROOT" >&2
}

# Runs a command with its output in a log and, filtered, on the terminal. A signal ends the command first; the log is
# whole when this returns the command's status.
run_logged() {
    local log=$1 hide=$2 status=0 pipes command filter
    shift 2
    pipes=$(mktemp -d)
    mkfifo "$pipes/out"
    (trap '' INT TERM; tee -a "$log" <"$pipes/out" | grep --line-buffered -v -E "$hide" || true) &
    filter=$!
    "$@" >"$pipes/out" 2>&1 </dev/null &
    command=$!
    trap 'kill -TERM "$command" 2>/dev/null || true' INT TERM HUP
    while kill -0 "$command" 2>/dev/null; do
        status=0
        wait "$command" || status=$?
    done
    trap - INT TERM HUP
    wait "$filter"
    rm -rf "$pipes"
    return "$status"
}

main() {
    local python started status=0 rank log launch=() hide='^$'
    rank=${OMPI_COMM_WORLD_RANK:-${PMIX_RANK:-}}
    [ -n "$rank" ] || [ -z "${SLURM_STEP_ID:-}" ] || rank=${SLURM_PROCID:-}

    if [ -z "${DGXSYSTEM:-}" ]; then
        DGXSYSTEM=$(choose_system)
        [ "${rank:-0}" != 0 ] || say "Configuration $DGXSYSTEM, chosen from the hardware found (DGXSYSTEM=<name> picks another: $(systems))"
    fi
    [ -f "config_$DGXSYSTEM.sh" ] || die "DGXSYSTEM=$DGXSYSTEM has no config_$DGXSYSTEM.sh: use one of: $(systems)"
    # shellcheck source=config_CPU_digits.sh
    source "./config_$DGXSYSTEM.sh"
    python=$(./setup_env.sh)
    "$python" -m mxresnet --print-config "$@" >/dev/null || exit
    LOGDIR=${LOGDIR:-./results}
    mkdir -p "$LOGDIR" || die "LOGDIR=$LOGDIR cannot be made: name a folder that this user may write"
    log=$LOGDIR/${DATESTAMP:-$(date +%y%m%d%H%M%S)}_${TRIAL:-1}.log

    if [ -z "$rank" ]; then
        [ -z "${BUILTIN_DATA:-}" ] || prepare_builtin_data "$python"
        launch=("$(dirname "$python")/mpirun" -np "$DGXNGPU" --oversubscribe --bind-to none --mca mpi_yield_when_idle 1)
        [ -x "${launch[0]}" ] || launch[0]=mpirun
        [ "$(id -u)" != 0 ] || launch+=(--allow-run-as-root)
        command -v ssh >/dev/null || launch+=(--mca plm_rsh_agent /bin/false)
        hide='^:::MLLOG'
    elif [ "$rank" != 0 ]; then
        exec "$python" -m mxresnet "$@"
    fi
    started=$(date +%s)
    run_logged "$log" "$hide" "${launch[@]}" "$python" -m mxresnet "$@" || status=$?
    say "log: $log"
    [ "$status" -eq 0 ] || exit "$status"
    echo "RESULT,IMAGE_CLASSIFICATION,,$(($(date +%s) - started)),$(id -un),$(date -d "@$started" '+%Y-%m-%d %I:%M:%S %p')"
}

main "$@"
