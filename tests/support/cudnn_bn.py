# SPDX-License-Identifier: Apache-2.0
"""Build and run mxresnet.model.cudnn_bn in tests: its CPU library, and changed copies of it."""

import fcntl
import os
import pathlib
import re
import shutil
import subprocess
import sys

from mxresnet.model.cudnn_bn import build
from support.commands import ROOT, python

PACKAGE = ROOT / "mxresnet" / "model" / "cudnn_bn"
FAKE_CUDNN = ROOT / "tests" / "support" / "fake_cudnn.cc"

# Prints what unavailable_reason() returns for each value of INJECTED_FAULT, in one process.
PRINT_REASONS = """
import os
import mxnet as mx
from mxresnet.model.cudnn_bn import runtime
timeout_seconds = runtime.SELF_TEST_SECONDS
for fault in {faults}:
    os.environ["INJECTED_FAULT"] = fault
    runtime.SELF_TEST_SECONDS = 6 if fault == "hang" else timeout_seconds
    runtime.unavailable_reason.cache_clear()
    print("reason:", runtime.unavailable_reason(mx.{device}()), "|")
"""


def build_cpu_library():
    """Build the CPU library with its command."""
    done = python("-m", "mxresnet.model.cudnn_bn", "build", "--cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(build.library_path("cpu"))]


def load_cpu_library():
    """Load the CPU library into this process."""
    import mxnet as mx

    from mxresnet.model.cudnn_bn import runtime

    assert runtime.unavailable_reason(mx.cpu()) is None


def copy_package(folder):
    """Copy what cudnn_bn needs to a folder, to change it there; return the copy of cudnn_bn."""
    package = folder / "mxresnet"
    for name in (
        *("__init__.py", "cuda_libraries.py", "numpy_bool.py", "errors.py", "process_guard.py"),
        "model/__init__.py",
    ):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "mxresnet" / name, package / name)
    copy = package / "model" / "cudnn_bn"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("build", "__pycache__"))
    return copy


def python_in(folder, *arguments, **env):
    """Run this Python on the copy of the package in a folder; return its stdout."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(folder), **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def unavailable_reasons(folder, *faults, device="cpu", **env):
    """Return the text of unavailable_reason() of a copy of the package, once with each fault."""
    script = PRINT_REASONS.format(faults=faults, device=device)
    reasons = re.findall(r"reason: (.*) \|\n", python_in(folder, "-c", script, **env))
    assert len(reasons) == len(faults)
    return reasons


def install_cuda_wheels():
    """Return a folder with cuDNN 8 and CUDA 11 from the Python package index.

    The download of 0.7 GB is kept for later runs.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folder = cache / "mxresnet" / "cuda11"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-cache-dir"]
            command = [*pip, "--upgrade", "--target", folder, *build.WHEELS]
            subprocess.run(list(map(str, command)), check=True)
            (folder / "complete").touch()
    return folder
