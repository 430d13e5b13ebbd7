# SPDX-License-Identifier: Apache-2.0
"""Check what a MATLAB file (version 5) makes SciPy allocate before SciPy reads it.

A file is a header of 128 bytes and variables. A variable is an element: a tag with kind and size
(two 32-bit numbers), then its data, padded to 8 bytes. At most 4 bytes of data may be in the tag
itself. An element of kind MATRIX contains further elements: flags, dimensions, a name, and the
values, which are matrices again for cells and structures. SciPy allocates an array of the
dimensions before it reads the values, so that a file of 200 bytes can demand any amount of memory.
A variable may be compressed as a whole.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Tuple

from prepare.bounded_read import TooLargeError

HEADER_BYTES, TAG_BYTES = 128, 8
ORDERS = {b"IM": "<", b"MI": ">"}  # the end of the header
MATRIX, COMPRESSED = 14, 15
MAX_DIMENSIONS = 32  # SciPy accepts no more
CELL, STRUCT, OBJECT = 1, 2, 3  # classes of arrays whose values are matrices


def check_matlab_file(content: bytes, name: str, limit: int) -> None:
    """Check the sizes of all variables; other damage is left to SciPy.

    Args:
        content: The file.
        name: For messages.
        limit: Bytes that all variables together may unpack to.

    Raises:
        TooLargeError: They unpack to more, or have larger dimensions than values.
        zlib.error: A compressed variable is damaged.
    """
    order = ORDERS.get(content[HEADER_BYTES - 2 : HEADER_BYTES])
    if order is None:
        return
    at, variables = HEADER_BYTES, []
    while at + TAG_BYTES <= len(content):
        kind, size = struct.unpack_from(f"{order}II", content, at)
        data = content[at : at + TAG_BYTES + size]
        if kind == COMPRESSED:
            data = zlib.decompressobj().decompress(data[TAG_BYTES:], limit + 1)
        variables.append(data)
        limit -= len(data)
        if limit < 0:
            raise TooLargeError(f"{name} unpacks to too many bytes")
        at += TAG_BYTES + size
    for data in variables:
        _check_dimensions(data, order, name)


def _check_dimensions(data: bytes, order: str, name: str) -> None:
    """Raise TooLargeError if the matrices of a variable have more values than bytes.

    The elements are visited in the order of the bytes, as SciPy does: the sizes of matrices, which
    could contradict those of the elements in them, are not used.
    """
    at, remaining = 0, len(data)
    while at + TAG_BYTES <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        if kind != MATRIX:
            _, at = _read_element(data, at, order)
        elif size == 0:  # an empty matrix
            at += TAG_BYTES
        else:
            needed, at = _read_matrix_header(data, at + TAG_BYTES, order)
            remaining -= needed
            if remaining < 0:
                raise TooLargeError(f"{name} has larger dimensions than values")


def _read_element(data: bytes, at: int, order: str) -> Tuple[bytes, int]:
    """Return the data of an element, and where the next one begins."""
    tag = data[at : at + TAG_BYTES].ljust(TAG_BYTES, b"\0")
    kind, size = struct.unpack(f"{order}II", tag)
    at += TAG_BYTES
    if kind >> 16:  # the data is in the tag; its size is in the upper half of the kind
        return tag[4 : 4 + (kind >> 16)], at
    return data[at : at + size], at + (size + 7) // 8 * 8


def _read_matrix_header(data: bytes, at: int, order: str) -> Tuple[int, int]:
    """Read the elements before the values of a matrix.

    Args:
        data: A variable.
        at: Where the flags begin.
        order: Byte order, as for struct.

    Returns:
        The least bytes that its values occupy, and where they begin.
    """
    flags = data[at + TAG_BYTES : at + TAG_BYTES + 4].ljust(4, b"\0")
    array_class = struct.unpack(f"{order}I", flags)[0] & 0xFF
    dimensions, at = _read_element(data, at + 2 * TAG_BYTES, order)
    count = min(len(dimensions) // 4, MAX_DIMENSIONS)
    values = math.prod(max(0, one) for one in struct.unpack_from(f"{order}{count}i", dimensions))
    _, at = _read_element(data, at, order)  # the name
    if array_class not in (CELL, STRUCT, OBJECT):
        return values, at
    fields = 1
    if array_class == OBJECT:
        _, at = _read_element(data, at, order)  # the name of its class
    if array_class != CELL:
        length, at = _read_element(data, at, order)
        names, at = _read_element(data, at, order)
        width = struct.unpack(f"{order}I", length[:4].ljust(4, b"\0"))[0]
        fields = max(1, len(names) // max(1, width))
    return values * fields * TAG_BYTES, at  # each value is a matrix, with a tag at least
