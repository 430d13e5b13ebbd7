# SPDX-License-Identifier: Apache-2.0
"""setup_env.sh with the real pip: a package whose hash is not in requirements/ is not installed."""

import hashlib
import os
import subprocess
import sys
import zipfile

import pytest
from support.scripts import copy_setup_env


def write_wheel(folder, content):
    """Write the wheel of a package `demo` with one module; return its SHA-256."""
    path = folder / "demo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("demo.py", content)
        wheel.writestr(
            "demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n"
        )
        wheel.writestr(
            "demo-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("demo-1.0.dist-info/RECORD", "demo.py,,\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def checkout(tmp_path):
    """A copy of setup_env.sh that needs one package, which is in the folder `wheels`."""
    folder = tmp_path / "checkout"
    (folder / "wheels").mkdir(parents=True)
    (folder / "requirements").mkdir()
    copy_setup_env(folder)
    digest = write_wheel(folder / "wheels", "GOOD = True\n")
    (folder / "requirements" / "build.txt").write_text(f"demo==1.0 --hash=sha256:{digest}\n")
    return folder


def run_setup(checkout):
    """Run setup_env.sh without a package index; return its standard error."""
    # The python that this one's environment was made from: it has venv and no packages.
    path = f"{os.path.dirname(os.path.realpath(sys.executable))}:/usr/bin:/bin"
    environ = {"PATH": path, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    environ["PIP_FIND_LINKS"] = str(checkout / "wheels")
    done = subprocess.run(
        ["./setup_env.sh"], cwd=checkout, env=environ, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 1  # there are no other packages
    return done.stderr


def installed(checkout):
    return list(checkout.glob(".venv/lib/*/site-packages/demo.py"))


def test_a_package_that_was_tampered_with_is_not_installed(checkout):
    wheel = checkout / "wheels" / "demo-1.0-py3-none-any.whl"
    good = wheel.read_bytes()
    write_wheel(checkout / "wheels", "GOOD = False\n")
    messages = run_setup(checkout)
    assert "install_build_requirements.log" in messages
    assert "DO NOT MATCH THE HASHES" in messages
    assert not installed(checkout)
    wheel.write_bytes(good)
    assert "install_build_requirements.log" not in run_setup(checkout)
    assert installed(checkout)
