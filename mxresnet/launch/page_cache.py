# SPDX-License-Identifier: Apache-2.0
"""Drop the page cache, so that a trial reads its data set from the disk."""

from __future__ import annotations

import os
from typing import List, Mapping

from mxresnet.launch.processes import capture_output, find_program

DROP_CACHES_FILE = "/proc/sys/vm/drop_caches"


def drop_command(environ: Mapping[str, str]) -> List[str]:
    """Return the command that drops the page cache: as root, or with CLEAR_CACHES=sudo by sudo."""
    command = ["sh", "-c", f"sync && echo 3 >{DROP_CACHES_FILE}"]
    # -n: fail where sudo would ask for a password, because trials run unattended.
    return ["sudo", "-n", *command] if environ.get("CLEAR_CACHES") == "sudo" else command


def drop_page_cache(environ: Mapping[str, str]) -> bool:
    """Drop the page cache of this machine; return whether that succeeded.

    Args:
        environ: With CLEAR_CACHES=sudo, sudo runs the command if this user is not root.
    """
    os.sync()
    try:
        with open(DROP_CACHES_FILE, "w", encoding="ascii") as file:
            file.write("3\n")
    except OSError:
        command = drop_command(environ)
        if command[0] != "sudo" or find_program("sudo", environ) is None:
            return False
        return capture_output(command, environ).returncode == 0
    return True
