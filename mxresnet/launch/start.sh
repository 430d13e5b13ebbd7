# shellcheck shell=bash
# What run_and_time.sh, run_trials.sh, run_with_docker.sh and run.sub have in common. They source
# this file.

# Replace this process with a module of mxresnet.launch, in the folder of this project.
# Usage: start_launcher <module> [arguments]
start_launcher() {
    local module=$1 python signal block=(env "--block-signal=HUP,INT,QUIT,TERM")
    shift
    # PID 1 of a container ignores signals that it has no handler for.
    if [ $$ = 1 ]; then
        for signal in HUP INT QUIT TERM; do
            # shellcheck disable=SC2064  # expand the number now
            trap "exit $((128 + $(kill -l "$signal")))" "$signal"
        done
    fi
    # Relative paths are relative to the caller's folder.
    export CALLER_FOLDER=$PWD
    CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." || exit
    python=$(./setup_env.sh --launcher-python)
    # Signals during the start of Python stay pending until it has its own handlers
    # (coreutils 8.31).
    "${block[@]}" true 2>/dev/null || block=()
    # -E: a module in PYTHONPATH may hide one of Python's own; the launcher reports it.
    exec "${block[@]}" "$python" -E -m "mxresnet.launch.$module" "$@"
}
