# SPDX-License-Identifier: Apache-2.0
"""Run the project's shell scripts as processes, in a clean environment."""

import os
import pathlib
import shutil
import subprocess
import time

from support.commands import ROOT

# What setup_env.sh reads besides requirements/.
SETUP_FILES = (
    "setup.py",
    "setup_env.sh",
    "mxresnet/launch/setup_gpu.sh",
    "mxresnet/launch/setup_machine.sh",
    "mxresnet/process_guard.py",
)


def copy_setup_env(folder):
    """Copy setup_env.sh, with the files that it reads, to a folder that has no requirements/."""
    for name in SETUP_FILES:
        path = pathlib.Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, path)


def start_script(command, folder, **environ):
    """Start a command; its LOGDIR is <folder>/results. Return the process."""
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "LOGDIR": str(folder / "results"),
        "CHECKPOINTS": "0",
        "OMP_NUM_THREADS": "1",
        "REPORT": "0",
        **environ,
    }
    return subprocess.Popen(
        command, cwd=ROOT, text=True, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process, timeout=120):
    """Wait for the end of a process; return its result with its output."""
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(condition, seconds=20):
    """Wait until a condition holds. It may raise OSError, as for a file that does not exist yet."""
    end = time.time() + seconds
    while time.time() < end:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"the condition did not hold within {seconds} s")
