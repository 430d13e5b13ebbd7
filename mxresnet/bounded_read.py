# SPDX-License-Identifier: Apache-2.0
"""Read files that are kept in memory whole, up to a limit: their sizes are not trusted."""

from __future__ import annotations

import errno
import os
from typing import List

_BLOCK_BYTES = 1 << 20


def read_file(path: str, limit: int) -> bytes:
    """Return the content of a file.

    Args:
        path: Path of the file.
        limit: Bytes that it may have.

    Raises:
        OSError: It cannot be read, or has more bytes than the limit.
    """
    blocks: List[bytes] = []
    remaining = limit
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size  # 0 for some kinds of files
        while True:
            block = file.read(min(_BLOCK_BYTES, remaining + 1))
            remaining -= len(block)
            if remaining < 0 or size > limit:
                raise OSError(errno.EFBIG, f"it has more than {limit / 2**20:.3g} MiB", path)
            if not block:
                return b"".join(blocks)
            blocks.append(block)
