#!/usr/bin/env bash
# The whole test suite; makes the environment first when there is none. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=$(./setup_env.sh)
PATH=$(dirname "$python"):$PATH
export PATH
exec "$python" -m pytest "$@"
