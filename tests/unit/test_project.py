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
from support.commands import ROOT

from mxresnet.config import FIELDS

MODULES = sorted(
    path for folder in ("mxresnet", "prepare") for path in (ROOT / folder).rglob("*.py")
)
# Modules of mxresnet that may import a heavy library.
OWNERS = {
    "horovod": {"parallel.world"},
    "mpi4py": {"parallel.world"},
    "mlperf_logging": {"mllog"},
    "nvidia": {"data.dali"},
    "mxnet": {
        "data.dali",
        "data.image_record_iter",
        "data.synthetic",
        "lars",
        "model.cudnn_bn.runtime",
        "model.ops",
        "model.ops_nvidia",
        "model.resnet",
        "model.select_ops",
        "model.sync_batch_norm",
        "trainer",
    },
}
# What each module of mxresnet may import of mxresnet; a module that is not listed may import nothing of it.
EDGES = {
    "__main__": {"cli"},
    "cli": {
        "config",
        "data.dataset",
        "data.loader",
        "errors",
        "lr_schedule",
        "mllog",
        "model.select_ops",
        "parallel.world",
        "profiling",
        "progress",
        "train_loop",
        "trainer",
    },
    "config": {"errors"},
    "data.dali": {"config", "data.shard"},
    "data.dataset": {"config", "errors"},
    "data.image_record_iter": {"config", "data.shard"},
    "data.loader": {"config", "data.dataset", "data.shard", "errors", "parallel.world"},
    "data.shard": {"errors"},
    "data.synthetic": {"config", "data.dataset", "data.shard"},
    "lr_schedule": {"config", "errors"},
    "mllog": {"config", "errors", "lr_schedule"},
    "model.cudnn_bn.__main__": {"model.cudnn_bn.runtime"},
    "model.cudnn_bn.build": {"errors"},
    "model.cudnn_bn.runtime": {"errors", "model.cudnn_bn.build"},
    "model.ops": {"config", "model.cudnn_bn.runtime", "model.sync_batch_norm"},
    "model.ops_nvidia": {"model.ops"},
    "model.resnet": {"config", "model.ops"},
    "model.select_ops": {"config", "model.cudnn_bn.runtime", "model.ops", "model.ops_nvidia"},
    "parallel.world": {"errors", "parallel.watchdog"},
    "profiling": {"config"},
    "progress": {"config", "errors", "lr_schedule", "metrics"},
    "results.submission": {"errors"},
    "train_loop": {
        "config",
        "data.dataset",
        "errors",
        "lr_schedule",
        "metrics",
        "mllog",
        "profiling",
        "progress",
    },
    "trainer": {
        "config",
        "data.loader",
        "errors",
        "lars",
        "lr_schedule",
        "metrics",
        "model.resnet",
        "model.select_ops",
        "model.sync_batch_norm",
        "parallel.world",
    },
}


def module_name(path):
    """The dotted name of a file below its top-level package."""
    return ".".join(path.with_suffix("").relative_to(ROOT).parts[1:])


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(path):
    """Yield what a file imports, as dotted names of modules where these are the project's."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if is_module(name) else node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    package = path.relative_to(ROOT).parts[0]
    module = module_name(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        if package == "prepare":
            assert top not in ("mxresnet", "mxnet", "horovod"), f"{path} imports {name}"
        else:
            assert top != "prepare", f"{path} imports {name}"
            assert top not in OWNERS or module in OWNERS[top], f"{path} imports {name}"
            assert top != "mxresnet" or rest in EDGES.get(module, ()), f"{path} imports {name}"


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
