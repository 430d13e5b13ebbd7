# SPDX-License-Identifier: Apache-2.0
"""Notice that a file was written or replaced after it was listed, or while it was read."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Dict, Iterator, NamedTuple, Optional, Sequence

WORD_64 = 1 << 64


class FileState(NamedTuple):
    """What changes when a file is written, or replaced by another one."""

    size: int  # bytes
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """Return the state of a file from the result of os.stat."""
        return cls(status.st_size, modification_time_ns(status), status.st_ino)


def modification_time_ns(status: os.stat_result) -> int:
    """Return the modification time as a signed number of 64 bits, nanoseconds.

    Times after the year 2262 exceed it and wrap around.
    """
    return (status.st_mtime_ns + WORD_64 // 2) % WORD_64 - WORD_64 // 2


def check_same_state(descriptor: int, listed: FileState, path: str) -> None:
    """Raise the OSError of `changed_file` unless an open file is as it was when it was listed."""
    if FileState.of(os.fstat(descriptor)) != listed:
        raise changed_file(path)


def changed_file(path: str) -> OSError:
    """Return the error for a file that has changed; like one of the storage, a retry can help."""
    return OSError(errno.ESTALE, "has changed since it was listed", path)


@contextlib.contextmanager
def unchanged_while_read(paths: Sequence[str]) -> Iterator[None]:
    """Raise OSError at the end, rather than other errors, if one of the files has changed."""

    def states() -> Dict[str, Optional[FileState]]:
        return {path: _state_of(path) for path in paths}

    before = states()
    try:
        yield
    finally:
        changed = [path for path, state in states().items() if state != before[path]]
        if changed:
            raise OSError(errno.ESTALE, "has changed while it was read", changed[0])


def _state_of(path: str) -> Optional[FileState]:
    """Return the state of a file; None if there is none."""
    try:
        return FileState.of(os.stat(path))
    except OSError:
        return None
