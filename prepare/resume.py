# SPDX-License-Identifier: Apache-2.0
"""What a conversion has written so far, and how an interrupted conversion is resumed."""

from __future__ import annotations

import hashlib
import os
from typing import Callable, Dict, Tuple

import numpy as np

from prepare import recordio
from prepare.journal import Journal
from prepare.pieces import Ranges
from prepare.plan import Plan

OnProgress = Callable[[int, int], None]  # (images, bytes) added


class ConversionState:
    """Lengths and checksums of the records so far, the bad images, and the hash of the file."""

    def __init__(self, plan: Plan) -> None:
        self.lengths = np.zeros(len(plan.paths), np.int64)  # in bytes; 0: skipped
        self.sums = np.zeros(len(plan.paths), recordio.WORD)  # recordio.word_sums of each record
        self.bad: Dict[int, str] = {}  # record -> reason
        self.sha256 = hashlib.sha256()

    def add(
        self, first: int, last: int, lengths: np.ndarray, sums: np.ndarray, bad: Dict[int, str]
    ) -> None:
        """Add the records `first` to `last` - 1."""
        self.lengths[first:last] = lengths
        self.sums[first:last] = sums
        self.bad.update(bad)


def resume(
    plan: Plan,
    ranges: Ranges,
    journal: Journal,
    path: str,
    state: ConversionState,
    progress: OnProgress,
) -> Tuple[int, int]:
    """Find the pieces of an interrupted run that can be kept: those that agree with the journal.

    The first piece that differs, and all later ones, are written again.

    Args:
        path: The record file.
        state: Updated with the records that are kept.

    Returns:
        Number of pieces kept, and their size in bytes.
    """
    pieces = end = 0
    if journal.entries and os.path.exists(path):
        with open(path, "rb") as stream:
            for (first, last), entry in zip(ranges, journal.entries):
                lengths = recordio.record_bytes(plan.sizes[first:last])
                for record, count in entry["cuts"].items():
                    lengths[int(record) - first] += count * recordio.SPLIT_GROWTH_BYTES
                for record in entry["bad"]:
                    lengths[int(record) - first] = 0
                data = stream.read(int(lengths.sum()))
                sha256 = state.sha256.copy()
                sha256.update(data)
                if sha256.hexdigest() != entry["sha256"]:
                    break
                state.sha256 = sha256
                sums = recordio.record_sums(data, lengths)
                bad = {int(record): reason for record, reason in entry["bad"].items()}
                state.add(first, last, lengths, sums, bad)
                pieces, end = pieces + 1, end + len(data)
                progress(last - first, int(plan.sizes[first:last].sum()))
    journal.truncate(pieces)
    return pieces, end
