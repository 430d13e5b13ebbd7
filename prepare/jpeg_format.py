# SPDX-License-Identifier: Apache-2.0
"""Find the scans of a JPEG and the end of their data, without decoding it.

Source of the format: ITU-T T.81, annex B.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Optional, Tuple

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
END_OF_IMAGE, SCAN_MARKER = 0xD9, 0xDA
# In the data of a scan, a byte of 255 is followed by 0, or by a restart marker.
NEXT_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)
FRAME_MARKERS = (0xC0, 0xC1)  # of images that may consist of one scan: not progressive
# Tables, another scan, the number of lines, and data of applications, all with a length.
BETWEEN_SCANS = (0xC4, 0xCC, SCAN_MARKER, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE)


class DataEnd(NamedTuple):
    """Where the data of the last scan end."""

    offset: int
    has_marker: bool  # the end marker of the image follows


def find_first_scan(jpeg: bytes) -> Optional[int]:
    """Return the offset of the first start-of-scan marker in a JPEG, or None.

    The segments before it are skipped, because a thumbnail in one of them has its own end marker.
    """
    return _walk_to_scan(jpeg)[0]


def find_data_end(jpeg: bytes) -> DataEnd:
    """Return where the data of a JPEG end: at its end marker, at an unexpected one, or at its end.

    An end marker in bytes that follow the image, or in a thumbnail, does not count.
    """
    scan, components = _walk_to_scan(jpeg)
    if scan is None:
        return DataEnd(len(jpeg), False)
    has_one_scan = jpeg[scan + 4 : scan + 5] == bytes([components])
    at = scan + 2
    while True:
        at += int.from_bytes(jpeg[at : at + 2], "big")
        marker = NEXT_MARKER.search(jpeg, at)
        if marker is None:
            return DataEnd(len(jpeg), False)
        kind = marker.group(1)[0]
        if kind == END_OF_IMAGE or has_one_scan or kind not in BETWEEN_SCANS:
            return DataEnd(marker.start(), kind == END_OF_IMAGE)
        at = marker.end()


def _walk_to_scan(jpeg: bytes) -> Tuple[Optional[int], int]:
    """Return the offset of the first scan, and the components of an image that may be one scan."""
    at, components = 2, 0
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == SCAN_MARKER:
            return at, components
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            at += 2
        else:
            if marker in FRAME_MARKERS and at + 9 < len(jpeg):
                components = jpeg[at + 9]
            at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return None, components
