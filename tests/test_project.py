# SPDX-License-Identifier: Apache-2.0
"""Promises about the source itself: who imports whom, sizes, configurations, shell."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from mxresnet.config import FIELDS

MODULES = sorted(
    path for folder in ("mxresnet", "prepare") for path in (ROOT / folder).rglob("*.py")
)
OWNERS = {
    "horovod": {"distributed.py"},
    "mpi4py": {"distributed.py"},
    "mlperf_logging": {"mllog.py"},
    "nvidia": {"dali.py"},
    "mxnet": {
        "op_sets.py",
        "ops.py",
        "network.py",
        "lars.py",
        "group_bn.py",
        "trainer.py",
        "dali.py",
        "recordio.py",
        "synthetic.py",
        "extension.py",
        "vendor_ops.py",
    },
}
# What each module of mxresnet may import of mxresnet; a module that is not listed may import nothing of it.
EDGES = {
    "cli": {
        "config",
        "dataset",
        "distributed",
        "loop",
        "mllog",
        "op_sets",
        "pipeline",
        "progress",
        "schedule",
        "timing",
        "trainer",
    },
    "__main__": {"cli"},
    "loop": {"config", "dataset", "metrics", "mllog", "progress", "schedule", "timing"},
    "trainer": {
        "config",
        "distributed",
        "group_bn",
        "lars",
        "metrics",
        "network",
        "op_sets",
        "pipeline",
        "schedule",
    },
    "pipeline": {"config", "dataset", "distributed", "pipeline"},
    "network": {"config", "ops"},
    "ops": {"config", "extension", "group_bn"},
    "op_sets": {"config", "extension", "ops", "vendor_ops"},
    "vendor_ops": {"ops"},
    "schedule": {"config"},
    "dataset": {"config"},
    "distributed": {"config", "watchdog"},
    "mllog": {"config", "schedule"},
    "progress": {"config", "metrics", "schedule"},
    "timing": {"config"},
    "extension": {"config", "extension_build"},
    "extension_build": {"config"},
    "package": {"config"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module in ("mxresnet", "prepare")
                else [node.module]
            )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    package = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        top, *rest = name.split(".")
        if top in OWNERS and package == "mxresnet":
            assert path.name in OWNERS[top], f"{path} imports {name}"
        if package == "prepare":
            assert top not in ("mxresnet", "mxnet", "horovod"), f"{path} imports {name}"
        if package == "mxresnet":
            assert top != "prepare"
            module = path.relative_to(ROOT / "mxresnet").parts[0].replace(".py", "")
            if top == "mxresnet":
                assert rest[0] in EDGES.get(module, set()), f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes_and_python_3_8(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text, feature_version=(3, 8))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


LAUNCHERS = {
    "BIND",
    "BUILTIN_DATA",
    "DGXNGPU",
    "DGXNNODES",
    "WALLTIME",
}  # read by the shell scripts


def configurations():
    return sorted(
        path.name for path in ROOT.glob("config_*.sh") if not path.name.endswith("common.sh")
    )


def exported(name):
    """What a configuration exports, sourced in an empty environment."""
    command = f"set -euo pipefail; source ./{name}; env -0"
    done = subprocess.run(
        ["env", "-i", f"PATH={os.environ['PATH']}", "bash", "-c", command],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    values = dict(item.split("=", 1) for item in done.stdout.split("\0") if item)
    return {
        key: value
        for key, value in values.items()
        if key not in ("PATH", "PWD", "SHLVL", "_", "OLDPWD")
    }


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


def test_shell_scripts_are_strict_and_clean():
    scripts = sorted([*ROOT.glob("*.sh"), ROOT / "run.sub", ROOT / ".ci" / "run"])
    for script in scripts:
        if os.access(script, os.X_OK):
            assert "\nset -euo pipefail\n" in script.read_text(), script
    shellcheck = shutil.which(
        "shellcheck", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    )
    done = subprocess.run(
        [shellcheck, "-x", *map(str, scripts)], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout
