#!/usr/bin/env bash
# Run everything that the GPU of this machine can prove, in at most 10 minutes: see gpu_checks.py.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python3
if [ -x "$here/.venv/bin/python" ]; then python=$here/.venv/bin/python; fi
exec "$python" "$here/benchmarks/gpu_checks.py" "$@"
