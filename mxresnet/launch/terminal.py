# SPDX-License-Identifier: Apache-2.0
"""Output of the launchers: messages on standard error, results on standard output.

A reader that pauses, such as a pager, delays the launcher, but not its end: after `stop_waiting`
what nobody reads is lost.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import Optional

STDOUT, STDERR = 1, 2
_POLL_SECONDS = 0.5
_STOP_SECONDS = 1.0  # for readers, after the signal that stops this process


class _State:
    """What a signal handler shares with the threads that write."""

    end: Optional[float] = None  # of waiting for readers (time.monotonic); None: not stopped


class OutputError(OSError):
    """Standard output cannot be written, so that a result is lost."""


def stop_waiting() -> None:
    """Wait no longer for readers, because this process is to end; callable in a signal handler."""
    _State.end = time.monotonic() + _STOP_SECONDS


def _remaining_seconds() -> float:
    """Return for how long to wait at a time: not at all when the time for readers is over."""
    if _State.end is None:
        return _POLL_SECONDS
    return min(_POLL_SECONDS, max(0.0, _State.end - time.monotonic()))


def _write(descriptor: int, data: bytes) -> None:
    """Write bytes, unbuffered.

    Raises:
        OSError: That failed, or nobody reads and this process is to end.
    """
    poller = select.poll()
    poller.register(descriptor, select.POLLOUT)
    while data:
        while not poller.poll(1000 * _remaining_seconds()):
            if _State.end is not None and _remaining_seconds() == 0:
                raise TimeoutError("nobody reads it")
        data = data[os.write(descriptor, data[: select.PIPE_BUF]) :]


def print_to_stderr(line: str) -> None:
    """Write one line to standard error at once. A closed terminal is not an error."""
    write_to_stderr(os.fsencode(line) + b"\n")


def write_to_stderr(data: bytes) -> None:
    """Write bytes to standard error, unbuffered. A closed terminal is not an error."""
    with contextlib.suppress(OSError):
        _write(STDERR, data)


def write_to_stdout(data: bytes) -> None:
    """Write bytes to standard output, unbuffered.

    Raises:
        OutputError: That failed.
    """
    try:
        _write(STDOUT, data)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"standard output cannot be written: {reason}") from error
