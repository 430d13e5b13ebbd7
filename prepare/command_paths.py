# SPDX-License-Identifier: Apache-2.0
"""Check the paths of a command line: wrong ones are usage errors, because a retry cannot help."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import stat
from typing import Iterator, Set

from prepare.listing import FileId
from prepare.regular_file import NotRegularFileError

# EACCES and EPERM are not among them: permissions of a destination may be temporary.
WRONG_PATH_ERRNOS = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG}
)
UNREADABLE_ERRNOS = WRONG_PATH_ERRNOS | {errno.EACCES, errno.EPERM}


class WrongPathError(Exception):
    """A path of the command line cannot be used; the message names it."""


def path_argument(text: str) -> str:
    """Return the path `text`; an empty one would be the current folder. A type for argparse."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, not ''")
    return text


@contextlib.contextmanager
def wrong_source_is_usage_error() -> Iterator[None]:
    """Raise WrongPathError where the source does not exist or may not be read."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNREADABLE_ERRNOS and not isinstance(error, NotRegularFileError):
            raise
        raise WrongPathError(f"{error.filename}: {error.strerror}") from None


def check_destination_path(folder: str) -> None:
    """Raise WrongPathError if there cannot be a folder with this path, which need not exist."""
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise WrongPathError(f"{folder}: {os.strerror(errno.EEXIST)}")
    except OSError as error:
        if error.errno in WRONG_PATH_ERRNOS - {errno.ENOENT}:
            raise WrongPathError(f"{folder}: {error.strerror}") from None


def make_destination(folder: str) -> None:
    """Create the destination folder if needed.

    Raises:
        WrongPathError: the path cannot be that of a folder.
        OSError: the folder cannot be created now.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        if error.errno not in WRONG_PATH_ERRNOS:
            raise
        raise WrongPathError(f"{error.filename}: {error.strerror}") from None


def check_destination_outside(destination: str, folder: str) -> None:
    """Raise WrongPathError if `destination` is in `folder`, a folder of images of the source.

    The next run would take it for a class.
    """
    image_folder = os.path.realpath(folder)
    inside = (os.path.realpath(destination) + os.sep).startswith(image_folder + os.sep)
    if os.path.isdir(image_folder) and inside:
        raise_inside(destination, image_folder)


def check_destination_not_listed(destination: str, folder_ids: Set[FileId]) -> None:
    """Raise WrongPathError if `destination` is in one of these folders, to which links may lead."""
    path = os.path.realpath(destination)
    while True:
        try:
            status = os.stat(path)
        except OSError:
            pass  # it is to be created
        else:
            if (status.st_dev, status.st_ino) in folder_ids:
                raise_inside(destination, path)
        parent = os.path.dirname(path)
        if parent == path:
            return
        path = parent


def raise_inside(destination: str, image_folder: str) -> None:
    """Raise WrongPathError for a destination in a folder of images."""
    raise WrongPathError(
        f"{destination}: is in the source's own folder {image_folder}: choose another destination"
    )
