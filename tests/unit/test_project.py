# SPDX-License-Identifier: Apache-2.0
"""Rules for the source files: allowed imports, sizes, references, shell options."""

import ast
import os
import subprocess
import sys

import pytest
from support.commands import ROOT

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_COLUMNS = 100


def files(*patterns):
    """Return the project's files that match, sorted; build products are left out."""
    found = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    return sorted(path for path in found if "build" not in path.relative_to(ROOT).parts)


def relative(path):
    return str(path.relative_to(ROOT))


MODULES = files("mxresnet/**/*.py", "prepare/**/*.py")
PYTHON_FILES = sorted([*MODULES, *files("setup.py", "tests/**/*.py", "benchmarks/**/*.py")])
SHELL_FILES = files(
    *("*.sh", "run.sub", ".ci/*", "k8s/**/*.sh", "k8s/image/sshd", "mxresnet/**/*.sh")
)
SOURCE_FILES = sorted(
    [*PYTHON_FILES, *SHELL_FILES, *files("mxresnet/**/*.h", "mxresnet/**/*.cc", "tests/**/*.cc")]
)
# The only modules of mxresnet that may import a heavy library.
OWNERS = {
    "horovod": {"parallel.world"},
    "mpi4py": {"parallel.world"},
    "mlperf_logging": {"mllog"},
    "nvidia": {"data.dali_graph"},
    "mxnet": {
        "bandwidth",
        "device",
        "model.initializers",
        "model.loss",
        "data.dali",
        "data.image_record_iter",
        "data.synthetic",
        "lars",
        "model.cudnn_bn.__main__",
        "model.cudnn_bn.runtime",
        "model.cudnn_bn.self_test",
        "model.ops",
        "model.ops_nvidia",
        "model.select_ops",
        "model.sync_batch_norm",
        "trainer",
    },
}
# What each module of mxresnet may import from mxresnet; a module that is not listed: nothing.
EDGES = {
    "__init__": {"cuda_libraries", "numpy_bool"},
    "__main__": {"bus_error", "cli", "environment", "errors", "standard_streams"},
    "bandwidth": {
        "cli",
        "config",
        "config_parser",
        "device",
        "errors",
        "parallel.world",
        "standard_streams",
    },
    "bus_error": {"errors"},
    "checkpoint.arrays": {"checkpoint.manifest"},
    "checkpoint.fingerprint": {"config"},
    "checkpoint.manifest": {"bounded_read", "checkpoint.fingerprint"},
    "checkpoint.state": {"checkpoint.arrays", "checkpoint.manifest"},
    "checkpoint.store": {"checkpoint.fingerprint", "checkpoint.manifest", "errors"},
    "cli": {
        "config",
        "config_parser",
        "data.dataset",
        "data.loader",
        "device",
        "environment",
        "errors",
        "mllog",
        "model.ops",
        "model.select_ops",
        "parallel.world",
        "profiling",
        "progress",
        "run_plan",
        "standard_streams",
        "train_loop",
        "trainer",
    },
    "config": {"config_field"},
    "config_combinations": {"config", "errors"},
    "config_parser": {"config", "config_combinations", "errors"},
    "data.dali": {"config", "data.dali_graph", "data.record_file", "data.shard"},
    "data.dali_graph": {"config", "data.shard"},
    "data.dataset": {"bounded_read", "config", "errors"},
    "data.image_record_iter": {"config", "data.record_file", "data.shard"},
    "data.loader": {"config", "data.dataset", "data.shard", "errors", "parallel.world"},
    "data.record_file": {"bounded_read", "data.shard", "errors"},
    "data.shard": {"config", "data.dataset", "errors", "parallel.world"},
    "data.synthetic": {"config", "data.dataset", "data.shard"},
    "device": {"config", "errors", "memory", "parallel.world"},
    "environment": {"errors"},
    "launch.backends.base": {
        "errors",
        "launch.nccl_test",
        "launch.processes",
        "launch.run_log",
        "launch.system_config",
        "launch.terminal",
    },
    "launch.backends.docker": {
        "errors",
        "launch.backends.base",
        "launch.copy_dataset",
        "launch.nccl_test",
        "launch.page_cache",
        "launch.processes",
        "launch.run_log",
        "launch.system_config",
        "process_guard",
    },
    "launch.backends.local": {
        "errors",
        "launch.backends.base",
        "launch.page_cache",
        "launch.processes",
        "launch.run",
        "launch.system_config",
    },
    "launch.backends.slurm": {
        "errors",
        "launch.backends.base",
        "launch.page_cache",
        "launch.processes",
        "launch.run",
        "launch.run_log",
        "launch.system_config",
        "launch.terminal",
        "launch.trial_settings",
    },
    "launch.bind": {"errors", "launch.processes", "launch.terminal", "launch.topology"},
    "launch.builtin_data": {"errors", "launch.processes", "launch.terminal"},
    "launch.caller_paths": {"config", "launch.run_log"},
    "launch.copy_dataset": {"errors", "launch.terminal"},
    "launch.hardware": {"errors", "launch.processes", "launch.system_config"},
    "launch.kubernetes": {
        "errors",
        "launch.mpi",
        "launch.processes",
        "launch.system_config",
        "launch.terminal",
    },
    "launch.mpi": {"errors", "launch.processes", "launch.terminal"},
    "launch.page_cache": {"launch.processes"},
    "launch.processes": {"errors", "launch.terminal", "process_guard"},
    "launch.nsys": {"errors", "launch.processes", "launch.run_log", "launch.terminal"},
    "launch.refused_variables": {"errors"},
    "launch.run": {
        "environment",
        "errors",
        "launch.builtin_data",
        "launch.caller_paths",
        "launch.hardware",
        "launch.kubernetes",
        "launch.mpi",
        "launch.nccl_test",
        "launch.nsys",
        "launch.processes",
        "launch.refused_variables",
        "launch.run_log",
        "launch.system_config",
        "launch.terminal",
        "launch.timing_lines",
        "memory",
        "results.log_reader",
    },
    "launch.run_log": {"errors", "results.log_reader"},
    "launch.system_config": {"config", "errors", "launch.terminal", "process_guard"},
    "launch.topology": {"errors", "launch.processes"},
    "launch.trial_settings": {"errors", "launch.run_log", "launch.system_config"},
    "launch.trial_summary": {"launch.trial_settings", "results.log_reader"},
    "launch.trials": {
        "environment",
        "errors",
        "launch.backends.base",
        "launch.backends.docker",
        "launch.backends.local",
        "launch.backends.slurm",
        "launch.caller_paths",
        "launch.nccl_test",
        "launch.processes",
        "launch.refused_variables",
        "launch.run_log",
        "launch.terminal",
        "launch.trial_settings",
        "launch.trial_summary",
        "results.log_reader",
    },
    "lr_schedule": {"config"},
    "memory": {"config", "errors"},
    "metrics": {"errors"},
    "mllog": {"config", "errors", "lr_schedule", "run_plan", "standard_streams", "step_times"},
    "model.cudnn_bn.__main__": {
        "errors",
        "model.cudnn_bn.build",
        "model.cudnn_bn.runtime",
        "model.cudnn_bn.self_test",
        "process_guard",
    },
    "model.cudnn_bn.build": {"errors"},
    "model.cudnn_bn.runtime": {"model.cudnn_bn.build"},
    "model.cudnn_bn.self_test": {"model.cudnn_bn.runtime"},
    "model.initializers": {"config", "model.resnet"},
    "model.ops": {"config", "model.cudnn_bn.runtime", "model.loss", "model.sync_batch_norm"},
    "model.ops_nvidia": {"model.ops"},
    "model.portable": {"config", "model.ops", "model.resnet"},
    "model.resnet": {"config", "model.ops"},
    "model.select_ops": {"config", "model.ops", "model.ops_nvidia"},
    "parallel.watchdog": {"parallel.listener"},
    "parallel.world": {"errors", "parallel.listener", "parallel.watchdog"},
    "profiling": {"config"},
    "progress": {"config", "errors", "metrics", "run_plan"},
    "results.log_reader": {"bounded_read"},
    "results.submission": {"errors", "results.log_reader"},
    "run_plan": {"config", "errors", "lr_schedule"},
    "standard_streams": {"errors"},
    "train_loop": {
        "config",
        "data.dataset",
        "data.loader",
        "errors",
        "metrics",
        "mllog",
        "profiling",
        "progress",
        "run_plan",
        "step_times",
    },
    "trainer": {
        "config",
        "data.loader",
        "device",
        "errors",
        "lars",
        "memory",
        "metrics",
        "model.initializers",
        "model.ops",
        "model.resnet",
        "model.sync_batch_norm",
        "parallel.world",
        "run_plan",
    },
}


def module_name(path):
    """Return the dotted name of a file below its top-level package."""
    return ".".join(path.with_suffix("").relative_to(ROOT).parts[1:])


def is_module(name):
    """Return whether a dotted name is a module or a package of this project."""
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports(path):
    """Yield what a file imports as dotted names, those of the project down to the module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if is_module(name) else node.module


@pytest.mark.parametrize("path", MODULES, ids=relative)
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


def importable_modules(folder):
    """Return the full names of the modules in a folder of mxresnet, except scripts."""
    return [
        "mxresnet." + module_name(path)
        for path in files(f"mxresnet/{folder}/**/*.py")
        if path.stem not in ("__init__", "__main__")
    ]


def import_modules(modules, before="", options=()):
    """Import modules in a new Python that first executes the statement `before`."""
    script = (
        f"import importlib, sys\n{before}\nfor name in sys.argv[1:]: importlib.import_module(name)"
    )
    done = subprocess.run(
        [sys.executable, *options, "-c", script, *modules], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_launch_imports_only_the_standard_library():
    """Launchers also run where the environment is not installed, on any Python 3.8 or newer."""
    # -S: without site-packages.
    import_modules(importable_modules("launch"), options=("-E", "-S"))


def test_results_imports_no_training_library():
    blocked = ("mxnet", "horovod", "mpi4py", "nvidia")
    import_modules(
        importable_modules("results"), before=f"sys.modules.update(dict.fromkeys({blocked}))"
    )


@pytest.mark.parametrize("path", SOURCE_FILES, ids=relative)
def test_file_size(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_FILE_LINES
    too_long = [number for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]
    assert not too_long, f"lines of more than {MAX_COLUMNS} columns: {too_long}"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_function_size_and_python_3_8(path):
    too_long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 8)))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert not too_long, f"functions of more than {MAX_FUNCTION_LINES} lines: {too_long}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_license_line_and_docstring(path):
    text = path.read_text()
    tree = ast.parse(text)
    if tree.body:
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
        assert ast.get_docstring(tree), "no module docstring"


@pytest.mark.parametrize("path", SHELL_FILES, ids=relative)
def test_shell_scripts_stop_at_the_first_error(path):
    if os.access(path, os.X_OK):
        assert "\nset -euo pipefail\n" in path.read_text()
