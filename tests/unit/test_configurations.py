# SPDX-License-Identifier: Apache-2.0
"""The files config_*.sh: what they export, and that the program accepts it."""

import json
import os
import re
import subprocess
import sys

import pytest
from support.commands import ROOT

from mxresnet.config import FIELDS

# Variables of the configurations that the launchers read, not mxresnet.
LAUNCHERS = {"BIND", "BUILTIN_DATA", "DGXNGPU", "DGXNNODES", "WALLTIME"}


def configurations():
    paths = sorted(ROOT.glob("config_*.sh"))
    return [path.name for path in paths if not path.name.endswith("common.sh")]


def exported(name):
    """Return the variables that a configuration exports when sourced in an empty environment."""
    command = f"set -euo pipefail; source ./{name}; env -0"
    done = subprocess.run(
        ["env", "-i", f"PATH={os.environ['PATH']}", "bash", "-c", command],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    values = dict(item.split("=", 1) for item in done.stdout.split("\0") if item)
    set_by_bash = ("PATH", "PWD", "SHLVL", "_", "OLDPWD")
    return {key: value for key, value in values.items() if key not in set_by_bash}


@pytest.mark.parametrize("name", configurations())
def test_a_configuration_exports_settings_and_library_variables_only(name):
    declared = {field.metadata["env"] for field in FIELDS.values()}
    for key in exported(name):
        of_a_library = re.match(r"(MXNET|HOROVOD|NCCL|OMPI|OMP|DMLC|MALLOC|SBATCH)_", key)
        assert key in declared or of_a_library or key in LAUNCHERS, (
            f"{name} exports {key}, which nothing reads"
        )


@pytest.mark.parametrize("name", configurations())
def test_a_configuration_is_accepted(name):
    environ = {"PATH": os.environ["PATH"], **exported(name)}
    done = subprocess.run(
        [sys.executable, "-m", "mxresnet", "--print-config"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["batch_size"] == int(exported(name)["BATCHSIZE"])
