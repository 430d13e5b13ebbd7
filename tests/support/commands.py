# SPDX-License-Identifier: Apache-2.0
"""Run the project's own commands: python and mpirun on this machine, with settings that fit the digits."""

import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MXNET_SUBGRAPH_VERBOSE", "0")
# Settings that the shell of whoever runs the tests may have must not reach them.
for name in ("DGXSYSTEM", "DATAROOT", "SEED", "LOGDIR", "BATCHSIZE", "LR"):
    os.environ.pop(name, None)

SMALL = [
    "--image-shape",
    "3,32,32",
    "--resize",
    "32",
    "--batch-size",
    "16",
    "--optimizer",
    "sgdwfastlars",
    "--lr",
    "4",
    "--lr-step-epochs",
    "pow2",
    "--num-epochs",
    "3",
    "--warmup-epochs",
    "1",
    "--eval-period",
    "1",
    "--eval-offset",
    "0",
    "--dali-threads",
    "1",
    "--rand-mirror",
    "0",
    "--disp-batches",
    "0",
]


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        **options,
    )


def mpirun(ranks, *arguments, env=None, timeout=300):
    """Run python with the arguments on some ranks of this machine."""
    launcher = shutil.which("mpirun", path=os.path.dirname(sys.executable)) or shutil.which(
        "mpirun"
    )
    command = [
        launcher,
        "-np",
        str(ranks),
        "--oversubscribe",
        "--bind-to",
        "none",
        "--mca",
        "mpi_yield_when_idle",
        "1",
    ]
    if os.getuid() == 0:
        command.append("--allow-run-as-root")
    environ = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
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
