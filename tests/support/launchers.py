# SPDX-License-Identifier: Apache-2.0
"""Start the project's launchers, and read its configurations, in clean environments."""

import os
import pathlib
import subprocess

from support.commands import ROOT

# Flags for a run of a few seconds, of ResNet-50 and of a smaller network.
QUICK_RESNET_50 = ["--batch-size", "16", "--num-epochs", "2"]
QUICK = [*QUICK_RESNET_50, "--num-layers", "18"]
# Variables that bash sets for itself.
_BASH_VARIABLES = ("PATH", "PWD", "SHLVL", "_", "OLDPWD")


def environment(records: pathlib.Path, tmp_path: pathlib.Path, **more: str) -> dict:
    """Return a clean environment in which CPU_digits trains on these records."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {
        **keep,
        "DATAROOT": str(records),
        "LOGDIR": str(tmp_path / "results"),
        "DGXSYSTEM": "CPU_digits",
        "OMP_NUM_THREADS": "1",
        "CHECKPOINTS": "0",
        **more,
    }


def run_and_time(*flags: str, env: dict, timeout: float = 120) -> subprocess.CompletedProcess:
    """Run ./run_and_time.sh to its end; capture its output."""
    return subprocess.run(
        ["./run_and_time.sh", *flags],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=env,
        timeout=timeout,
    )


def exported(system: str, **environ: str) -> dict:
    """Return what a configuration exports when a strict bash sources it in an empty environment."""
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source ./config_{system}.sh; env -0"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={"PATH": os.environ["PATH"], **environ},
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    values = dict(item.split("=", 1) for item in done.stdout.split("\0") if item)
    return {key: value for key, value in values.items() if key not in _BASH_VARIABLES}
