# SPDX-License-Identifier: Apache-2.0
"""What a conversion has written so far, and how an unfinished conversion is resumed."""

from __future__ import annotations

import hashlib
import os
from typing import IO, Callable, Container, Dict, List, Optional, Tuple

import numpy as np

from prepare import recordio
from prepare.image_check import ImageCheck
from prepare.journal import Entry, Journal
from prepare.pieces import Piece, Ranges, build_pieces
from prepare.plan import Plan, piece_digest

OnProgress = Callable[[int, int], None]  # (images, bytes) added
READ_BYTES = 8 << 20  # read at a time from a large record


class ConversionState:
    """Lengths and checksums of the records so far, notes on images, and the hash of the file."""

    def __init__(self, plan: Plan) -> None:
        self.lengths = np.zeros(len(plan.paths), np.int64)  # in bytes; 0: skipped
        self.sums = np.zeros(len(plan.paths), recordio.WORD)  # recordio.word_sums of each record
        self.bad: Dict[int, str] = {}  # record -> reason
        self.unusual: Dict[int, str] = {}  # record -> description
        self.sha256 = hashlib.sha256()

    def add(self, first: int, last: int, lengths: np.ndarray, sums: np.ndarray) -> None:
        """Add the records `first` to `last` - 1."""
        self.lengths[first:last] = lengths
        self.sums[first:last] = sums


def journal_entry(plan: Plan, piece: Piece, sha256: str) -> Entry:
    """Return the entry of a piece; `sha256` is that of the record file up to its end."""
    # Do not rename the keys: they are in the journals of unfinished conversions.
    return {
        "sha256": sha256,
        "plan": piece_digest(plan, piece.first, piece.last),
        "cuts": piece.magic_splits,
        "bad": piece.bad,
        "unusual": piece.unusual,
    }


def is_complete(plan: Plan, ranges: Ranges, journal: Journal) -> bool:
    """Return whether the unfinished conversion has read all images, as they are now."""
    return len(journal.entries) == len(ranges) and all(
        entry.get("plan") == piece_digest(plan, first, last)
        for (first, last), entry in zip(ranges, journal.entries)
    )


def bad_images_now(
    plan: Plan, ranges: Ranges, journal: Journal, workers: int, check: ImageCheck
) -> Dict[int, str]:
    """Read the images again that were bad in the unfinished conversion.

    Returns:
        {record: reason} of those that still are, if their files have not changed in size or time.
    """
    records: List[int] = []
    for (first, last), entry in zip(ranges, journal.entries):
        if entry["bad"] and entry.get("plan") == piece_digest(plan, first, last):
            records += map(int, entry["bad"])
    bad: Dict[int, str] = {}
    if not records:
        return bad
    selected = plan.select(records)
    for piece, release in build_pieces(selected, selected.pieces(), workers, check):
        bad.update({records[number]: reason for number, reason in piece.bad.items()})
        release(piece)
    return bad


def resume(
    plan: Plan,
    ranges: Ranges,
    journal: Journal,
    path: str,
    state: ConversionState,
    still_bad: Optional[Container[int]],
    progress: OnProgress,
) -> Tuple[int, int]:
    """Find the pieces of an unfinished conversion that can be kept: those that the journal covers.

    The first piece that differs from the journal or from the plan ends them; it and all later ones
    are written again.

    Args:
        plan: The plan.
        ranges: The records of each piece.
        journal: The journal; entries that are not kept are removed.
        path: The record file.
        state: Updated with the records that are kept.
        still_bad: The bad images that are to be left out again (None: all of them). A piece that
            another image was left out of is not kept.
        progress: Called with the images and bytes that are kept.

    Returns:
        Number of pieces kept, and their size in bytes.
    """
    pieces = end = 0
    if journal.entries and os.path.exists(path):
        with open(path, "rb") as stream:
            for (first, last), entry in zip(ranges, journal.entries):
                if entry.get("plan") != piece_digest(plan, first, last):
                    break
                bad = {int(record): reason for record, reason in entry["bad"].items()}
                if still_bad is not None and any(record not in still_bad for record in bad):
                    break
                lengths = recordio.record_bytes(plan.sizes[first:last])
                for record, count in entry["cuts"].items():
                    lengths[int(record) - first] += count * recordio.SPLIT_GROWTH_BYTES
                for record in bad:
                    lengths[record - first] = 0
                sha256 = state.sha256.copy()
                sums = _read_sums(stream, lengths, sha256)
                if sha256.hexdigest() != entry["sha256"]:
                    break
                state.sha256 = sha256
                state.add(first, last, lengths, sums)
                state.bad.update(bad)
                state.unusual.update(
                    {int(record): text for record, text in entry["unusual"].items()}
                )
                pieces, end = pieces + 1, end + int(lengths.sum())
                progress(last - first, int(plan.sizes[first:last].sum()))
    journal.truncate(pieces)
    return pieces, end


def _read_sums(stream: IO[bytes], lengths: np.ndarray, sha256: hashlib._Hash) -> np.ndarray:
    """Read records and add them to `sha256`; return the sum of each.

    Args:
        stream: The record file; it may end before the records do.
        lengths: Size of each record in bytes.
        sha256: The hash.
    """
    total = int(lengths.sum())
    if len(lengths) > 1 or total <= READ_BYTES:
        data = stream.read(total)
        sha256.update(data)
        return recordio.record_sums(data.ljust(total, b"\0"), lengths)
    large_sum, done = 0, 0
    while done < total:
        data = stream.read(min(READ_BYTES, total - done))
        if not data:
            break
        sha256.update(data)
        done += len(data)
        whole_words = len(data) // 4 * 4
        large_sum += int(np.frombuffer(data[:whole_words], recordio.WORD).sum(dtype=np.uint64))
    return np.array([large_sum & 0xFFFFFFFF], recordio.WORD)
