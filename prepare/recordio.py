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
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, TypeVar, Union

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
BLOCK_WORDS = 1 << 18  # of a record that is handled a block at a time
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


def count_magic_splits(words: np.ndarray, starts: np.ndarray) -> Dict[int, int]:
    """Count the magic words inside records, at which the records must be split.

    Args:
        words: Unsplit records without gaps between them, uint32.
        starts: Offset of each record in `words`, in bytes.

    Returns:
        Number of a record -> number of its magic words. Records without one are absent.
    """
    is_magic = words == MAGIC
    if np.count_nonzero(is_magic) == len(starts):  # those of the frames
        return {}
    counts = np.add.reduceat(is_magic, starts // 4, dtype=np.int64) - 1
    return {number: int(counts[number]) for number in np.flatnonzero(counts).tolist()}


def word_blocks(words: np.ndarray) -> Iterator[np.ndarray]:
    """Yield an array in blocks of BLOCK_WORDS."""
    for begin in range(0, len(words), BLOCK_WORDS):
        yield words[begin : begin + BLOCK_WORDS]


def _magic_words(words: np.ndarray, at: int) -> np.ndarray:
    """Return the indices of the magic words in a block of a record, but not that of its frame.

    Args:
        words: The block, uint32.
        at: Index of the block's first word in the record.
    """
    found = np.flatnonzero(words == MAGIC)
    return found[1:] if at == 0 else found


def first_magic_words(blocks: Iterable[np.ndarray]) -> Tuple[List[Optional[int]], int]:
    """Find the places where `split_blocks` splits a record.

    Args:
        blocks: An unsplit record, frame included, in consecutive blocks (uint32).

    Returns:
        For each block the index of its first magic word in the record (None: it has none), and
        the number of magic words in all blocks.
    """
    firsts: List[Optional[int]] = []
    at = count = 0
    for words in blocks:
        found = _magic_words(words, at)
        firsts.append(at + int(found[0]) if len(found) else None)
        count += len(found)
        at += len(words)
    return firsts, count


def split_blocks(
    blocks: Iterable[np.ndarray], firsts: Sequence[Optional[int]], content_bytes: int
) -> Iterator[np.ndarray]:
    """Split a record at its magic words, a block at a time.

    A split leaves the magic word in its place, as the first word of the next part's frame, and
    inserts that frame's second word after it.

    Args:
        blocks: The unsplit record, in the blocks that `first_magic_words` was called with.
        firsts: What `first_magic_words` returned.
        content_bytes: Size of the image header and the image.

    Yields:
        Blocks of the split record, uint32.

    Raises:
        ValueError: The blocks are not those that `first_magic_words` was called with.
    """
    following: List[Optional[int]] = []  # the first magic word after each block
    for first in reversed(firsts):
        following.append(first if first is not None else following[-1] if following else None)
    following = [*following[-2::-1], None]
    content_end, at = FRAME_BYTES + content_bytes, 0
    for words, first, next_magic in zip(blocks, firsts, following):
        found = _magic_words(words, at)
        if (at + int(found[0]) if len(found) else None) != first:
            raise ValueError("the record differs between two reads")
        ends = np.full(len(found), content_end if next_magic is None else 4 * next_magic)
        ends[:-1] = 4 * (at + found[1:])
        frame_words = (MIDDLE << KIND_SHIFT) + ends - 4 * (at + found + 1)
        if next_magic is None:
            frame_words[-1:] += (LAST - MIDDLE) << KIND_SHIFT
        inserted = found + 1 + np.arange(len(found))
        is_kept = np.ones(len(words) + len(found), bool)
        is_kept[inserted] = False
        split = np.empty(len(is_kept), WORD)
        split[is_kept] = words
        split[inserted] = frame_words
        first_magic = first if first is not None else next_magic
        if at == 0 and first_magic is not None:
            split[1] = (FIRST << KIND_SHIFT) + 4 * first_magic - FRAME_BYTES
        at += len(words)
        yield split


def join_record(record: Buffer) -> bytes:
    """Return the content (image header and image) of one record, split or not.

    Raises:
        ValueError: The framing is invalid; the message describes the error.
    """
    joined = _join_valid_record(record)
    if joined is not None:
        return joined
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


def _join_valid_record(record: Buffer) -> Optional[bytes]:
    """Return the content of a record as writers split it; None: it is invalid or split otherwise.

    A record may have millions of parts. The magic words in it are those of its frames.
    """
    if len(record) % 4:
        return None
    words = np.frombuffer(record, WORD)
    begins = np.flatnonzero(words == MAGIC)
    if not len(begins) or begins[0] or begins[-1] + 1 == len(words):
        return None
    frames = words[begins + 1]
    lengths = (frames & LENGTH_MASK).astype(np.int64)
    kinds = np.full(len(begins), MIDDLE)
    kinds[0], kinds[-1] = (FIRST, LAST) if len(begins) > 1 else (WHOLE, WHOLE)
    ends = begins + FRAME_BYTES // 4 + (lengths + 3) // 4
    if (
        ends[-1] != len(words)
        or (ends[:-1] != begins[1:]).any()
        or (lengths[:-1] % 4).any()
        or (frames >> KIND_SHIFT != kinds).any()
    ):
        return None
    is_content = np.ones(len(words), bool)
    is_content[0] = False
    is_content[begins + 1] = False
    content_bytes = int(lengths.sum()) + 4 * (len(begins) - 1)
    return words[is_content].tobytes()[:content_bytes]


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
