#!/usr/bin/env bash
# Run one rank's command bound to the CPUs, the memory and the network adapter near its GPU.
#
#   ./bind.sh [options] [--] command [arguments]
#
#   --cpu=node             (default) the cores of the NUMA node that the rank's GPU is attached to
#   --cpu=exclusive        a share of these cores that no other rank uses
#   --cpu=exclusive,nosmt  the same, with only one hardware thread of each core
#   --cpu=off              any core
#   --mem=node | off       (default node) allocate memory on that node first
#   --ib=single | off      (default off) UCX uses only the adapter nearest to the GPU, unless
#                          UCX_NET_DEVICES is set
set -euo pipefail
script=${BASH_SOURCE[0]}
[ ! -L "$script" ] || script=$(command readlink -f "$script")
root=$(CDPATH='' builtin cd -- "$(command dirname -- "$script")" && pwd)
python=$(BASH_ENV='' "$root/setup_env.sh" --launcher-python)
# Do not change the working directory or PYTHONPATH: the command inherits both.
exec "$python" -I -c 'import sys; sys.path.insert(0, sys.argv.pop(1))
from mxresnet.launch.bind import main; main()' "$root" "$@"
