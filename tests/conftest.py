# SPDX-License-Identifier: Apache-2.0
"""What several tests need: a real data set, the launcher, and a config that fits the data set."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
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


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The built-in data set as records, made by the project's own commands."""
    folder = tmp_path_factory.mktemp("digits")
    for arguments in (
        ["prepare.digits", folder / "images"],
        ["prepare.imagenet", folder / "images", folder / "records"],
    ):
        done = python("-m", *arguments)
        assert done.returncode == 0, done.stderr
    return folder / "records"


@pytest.fixture(scope="session")
def few(digits, tmp_path_factory):
    """100 training and 47 validation images of the built-in data set: quick, and nothing divides 47."""
    folder = tmp_path_factory.mktemp("few")
    for part, count in (("train", 10), ("val", 5)):
        for label in sorted((digits.parent / "images" / part).iterdir()):
            target = folder / "images" / part / label.name
            target.mkdir(parents=True)
            images = sorted(label.iterdir())[
                : 2 if (part, label.name) == ("val", "digit_9") else count
            ]
            for image in images:
                shutil.copy(image, target)
    done = python("-m", "prepare.imagenet", folder / "images", folder / "records")
    assert done.returncode == 0, done.stderr
    return folder / "records"


@pytest.fixture
def copied(digits, tmp_path):
    """A copy of the data set to damage."""
    return pathlib.Path(shutil.copytree(digits, tmp_path / "records"))
