# SPDX-License-Identifier: Apache-2.0
"""Distinguish failures of the storage, which may be temporary, from faults of a single image."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Iterator

# Failures of the storage or shortages of this process; not every system defines all of them.
_OUTAGE_NAMES = (
    "EMFILE",
    "ENFILE",
    "ENOMEM",
    "EIO",
    "ESTALE",
    "ETIMEDOUT",
    "ENOTCONN",
    "EHOSTDOWN",
    "ENODEV",
    "ENXIO",
    "EREMOTEIO",
)
LIMITS = {  # what to raise
    errno.EFBIG: "the limit of the file system, or of ulimit -f",
    errno.EMFILE: "the limit of ulimit -n",
    errno.EDQUOT: "the user's quota of the file system",
}
OUTAGE_ERRNOS = frozenset(getattr(errno, name) for name in _OUTAGE_NAMES if hasattr(errno, name))


def raise_if_outage(error: OSError, path: str, *containers: str) -> None:
    """Raise an OSError that names the failed path if `error` is a failure of the storage.

    Return normally if only `path` itself is at fault. A missing file is a failure of the storage,
    too, when a folder or archive that contained it is missing or empty: an unmounted network share
    leaves an empty folder.

    Args:
        error: the error that was raised for `path`.
        path: the file or folder that could not be used.
        containers: folders and archives that contain `path`.

    Raises:
        OSError: the storage failed.
    """
    if error.errno in OUTAGE_ERRNOS:
        raise OSError(error.errno, error.strerror, path) from None
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        for container in containers:
            is_filled_folder = os.path.isdir(container) and os.listdir(container)
            if not os.path.isfile(container) and not is_filled_folder:
                # Not ENOENT, which is reported as a wrong command line: the path existed before.
                raise OSError(
                    errno.ENODEV, "existed before and is missing now", container
                ) from None
        if containers and os.path.exists(path):
            raise OSError(errno.ENODEV, "was missing for a moment", path) from None


def describe(error: OSError, default: str) -> str:
    """Return what failed and why, with the limit that may be too low.

    Args:
        error: the error.
        default: path of the file or folder that failed if `error` names none.
    """
    if error.filename is None and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        default = ""  # a shortage of this process or machine, whatever it was doing
    where = os.fsdecode(error.filename or default)
    hint = f" ({LIMITS[error.errno]})" if error.errno in LIMITS else ""
    return f"{where}{': ' if where else ''}{error.strerror or error}{hint}"


@contextlib.contextmanager
def name_in_errors(path: str) -> Iterator[None]:
    """Name `path` in errors that name no file, such as those of reading an open file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), path) from None
