#!/usr/bin/env bash
# Run the linters and the test suite; creates the environment first if needed.
#
#   ./run_tests.sh                 the linters, then every test that is not marked as slow
#   ./run_tests.sh ARGUMENT...     only pytest, with these arguments
set -euo pipefail
script=${BASH_SOURCE[0]}
[ ! -L "$script" ] || script=$(readlink -f "$script")
CDPATH='' builtin cd -- "$(dirname -- "$script")"
launcher=$(./setup_env.sh --launcher-python)
# The guard ends the set-up with this script.
python=$(exec "$launcher" -I -S mxresnet/process_guard.py $$ ./setup_env.sh --dev)
PATH=$(dirname "$python"):$PATH
export PATH
[ $# -gt 0 ] || .ci/lint
exec "$python" -m pytest "$@"
