# SPDX-License-Identifier: Apache-2.0
"""Copy a data set to a disk of this machine, before the trials (COPY_DATASET).

    python -m mxresnet.launch.copy_dataset SOURCE DESTINATION

SOURCE has the files of python -m prepare.imagenet. Each file appears under its name when it is
complete, the manifests last. Files that a run before has copied are kept, if size and time of
change are those of the source.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import sys
from typing import List

from mxresnet.errors import ExitStatus, UserError
from mxresnet.launch.terminal import print_to_stderr

_REQUIRED = ("train.rec", "train.idx", "val.rec", "val.idx")
_OPTIONAL = ("train.lst", "val.lst", "train.json", "val.json")


def copy_dataset(source_folder: str, destination_folder: str) -> None:
    """Copy the files of a data set that the destination does not have.

    Raises:
        UserError: The source is no data set, or it cannot be copied.
    """
    source, destination = pathlib.Path(source_folder), pathlib.Path(destination_folder)
    try:
        files = _files(source)
        destination.mkdir(parents=True, exist_ok=True)
        folder = os.open(destination, os.O_RDONLY)
        try:
            # Of two jobs that start together, one copies and the other waits for it.
            with contextlib.suppress(OSError):  # some network file systems lock no folders
                fcntl.flock(folder, fcntl.LOCK_EX)
            if not destination.samefile(source):
                _copy_missing(files, destination)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(
            f"COPY_DATASET={source} cannot be copied to {destination}: "
            f"{error.filename or destination}: {error.strerror}"
        ) from error


def _files(source: pathlib.Path) -> List[pathlib.Path]:
    """Return the files of a data set, the manifests last.

    Raises:
        UserError: The folder is no data set.
    """
    missing = [name for name in _REQUIRED if not (source / name).is_file()]
    if missing:
        raise UserError(
            f"COPY_DATASET={source} has no {missing[0]}: name the folder that "
            "python -m prepare.imagenet made"
        )
    optional = [source / name for name in _OPTIONAL]
    return [source / name for name in _REQUIRED] + [path for path in optional if path.is_file()]


def _copy_missing(files: List[pathlib.Path], destination: pathlib.Path) -> None:
    """Copy the files that the destination does not have.

    Raises:
        UserError: The destination has other files with these names, or not enough room.
        OSError: A file cannot be copied.
    """
    missing = []
    for path in files:
        copy = destination / path.name
        if not os.path.lexists(copy):
            missing.append(path)
        elif not _is_copied(path, copy):
            raise UserError(
                f"COPY_DATASET={path.parent}: {copy} is another file than {path} (size or time of "
                "change): remove it, or set another DATADIR"
            )
    for path in files:  # left by a run that was stopped
        with contextlib.suppress(FileNotFoundError):
            _part(path, destination).unlink()
    size, room = sum(path.stat().st_size for path in missing), shutil.disk_usage(destination).free
    if size > room:
        raise UserError(
            f"COPY_DATASET needs {size / 1e9:.1f} GB in {destination}, which has room for "
            f"{room / 1e9:.1f} GB"
        )
    for path in missing:
        print_to_stderr(f"copying {path} ({path.stat().st_size / 1e9:.1f} GB) to {destination}")
        part = _part(path, destination)
        shutil.copyfile(path, part)
        shutil.copystat(path, part)
        os.replace(part, destination / path.name)


def _part(path: pathlib.Path, destination: pathlib.Path) -> pathlib.Path:
    """Return the path of a file in the destination while it is being copied."""
    return destination / f".{path.name}.part"


def _is_copied(path: pathlib.Path, copy: pathlib.Path) -> bool:
    """Return whether a copy has the size and the time of change of a file."""
    if not copy.is_file():
        return False
    expected, found = path.stat(), copy.stat()
    # Some file systems store times in whole seconds.
    return expected.st_size == found.st_size and int(expected.st_mtime) == int(found.st_mtime)


def main() -> int:
    """Copy, report an error in one line, and return the exit status."""
    if len(sys.argv) != 3:
        print_to_stderr("usage: python -m mxresnet.launch.copy_dataset SOURCE DESTINATION")
        return ExitStatus.USER_ERROR
    source, destination = sys.argv[1:]
    try:
        copy_dataset(source, destination)
    except UserError as error:
        print_to_stderr(f"{error}")
        return ExitStatus.USER_ERROR
    return ExitStatus.SUCCESS


if __name__ == "__main__":
    sys.exit(main())
