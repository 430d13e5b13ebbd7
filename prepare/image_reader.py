# SPDX-License-Identifier: Apache-2.0
"""Read the bytes of the images of a plan, from files or from archives."""

from __future__ import annotations

import os
from typing import List

from prepare.file_state import changed_file, check_same_state, modification_time_ns
from prepare.listing import SourceError
from prepare.plan import Plan
from prepare.regular_file import open_descriptor
from prepare.storage_errors import raise_if_outage


def read_exactly(descriptor: int, view: memoryview, offset: int) -> None:
    """Fill `view` from the file at `offset` (bytes).

    Raises:
        SourceError: the file ends too early.
    """
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            missing = len(view) - done
            raise SourceError(f"ends too early: {missing} bytes are missing")
        done += count


class ImageReader:
    """Read the images of a plan; a context manager that any number of threads may share.

    A file that is not as it was when it was listed is an error: the images of an archive may be at
    other offsets. Of an image's own file, size and modification time are compared. Its inode is
    not: some network file systems give a file another inode number whenever it is looked up.
    """

    # A thousand open class archives would exceed the process's limit of open files.
    MAX_OPEN_ARCHIVES = 64

    def __init__(self, plan: Plan) -> None:
        """Open the plan's archives, unless there are more than MAX_OPEN_ARCHIVES.

        Raises:
            OSError: an archive cannot be opened, or has changed since it was listed.
        """
        self._plan = plan
        self._top = os.path.join(plan.top, "")
        self._descriptors: List[int] = []  # of all archives, or empty
        if len(plan.archives) <= self.MAX_OPEN_ARCHIVES:
            for index, archive in enumerate(plan.archives):
                try:
                    self._descriptors.append(open_descriptor(archive))
                    self._check_archive(index, self._descriptors[index])
                except OSError as error:
                    self.__exit__()
                    raise_if_outage(error, archive, archive)
                    raise

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    def read(self, record: int, view: memoryview, begin: int = 0) -> None:
        """Fill `view` with bytes of the image of one record.

        Args:
            record: the record's index in the plan.
            view: a writable buffer for all of the image, or for a part of it.
            begin: offset of the part in the image, bytes.

        Raises:
            SourceError: the file ends too early, although its size is the same.
            OSError: the image cannot be read, or its file has changed since it was listed.
        """
        plan = self._plan
        if not plan.archives:
            self._read_file(record, view, begin)
            return
        archive_index = int(plan.archive_indices[record])
        offset = int(plan.offsets[record]) + begin
        if self._descriptors:
            self._read_archive(archive_index, self._descriptors[archive_index], view, offset)
        else:
            descriptor = open_descriptor(plan.archives[archive_index])
            try:
                self._read_archive(archive_index, descriptor, view, offset)
            finally:
                os.close(descriptor)

    def _read_archive(self, index: int, descriptor: int, view: memoryview, offset: int) -> None:
        try:
            read_exactly(descriptor, view, offset)
        finally:
            self._check_archive(index, descriptor)

    def _check_archive(self, index: int, descriptor: int) -> None:
        """Raise OSError unless an open archive is the file that was listed, and is unchanged."""
        check_same_state(descriptor, self._plan.archive_states[index], self._plan.archives[index])

    def raise_if_outage(self, error: OSError, record: int) -> None:
        """Raise an OSError if `error` is a failure of the storage, not a fault of this image."""
        if self._plan.archives:
            archive = self._plan.archives[self._plan.archive_indices[record]]
            raise_if_outage(error, archive, self._plan.top, archive)
        else:
            path = self._path(record)
            # Resolve links, because the image's folder may be on other storage than the source.
            real_folder = os.path.dirname(os.path.realpath(path))
            raise_if_outage(error, path, self._plan.top, real_folder)

    def path(self, record: int) -> str:
        """Return the file that contains the image of a record: its own, or an archive."""
        plan = self._plan
        return plan.archives[plan.archive_indices[record]] if plan.archives else self._path(record)

    def _path(self, record: int) -> str:
        return self._top + self._plan.source_path(record)

    def _read_file(self, record: int, view: memoryview, begin: int) -> None:
        path, plan = self._path(record), self._plan
        # Without waiting for the writer of a named pipe that has taken the place of the file.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            try:
                read_exactly(descriptor, view, begin)
            finally:
                status = os.fstat(descriptor)
                found = status.st_size, modification_time_ns(status)
                if found != (plan.sizes[record], plan.mtimes_ns[record]):
                    raise changed_file(path)
        finally:
            os.close(descriptor)
