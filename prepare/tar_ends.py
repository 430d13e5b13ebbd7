# SPDX-License-Identifier: Apache-2.0
"""Recognize a tar archive that is complete in form, but whose last bytes were never written.

A download that was interrupted, or a crash, can leave zeros where the rest of an archive belongs.
All programs take zeros for the archive's end mark.
"""

from __future__ import annotations

import os
from typing import Iterable, Optional

from prepare.image_check import PNG_END, PNG_START
from prepare.jpeg_format import JPEG_END, JPEG_START
from prepare.listing import Folder
from prepare.tar_format import BLOCK_BYTES, ZERO_BLOCK, shorten

READ_BYTES = 1 << 20


def cut_last_image(descriptor: int, folders: Iterable[Folder]) -> Optional[str]:
    """Return what is wrong if the last member is an image that lacks its end and ends in zeros.

    Args:
        descriptor: of the open archive, whose headers are complete up to its end mark.
        folders: its images, those of each folder in the order of the archive.
    """
    last = max(
        (folder for folder in folders if folder.names),
        key=lambda folder: folder.offsets[-1],
        default=None,
    )
    if last is None:
        return None
    begin, size = last.offsets[-1], last.sizes[-1]
    end = begin + size
    next_header = os.pread(descriptor, BLOCK_BYTES, end + -size % BLOCK_BYTES)
    if not size or next_header != ZERO_BLOCK or os.pread(descriptor, 1, end - 1) != b"\0":
        return None
    zeros = count_last_zeros(descriptor, begin, end)
    content_end = os.pread(descriptor, len(PNG_END), max(begin, end - zeros - len(PNG_END)))
    start = os.pread(descriptor, len(PNG_START), begin)
    has_known_start = start.startswith((JPEG_START, PNG_START)) or zeros == size
    if not has_known_start or content_end.endswith((JPEG_END, PNG_END)):
        return None
    return (
        f"ends in zeros, which are the last {zeros} bytes of {shorten(last.names[-1])}, too: "
        f"members may be lost in an incomplete copy; copy or make the archive again"
    )


def count_last_zeros(descriptor: int, begin: int, end: int) -> int:
    """Return how many of the bytes between two offsets of a file are zeros at their end."""
    at = end
    while at > begin:
        size = min(READ_BYTES, at - begin)
        rest = os.pread(descriptor, size, at - size).rstrip(b"\0")
        at -= size
        if rest:
            return end - at - len(rest)
    return end - begin
