# SPDX-License-Identifier: Apache-2.0
"""setup_env.sh with a fake Python, which installs nothing."""

import re
import shutil
import subprocess
import sys

from support.commands import ROOT
from support.scripts import copy_setup_env

# A fake of python3.11 and of .venv's python: records its arguments and installs nothing.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *ensurepip*) echo yes ;;
    *sysconfig*) echo lib ;;
    "-m venv "*)
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        ;;
    *" pip "*)
        echo "$*" >>"$CALLS"
        case "$*" in
            *" wheel --"*)
                eval "${BUILD:-}"
                mkdir -p .venv/wheels/new
                touch .venv/wheels/new/horovod-0.whl
                ;;
            *" install "*horovod-*.whl) eval "${INSTALL:-}" ;;
            *"/cuda.txt "*)
                mkdir -p lib/mxnet lib/nvidia/cudnn/lib lib/nvidia/nccl/lib
                touch lib/nvidia/cudnn/lib/libcudnn.so.8 lib/nvidia/nccl/lib/libnccl.so.2
                ;;
        esac
        ;;
    *" build --gpu "*) echo "$*" >>"$CALLS" ;;
    *process_guard.py*) exec REAL_PYTHON "$@" ;;
esac
""".replace("REAL_PYTHON", sys.executable)


class Environment:
    """A folder with setup_env.sh, in which python3.11 is the fake."""

    def __init__(self, folder):
        self.folder = folder
        self.calls = folder / "calls"
        copy_setup_env(folder)
        shutil.copytree(ROOT / "requirements", folder / "requirements")
        fake = folder / "bin" / "python3.11"
        fake.parent.mkdir()
        fake.write_text(FAKE_PYTHON)
        fake.chmod(0o755)
        self.environ = {"PATH": f"{fake.parent}:/usr/bin:/bin", "CALLS": str(self.calls)}

    def start(self, *arguments, script="setup_env.sh", **environ):
        self.calls.write_text("")
        return subprocess.Popen(
            [f"./{script}", *arguments],
            cwd=self.folder,
            env={**self.environ, **environ},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments, **environ):
        """Run setup_env.sh; return its status, standard output and standard error."""
        process = self.start(*arguments, **environ)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def installed(self):
        """Return the files of requirements/ that the last run installed, sorted."""
        calls = self.calls.read_text()
        return sorted(set(re.findall(r"/requirements/(\w+)\.txt", calls)))
