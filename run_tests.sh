#!/usr/bin/env bash
# Run the linters and the test suite; creates the environment first if needed.
#
#   ./run_tests.sh                 the linters, then every test that is not marked as slow
#   ./run_tests.sh ARGUMENT...     only pytest, with these arguments
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=$(./setup_env.sh --dev)
PATH=$(dirname "$python"):$PATH
export PATH
[ $# -gt 0 ] || .ci/lint
exec "$python" -m pytest "$@"
