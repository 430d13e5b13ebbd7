#!/usr/bin/env bash
# One timed training run.
#
#   ./run_and_time.sh [flags of python -m mxresnet]
#
# Started by hand it makes the environment, gets the built-in data ready where the configuration asks for it, starts the
# ranks of this machine and shows their progress. Started by mpirun or srun it runs just that rank. In the launcher of an
# MPIJob it starts itself as every rank on the workers.
# DGXSYSTEM=<name> picks config_<name>.sh; without it the hardware decides. LOGDIR (./results) gets the log.
# Exit status: 0 target accuracy reached (or nothing to reach: no RESULT line then), 3 missed, 2 a mistake in settings or data,
# anything else a failure.
set -euo pipefail
mpi_words=""
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./launch_common.sh
source ./k8s/launch.sh

# Before there are ranks. As a container's first process a script is told to stop in vain, unless it says what it does then.
for signal in INT TERM HUP; do
    # shellcheck disable=SC2064  # the signal's name and number as they are now
    trap "say 'run_and_time.sh: stopped by SIG$signal'; exit $((128 + $(kill -l "$signal")))" "$signal"
done

say() { printf '%s\n' "$*" >&2; }
# Ranks that find the same mistake leave it to rank 0 to say so: the launcher then ends them.
die() { [ "${rank:-0}" = 0 ] || { trap - INT TERM HUP; sleep 5; }; say "run_and_time.sh: $*"; exit 2; }

# Prints the configuration for so many GPUs of a name and of so many GiB, or nothing.
system_for() {
    [[ $2 != *$'\n'* ]] || return 0 # several names
    case "$1 x $2, $3" in
        "8 x "*A100*", 80") echo DGXA100 ;;
        "8 x "*A100*", 40") echo A100-40GB_8gpu ;;
        "4 x "*A100*PCI[eE]*", 80") echo A100-PCIe-80GB_4gpu ;;
        "4 x "*A100*", 80") echo A100-80GB_4gpu ;;
        "4 x "*A100*", 40") echo A100-40GB_4gpu ;;
        # Two RTX A5000 were submitted to v2.1 with the settings of two A30.
        "2 x "*" A30, 24" | "2 x A30, 24" | "2 x "*"RTX A5000, 24") echo A30_1x2x204 ;;
        "8 x "*V100*", 32") echo V100-32GB_8gpu ;;
        "8 x "*V100*", 16") echo V100-16GB_8gpu ;;
        "4 x "*" T4, 1"[56]) echo T4_4gpu ;;
    esac
}

# Sets DGXSYSTEM from the GPUs of this machine, and hardware to what they are in words.
choose_system() {
    local listed="" names gib only=()
    hardware="no GPU" DGXSYSTEM=CPU_digits
    case ${CUDA_VISIBLE_DEVICES-all} in
        "" | -1 | NoDevFiles) return ;;
        all) ;;
        *) only=(-i "$CUDA_VISIBLE_DEVICES") ;;
    esac
    command -v nvidia-smi >/dev/null || return 0
    listed=$(nvidia-smi "${only[@]}" --query-gpu=name,memory.total --format=csv,noheader,nounits 2>/dev/null) || {
        [[ $listed != *"No devices were found"* ]] || return 0
        die "nvidia-smi fails (${listed//$'\n'/ }), so the hardware is not known: set DGXSYSTEM to one of: $(systems)"
    }
    hardware=$(sort <<<"$listed" | uniq -c | sed 's/^ *\([0-9]*\) /\1 x /; s/$/ MiB/' | paste -sd ';' | sed 's/;/; /g')
    names=$(awk -F', ' '{print $1}' <<<"$listed" | sort -u)
    # The least memory, rounded up: drivers keep some of it for themselves.
    gib=$(awk -F', ' '{print $2}' <<<"$listed" | sort -n | awk 'NR == 1 && /^[0-9]+$/ {print int(($1 + 1023) / 1024)}')
    DGXSYSTEM=$(system_for "$(wc -l <<<"$listed")" "$names" "$gib")
    [ -n "$DGXSYSTEM" ] || die "no configuration is known for the GPUs of this machine ($hardware): set DGXSYSTEM to one of: $(systems)"
    [ "${OMPI_COMM_WORLD_SIZE:-1}" = "${OMPI_COMM_WORLD_LOCAL_SIZE:-1}" ] && [ "${SLURM_JOB_NUM_NODES:-1}" = 1 ] ||
        die "several machines were given, and only one can be looked at: set DGXSYSTEM to one of: $(systems)"
}

prepare_builtin_data() {
    local python=$1 images=$DATAROOT.images status=0
    [ ! -f "$DATAROOT/val.json" ] || [ ! -f "$DATAROOT/train.json" ] || return 0
    [ "$BUILTIN_DATA" = digits ] || die "BUILTIN_DATA=$BUILTIN_DATA is not a built-in data set: use digits"
    mkdir -p "$(dirname "$DATAROOT")"
    "$python" -m prepare.digits "$images" >&2 && "$python" -m prepare.imagenet "$images" "$DATAROOT" >&2 || status=$?
    [ "$status" != 3 ] || status=2 # something else is there; 3 is a missed target here
    [ "$status" = 0 ] || say "run_and_time.sh: the built-in data set could not be made in DATAROOT=$DATAROOT (DGXSYSTEM=CPU trains on other data)"
    return "$status"
}

# Shows what python -m mxresnet shows without a run.
look_at_flags() {
    local word
    for word in "$@"; do
        case $word in --help | -h | --print-config) [ "${rank:-0}" = 0 ] || exit 0; exec "${command[@]}" ;; esac
    done
}

# Runs mpirun and returns its status. What the ranks write goes to standard output; mpirun's own words are kept for explain.
start_ranks() {
    local mpirun=$1 guard status=0
    shift
    mpi_words=$(mktemp) || mpi_words=/dev/null
    stop_is_noted_in=$mpi_words
    [ "$(id -u)" != 0 ] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    # It may wait for machines that it has given up itself: when it has told of its end it gets a while for it.
    finish_off "$mpi_words" $$ &
    guard=$!
    # In a session of its own: a Ctrl-C that reaches mpirun twice, from the terminal and from here, makes it leave ranks behind.
    run_to_its_end setsid "$mpirun" --mca iof_base_redirect_app_stderr_to_stdout 1 "$@" 2>"$mpi_words" || status=$?
    kill "$guard" 2>/dev/null || true
    return "$status"
}

# Kills the mpirun that is a child of a script when it has written that it ends its ranks and is still there 8 seconds later.
finish_off() {
    local words=$1 script=$2 never
    trap - INT TERM HUP
    exec {never}<> <(:) # waiting without a process that would outlive this one
    until grep -qE 'lost communication|MPI_ABORT was invoked|has been aborted|noticed that process|unable to reliably start|told to stop' "$words"; do
        read -rt 2 -u "$never" || true
        kill -0 "$script" || return 0
    done
    read -rt 8 -u "$never" || true
    echo "finished off" >>"$words"
    pkill -KILL -P "$script" -f /mpirun || true
} >/dev/null 2>&1

# Says in one line why the ranks ended, unless one of them has said it; removes mpirun's words.
explain() {
    local status=$1 words="" signal rank='rank ([0-9]+) with PID [0-9]+ on node ([^ ]+) exited on signal ([0-9]+)' host='on node ([^ ]+)'
    [ ! -f "$mpi_words" ] || words=$(sed '/Warning: setpgid/d; s/^--*$/--------/' "$mpi_words" | tr -s ' \n' ' ')
    [ ! -f "$mpi_words" ] || rm -f "$mpi_words"
    [ "$status" != 0 ] || return 0
    [[ $words != *"finished off"* ]] || status=1 # that SIGKILL is no cause
    if [ -n "$stopped_by" ]; then
        say "run_and_time.sh: stopped by SIG$stopped_by"
    elif [ "$status" = 142 ]; then
        say "run_and_time.sh: the ranks did not come together within ${WATCHDOG_LIMIT:-40} s: one did not start, or was stopped (WATCHDOG_LIMIT)"
    elif [[ $words =~ $rank ]]; then
        signal=$(kill -l "${BASH_REMATCH[3]}")
        say "run_and_time.sh: rank ${BASH_REMATCH[1]} on ${BASH_REMATCH[2]} was ended by SIG$signal$([ "$signal" != KILL ] || echo " (often out of memory)")"
    elif [[ $words =~ "process rank "([0-9]+)" with PID "[0-9]+" on node "([^ ]+)" exiting improperly" ]]; then
        say "run_and_time.sh: rank ${BASH_REMATCH[1]} on ${BASH_REMATCH[2]} ended before the run was over, without a word"
    elif [[ $words =~ "Remote daemon: ["[^\ ]*" "$host || $words =~ "Connection to "([^ ]+)" closed by remote host" ]]; then
        say "run_and_time.sh: the machine ${BASH_REMATCH[1]} was lost: it or its mpirun daemon ended, or its network was cut"
    elif [[ $words == *"unable to reliably start one or more daemons"* ]]; then
        words=$(unreachable_workers)${words%%--------*}
        say "run_and_time.sh: the machines cannot be reached, or not any more, or have no orted: ${words:-one ended before it had answered}"
    elif [ "$status" -gt 128 ]; then
        signal=$(kill -l $((status - 128))) rank=${mpi_words:+mpirun}
        rank=${rank:-a rank}
        [[ ! $words =~ "Process name: [["[0-9]+,[0-9]+"],"([0-9]+)"]" ]] || rank="rank ${BASH_REMATCH[1]}"
        say "run_and_time.sh: $rank was ended by SIG$signal$([ "$signal" != KILL ] || echo " (often out of memory)")"
    elif [ -n "$words" ] && [[ $words != *"MPI_ABORT was invoked"* && $words != *"non-zero"* ]]; then
        say "run_and_time.sh: mpirun failed: ${words//--------/}"
    elif [ "$status" = 1 ] && [ -n "$mpi_words" ] && [ -z "$words" ]; then
        say "run_and_time.sh: mpirun was told to stop by somebody else"
    elif [ "$status" -gt 3 ]; then
        say "run_and_time.sh: a rank ended with status $status"
    fi
}

# Starts the ranks of this machine and shows what they say, but for the MLPerf log, which is in the log file.
launch() {
    local python=$1 mpirun status=0 shown filter
    shift
    mpirun=$(dirname "$python")/mpirun
    [ -x "$mpirun" ] || mpirun=$(command -v mpirun) || die "mpirun is not found beside $python nor on PATH: install Open MPI 4.1"
    # One machine needs no remote shell, but Open MPI wants to see one.
    command -v ssh >/dev/null || export OMPI_MCA_plm_rsh_agent=/bin/false
    exec {shown}> >(trap "" INT TERM HUP; exec grep --line-buffered -v "^:::MLLOG" >&2)
    filter=$!
    start_ranks "$mpirun" -np "$DGXNGPU" --oversubscribe --bind-to none --mca mpi_yield_when_idle 1 "$@" >&"$shown" || status=$?
    exec {shown}>&-
    wait "$filter" || true
    return "$status"
}

# A configuration is for a number of ranks: any other number is another global batch, so it is said.
check_ranks() {
    local rank=$1 wanted=$((DGXNGPU * ${DGXNNODES:-1})) ranks=${OMPI_COMM_WORLD_SIZE:-${SLURM_NTASKS:-}}
    if [ -z "$rank" ]; then
        [ "${DGXNNODES:-1}" = 1 ] || die "DGXSYSTEM=$DGXSYSTEM is for $DGXNNODES machines: start it with run.sub or mpirun (this would be one machine's ranks)"
    elif [ -n "$ranks" ] && [ "$ranks" != "$wanted" ]; then
        say "note: $ranks ranks, where DGXSYSTEM=$DGXSYSTEM is for $wanted: the global batch is not that configuration's"
    fi
}

main() {
    local python started status=0 rank command hardware bind
    rank=${OMPI_COMM_WORLD_RANK:-${PMIX_RANK:-}}
    [ -n "$rank" ] || [ -z "${SLURM_STEP_ID:-}" ] || rank=${SLURM_PROCID:-}
    refuse_log_file "$@"

    if [ -z "$rank" ] && in_a_launcher; then
        [ -n "${DGXSYSTEM:-}" ] || die "DGXSYSTEM is not set, and an MPIJob's launcher does not see the workers' hardware: set it to one of: $(systems)"
        check_system
        python=$(./setup_env.sh)
        launch_job "$python" "$@" || status=$?
        explain "$status"
        exit "$status"
    fi
    if [ -z "${DGXSYSTEM:-}" ]; then
        choose_system
        [ "$DGXSYSTEM" != CPU_digits ] || [ -z "${DATAROOT:-}" ] ||
            die "DATAROOT=$DATAROOT is set and this machine has no GPU: set DGXSYSTEM too (CPU trains on what is there, CPU_digits puts the built-in digits there)"
        [ "${rank:-0}" != 0 ] || say "Configuration $DGXSYSTEM, chosen from the hardware found: $hardware (DGXSYSTEM=<name> picks another: $(systems))"
    fi
    # A launcher that exported a configuration from outside a container says so: the container's need not be the same.
    # shellcheck source=config_CPU_digits.sh
    [ "${CONFIG_LOADED:-}" = "$DGXSYSTEM" ] || { check_system; source "./config_$DGXSYSTEM.sh"; }
    python=$(./setup_env.sh)
    command=("$python" -m mxresnet "$@")
    look_at_flags "$@"
    read -ra bind <<<"${BIND:-}"
    [ -z "${BIND:-}" ] || bind=(./bind.sh "${bind[@]}" --)
    [ "${rank:-0}" = 0 ] || exec "${bind[@]}" "${command[@]}"

    check_ranks "$rank"
    "${command[@]}" --print-config >/dev/null || exit
    LOGDIR=${LOGDIR:-./results}
    mkdir -p "$LOGDIR" || die "LOGDIR=$LOGDIR cannot be made: name a folder that this user may write"
    export LOG_FILE=$LOGDIR/${DATESTAMP:-$(date +%y%m%d%H%M%S)}_${TRIAL:-1}.log
    started=$(date +%s)
    if [ -n "$rank" ]; then
        run_to_its_end "${bind[@]}" "${command[@]}" || status=$?
    else
        [ -z "${BUILTIN_DATA:-}" ] || prepare_builtin_data "$python"
        launch "$python" "${bind[@]}" "${command[@]}" || status=$?
    fi
    # A launcher that started this rank says itself why it ended.
    [ -n "${STARTED_BY:-}" ] || explain "$status"
    say "log: $LOG_FILE"
    [ "$status" -eq 0 ] || exit "$status"
    grep -q '"key": "eval_accuracy"' "$LOG_FILE" || exit 0 # nothing was to be reached: --synth-data, --profile, fewer epochs
    echo "RESULT,IMAGE_CLASSIFICATION,,$(($(date +%s) - started)),$(id -un),$(date -d "@$started" '+%Y-%m-%d %I:%M:%S %p')"
}

# In one piece, for bash reads a script as it goes, and this file may be changed meanwhile.
{ main "$@"; exit; }
