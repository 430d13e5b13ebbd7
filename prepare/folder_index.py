# SPDX-License-Identifier: Apache-2.0
"""List the image files in a folder and its sub-folders, without reading them."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from typing import Container, List, Optional, Tuple

from prepare.cpus import parallel_map
from prepare.file_state import modification_time_ns
from prepare.listing import (
    LOST_AND_FOUND,
    FileId,
    Folder,
    Listing,
    Problem,
    is_image_name,
    name_problem,
)
from prepare.packed_files import MAX_UNKNOWN_FILES, packed_content, packed_stem
from prepare.regular_file import NotRegularFileError, open_regular
from prepare.storage_errors import raise_if_outage
from prepare.tar_format import BLOCK_BYTES

OFFICIAL_PREFIX = "ILSVRC2012_"  # of ImageNet's own archives, which are not classes
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
        if relative == LOST_AND_FOUND:
            return scan
        scan.problems.append(
            Problem(absolute, f"cannot be listed: {error.strerror}", skippable=False)
        )
    unpacked = {os.path.basename(path) for path, _ in scan.subfolders}
    if scan.folder.names:
        unpacked.add(os.path.basename(relative))
    find_packed_files(absolute, scan, unpacked, may_be_class=not scan.folder.names)
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
    scan.folder.add(entry.name, status.st_size, mtime_ns=modification_time_ns(status))


def find_packed_files(
    folder: str, scan: FolderScan, unpacked: Container[str], may_be_class: bool
) -> None:
    """Move packed files from the ignored files to the problems: their images would be missing.

    Args:
        folder: path of the folder.
        scan: its content; changed in place.
        unpacked: the packed files with these names, less their extensions, are there unpacked, too.
        may_be_class: whether a packed file may be a whole class, under any name.
    """
    paths, scan.ignored = scan.ignored, []
    num_opened = 0
    for path in paths:
        name = os.path.basename(path)
        stem = packed_stem(name)
        if stem is None and may_be_class and num_opened < MAX_UNKNOWN_FILES:
            num_opened += 1
            stem = stem_by_content(os.path.join(folder, name))
        if stem is None or stem in unpacked or name.startswith(OFFICIAL_PREFIX):
            scan.ignored.append(path)
        else:
            reason = "a packed archive, whose images would be missing: unpack it, or move it away"
            path = os.path.join(folder, name)
            scan.problems.append(Problem(path, reason, skippable=not may_be_class))


def stem_by_content(path: str) -> Optional[str]:
    """Return the name of a packed file less its extension, or None if its content is another.

    Raises:
        OSError: the storage failed.
    """
    try:
        with open_regular(path) as stream:
            block = stream.read(BLOCK_BYTES)
    except NotRegularFileError:
        return None
    except OSError as error:
        raise_if_outage(error, path)
        return None
    return None if packed_content(block) is None else os.path.splitext(os.path.basename(path))[0]


def add_files_beside_archives(folder: str, listing: Listing) -> None:
    """Add the files next to archives to `listing`; an image there belongs to no class.

    Args:
        folder: path of the folder that contains the archives.
        listing: what the archives contain; images and archives of other classes become problems,
            other files are counted.
    """
    scan = FolderScan(Folder(""))
    classes = {folder.path.split("/")[0] for folder in listing.folders}
    known = {problem.path for problem in listing.problems}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            stem, extension = os.path.splitext(entry.name)
            listed = stem in classes or stem.startswith(OFFICIAL_PREFIX) or entry.path in known
            if not (extension == ".tar" and listed) and not is_folder(entry):
                scan_file(entry, entry.name, scan)
    find_packed_files(folder, scan, unpacked=classes, may_be_class=True)
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
