# SPDX-License-Identifier: Apache-2.0
"""List the images in tar archives by their headers, so that they can be read without unpacking.

A truncated or damaged archive is reported with the position of the damage; the images before it are
listed.
"""

from __future__ import annotations

import os
from typing import List, Sequence

from prepare.cpus import parallel_map
from prepare.file_state import FileState
from prepare.listing import Listing, Problem, SourceError
from prepare.regular_file import NotRegularFileError, open_descriptor
from prepare.storage_errors import name_in_errors
from prepare.tar_format import TarMember
from prepare.tar_indexer import TarIndexer


def list_archive(path: str, workers: int) -> Listing:
    """List an archive of images, of folders of images, or of class archives.

    Args:
        path: path of the archive.
        workers: number of threads for class archives in it.

    Raises:
        SourceError: the path is that of something else than a file.
        OSError: the archive cannot be read.
    """
    listing = Listing(path)
    class_archives: List[TarMember] = []
    try:
        descriptor = open_descriptor(path)
    except NotRegularFileError as error:
        raise SourceError(f"{path}: {error.reason}") from None
    with os.fdopen(descriptor, "rb", buffering=0), name_in_errors(path):
        state = listing.archive_states[path] = FileState.of(os.fstat(descriptor))
        outer = TarIndexer(path, listing, "", state.mtime_ns, class_archives)
        outer.index(descriptor, 0, state.size)

        def list_member(member: TarMember) -> Listing:
            class_listing = Listing(path)
            class_name = outer.class_path(member.name[: -len(".tar")])
            indexer = TarIndexer(path, class_listing, class_name, state.mtime_ns)
            indexer.index(descriptor, member.offset, member.offset + member.size)
            return class_listing

        for class_listing in parallel_map(list_member, class_archives, workers):
            listing.extend(class_listing)
    return listing


def list_class_archives(folder: str, names: Sequence[str], workers: int) -> Listing:
    """List a folder of archives, one for each class and named after it.

    Args:
        folder: path of the folder.
        names: file names of the archives.
        workers: number of threads.

    Raises:
        OSError: an archive cannot be read.
    """
    listing = Listing(folder)

    def list_class_archive(name: str) -> Listing:
        class_listing = Listing(folder)
        path = os.path.join(folder, name)
        try:
            descriptor = open_descriptor(path)
        except NotRegularFileError as error:
            class_listing.problems.append(Problem(path, error.reason, skippable=False))
            return class_listing
        with os.fdopen(descriptor, "rb", buffering=0), name_in_errors(path):
            state = class_listing.archive_states[path] = FileState.of(os.fstat(descriptor))
            class_name = os.path.splitext(name)[0]
            indexer = TarIndexer(path, class_listing, class_name, state.mtime_ns)
            indexer.index(descriptor, 0, state.size)
        return class_listing

    for class_listing in parallel_map(list_class_archive, names, workers):
        listing.extend(class_listing)
    return listing
