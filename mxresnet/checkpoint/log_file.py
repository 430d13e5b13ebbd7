# SPDX-License-Identifier: Apache-2.0
"""Continue the log file of a run that is resumed, so that it reads as the log of one run.

What was logged after the checkpoint is logged again. The earlier lines are kept as text, without
the prefix that makes them events: a run has one run_stop, and each epoch once.
"""

from __future__ import annotations

import json
import os
from typing import List

from mxresnet.atomic_write import write_atomically
from mxresnet.bounded_read import read_file
from mxresnet.checkpoint.fingerprint import sha256_of
from mxresnet.checkpoint.manifest import LogPosition

MAX_LOG_BYTES = 1 << 30
EVENT_PREFIX = b":::MLLOG "
LOST_PREFIX = b"lost, because the run was resumed: "
REPLACED_PREFIX = b"lost, because the log was not continued: "
# Events that are not repeated; MLPerf has no keys for them.
CHECKPOINT_KEY, RESUMED_KEY = "checkpoint", "resumed"


def position_of(path: str) -> LogPosition:
    """Return how much of a log is written now.

    Raises:
        OSError: it cannot be read.
    """
    size = os.path.getsize(path)
    return LogPosition(os.path.abspath(path), size, sha256_of(path, size))


def sync(path: str) -> None:
    """Write a log to the disk: it must not be older than a checkpoint after the machine crashes.

    Raises:
        OSError: it cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_continuable(path: str, position: LogPosition) -> bool:
    """Return whether a file begins with what the log had at the checkpoint."""
    try:
        if os.path.getsize(path) < position.size_bytes:
            return False
        return sha256_of(path, position.size_bytes) == position.sha256
    except OSError:
        return False


def mark_lost_lines(path: str, position: LogPosition) -> None:
    """Make text of the events after a checkpoint; the file is replaced as a whole.

    Raises:
        OSError: it cannot be read or written.
    """
    path = os.path.realpath(path)
    content = read_file(path, MAX_LOG_BYTES)
    lines = content[position.size_bytes :].splitlines(keepends=True)
    changed = [line if _is_kept(line) else LOST_PREFIX + _without_prefix(line) for line in lines]
    _replace_lines(path, content[: position.size_bytes], lines, changed)


def mark_all_lines_lost(path: str) -> None:
    """Make text of all events: a run begins anew in this log, or with a header of its own.

    Raises:
        OSError: the file exists and cannot be read or written.
    """
    if not os.path.isfile(path):
        return
    path = os.path.realpath(path)
    lines = read_file(path, MAX_LOG_BYTES).splitlines(keepends=True)
    changed = [
        REPLACED_PREFIX + _without_prefix(line) if EVENT_PREFIX.strip() in line else line
        for line in lines
    ]
    _replace_lines(path, b"", lines, changed)


def _replace_lines(path: str, start: bytes, lines: List[bytes], changed: List[bytes]) -> None:
    """Replace a log, whose lines after its start were these, as a whole."""
    if changed and not changed[-1].endswith(b"\n"):  # its process was killed
        changed[-1] += b"\n"
    if changed == lines:
        return
    write_atomically(path, start + b"".join(changed), os.stat(path).st_mode)


def _is_kept(line: bytes) -> bool:
    if EVENT_PREFIX.strip() not in line:
        return True
    try:
        key = json.loads(line[len(EVENT_PREFIX) :])["key"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False  # a part of a line
    return line.startswith(EVENT_PREFIX) and key in (CHECKPOINT_KEY, RESUMED_KEY)


def _without_prefix(line: bytes) -> bytes:
    return line.replace(EVENT_PREFIX, b"").replace(EVENT_PREFIX.strip(), b"")
