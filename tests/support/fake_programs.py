# SPDX-License-Identifier: Apache-2.0
"""Fake programs: shell scripts that replace a tool on PATH."""


def fake_program(folder, name, script):
    """Write an executable shell script into a folder, which is created if needed."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
