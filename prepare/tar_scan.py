# SPDX-License-Identifier: Apache-2.0
"""Read the headers of consecutive plain image files in a tar archive, many at a time.

A training archive has a million of them. Any other header (long or unusual names, links, folders,
damage) ends a scan, and `tar_format` reads it.
"""

from __future__ import annotations

import os
import re
from typing import Callable, List, Tuple

import numpy as np

BLOCK_BYTES = 512
# Headers read at a time, first and at most: without plain images, most that are read are no use.
MIN_HEADERS, MAX_HEADERS = 4, 256
MAX_PAUSE = 256  # headers without a scan, after scans that found nothing
# POSIX.1-2008, `pax`, "ustar Interchange Format".
HEADER = np.dtype(
    {
        "names": ["name", "size", "size_end", "sum", "sum_field", "kind", "magic", "prefix"],
        "formats": ["S100", "11u1", "u1", "6u1", "8u1", "u1", "S8", "u1"],
        "offsets": [0, 124, 135, 148, 148, 156, 257, 345],
        "itemsize": BLOCK_BYTES,
    }
)
SIZE_FIELD, KIND_FIELD = slice(124, 135), slice(156, 157)
PLAIN_KINDS = (b"0", b"\0")
# Lines with a name: an optional "./", folders, and a name that needs no further check.
PLAIN_NAMES = re.compile(rb"(?:(?:\./)?(?:[\w-]+/)*[\w-]+\.(?:[Jj][Pp][Ee]?[Gg]|[Pp][Nn][Gg])\n)*")
USTAR_MAGIC, GNU_MAGIC = b"ustar\x0000", b"ustar  "  # without zeros at the end
ZERO, BLANK = ord("0"), ord(" ")
OCTAL_WEIGHTS = 8 ** np.arange(10, -1, -1, dtype=np.int64)

# Takes a folder of the archive ("" is the top), and the names, sizes and offsets of its images.
AddImages = Callable[[str, List[str], List[int], List[int]], None]


class PlainImageScanner:
    """Find the plain images that follow each other in an archive."""

    def __init__(self, descriptor: int, end: int, add_images: AddImages) -> None:
        """Prepare for an archive.

        Args:
            descriptor: an open file.
            end: offset of the archive's end in the file, bytes.
            add_images: called with the images found, those of one folder at a time.
        """
        self._descriptor, self._end, self._add_images = descriptor, end, add_images
        self._pause = self._headers_to_skip = 0

    def scan(self, begin: int) -> int:
        """Add the plain images from the header at the offset `begin` on.

        No pax record may apply to this header. In an archive without plain images, most calls do
        nothing.

        Returns:
            Offset of the first header that was not used, in bytes.
        """
        if self._headers_to_skip:
            self._headers_to_skip -= 1
            return begin
        at, count, is_full = begin, MIN_HEADERS, True
        while is_full:
            block, offsets = self._read_headers(at, count)
            if not block:
                break
            headers = np.frombuffer(block, HEADER)
            names = leading_plain_names(headers)
            is_full = len(names) == count
            count = min(4 * count, MAX_HEADERS)
            if names:
                self._add(names, parse_octal(headers["size"][: len(names)]).tolist(), offsets)
                at = offsets[len(names)]
        self._pause = 0 if at > begin else min(max(1, 2 * self._pause), MAX_PAUSE)
        self._headers_to_skip = self._pause
        return at

    def _read_headers(self, at: int, count: int) -> Tuple[bytes, List[int]]:
        """Return at most `count` headers, and their offsets followed by that of the next header.

        There are none if the first one is no regular file's. The headers are those of members that
        end before the archive does. They are not checked otherwise.
        """
        headers: List[bytes] = []
        offsets = [at]
        descriptor, last_offset = self._descriptor, self._end - BLOCK_BYTES
        while len(headers) < count:
            header = os.pread(descriptor, BLOCK_BYTES, at)
            if not headers and header[KIND_FIELD] not in PLAIN_KINDS:
                break
            try:
                size = int(header[SIZE_FIELD], 8)
            except ValueError:
                break
            if size < 0 or at + size > last_offset or len(header) < BLOCK_BYTES:
                break
            at += BLOCK_BYTES + (size + BLOCK_BYTES - 1 & -BLOCK_BYTES)
            headers.append(header)
            offsets.append(at)
        return b"".join(headers), offsets

    def _add(self, names: List[str], sizes: List[int], offsets: List[int]) -> None:
        """Add images; `offsets` are those of the headers."""
        data = [offset + BLOCK_BYTES for offset in offsets]
        folders = [name.rpartition("/")[0] for name in names]
        begin = 0
        while begin < len(names):
            folder = folders[begin]
            others = (number for number in range(begin, len(names)) if folders[number] != folder)
            last = next(others, len(names))
            prefix = len(folder) + 1 if folder else 0
            found = slice(begin, last)
            self._add_images(
                folder, [name[prefix:] for name in names[found]], sizes[found], data[found]
            )
            begin = last


def leading_plain_names(headers: np.ndarray) -> List[str]:
    """Return the paths of the members up to the first one that is not a plain image.

    Args:
        headers: an array of HEADER.
    """
    is_plain = (
        ((headers["kind"] == ZERO) | (headers["kind"] == 0))
        & is_octal(headers["size"])
        & ((headers["size_end"] == 0) | (headers["size_end"] == BLANK))
        & is_octal(headers["sum"])
        & (
            (headers["magic"] == GNU_MAGIC)
            | ((headers["magic"] == USTAR_MAGIC) & (headers["prefix"] == 0))
        )
    )
    # A checksum is the sum of the bytes, with blanks in its own field.
    sum_of_bytes = headers.view(np.uint8).reshape(-1, BLOCK_BYTES).sum(axis=1, dtype=np.int64)
    field = headers["sum_field"]
    sum_of_bytes += field.shape[1] * BLANK - field.sum(axis=1, dtype=np.int64)
    is_plain &= sum_of_bytes == parse_octal(headers["sum"])
    count = len(headers) if is_plain.all() else int(is_plain.argmin())
    lines = b"\n".join([*headers["name"][:count].tolist(), b""])
    found = PLAIN_NAMES.match(lines)
    plain_lines = found.group() if found else b""
    return [line[2:] if line[:1] == "." else line for line in plain_lines.decode().split("\n")[:-1]]


def is_octal(digits: np.ndarray) -> np.ndarray:
    """Return for each row whether all its bytes are octal digits."""
    return ((digits >= ZERO) & (digits < ZERO + 8)).all(axis=1)


def parse_octal(digits: np.ndarray) -> np.ndarray:
    """Return the number (int64) in each row of octal digits."""
    return (digits.astype(np.int64) - ZERO) @ OCTAL_WEIGHTS[-digits.shape[1] :]
