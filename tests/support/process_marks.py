# SPDX-License-Identifier: Apache-2.0
"""Find all processes that a test started, wherever they are, by a variable that they inherit."""

import os
import pathlib
import time
import uuid

VARIABLE = "TEST_MARK"


def new_mark():
    """Return an environment variable for a command, as a dictionary."""
    return {VARIABLE: uuid.uuid4().hex}


def _state(folder):
    return (folder / "stat").read_text().rpartition(")")[2].split()[0]


def marked_processes(mark):
    """Return {id: command line} of the processes that run with a mark; no zombies."""
    entry = f"{VARIABLE}={mark[VARIABLE]}".encode()
    found = {}
    for folder in pathlib.Path("/proc").iterdir():
        try:
            if (
                folder.name.isdecimal()
                and int(folder.name) != os.getpid()
                and entry in (folder / "environ").read_bytes().split(b"\0")
                and _state(folder) != "Z"
            ):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = command.decode(errors="replace")
        except OSError:
            continue  # it has ended
    return found


def wait_until_gone(mark, seconds):
    """Wait until no process with a mark is left; return those that are left after the time."""
    end = time.monotonic() + seconds
    while True:
        left = marked_processes(mark)
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.05)
