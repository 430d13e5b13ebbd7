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
stopped_by=""
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

# Runs a command and ends it when this script is told to stop, so that no rank outlives it; returns its status.
run_to_its_end() {
    local status=0 command signal
    "$@" </dev/null &
    command=$!
    for signal in INT TERM HUP; do
        # shellcheck disable=SC2064  # the names as they are now
        trap "stopped_by=$signal; kill -TERM $command 2>/dev/null || true" "$signal"
    done
    while kill -0 "$command" 2>/dev/null; do
        status=0
        wait "$command" || status=$?
    done
    trap - INT TERM HUP
    [ -z "$stopped_by" ] || status=$((128 + $(kill -l "$stopped_by")))
    return "$status"
}

# Starts the ranks of this machine. Their standard output is the MLPerf log, which is in the log file as well.
launch() {
    local python=$1 mpirun
    shift
    mpirun=$(dirname "$python")/mpirun
    [ -x "$mpirun" ] || mpirun=$(command -v mpirun) || die "mpirun is not found beside $python nor on PATH: install Open MPI 4.1"
    set -- "$mpirun" -np "$DGXNGPU" --oversubscribe --bind-to none --mca mpi_yield_when_idle 1 -q "$@"
    [ "$(id -u)" != 0 ] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    # One machine needs no remote shell, but Open MPI wants to see one.
    command -v ssh >/dev/null || export OMPI_MCA_plm_rsh_agent=/bin/false
    run_to_its_end "$@" >/dev/null
}

main() {
    local python started status=0 rank command
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
    command=("$python" -m mxresnet "$@")
    [ "${rank:-0}" = 0 ] || exec "${command[@]}"

    "${command[@]}" --print-config >/dev/null || exit
    LOGDIR=${LOGDIR:-./results}
    mkdir -p "$LOGDIR" || die "LOGDIR=$LOGDIR cannot be made: name a folder that this user may write"
    export LOG_FILE=$LOGDIR/${DATESTAMP:-$(date +%y%m%d%H%M%S)}_${TRIAL:-1}.log
    started=$(date +%s)
    if [ -n "$rank" ]; then
        run_to_its_end "${command[@]}" || status=$?
    else
        [ -z "${BUILTIN_DATA:-}" ] || prepare_builtin_data "$python"
        launch "$python" "${command[@]}" || status=$?
    fi
    # mpirun is told to be quiet, for a rank says itself what is wrong, unless it is killed.
    if [ -n "$stopped_by" ]; then
        say "run_and_time.sh: stopped by SIG$stopped_by"
    elif [ "$status" -gt 128 ]; then
        say "run_and_time.sh: a rank was ended by SIG$(kill -l $((status - 128))) (SIGKILL: often out of memory)"
    fi
    say "log: $LOG_FILE"
    [ "$status" -eq 0 ] || exit "$status"
    echo "RESULT,IMAGE_CLASSIFICATION,,$(($(date +%s) - started)),$(id -un),$(date -d "@$started" '+%Y-%m-%d %I:%M:%S %p')"
}

main "$@"
