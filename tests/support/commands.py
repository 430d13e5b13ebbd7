# SPDX-License-Identifier: Apache-2.0
"""Run the project's commands in tests: python or mpirun on this machine, on the digits data set."""

import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Several processes share the CPUs; threads that wait for each other would use the time of others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MXNET_SUBGRAPH_VERBOSE", "0")
os.environ.setdefault("REPORT", "0")  # tests of the report set it
# Runs with a log file write checkpoints by default, which takes time and disk; tests of them do.
os.environ.setdefault("CHECKPOINTS", "0")
# Settings exported in the shell that starts the tests must not change what the tests do.
for name in ("DGXSYSTEM", "DATAROOT", "SEED", "LOGDIR", "BATCHSIZE", "LR"):
    os.environ.pop(name, None)

# Flags of `python -m mxresnet` for a run of seconds on the digits data set.
SMALL = [
    *("--num-layers", "18"),
    *("--image-shape", "3,32,32", "--resize", "32", "--rand-mirror", "0"),
    *("--batch-size", "16", "--num-epochs", "3", "--eval-period", "1", "--eval-offset", "0"),
    *("--optimizer", "sgdwfastlars", "--lr", "4", "--lr-step-epochs", "pow2"),
    *("--warmup-epochs", "1", "--dali-threads", "1", "--disp-batches", "0"),
]


def python(*arguments, **options):
    """Run this Python with the arguments in the project's folder; return the finished process."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        **options,
    )


def mpirun(ranks, *arguments, env=None, timeout=300):
    """Run this Python with the arguments as `ranks` MPI ranks on this machine.

    Args:
        ranks: number of ranks; may exceed the number of cores.
        *arguments: arguments of python.
        env: environment variables to set in addition.
        timeout: seconds after which the run is killed and the test fails.
    """
    folder = os.path.dirname(sys.executable)
    command = [
        shutil.which("mpirun", path=folder) or shutil.which("mpirun"),
        *("-np", str(ranks), "--oversubscribe", "--bind-to", "none"),
        *("--mca", "mpi_yield_when_idle", "1"),
    ]
    if os.getuid() == 0:
        command.append("--allow-run-as-root")
    environ = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # One host needs no remote shell, but mpirun does not start without one.
        "OMPI_MCA_plm_rsh_agent": "/bin/false",
        **(env or {}),
    }
    return subprocess.run(
        [*command, sys.executable, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
        env=environ,
    )
