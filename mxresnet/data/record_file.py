# SPDX-License-Identifier: Apache-2.0
"""Check the index and the headers of a record file before a backend opens it, and its labels.

DALI and ImageRecordIter trust both: an offset outside the file, or a record that is longer than the
file, makes them read memory that is not theirs.

A record is two little-endian 32-bit words and its data, padded to 4 bytes. The words are a constant
and the length (29 bits) with the kind of the part (3 bits): 0 a whole record, 1 its first part, 2
and 3 further parts. The data starts with a header of 24 bytes: the number of labels (0: one, in the
header), the label (float32) and two 64-bit numbers. Labels that are not in the header follow it.
The index has a line "number<tab>offset in bytes" for each record.
"""

from __future__ import annotations

import os
import struct
import warnings
from typing import NamedTuple, Optional

import numpy as np

from mxresnet.bounded_read import read_file
from mxresnet.data.shard import RecordShard
from mxresnet.errors import UserError

_MAGIC = 0xCED7230A
_PREFIX_BYTES = 8  # the two words before the data of a record
_HEADER_BYTES = 24
_MAX_LENGTH = 2**29 - 1
_MAX_LINE_BYTES = 44  # of the index: two numbers of 64 bits
_MIN_LIMIT_BYTES = 64 << 20  # of an index, also for a record file that was cut off


class Index(NamedTuple):
    """The records of a file, sorted by their offsets; int64 arrays of equal length."""

    numbers: np.ndarray
    offsets: np.ndarray  # bytes


def check_record_file(shard: RecordShard) -> int:
    """Check the index and the headers of records; return the number of records in the whole file.

    A damaged length can lead outside the file only from its last 512 MiB. The headers there are
    read, a part by each rank; to read all headers of ImageNet would take minutes.

    Raises:
        UserError: the index does not fit the file, a record is damaged, or a file cannot be read.
    """
    try:
        index = read_index(shard)
        size = os.path.getsize(shard.records_path)
        if size % 4:
            raise _damaged(shard, f"its size, {size} bytes, is not a multiple of 4")
        ends = np.append(index.offsets[1:], size)
        _check_offsets(shard, index, ends)
        first = int(np.searchsorted(index.offsets, size - _MAX_LENGTH))
        with open(shard.records_path, "rb") as file:
            for position in range(first + shard.rank, len(ends), shard.num_ranks):
                offset, end = int(index.offsets[position]), int(ends[position])
                problem = _header_problem(file.fileno(), offset, end - offset)
                if problem:
                    raise _damaged(shard, f"record {index.numbers[position]} {problem}")
    except OSError as error:
        raise UserError(
            f"{shard.split} records {shard.name}: the records or their index cannot be read "
            f"({error.strerror})"
        ) from None
    return len(ends)


def read_index(shard: RecordShard) -> Index:
    """Return the index of a record file.

    Raises:
        UserError: the index is not a list of pairs of numbers.
        OSError: the file cannot be read.
    """
    # No more lines than records of the smallest size fit in the file.
    records = os.path.getsize(shard.records_path) // (_PREFIX_BYTES + _HEADER_BYTES)
    content = read_file(shard.index_path, max(_MIN_LIMIT_BYTES, records * _MAX_LINE_BYTES))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # NumPy's sign of text after a number
        try:
            words = np.fromstring(content, dtype=np.int64, sep=" ")
        except (DeprecationWarning, ValueError):
            words = np.zeros(1, np.int64)
    if len(words) % 2 or not len(words):
        raise _damaged(shard, "its index is not a list of record numbers and offsets")
    numbers, offsets = words[0::2], words[1::2]
    order = np.argsort(offsets, kind="stable")
    return Index(numbers[order], offsets[order])


def _check_offsets(shard: RecordShard, index: Index, ends: np.ndarray) -> None:
    """Raise UserError unless each record has room for its header within the file."""
    room = ends - index.offsets
    wrong = (index.offsets < 0) | (index.offsets % 4 != 0) | (room < _PREFIX_BYTES + _HEADER_BYTES)
    if wrong.any():
        position = int(np.argmax(wrong))
        raise _damaged(
            shard,
            f"its index has record {index.numbers[position]} at byte {index.offsets[position]} "
            f"and the next record, or the end of the file, at byte {ends[position]}",
        )


def _header_problem(file: int, offset: int, room: int) -> Optional[str]:
    """Return what is wrong with the record at an offset that has `room` bytes, or None."""
    magic, word, num_labels = struct.unpack("<3I", os.pread(file, 12, offset))
    part, length = word >> 29, word & _MAX_LENGTH
    if magic != _MAGIC or part > 1:
        return f"does not start at byte {offset}, where the index has it"
    if _PREFIX_BYTES + length > room:
        return f"has a length of {length} bytes in its header, where {room - _PREFIX_BYTES} are"
    if part == 0 and _HEADER_BYTES + 4 * num_labels > length:
        return f"has {num_labels} labels in {length} bytes"
    return None


def find_wrong_label(labels: np.ndarray, num_classes: int) -> Optional[int]:
    """Return the position of the first label that is not the number of a class, or None.

    Args:
        labels: the labels of a batch in the memory of the host, float32 (images,). They are few, so
            that a check of each batch takes microseconds.
        num_classes: the labels are 0 to num_classes - 1.
    """
    valid = (labels >= 0) & (labels < num_classes) & (labels == np.floor(labels))
    return None if valid.all() else int(np.argmin(valid))


def label_error(shard: RecordShard, label: float, offset: Optional[int] = None) -> UserError:
    """Return the error for a label that is not the number of a class.

    Args:
        shard: where the label was read.
        label: the label.
        offset: of the record, bytes. Unknown: the first record with such a label is searched.
    """
    index = read_index(shard)
    if offset is None:
        offset = _offset_of_label(shard, index, label)
    found = index.numbers[index.offsets == offset]
    record = f"record {found[0]}" if len(found) else "a record"
    classes = shard.num_classes
    return _damaged(
        shard,
        f"{record} has the label {label:g}, and the {classes} classes are 0 to {classes - 1}",
    )


def _offset_of_label(shard: RecordShard, index: Index, label: float) -> Optional[int]:
    """Return the offset of the first record with this label (NaN: with NaN), or None."""
    wanted = np.float32(label)
    with open(shard.records_path, "rb") as file:
        for offset in index.offsets.tolist():
            header = os.pread(file.fileno(), _PREFIX_BYTES + _HEADER_BYTES + 4, offset)
            (num_labels,) = struct.unpack_from("<I", header, _PREFIX_BYTES)
            position = _PREFIX_BYTES + (_HEADER_BYTES if num_labels else 4)
            (found,) = struct.unpack_from("<f", header, position)
            if np.array_equal([found], [wanted], equal_nan=True):
                return offset
    return None


def _damaged(shard: RecordShard, problem: str) -> UserError:
    return UserError(
        f"{shard.split} records {shard.name}: {problem}: convert the data set again with python -m "
        "prepare.imagenet (python -m prepare.verify finds all damaged records)"
    )
