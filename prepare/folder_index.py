# SPDX-License-Identifier: Apache-2.0
"""List the image files in a folder and its sub-folders, without reading them."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from typing import List, Optional, Tuple

from prepare.cpus import parallel_map
from prepare.listing import (
    FileId,
    Folder,
    Listing,
    Problem,
    is_image_name,
    name_problem,
)
from prepare.storage_errors import raise_if_outage

# Path of a folder relative to the top, and the identities of all folders above it.
PendingFolder = Tuple[str, Tuple[FileId, ...]]


@dataclass
class FolderScan:
    """The direct content of one folder."""

    folder: Folder
    problems: List[Problem] = field(default_factory=list)
    ignored: List[str] = field(default_factory=list)  # relative paths of other files
    subfolders: List[PendingFolder] = field(default_factory=list)
    identity: Optional[FileId] = None  # of the folder; None: it does not exist any more


def list_folder(top: str, workers: int = 1) -> Listing:
    """List the images under the folder `top` as im2rec does.

    Symbolic links are followed; images have one of three extensions and may be in nested folders.

    Args:
        top: path of the folder.
        workers: number of threads.

    Raises:
        OSError: the storage failed.
    """
    listing = Listing(top)
    level: List[PendingFolder] = [("", ())]
    while level:
        scans = parallel_map(lambda pending: scan_folder(top, pending), level, workers)
        for scan in scans:
            listing.folders.append(scan.folder)
            listing.problems += scan.problems
            listing.count_ignored(scan.ignored)
            if scan.identity is not None:
                listing.folder_ids.add(scan.identity)
        level = [pending for scan in scans for pending in scan.subfolders]
    return listing


def scan_folder(top: str, pending: PendingFolder) -> FolderScan:
    """List the direct content of one folder. Raise OSError if the storage failed."""
    relative, ancestors = pending
    absolute = os.path.join(top, relative) if relative else top
    scan = FolderScan(Folder(relative))
    try:
        status = os.stat(absolute)
        scan.identity = identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            reason = "a symbolic link that leads back to a folder above it: remove it"
            scan.problems.append(Problem(absolute, reason, skippable=False))
            return scan
        with os.scandir(absolute) as entries:
            for entry in entries:
                path = f"{relative}/{entry.name}" if relative else entry.name
                if is_folder(entry):
                    scan.folder.has_folders = True
                    scan.subfolders.append((path, (*ancestors, identity)))
                else:
                    scan_file(entry, path, scan)
    except OSError as error:
        raise_if_outage(error, absolute, top)
        scan.problems.append(
            Problem(absolute, f"cannot be listed: {error.strerror}", skippable=False)
        )
    return scan


def scan_file(entry: os.DirEntry[str], path: str, scan: FolderScan) -> None:
    """Add one directory entry that is not a folder to `scan`.

    Args:
        entry: the directory entry.
        path: its path relative to the top of the data set.
        scan: where to record the image, the problem or the ignored file.
    """
    try:
        status = entry.stat()
    except OSError as error:
        raise_if_outage(error, entry.path)
        dangling = error.errno != errno.ELOOP and entry.is_symlink()
        system_reason = error.strerror or str(error)
        reason = "a symbolic link whose target does not exist" if dangling else system_reason
        # A link to a missing folder may be a class; a link to itself leads to nothing.
        skippable = is_image_name(entry.name) or error.errno == errno.ELOOP
        scan.problems.append(Problem(entry.path, reason, skippable))
        return
    if not is_image_name(entry.name):
        scan.ignored.append(path)
        return
    if not stat.S_ISREG(status.st_mode):
        scan.problems.append(Problem(entry.path, "not a regular file"))
        return
    unusable_name = name_problem(path)
    if unusable_name is not None:
        scan.problems.append(Problem(entry.path, unusable_name))
        return
    # os.access is a round trip on network storage: skip it for files that everybody may read.
    if not status.st_mode & stat.S_IROTH and not os.access(entry.path, os.R_OK):
        scan.problems.append(Problem(entry.path, "cannot be read: permission denied"))
    scan.folder.add(entry.name, status.st_size, mtime_ns=status.st_mtime_ns)


def add_files_beside_archives(folder: str, listing: Listing) -> None:
    """Add the files next to class archives to `listing`; an image there belongs to no class.

    Args:
        folder: path of the folder that contains the archives.
        listing: what the archives contain; images become problems, other files are counted.
    """
    scan = FolderScan(Folder(""))
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.name.endswith(".tar") and not is_folder(entry):
                scan_file(entry, entry.name, scan)
    faulty = {problem.path for problem in scan.problems}
    listing.problems += scan.problems
    for path in (os.path.join(folder, name) for name in scan.folder.names):
        if path not in faulty:
            reason = "is next to archives, in no class: move it into a class, or remove it"
            listing.problems.append(Problem(path, reason))
    listing.count_ignored(scan.ignored)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether a directory entry is a folder or a link to one.

    Return False if a link cannot be followed; scan_file then reports the reason.

    Raises:
        OSError: the storage failed.
    """
    try:
        return entry.is_dir()
    except OSError as error:
        raise_if_outage(error, entry.path)
        return False
