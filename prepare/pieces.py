# SPDX-License-Identifier: Apache-2.0
"""Read the images of a plan in pieces of consecutive records, framed as in the record file."""

from __future__ import annotations

import queue
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Callable, Deque, Dict, Iterator, List, Sequence, Tuple

import numpy as np

from prepare import recordio
from prepare.image_check import BadImage
from prepare.image_reader import ImageReader
from prepare.listing import SourceError
from prepare.plan import Plan

# Pieces that are read and not yet released: being hashed, being written, and the newest one.
MAX_IN_FLIGHT = 3
IMAGE_OFFSET_BYTES = recordio.FRAME_BYTES + recordio.IMAGE_HEADER_BYTES  # in a record

# Takes the bytes (uint8), the offset and the size of each image.
ImageCheck = Callable[[np.ndarray, np.ndarray, np.ndarray], List[BadImage]]
Ranges = Sequence[Tuple[int, int]]  # first record of each piece, last record + 1
Release = Callable[[np.ndarray], None]  # takes the buffer of a piece


@dataclass
class Piece:
    """Some consecutive records, framed. Record numbers count from the start of the plan."""

    first: int
    last: int  # one past the end
    views: List[memoryview]  # the bytes, in order; valid until `buffer` is released
    image_bytes: int  # of all its images
    lengths: np.ndarray  # of each record in bytes; 0: skipped
    sums: np.ndarray
    magic_splits: Dict[int, int]  # record -> number of magic words that it was split at
    bad: Dict[int, str]  # record -> why it is skipped
    buffer: np.ndarray


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
    view = raw.data
    bad = _read_images(reader, first, view, image_starts, sizes)
    for number, reason in check(raw, image_starts, sizes):
        bad.setdefault(number, reason)
    magic_splits = recordio.find_magic_splits(words, starts)
    sums = recordio.word_sums(words, starts)
    views = [view]
    if bad or magic_splits:
        views = _replace_records(view, starts, lengths, sums, magic_splits, bad)
    return Piece(
        first=first,
        last=last,
        views=views,
        image_bytes=int(sizes.sum()),
        lengths=lengths,
        sums=sums,
        magic_splits={
            first + number: len(offsets)
            for number, offsets in magic_splits.items()
            if number not in bad
        },
        bad={first + number: reason for number, reason in bad.items()},
        buffer=buffer,
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


def _replace_records(
    view: memoryview,
    starts: np.ndarray,
    lengths: np.ndarray,
    sums: np.ndarray,
    magic_splits: Dict[int, List[int]],
    bad: Dict[int, str],
) -> List[memoryview]:
    """Return the bytes of a piece without its bad records and with records split at magic words.

    Updates `lengths` and `sums` in place.
    """
    views, begin = [], 0
    for number in sorted({*magic_splits, *bad}):
        start, end = int(starts[number]), int(starts[number] + lengths[number])
        views.append(view[begin:start])
        begin = end
        record = (
            b"" if number in bad else recordio.split_record(view[start:end], magic_splits[number])
        )
        views.append(memoryview(record))
        lengths[number] = len(record)
        sums[number] = np.frombuffer(record, recordio.WORD).sum(dtype=recordio.WORD)
    return [*views, view[begin:]]


def build_pieces(
    plan: Plan, ranges: Ranges, workers: int, check: ImageCheck
) -> Iterator[Tuple[Piece, Release]]:
    """Yield (piece, release) for each piece of `ranges`, in order, read by `workers` threads.

    The caller must call release(piece.buffer) when it no longer needs the bytes; at most
    MAX_IN_FLIGHT pieces may be unreleased when it asks for the next one. Threads suffice: reading,
    hashing and the array operations release Python's global lock.
    """
    sizes = (int(recordio.record_bytes(plan.sizes[first:last]).sum()) for first, last in ranges)
    capacity = max(sizes, default=0) // 4
    buffers: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    for _ in range(workers + 1 + MAX_IN_FLIGHT):
        buffers.put(np.empty(capacity, recordio.WORD))
    with ImageReader(plan) as reader, ThreadPoolExecutor(workers) as pool:
        futures: Deque[Future[Piece]] = deque()
        try:
            for first, last in ranges:
                if len(futures) > workers:
                    yield futures.popleft().result(), buffers.put
                futures.append(
                    pool.submit(build_piece, plan, first, last, buffers.get(), reader, check)
                )
            while futures:
                yield futures.popleft().result(), buffers.put
        finally:
            for future in futures:
                future.cancel()
