# SPDX-License-Identifier: Apache-2.0
"""One split on disk: its manifest, index, list and sums, and whether these agree."""

from __future__ import annotations

import io
import os
from array import array
from collections import Counter
from typing import Counter as CounterType
from typing import List, Tuple

import numpy as np

from prepare import recordio
from prepare.bounded_read import TooLargeError, file_sha256, read_file
from prepare.manifest import load_manifest, manifest_path
from prepare.regular_file import NotRegularFileError, check_regular

# The most that a record needs: two numbers of 64 bits; a number, a label and a path.
MAX_INDEX_LINE_BYTES, MAX_LIST_LINE_BYTES = 44, 4200
MIN_TABLE_LIMIT_BYTES = 64 << 20  # also for record files that were cut off
MAX_LABEL = float(np.finfo(np.float32).max)


class UnreadableTablesError(Exception):
    """The tables are so damaged or contradictory that no record can be located."""


class RecordSet:
    """The tables of one split and the errors found in its files.

    Attributes:
        errors: Messages. Checks append to it.
        keys: Key of each record (from .idx); the arrays are in record order.
        offsets: Offset of each record in the record file, in bytes (from .idx).
        ends: End of each record in the record file, in bytes.
        labels: Class of each record, float32 (from .lst).
        paths: Path of each image (from .lst).
        sums: Checksum of each record (from .sums).
        size: Actual size of the record file, in bytes.
    """

    keys: np.ndarray
    offsets: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    paths: List[str]
    sums: np.ndarray
    size: int

    def __init__(self, folder: str, prefix: str) -> None:
        """Read the manifest. Raises DestinationError when it is invalid."""
        self.folder, self.prefix = folder, prefix
        self.manifest = load_manifest(folder, prefix)
        self.errors: List[str] = []

    def path(self, suffix: str) -> str:
        """Return the path of the split's file with this suffix."""
        return os.path.join(self.folder, self.prefix + suffix)

    @property
    def expected_size(self) -> int:
        """Size of the record file according to the manifest, in bytes."""
        return self.manifest["files"][self.prefix + ".rec"]["bytes"]

    def read_tables(self) -> None:
        """Read .idx, .lst and .sums; compare them with the manifest and with each other.

        Raises:
            UnreadableTablesError: The records cannot be located.
        """
        self._check_files()
        listed_keys = self._parse_index_and_list()
        counts = {
            "manifest": self.manifest["examples"],
            ".idx": len(self.keys),
            ".lst": len(self.paths),
        }
        if len(set(counts.values())) > 1:
            raise UnreadableTablesError(
                f"{self.path('.rec')}: the numbers of records differ: {counts}"
            )
        if not np.array_equal(listed_keys, self.keys):
            raise UnreadableTablesError(
                f"{self.path('.idx')}: its keys differ from those of the list"
            )
        self.ends = np.append(self.offsets[1:], self.expected_size)
        self._check_offsets()
        self.size = os.path.getsize(self.path(".rec"))
        self._check_classes()
        self.sums = self._read_sums()

    def _check_files(self) -> None:
        """Compare the size of all files, and the SHA-256 of the tables, with the manifest.

        Raises:
            UnreadableTablesError: A file is missing.
        """
        for name, facts in sorted(self.manifest["files"].items()):
            path = os.path.join(self.folder, name)
            if not os.path.exists(path):
                raise UnreadableTablesError(f"{path}: is missing")
            try:
                check_regular(os.stat(path).st_mode, path)
            except NotRegularFileError as error:
                raise UnreadableTablesError(f"{path}: {error.reason}") from None
            size = os.path.getsize(path)
            if size != facts["bytes"]:
                self.errors.append(f"{path}: has {size} bytes, expected {facts['bytes']}")
            elif not name.endswith(".rec") and file_sha256(path) != facts["sha256"]:
                self.errors.append(f"{path}: its SHA-256 differs from the manifest's")

    def _parse_index_and_list(self) -> array[int]:
        """Set keys, offsets, labels and paths; return the keys of the list.

        Raises:
            UnreadableTablesError: A line is malformed.
        """
        try:
            words = self._read_table(".idx", MAX_INDEX_LINE_BYTES).split()
            index = np.array(array("q", map(int, words))).reshape(-1, 2)
        except (ValueError, OverflowError) as error:
            raise UnreadableTablesError(f"{self.path('.idx')}: cannot be parsed: {error}") from None
        self.keys, self.offsets = index[:, 0], index[:, 1]
        listed_keys, labels, self.paths = array("q"), array("f"), []
        path = self.path(".lst")
        try:
            content = self._read_table(".lst", MAX_LIST_LINE_BYTES)
            for line in io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"):
                key, label, image_path = line.rstrip("\n").split("\t")
                listed_keys.append(int(key))
                if not abs(float(label)) <= MAX_LABEL:
                    raise ValueError(f"the label {label} is not a finite number")
                labels.append(float(label))
                self.paths.append(image_path)
        except (ValueError, OverflowError) as error:
            line_number = len(self.paths) + 1
            raise UnreadableTablesError(f"{path}: line {line_number}: {error}") from None
        self.labels = np.array(labels, dtype="<f4")
        return listed_keys

    def _read_table(self, suffix: str, line_bytes: int) -> bytes:
        """Return the content of one of the tables.

        Args:
            suffix: of the file.
            line_bytes: the most that a record can need in it.

        Raises:
            UnreadableTablesError: it is larger than a table of this record file can be.
        """
        records = os.path.getsize(self.path(".rec")) // recordio.record_bytes(0) + 1
        try:
            return read_file(self.path(suffix), max(MIN_TABLE_LIMIT_BYTES, records * line_bytes))
        except TooLargeError as error:
            raise UnreadableTablesError(f"{error}, too many for this record file") from None

    def _check_offsets(self) -> None:
        """Raise UnreadableTablesError unless the offsets ascend from 0 within the file."""
        if len(self.offsets) and (
            self.offsets[0] or (self.ends <= self.offsets).any() or (self.offsets % 4).any()
        ):
            raise UnreadableTablesError(
                f"{self.path('.idx')}: its offsets are not ascending multiples of 4 from 0, or "
                "exceed the file's size"
            )

    def _check_classes(self) -> None:
        """Compare the label, folder and size of each class in the list with the manifest."""
        listed: CounterType[Tuple[float, str]] = Counter(
            zip(self.labels.tolist(), (os.path.dirname(path) or "." for path in self.paths))
        )
        expected: CounterType[Tuple[float, str]] = Counter()
        for row in self.manifest["classes"]:
            expected[row["label"], row["name"]] += row["examples"]
        for label, name in sorted((expected - listed) | (listed - expected)):
            self.errors.append(
                f"{manifest_path(self.folder, self.prefix)}: gives class {label:g}, {name}, "
                f"{expected[label, name]} images, but the list has {listed[label, name]}"
            )

    def _read_sums(self) -> np.ndarray:
        path = self.path(".sums")
        sums = self._read_table(".sums", 4)
        if len(sums) != 4 * len(self.keys):
            raise UnreadableTablesError(
                f"{path}: has {len(sums)} bytes for {len(self.keys)} records, expected 4 for each"
            )
        return np.frombuffer(sums, recordio.WORD)

    def add_record_error(self, record: int, reason: str) -> None:
        """Add an error of one record."""
        self.errors.append(
            f"{self.path('.rec')}: record {record} (key {self.keys[record]}, {self.paths[record]}, "
            f"at byte {self.offsets[record]}): {reason}"
        )
