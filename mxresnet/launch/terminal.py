# SPDX-License-Identifier: Apache-2.0
"""Messages of the launchers to the terminal: whole lines on standard error."""

from __future__ import annotations

import contextlib
import os

STDERR = 2


def print_to_stderr(line: str) -> None:
    """Write one line to standard error at once. A closed terminal is not an error."""
    write_to_stderr(os.fsencode(line) + b"\n")


def write_to_stderr(data: bytes) -> None:
    """Write bytes to standard error, unbuffered. A closed terminal is not an error."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(STDERR, data) :]
