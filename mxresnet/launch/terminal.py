# SPDX-License-Identifier: Apache-2.0
"""Output of the launchers: messages on standard error, results on standard output."""

from __future__ import annotations

import contextlib
import os

STDOUT, STDERR = 1, 2


class OutputError(OSError):
    """Standard output cannot be written, so that a result is lost."""


def print_to_stderr(line: str) -> None:
    """Write one line to standard error at once. A closed terminal is not an error."""
    write_to_stderr(os.fsencode(line) + b"\n")


def write_to_stderr(data: bytes) -> None:
    """Write bytes to standard error, unbuffered. A closed terminal is not an error."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(STDERR, data) :]


def write_to_stdout(data: bytes) -> None:
    """Write bytes to standard output, unbuffered.

    Raises:
        OutputError: That failed.
    """
    try:
        while data:
            data = data[os.write(STDOUT, data) :]
    except OSError as error:
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error
