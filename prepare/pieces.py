# SPDX-License-Identifier: Apache-2.0
"""Read the images of a plan in pieces of consecutive records, framed as in the record file."""

from __future__ import annotations

import queue
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Callable, Container, Deque, Dict, Iterator, Optional, Sequence, Set, Tuple

import numpy as np

from prepare import recordio
from prepare.image_check import Findings, ImageCheck
from prepare.image_reader import ImageReader
from prepare.large_images import LARGE_RECORD_BYTES, LargeRecord
from prepare.listing import SourceError
from prepare.plan import Plan

# Pieces that are read and not yet released: being hashed, being written, and the newest one.
MAX_IN_FLIGHT = 3
IMAGE_OFFSET_BYTES = recordio.FRAME_BYTES + recordio.IMAGE_HEADER_BYTES  # in a record

Ranges = Sequence[Tuple[int, int]]  # first record of each piece, last record + 1


@dataclass
class Piece:
    """Some consecutive records, framed. Record numbers count from the start of the plan.

    `blocks` and `buffer` are valid until the piece is released. `sums` is complete when all of
    `blocks` have been taken.
    """

    first: int
    last: int  # one past the end
    blocks: Iterator[memoryview]  # the bytes, in order; can be taken once
    image_bytes: int  # of all its images
    lengths: np.ndarray  # of each record in bytes; 0: skipped
    sums: np.ndarray
    magic_splits: Dict[int, int]  # record -> number of magic words that it is split at
    bad: Dict[int, str]  # record -> why it is skipped
    unusual: Dict[int, str]  # record -> what is unusual about the image, which is kept
    buffer: Optional[np.ndarray]  # None: a large record, which is read again for `blocks`


Release = Callable[[Piece], None]


def build_piece(
    plan: Plan,
    first: int,
    last: int,
    buffer: np.ndarray,
    reader: ImageReader,
    check: ImageCheck,
) -> Piece:
    """Read the images of records `first` to `last` - 1 into `buffer` (uint32) and frame them."""
    sizes = plan.sizes[first:last]
    lengths = recordio.record_bytes(sizes)
    starts = np.cumsum(lengths) - lengths
    total = int(starts[-1] + lengths[-1])
    words = buffer[: total // 4]
    recordio.write_prefixes(words, starts, sizes, plan.labels[first:last], plan.keys[first:last])
    image_starts = starts + IMAGE_OFFSET_BYTES
    raw = words.view(np.uint8)
    bad = _read_images(reader, first, raw.data, image_starts, sizes)
    findings = _check_images(check, raw, image_starts, sizes, bad)
    counts = recordio.count_magic_splits(words, starts)
    sums = recordio.word_sums(words, starts)
    splits = {number: count for number, count in counts.items() if number not in findings.bad}
    for number, count in splits.items():
        lengths[number] += count * recordio.SPLIT_GROWTH_BYTES
    for number in findings.bad:
        lengths[number] = sums[number] = 0
    return Piece(
        first=first,
        last=last,
        blocks=_blocks(words, starts, sums, {*splits, *findings.bad}, findings.bad),
        image_bytes=int(sizes.sum()),
        lengths=lengths,
        sums=sums,
        magic_splits={first + number: count for number, count in splits.items()},
        bad={first + number: reason for number, reason in findings.bad.items()},
        unusual={first + number: note for number, note in findings.unusual.items()},
        buffer=buffer,
    )


def build_large_piece(plan: Plan, record: int, reader: ImageReader, check: ImageCheck) -> Piece:
    """Read a record that is too large for a buffer; return a piece that reads it once more."""
    large = LargeRecord(plan, record, reader)
    bad: Dict[int, str] = {}
    unusual: Dict[int, str] = {}
    try:
        findings = large.examine(check)
        bad, unusual = (
            {record + index: text for index, text in found.items()} for found in findings
        )
    except SourceError as error:
        bad[record] = str(error)
    except OSError as error:
        reader.raise_if_outage(error, record)
        bad[record] = f"cannot be read: {error.strerror}"
    size, sums = int(plan.sizes[record]), np.zeros(1, recordio.WORD)
    growth = large.magic_splits * recordio.SPLIT_GROWTH_BYTES
    return Piece(
        first=record,
        last=record + 1,
        blocks=iter(()) if bad else large.blocks(sums),
        image_bytes=size,
        lengths=np.array([0 if bad else recordio.record_bytes(size) + growth], np.int64),
        sums=sums,
        magic_splits={record: large.magic_splits} if large.magic_splits and not bad else {},
        bad=bad,
        unusual=unusual,
        buffer=None,
    )


def _check_images(
    check: ImageCheck, raw: np.ndarray, starts: np.ndarray, sizes: np.ndarray, bad: Dict[int, str]
) -> Findings:
    """Check the images that were read, those other than `bad`; return `bad` among the findings."""
    if not bad:
        return check(raw, starts, sizes)
    read = np.array([number for number in range(len(sizes)) if number not in bad], np.int64)
    findings = check(raw, starts[read], sizes[read])
    return Findings(
        {**bad, **{int(read[index]): text for index, text in findings.bad.items()}},
        {int(read[index]): text for index, text in findings.unusual.items()},
    )


def _read_images(
    reader: ImageReader, first: int, view: memoryview, starts: np.ndarray, sizes: np.ndarray
) -> Dict[int, str]:
    """Read consecutive images, from record `first` on, into `view`.

    Returns:
        {number of a bad image, counted from `first`: reason}.
    """
    bad = {}
    for number, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist())):
        try:
            reader.read(first + number, view[start : start + size])
        except SourceError as error:
            bad[number] = str(error)
        except OSError as error:
            reader.raise_if_outage(error, first + number)
            bad[number] = f"cannot be read: {error.strerror}"
    return bad


def _blocks(
    words: np.ndarray,
    starts: np.ndarray,
    sums: np.ndarray,
    changed: Set[int],
    bad: Container[int],
) -> Iterator[memoryview]:
    """Yield the bytes of a piece, without its bad records, and with records split at magic words.

    Args:
        words: All records, unsplit.
        starts: Offset of each record in `words`, in bytes.
        sums: Sum of each record; those of split records are updated.
        changed: The records that are bad or split.
        bad: The records that are bad.
    """
    edges = np.append(starts, 4 * len(words)) // 4
    begin = 0
    for number in sorted(changed):
        start, end = int(edges[number]), int(edges[number + 1])
        if begin < start:
            yield words[begin:start].view(np.uint8).data
        begin = end
        if number not in bad:
            record, total = words[start:end], 0
            firsts, _ = recordio.first_magic_words(recordio.word_blocks(record))
            content_bytes = int(record[1])
            blocks = recordio.split_blocks(recordio.word_blocks(record), firsts, content_bytes)
            for block in blocks:
                total += int(block.sum(dtype=np.uint64))
                yield block.view(np.uint8).data
            sums[number] = total & 0xFFFFFFFF
    if begin < len(words):
        yield words[begin:].view(np.uint8).data


def build_pieces(
    plan: Plan, ranges: Ranges, workers: int, check: ImageCheck
) -> Iterator[Tuple[Piece, Release]]:
    """Yield (piece, release) for each piece of `ranges`, in order, read by `workers` threads.

    The caller must call release(piece) when it no longer needs the bytes; at most MAX_IN_FLIGHT
    pieces may be unreleased when it asks for the next one. Threads suffice: reading, hashing and
    the array operations release Python's global lock.
    """
    piece_bytes = [
        int(recordio.record_bytes(plan.sizes[first:last]).sum()) for first, last in ranges
    ]
    buffered = [size for size in piece_bytes if size <= LARGE_RECORD_BYTES]
    buffers: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    for _ in range(min(len(buffered), workers + 1 + MAX_IN_FLIGHT)):
        buffers.put(np.empty(max(buffered) // 4, recordio.WORD))

    def release(piece: Piece) -> None:
        if piece.buffer is not None:
            buffers.put(piece.buffer)

    with ImageReader(plan) as reader, ThreadPoolExecutor(workers) as pool:
        futures: Deque[Future[Piece]] = deque()
        try:
            for (first, last), size in zip(ranges, piece_bytes):
                if len(futures) > workers:
                    yield futures.popleft().result(), release
                if size > LARGE_RECORD_BYTES:
                    future = pool.submit(build_large_piece, plan, first, reader, check)
                else:
                    buffer = buffers.get()
                    future = pool.submit(build_piece, plan, first, last, buffer, reader, check)
                futures.append(future)
            while futures:
                yield futures.popleft().result(), release
        finally:
            for future in futures:
                future.cancel()
