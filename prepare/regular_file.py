# SPDX-License-Identifier: Apache-2.0
"""Open regular files only: opening a named pipe would wait for a writer that may never come."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class NotRegularFileError(OSError):
    """A path leads to something else than a regular file; `reason` says what, without the path."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(errno.EINVAL, reason, path)
        self.reason = reason


def check_regular(mode: int, path: str) -> None:
    """Raise NotRegularFileError unless `mode`, of os.stat, is that of a regular file."""
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "no file")
        raise NotRegularFileError(path, f"is {kind}, not a regular file")


def open_descriptor(path: str) -> int:
    """Open a regular file for reading; return its descriptor.

    Raises:
        NotRegularFileError: it is a named pipe, a device, a socket or a folder.
        OSError: it cannot be opened.
    """
    check_regular(os.stat(path).st_mode, path)  # opening a device may do something to it
    # Without waiting, as the path may lead to something else since.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_regular(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def open_regular(path: str) -> BinaryIO:
    """Open a regular file for reading, as `open(path, "rb")` does.

    Raises:
        NotRegularFileError: it is a named pipe, a device, a socket or a folder.
        OSError: it cannot be opened.
    """
    return os.fdopen(open_descriptor(path), "rb")
