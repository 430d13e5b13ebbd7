# SPDX-License-Identifier: Apache-2.0
"""The file format: MXNet RecordIO with image headers, its index and its list.

A record is one or more parts. A part is the magic word, a word with the kind of the part (top 3
bits: 0 whole, 1 first, 2 middle, 3 last) and its length in bytes (low 29 bits), the content, and
zeros up to a multiple of 4 bytes. The content of a record is a 24-byte image header (flag 0, label
as float32, key, 0) and the bytes of the image file. Where the magic word occurs in the content of a
record at a multiple of 4 bytes, the writer splits the record and drops these four bytes; a reader
inserts them again. All numbers are little-endian. All sizes and offsets are in bytes, unless a name
contains "word".

Source of the format: dmlc-core's include/dmlc/recordio.h, and IRHeader in mxnet/recordio.py.
"""

from __future__ import annotations

import struct
from typing import Dict, Iterator, List, Sequence, TypeVar, Union

import numpy as np

MAGIC = 0xCED7230A
WORD = np.dtype("<u4")
FRAME_BYTES = 8  # magic; kind and length
IMAGE_HEADER_BYTES = 24  # flag u32, label f32, key u64, 0 u64
PREFIX_WORDS = (FRAME_BYTES + IMAGE_HEADER_BYTES) // 4
KIND_SHIFT = 29
LENGTH_MASK = (1 << KIND_SHIFT) - 1
MAX_IMAGE_BYTES = LENGTH_MASK - IMAGE_HEADER_BYTES
SPLIT_GROWTH_BYTES = 4  # a split drops the 4 bytes of the magic word and adds a frame of 8
WHOLE, FIRST, MIDDLE, LAST = 0, 1, 2, 3
ROWS_PER_BLOCK = 65536  # of the index and list files

Buffer = Union[bytes, bytearray, memoryview]
Bytes = TypeVar("Bytes", int, np.ndarray)


def record_bytes(image_bytes: Bytes) -> Bytes:
    """Return the size of an unsplit record that holds an image of `image_bytes`."""
    return FRAME_BYTES + ((IMAGE_HEADER_BYTES + image_bytes + 3) & ~3)


def write_prefixes(
    words: np.ndarray,
    starts: np.ndarray,
    image_bytes: np.ndarray,
    labels: np.ndarray,
    keys: np.ndarray,
) -> None:
    """Write the frame, the image header and the final padding of unsplit records.

    Args:
        words: Output, uint32. The image bytes belong 32 bytes after each record's start.
        starts: Offset of each record in `words`, in bytes, a multiple of 4.
        image_bytes: Size of each image.
        labels: Class of each image.
        keys: Key of each record.
    """
    at = starts // 4
    # The padding first: an image without bytes has none, and its last word is the header's.
    words[(starts + record_bytes(image_bytes)) // 4 - 1] = 0
    words[at] = MAGIC
    words[at + 1] = image_bytes + IMAGE_HEADER_BYTES
    words[at + 2] = 0
    words[at + 3] = labels.astype("<f4").view(WORD)
    words[at + 4] = keys & 0xFFFFFFFF
    words[at + 5] = keys >> 32
    words[at + 6] = 0
    words[at + 7] = 0


def find_magic_splits(words: np.ndarray, starts: np.ndarray) -> Dict[int, List[int]]:
    """Find the magic words inside records, at which the records must be split.

    Args:
        words: Unsplit records, uint32.
        starts: Byte offset in `words` at which each record starts.

    Returns:
        Positions of the magic words inside each record, by index of the record. A position counts
        4-byte words from the record's start. Records without a magic word are absent.
    """
    is_magic = words == MAGIC
    if np.count_nonzero(is_magic) == len(starts):
        return {}
    magic_splits: Dict[int, List[int]] = {}
    at = starts // 4
    for word in np.flatnonzero(is_magic):
        record = int(np.searchsorted(at, word, side="right")) - 1
        if word != at[record]:
            magic_splits.setdefault(record, []).append(int(word - at[record]))
    return magic_splits


def split_record(record: Buffer, split_words: Sequence[int]) -> bytes:
    """Split a record at its magic words.

    Args:
        record: An unsplit record, frame included.
        split_words: Offsets of the magic words from the start of the record, in words.
    """
    length = struct.unpack_from("<I", record, 4)[0] & LENGTH_MASK
    content = bytes(record[FRAME_BYTES : FRAME_BYTES + length])
    edges = [word * 4 - FRAME_BYTES for word in split_words]
    begins = [0] + [edge + 4 for edge in edges]
    ends = edges + [length]
    parts = []
    for number, (begin, end) in enumerate(zip(begins, ends)):
        kind = FIRST if number == 0 else LAST if number == len(edges) else MIDDLE
        frame = struct.pack("<II", MAGIC, kind << KIND_SHIFT | (end - begin))
        parts.append(frame + content[begin:end])
    parts[-1] += b"\0" * (-length % 4)
    return b"".join(parts)


def join_record(record: Buffer) -> bytes:
    """Return the content (image header and image) of one record, split or not.

    Raises:
        ValueError: The framing is invalid; the message describes the error.
    """
    parts: List[bytes] = []
    at = 0
    while True:
        if at + FRAME_BYTES > len(record):
            raise ValueError(f"it ends inside a frame, at its byte {at}")
        magic, word = struct.unpack_from("<II", record, at)
        kind, length = word >> KIND_SHIFT, word & LENGTH_MASK
        if magic != MAGIC:
            raise ValueError(f"it has no magic number at its byte {at}")
        if kind not in ((MIDDLE, LAST) if parts else (WHOLE, FIRST)):
            raise ValueError(f"it has an unexpected part of kind {kind} at its byte {at}")
        begin, at = at + FRAME_BYTES, at + FRAME_BYTES + ((length + 3) & ~3)
        if at > len(record):
            raise ValueError("its length field is larger than the space up to the next record")
        parts.append(bytes(record[begin : begin + length]))
        if kind in (WHOLE, LAST):
            break
    if at != len(record):
        raise ValueError("its length field is smaller than the space up to the next record")
    return struct.pack("<I", MAGIC).join(parts)


def word_sums(words: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the sum of each record's words modulo 2**32.

    A cheap checksum per record: it locates the damage in a file whose SHA-256 is wrong.

    Args:
        words: Records without gaps between them, uint32.
        starts: Byte offset in `words` at which each record starts.
    """
    return np.add.reduceat(words, starts // 4, dtype=WORD) if len(starts) else np.zeros(0, WORD)


def record_sums(data: Buffer, lengths: np.ndarray) -> np.ndarray:
    """Return `word_sums` of consecutive records in `data`.

    Args:
        data: The records.
        lengths: Size of each record in bytes; 0 for a skipped record, whose sum is 0.
    """
    kept = lengths > 0
    sums = np.zeros(len(lengths), WORD)
    sums[kept] = word_sums(np.frombuffer(data, WORD), (np.cumsum(lengths) - lengths)[kept])
    return sums


def index_lines(keys: np.ndarray, offsets: np.ndarray) -> Iterator[bytes]:
    """Yield blocks of the .idx file: one line `key TAB offset` per record."""
    for begin in range(0, len(keys), ROWS_PER_BLOCK):
        block = slice(begin, begin + ROWS_PER_BLOCK)
        rows = zip(keys[block].tolist(), offsets[block].tolist())
        yield "".join(f"{key}\t{offset}\n" for key, offset in rows).encode()


def list_lines(keys: np.ndarray, labels: np.ndarray, paths: Sequence[str]) -> Iterator[bytes]:
    """Yield blocks of the .lst file: one line `key TAB label TAB path` per record."""
    for begin in range(0, len(keys), ROWS_PER_BLOCK):
        block = slice(begin, begin + ROWS_PER_BLOCK)
        rows = zip(keys[block].tolist(), labels[block].tolist(), paths[block])
        yield "".join(f"{key}\t{label:f}\t{path}\n" for key, label, path in rows).encode()
