# SPDX-License-Identifier: Apache-2.0
"""Read files that are kept in memory whole, up to a limit: their sizes are not trusted.

Also hash files of any size, a block at a time.
"""

from __future__ import annotations

import hashlib
import os
from typing import IO

from prepare.regular_file import open_regular
from prepare.storage_errors import name_in_errors

BLOCK_BYTES = 1 << 20


class TooLargeError(Exception):
    """A file has, or unpacks to, more bytes than the limit."""


class BoundedStream:
    """A stream that ends with TooLargeError after a number of bytes."""

    def __init__(self, stream: IO[bytes], name: str, limit: int) -> None:
        """Wrap a stream.

        Args:
            stream: Its position is that of the first byte that counts.
            name: For the message of the error.
            limit: Bytes.
        """
        self._stream, self._name, self._limit, self._remaining = stream, name, limit, limit

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes, or nothing at the end.

        Raises:
            TooLargeError: there are more bytes than the limit.
        """
        data = self._stream.read(min(size, self._remaining + 1))
        self._remaining -= len(data)
        if self._remaining < 0:
            raise TooLargeError(f"{self._name} has more than {self._limit / 2**20:.3g} MiB")
        return data

    def read_all(self) -> bytes:
        """Return everything up to the end.

        Raises:
            TooLargeError: there are more bytes than the limit.
        """
        return b"".join(iter(lambda: self.read(BLOCK_BYTES), b""))


def read_file(path: str, limit: int) -> bytes:
    """Return the content of a file.

    Raises:
        TooLargeError: it has more bytes than the limit.
        OSError: it cannot be read, or is no regular file.
    """
    with open_regular(path) as stream, name_in_errors(path):
        if os.fstat(stream.fileno()).st_size > limit:
            raise TooLargeError(f"{path} has more than {limit / 2**20:.3g} MiB")
        return BoundedStream(stream, path, limit).read_all()


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file (hexadecimal).

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    digest = hashlib.sha256()
    with open_regular(path) as stream, name_in_errors(path):
        for block in iter(lambda: stream.read(BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()
