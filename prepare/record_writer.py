# SPDX-License-Identifier: Apache-2.0
"""Append to the record file with direct I/O and double buffering."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Optional, Union

import numpy as np

BLOCK_BYTES = 4096  # direct I/O needs offsets and sizes that are multiples of this
# Size of each of the two buffers. With smaller ones the disk is idle while the thread wakes up.
STAGE_BYTES = 32 << 20
O_DIRECT = getattr(os, "O_DIRECT", 0)


class RecordWriter:
    """Append to a file from a given offset on, without the page cache if the file system can.

    Direct I/O leaves the CPUs to reading and hashing (a write through the page cache costs several
    times the CPU time) and does not evict the source from memory. One full buffer is written by a
    thread while the next one is filled.

    Attributes:
        flushed: Offset in bytes up to which the data is in the file; the rest is in memory.
    """

    def __init__(self, path: str, offset: int) -> None:
        """Open or create the file; the next byte will be written at `offset`."""
        self._path = path
        self.flushed = self._base = offset - offset % BLOCK_BYTES
        self._fill = offset - self._base
        # mmap, because direct I/O needs memory that is aligned to a page.
        self._stage, self._other_stage = (
            np.frombuffer(mmap.mmap(-1, STAGE_BYTES), np.uint8) for _ in range(2)
        )
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems have no direct I/O
                raise
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with open(path, "rb") as stream:
            stream.seek(self._base)
            self._stage[: self._fill] = np.frombuffer(stream.read(self._fill), np.uint8)
        self._thread = ThreadPoolExecutor(1)
        self._pending_write: Optional[Future[None]] = None

    @property
    def position(self) -> int:
        """Offset of the next byte."""
        return self._base + self._fill

    def write(self, data: Union[bytes, memoryview]) -> None:
        """Append `data`.

        Raises:
            OSError: This write or an earlier one failed, for instance because the disk is full.
        """
        rest = np.frombuffer(data, np.uint8)
        while len(rest):
            count = min(len(rest), STAGE_BYTES - self._fill)
            self._stage[self._fill : self._fill + count] = rest[:count]
            self._fill += count
            rest = rest[count:]
            if self._fill == STAGE_BYTES:
                self._wait()
                self._pending_write = self._thread.submit(self._write_at, self._stage, self._base)
                self._stage, self._other_stage = self._other_stage, self._stage
                self._base += STAGE_BYTES
                self._fill = 0

    def _wait(self) -> None:
        if self._pending_write is not None:
            self._pending_write.result()

    def _write_at(self, data: np.ndarray, offset: int) -> None:
        view, done = data.data, 0
        while done < len(view):
            try:
                done += os.pwrite(self._file, view[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._disable_direct_io():
                    raise OSError(error.errno, error.strerror, self._path) from None
        self.flushed = offset + len(view)

    def _disable_direct_io(self) -> bool:
        """Write through the page cache from now on; return whether direct I/O was on before."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~O_DIRECT)
        return bool(flags & O_DIRECT)

    def finish(self) -> None:
        """Write what is in memory, truncate the file there and flush it to the disk."""
        self._wait()
        self._disable_direct_io()  # the last block is incomplete
        self._write_at(self._stage[: self._fill], self._base)
        os.ftruncate(self._file, self.position)
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file; what is in memory is lost unless `finish` was called."""
        self._thread.shutdown()
        os.close(self._file)
