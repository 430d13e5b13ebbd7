#!/usr/bin/env bash
# Run the linters and the test suite; creates the environment first if needed.
#
#   ./run_tests.sh                 the linters, then every test that is not marked as slow, with a
#                                  process for each CPU
#   ./run_tests.sh ARGUMENT...     only pytest, with these arguments
set -euo pipefail
script=${BASH_SOURCE[0]}
[ ! -L "$script" ] || script=$(readlink -f "$script")
CDPATH='' builtin cd -- "$(dirname -- "$script")"
# The tests are for the environment for the CPU.
export SETUP_DEVICE=${SETUP_DEVICE:-cpu}
launcher=$(./setup_env.sh --launcher-python)
# The guard ends the set-up with this script.
python=$(exec "$launcher" -I -S mxresnet/process_guard.py $$ ./setup_env.sh --dev)
PATH=$(dirname "$python"):$PATH
export PATH
if [ $# -eq 0 ]; then
    .ci/lint
    # In the order of the folders' names, whose last one has the shortest tests, so that all
    # processes end at about the same time. More processes than 8 do not make it faster.
    cpus=$("$python" -c 'import os; print(min(8, len(os.sched_getaffinity(0))))')
    set -- --numprocesses "$cpus" --dist loadfile --no-loadscope-reorder
fi
exec "$python" -m pytest "$@"
