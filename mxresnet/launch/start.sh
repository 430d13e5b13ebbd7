# shellcheck shell=bash
# What run_and_time.sh, run_trials.sh, run_with_docker.sh and run.sub have in common. They source
# this file.

# Replace this process with a module of mxresnet.launch, in the folder of this project.
# Usage: start_launcher <module> [arguments]
start_launcher() {
    local module=$1 python signal block
    block=("$(type -P env)" "--block-signal=HUP,INT,QUIT,TERM")
    shift
    # What the caller's file of BASH_ENV prints would mix with the output of scripts. Python would
    # make an error of a warning, not find this project, wait for input, or write another encoding.
    unset BASH_ENV PYTHONWARNINGS PYTHONSAFEPATH PYTHONINSPECT PYTHONIOENCODING
    # Files would get the numbers of descriptors that the caller closed. Standard output stays one
    # that cannot be written: a result is lost.
    { true 9<&0; } 2>/dev/null || exec 0</dev/null
    { true 9>&1; } 2>/dev/null || exec 1</dev/null
    true 9>&2 2>/dev/null || exec 2>/dev/null
    # Without traps bash ignores SIGQUIT, and SIGINT if the command that it waits for does not end
    # with it; PID 1 of a container ignores all signals that it has no handler for.
    for signal in HUP INT QUIT TERM; do
        # shellcheck disable=SC2064  # expand the number now
        trap "exit $((128 + $(kill -l "$signal")))" "$signal"
    done
    # Relative paths are relative to the caller's folder.
    export CALLER_FOLDER=$PWD
    # The caller may export a function cd.
    CDPATH='' builtin cd -- "$(command dirname -- "${BASH_SOURCE[0]}")/../.." || exit
    python=$(./setup_env.sh --launcher-python)
    # Signals during the start of Python stay pending until it has its own handlers
    # (coreutils 8.31).
    "${block[@]}" true 2>/dev/null || block=()
    # -E: a module in PYTHONPATH may hide one of Python's own; the launcher reports it.
    exec "${block[@]}" "$python" -E -m "mxresnet.launch.$module" "$@"
}
