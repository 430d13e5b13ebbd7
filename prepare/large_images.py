# SPDX-License-Identifier: Apache-2.0
"""Records too large for a buffer in memory: read in blocks, once to examine and once to copy them.

Without this the memory that a conversion needs would depend on the largest image.
"""

from __future__ import annotations

import errno
import threading
from typing import Iterator, List, Optional

import numpy as np

from prepare import recordio
from prepare.image_check import END_BYTES, Findings, ImageCheck
from prepare.image_reader import ImageReader
from prepare.listing import SourceError
from prepare.plan import Plan

LARGE_RECORD_BYTES = 12 << 20  # a worker's buffer has at most this size
MAX_CHECKED_BYTES = 64 << 20  # of an image that is decoded, which needs all its bytes in memory


class LargeRecord:
    """One large record of a plan.

    Attributes:
        magic_splits: Number of magic words that the record is split at, known after `examine`.
    """

    _whole_image_lock = threading.Lock()  # one image at a time is completely in memory

    def __init__(self, plan: Plan, record: int, reader: ImageReader) -> None:
        """Read nothing yet."""
        self._plan, self._record, self._reader = plan, record, reader
        self._size = int(plan.sizes[record])
        self._firsts: List[Optional[int]] = []
        self.magic_splits = 0

    def examine(self, check: ImageCheck) -> Findings:
        """Check the image, whose index in the findings is 0; find the magic words in the record.

        Raises:
            SourceError: The file ends too early.
            OSError: The image cannot be read, or has changed since it was listed.
        """
        begin, end = self._read(0, END_BYTES), self._read(self._size - END_BYTES, END_BYTES)
        findings = Findings({}, {})
        if not check.accepts_ends(begin.tobytes(), end.tobytes()):
            if self._size > MAX_CHECKED_BYTES:
                findings.unusual[0] = f"not checked, because it has {self._size} bytes"
            else:
                with self._whole_image_lock:
                    image = self._read(0, self._size)
                    findings = check(image, np.zeros(1, np.int64), np.array([self._size]))
        self._firsts, self.magic_splits = recordio.first_magic_words(self._words())
        return findings

    def _read(self, offset: int, size: int) -> np.ndarray:
        data = np.empty(size, np.uint8)
        self._reader.read(self._record, data.data, offset)
        return data

    def _words(self) -> Iterator[np.ndarray]:
        """Read the record, unsplit, in blocks (uint32)."""
        prefix = np.empty(recordio.PREFIX_WORDS, recordio.WORD)
        one = slice(self._record, self._record + 1)
        plan = self._plan
        zero = np.zeros(1, np.int64)
        recordio.write_prefixes(prefix, zero, zero, plan.labels[one], plan.keys[one])
        prefix[1] = recordio.IMAGE_HEADER_BYTES + self._size
        offset, at = 0, recordio.PREFIX_WORDS
        while offset < self._size:
            size = min(4 * (recordio.BLOCK_WORDS - at), self._size - offset)
            words = np.zeros(at + (size + 3) // 4, recordio.WORD)
            words[:at] = prefix[:at]
            view = words[at:].view(np.uint8)[:size]
            self._reader.read(self._record, view.data, offset)
            yield words
            offset, at = offset + size, 0

    def blocks(self, sums: np.ndarray) -> Iterator[memoryview]:
        """Read the record again and yield it in blocks, split at its magic words.

        Args:
            sums: One element, set to the sum of the record.

        Raises:
            OSError: The image cannot be read, or has changed since it was examined.
        """
        total = 0
        blocks = self._words()
        if self.magic_splits:
            content_bytes = recordio.IMAGE_HEADER_BYTES + self._size
            blocks = recordio.split_blocks(blocks, self._firsts, content_bytes)
        try:
            for block in blocks:
                total += int(block.sum(dtype=np.uint64))
                yield block.view(np.uint8).data
        except (SourceError, ValueError):
            path = self._reader.path(self._record)
            raise OSError(errno.ESTALE, "has changed while it was read", path) from None
        sums[0] = total & 0xFFFFFFFF
