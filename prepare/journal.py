# SPDX-License-Identifier: Apache-2.0
"""The journal of an unfinished conversion: its lock, and the pieces that a resumed run keeps."""

from __future__ import annotations

import fcntl
import json
import os
from collections import deque
from typing import Any, Deque, Dict, List, Optional, Tuple

from prepare.manifest import JOURNAL_NAME, DestinationError

MAX_JOURNAL_BYTES = 1 << 30  # that of ImageNet has a few MB
HEADER_BEGIN = b'{"digest": '  # of the first line

Entry = Dict[str, Any]


class Journal:
    """A file with one JSON line per finished piece of the record file, after a header line.

    The header identifies the source and the options. An entry holds the SHA-256 of the record file
    up to the end of the piece, and is valid only if the file has this hash. Therefore a conversion
    needs no fsync before its end: data that a power failure loses is written again. It also holds a
    digest of what was planned for the piece, because files of the source may have changed since.

    Attributes:
        entries: The entries that the file held when it was opened.
    """

    def __init__(self, folder: str, header: Entry) -> None:
        """Create `folder` if needed, open or create the journal in it, and lock the journal.

        Raises:
            DestinationError: The journal is in use, or belongs to a different conversion.
        """
        os.makedirs(folder, exist_ok=True)
        self._folder = folder
        self._file = open(os.path.join(folder, JOURNAL_NAME), "ab+")  # noqa: SIM115
        self._lock()
        self._unwritten: Deque[Tuple[int, Entry]] = deque()
        self.entries = self._read(header)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DestinationError(
                f"{self._folder}: another conversion is writing here: wait until it ends"
            ) from None
        except OSError:
            pass  # a file system without locks
        # The previous owner of the lock may have removed the folder after this file was opened.
        if not self.is_in_place():
            raise DestinationError(
                f"{self._folder}: another conversion was writing here: run the same command again"
            )

    def is_in_place(self) -> bool:
        """Return whether the file is still there; False if another one has its name now."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._file.name))
        except OSError:
            return False

    def _read(self, header: Entry) -> List[Entry]:
        self._file.seek(0)
        if os.fstat(self._file.fileno()).st_size > MAX_JOURNAL_BYTES:
            raise DestinationError(f"{self._file.name}: is too large for a journal: move it away")
        # An interrupted write leaves a line without its line feed, and a power failure can leave
        # zeros. Both are ignored.
        content = self._file.read()
        lines = [_parse_line(line) for line in content.split(b"\n")[:-1]]
        if not lines or lines[0] is None:
            if not may_begin_journal(content):
                raise DestinationError(f"{self._file.name}: would be overwritten: move it away")
            self._file.truncate(0)
            self._append(header)
            return []
        if not _is_same_conversion(lines[0], header):
            raise DestinationError(
                f"{self._folder}: holds the unfinished conversion of another source, or with "
                "other options: finish that conversion, or remove this folder to start over"
            )
        entries = []
        for line in lines[1:]:
            if line is None:
                break
            entries.append(line)
        return entries

    def truncate(self, count: int) -> None:
        """Remove all but the first `count` of the entries found."""
        self._file.seek(0)
        kept = self._file.read().split(b"\n")[: count + 1]
        self._file.truncate(sum(len(line) + 1 for line in kept))
        self.entries = self.entries[:count]

    def add(self, entry: Entry, end: int) -> None:
        """Add an entry, to be written once the record file is flushed up to the offset `end`."""
        self._unwritten.append((end, entry))

    def write_flushed(self, flushed: int) -> None:
        """Write the entries of all pieces that end at or before the offset `flushed`."""
        while self._unwritten and self._unwritten[0][0] <= flushed:
            self._append(self._unwritten.popleft()[1])

    def _append(self, entry: Entry) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file, which releases the lock."""
        self._file.close()


def may_begin_journal(content: bytes) -> bool:
    """Return whether a file with this content, or this beginning of it, can be a journal.

    An interrupted write can leave a part of the header, and a power failure zeros.
    """
    begin = content[: len(HEADER_BEGIN)]
    return HEADER_BEGIN.startswith(begin) or not content.strip(b"\0")


def _is_same_conversion(found: Any, header: Entry) -> bool:
    """Return whether the header of a journal belongs to the conversion with `header`.

    Either the source folder is the same, although files in it may have changed since, or all its
    files are the same, although it was moved.
    """
    if not isinstance(found, dict) or found.get("check") != header.get("check"):
        return False
    return any(found.get(key) == header.get(key) for key in ("digest", "source"))


def _parse_line(line: bytes) -> Optional[Any]:
    """Return the value of a line of the journal; None when it is damaged."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
