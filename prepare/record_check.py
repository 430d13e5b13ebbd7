# SPDX-License-Identifier: Apache-2.0
"""Checks of the record file: every byte, the record headers only, or against the source.

Each check adds what it finds to the errors of a RecordSet whose tables were read.
"""

from __future__ import annotations

import hashlib
import io
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Iterator, List, Optional, Set, Tuple

import numpy as np

from prepare import recordio
from prepare.image_check import ImageCheck
from prepare.pieces import Piece, build_pieces
from prepare.plan import Plan
from prepare.record_set import RecordSet

CHUNK_BYTES = 8 << 20  # read at a time by the check of all bytes
HEADERS_PER_TASK = 4096
PREFIX_BYTES = 4 * recordio.PREFIX_WORDS

OnProgress = Callable[[int, int], None]  # (records, bytes) added


def check_all_bytes(records: RecordSet, progress: OnProgress) -> None:
    """Check the frame, header and sum of every record, and the SHA-256 of the record file."""
    digest = hashlib.sha256()
    hashed: Optional[Future[None]] = None
    errors_before = len(records.errors)
    buffers = [bytearray(), bytearray()]
    path = records.path(".rec")
    with io.FileIO(path) as stream, ThreadPoolExecutor(1) as hasher:
        for number, (first, last) in enumerate(_chunks(records)):
            size = _readable_bytes(records, first, last)
            if len(buffers[number % 2]) < size:
                buffers[number % 2] = bytearray(size)
            data = _read_fully(stream, memoryview(buffers[number % 2])[:size])
            if hashed:
                hashed.result()  # in order, and before its buffer is filled again
            hashed = hasher.submit(digest.update, data)
            _check_chunk(records, first, last, data)
            progress(last - first, len(data))
    expected = records.manifest["files"][records.prefix + ".rec"]["sha256"]
    if digest.hexdigest() != expected and len(records.errors) == errors_before:
        records.errors.append(
            f"{path}: its SHA-256 differs from the manifest's, although the sum of every record "
            "is right"
        )


def _chunks(records: RecordSet) -> Iterator[Tuple[int, int]]:
    """Yield (first, last + 1) of the records to be read together."""
    first = 0
    while first < len(records.offsets):
        limit = records.offsets[first] + CHUNK_BYTES
        last = max(int(np.searchsorted(records.ends, limit, side="right")), first + 1)
        yield first, last
        first = last


def _readable_bytes(records: RecordSet, first: int, last: int) -> int:
    """Return how many bytes of the records `first` to `last` - 1 are in the file."""
    begin = records.offsets[first]
    return int(min(records.ends[last - 1], max(records.size, begin)) - begin)


def _read_fully(stream: io.FileIO, view: memoryview) -> memoryview:
    """Fill `view` from the stream; return the filled part, shorter only at the end of the file."""
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            break
        done += count
    return view[:done]


def _check_chunk(records: RecordSet, first: int, last: int, data: memoryview) -> None:
    """Compare the records `first` to `last` - 1 with the index, the list and the sums.

    Args:
        data: The bytes of the records, shorter if the file ends before them.
    """
    starts = records.offsets[first:last] - records.offsets[first]
    lengths = records.ends[first:last] - records.offsets[first:last]
    complete = int(np.searchsorted(starts + lengths, len(data), side="right"))
    for record in range(first + complete, last):
        records.add_record_error(record, "the file ends before the end of this record")
    starts, lengths = starts[:complete], lengths[:complete]
    if not complete:
        return
    words = np.frombuffer(data, recordio.WORD, count=int(starts[-1] + lengths[-1]) // 4)
    selected = slice(first, first + complete)
    keys, labels = records.keys[selected], records.labels[selected]
    is_whole, _ = _classify_prefixes(words, starts // 4, lengths, keys, labels)
    sum_is_right = recordio.word_sums(words, starts) == records.sums[selected]
    # The rest, usually few, are records that are split at magic words or damaged.
    for number in np.flatnonzero(~(is_whole & sum_is_right)).tolist():
        record_data = data[int(starts[number]) : int(starts[number] + lengths[number])]
        error = _find_error(records, first + number, record_data, bool(sum_is_right[number]))
        if error:
            records.add_record_error(first + number, error)


def _classify_prefixes(
    words: np.ndarray,
    at: np.ndarray,
    lengths: np.ndarray,
    keys: np.ndarray,
    labels: np.ndarray,
) -> Tuple[np.ndarray, np.ndarray]:
    """Check the frames and image headers of many records at once.

    Args:
        words: At least the first 32 bytes of each record, uint32.
        at: Offset of each record in `words`, in words.
        lengths: Size of each record in bytes.
        keys: Expected keys.
        labels: Expected labels, float32.

    Returns:
        Two arrays of bool: whether the record has a single part of the right length, and whether
        it begins with the first of several parts. Both are False where the header is wrong.
    """
    rows = words.take(at[:, None] + np.arange(recordio.PREFIX_WORDS), mode="clip")
    expected = np.zeros((len(at), 6), recordio.WORD)
    expected[:, 1] = labels.view(recordio.WORD)
    expected[:, 2], expected[:, 3] = keys & 0xFFFFFFFF, keys >> 32
    valid = (
        (lengths >= PREFIX_BYTES)
        & (rows[:, 0] == recordio.MAGIC)
        & (rows[:, 2:] == expected).all(axis=1)
    )
    sizes = (rows[:, 1] & recordio.LENGTH_MASK).astype(np.int64) - recordio.IMAGE_HEADER_BYTES
    kinds = rows[:, 1] >> recordio.KIND_SHIFT
    return (
        valid & (kinds == recordio.WHOLE) & (recordio.record_bytes(sizes) == lengths),
        valid & (kinds == recordio.FIRST) & (recordio.record_bytes(sizes) < lengths),
    )


def _find_error(
    records: RecordSet, record: int, data: memoryview, sum_is_right: bool
) -> Optional[str]:
    """Return what is wrong with the bytes of one record; None: it is a valid split record."""
    try:
        content = recordio.join_record(data)
    except ValueError as error:
        return str(error)
    expected = np.zeros(6, recordio.WORD)
    expected[1:2] = records.labels[record : record + 1].view(recordio.WORD)
    expected[2], expected[3] = records.keys[record] & 0xFFFFFFFF, records.keys[record] >> 32
    if content[: recordio.IMAGE_HEADER_BYTES] != expected.tobytes():
        return "its header (label, key) differs from the list"
    return None if sum_is_right else "its bytes differ from those that were written"


def check_headers(records: RecordSet, workers: int, progress: OnProgress) -> None:
    """Check only the first 32 bytes of every record, on `workers` threads."""
    descriptor = os.open(records.path(".rec"), os.O_RDONLY)

    def check(first: int) -> Tuple[int, int, List[int]]:
        last = min(first + HEADERS_PER_TASK, len(records.offsets))
        offsets = records.offsets[first:last]
        prefixes = [os.pread(descriptor, PREFIX_BYTES, offset) for offset in offsets.tolist()]
        words = np.frombuffer(
            b"".join(prefix.ljust(PREFIX_BYTES, b"\0") for prefix in prefixes), recordio.WORD
        )
        at = np.arange(last - first) * recordio.PREFIX_WORDS
        lengths = records.ends[first:last] - offsets
        is_whole, is_split = _classify_prefixes(
            words, at, lengths, records.keys[first:last], records.labels[first:last]
        )
        return first, last, np.flatnonzero(~(is_whole | is_split)).tolist()

    try:
        with ThreadPoolExecutor(workers) as pool:
            firsts = range(0, len(records.offsets), HEADERS_PER_TASK)
            for first, last, invalid in pool.map(check, firsts):
                for number in invalid:
                    records.add_record_error(
                        first + number,
                        "its frame or header (length, label, key) differs from the index and list",
                    )
                progress(last - first, int(records.ends[last - 1] - records.offsets[first]))
    finally:
        os.close(descriptor)


def compare_with_source(records: RecordSet, plan: Plan, workers: int, progress: OnProgress) -> None:
    """Build every record again from the source and compare the bytes."""
    plan = _without_skipped_images(records, plan)
    if plan.paths != records.paths or not np.array_equal(plan.labels, records.labels):
        different = sorted(set(plan.paths) ^ set(records.paths))
        details = (
            f": {different[0]} is in only one of them ({len(different)} such)"
            if different
            else " in this order"
        )
        records.errors.append(
            f"{plan.top}: does not hold the images that {records.path('.lst')} lists{details}"
        )
        return
    with ImageCheck("none") as check, io.FileIO(records.path(".rec")) as stream:
        for piece, release in build_pieces(plan, plan.pieces(), workers, check):
            begin, end = int(records.offsets[piece.first]), int(records.ends[piece.last - 1])
            stream.seek(begin)
            if piece.last - piece.first == 1:
                _compare_record(records, piece, stream)
            else:
                size = _readable_bytes(records, piece.first, piece.last)
                data = _read_fully(stream, memoryview(bytearray(size)))
                _compare_piece(records, piece, data)
            release(piece)
            progress(piece.last - piece.first, end - begin)


def _without_skipped_images(records: RecordSet, plan: Plan) -> Plan:
    """Return the plan without the images that the manifest lists as skipped."""
    listed = set(records.paths)
    skipped: Set[str] = set()
    for image in records.manifest["skipped"]:
        # Earlier versions wrote these paths with the source folder in front.
        skipped.update(_path_tails(image["path"]))
    kept = [
        record
        for record, path in enumerate(plan.paths)
        if path in listed or not {path, plan.source_path(record)} & skipped
    ]
    return plan.select(kept)


def _path_tails(path: str) -> List[str]:
    """Return the path, the path without its first component, without its first two, and so on."""
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _compare_record(records: RecordSet, piece: Piece, stream: io.FileIO) -> None:
    """Compare a piece of one record, which may be large, with the source a block at a time.

    Args:
        records: The split; an error is added to it.
        piece: The piece as built from the source.
        stream: The record file, at the beginning of the record.
    """
    record = piece.first
    if record in piece.bad:
        reason = piece.bad[record]
        records.add_record_error(record, f"the source cannot be read: {reason}")
        return
    is_same = piece.lengths[0] == records.ends[record] - records.offsets[record]
    for block in piece.blocks:
        is_same = is_same and _read_fully(stream, memoryview(bytearray(len(block)))) == block
    if not is_same:
        records.add_record_error(record, "its bytes differ from the source")


def _compare_piece(records: RecordSet, piece: Piece, data: memoryview) -> None:
    """Find the records of a piece that differ from the source.

    Args:
        records: The split; errors are added to it.
        piece: The piece as built from the source.
        data: The piece as it is in the record file.
    """
    expected = memoryview(b"".join(piece.blocks))
    if data == expected:
        return
    at = 0
    for record, length in zip(range(piece.first, piece.last), piece.lengths.tolist()):
        begin = int(records.offsets[record] - records.offsets[piece.first])
        end = int(records.ends[record] - records.offsets[piece.first])
        if record in piece.bad:
            reason = piece.bad[record]
            records.add_record_error(record, f"the source cannot be read: {reason}")
        elif data[begin:end] != expected[at : at + length]:
            records.add_record_error(record, "its bytes differ from the source")
        at += length
