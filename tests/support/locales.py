# SPDX-License-Identifier: Apache-2.0
"""Locales in which Python does not read names and settings as UTF-8."""

import shutil
import subprocess

import pytest

ASCII_ENVIRONMENT = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def latin1_environment(folder):
    """Return an environment with a locale in which Python decodes names as ISO-8859-1."""
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")]
    if not shutil.which("localedef") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot compile a locale here")
    return {"LOCPATH": str(folder), "LC_ALL": "en_US.ISO-8859-1"}
