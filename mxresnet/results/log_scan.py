# SPDX-License-Identifier: Apache-2.0
"""Read the events of a log of any size, and count what is damaged or unusual in it.

A log is read in blocks. Events with keys that the caller does not want are counted and not parsed,
so that time and memory are bounded for a log of gigabytes.
"""

from __future__ import annotations

import codecs
import os
import re
from dataclasses import dataclass, field
from typing import BinaryIO, Container, Dict, Iterator, List, Optional, Tuple

from mxresnet.results.log_reader import PREFIX, DamagedLine, Event, decode, parse_event

_BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 20
MAX_EVENTS_PER_KEY = 10_000  # kept of a wanted key; a run on 527 machines has 4,216 init_start
MAX_SAMPLES = 5
MAX_SAMPLE_CHARACTERS = 200
MAX_KEYS = 1000
_EVENT_LINE = re.compile(rb":::MLLOG ([^\n]*)")
_KEY = re.compile(rb'"key":\s*"([A-Za-z0-9_.-]{1,100})"')
_BYTE_ORDER_MARKS = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


@dataclass
class LogScan:
    """The events of a log file, and what is unusual about it.

    Attributes:
        path: Path of the file.
        size_bytes: Its size.
        lines: Number of its lines.
        events: The events with wanted keys, in the order of the file; of each key at most
            MAX_EVENTS_PER_KEY.
        dropped_events: Number of events beyond that.
        counts: Number of events by key, also of those that are not wanted.
        damaged: Number of parts with the prefix that cannot be parsed.
        damaged_samples: The first of them.
        joined_lines: Lines with several events or with text after an event: the output of several
            processes is mixed in them. MLPerf's parser rejects such lines.
        prefixed_lines: Lines with text before the event.
        long_lines: Lines of more than MAX_LINE_BYTES, which are skipped.
        encoding: "utf-16-le" or "utf-16-be" when the file starts with that byte order mark.
        cut: Whether the last line has an event and no line feed.
    """

    path: str
    size_bytes: int = 0
    lines: int = 0
    events: List[Event] = field(default_factory=list)
    dropped_events: int = 0
    counts: Dict[str, int] = field(default_factory=dict)
    damaged: int = 0
    damaged_samples: List[DamagedLine] = field(default_factory=list)
    joined_lines: int = 0
    prefixed_lines: int = 0
    long_lines: int = 0
    encoding: Optional[str] = None
    cut: bool = False


def scan_log(path: str, wanted: Container[str]) -> LogScan:
    """Read a log file.

    Args:
        path: Path of the file.
        wanted: The keys of the events to keep.

    Raises:
        OSError: The file cannot be read.
    """
    scan = LogScan(path)
    with open(path, "rb") as file:
        scan.size_bytes = os.fstat(file.fileno()).st_size
        for lines, number in _blocks(file, scan):
            _scan_block(scan, lines, number, wanted)
    return scan


def event_lines(path: str) -> Iterator[bytes]:
    """Yield the lines of a log that have the prefix, as they are, without line feeds.

    Raises:
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        for lines, _ in _blocks(file, LogScan(path)):
            if PREFIX in lines:
                yield from (line for line in lines.split(b"\n") if PREFIX in line)


def key_of(line: bytes) -> Optional[str]:
    """Return the key of an event, found without parsing it; None when there is not exactly one."""
    keys = _KEY.findall(line)
    return keys[0].decode() if len(keys) == 1 else None


def _read_blocks(file: BinaryIO, scan: LogScan) -> Iterator[bytes]:
    """Yield the content of a file in blocks, in UTF-8 where its byte order mark is of UTF-16."""
    first = file.read(2)
    scan.encoding = _BYTE_ORDER_MARKS.get(first)
    if scan.encoding is None:
        yield first
        while True:
            block = file.read(_BLOCK_BYTES)
            if not block:
                return
            yield block
    decoder = codecs.getincrementaldecoder(scan.encoding)(errors="replace")
    while True:
        block = file.read(_BLOCK_BYTES)
        yield decoder.decode(block, final=not block).encode("utf-8", errors="replace")
        if not block:
            return


def _blocks(file: BinaryIO, scan: LogScan) -> Iterator[Tuple[bytes, int]]:
    """Yield whole lines, many at a time, and the number of the first of them, from 1."""
    rest, number, skipping = b"", 1, False
    for block in _read_blocks(file, scan):
        if skipping:
            _, line_feed, block = block.partition(b"\n")
            skipping = not line_feed
            number += bool(line_feed)
        whole, line_feed, rest_of_block = block.rpartition(b"\n")
        if line_feed:
            lines = rest + whole
            yield lines, number
            number += lines.count(b"\n") + 1
            rest = rest_of_block
        else:
            rest += rest_of_block
        if len(rest) > MAX_LINE_BYTES:
            scan.long_lines += 1
            rest, skipping = b"", True
    scan.cut = PREFIX in rest
    scan.lines = number - (0 if rest else 1)
    if rest:
        yield rest, number


def _scan_block(scan: LogScan, lines: bytes, number: int, wanted: Container[str]) -> None:
    """Add the events of some lines to a scan."""
    counted_to = 0
    for match in _EVENT_LINE.finditer(lines):
        content = match.group(1)
        start = match.start()
        if start and lines[start - 1] != 0x0A:
            scan.prefixed_lines += 1
        if PREFIX not in content:
            key = key_of(content)
            is_full = key and scan.counts.get(key, 0) >= MAX_EVENTS_PER_KEY
            if key and (key not in wanted or is_full) and content.rstrip().endswith(b"}"):
                scan.dropped_events += key in wanted
                _count(scan, key)
                continue
        number += lines.count(b"\n", counted_to, start)
        counted_to = start
        parts = content.split(PREFIX)
        joined = len(parts) > 1
        for part in parts:
            joined = _scan_event(scan, part, number, wanted) or joined
        scan.joined_lines += joined


def _scan_event(scan: LogScan, content: bytes, number: int, wanted: Container[str]) -> bool:
    """Add one event to a scan; return whether there is text after it."""
    text = decode(content)
    try:
        event = parse_event(text)
    except ValueError:
        scan.damaged += 1
        if len(scan.damaged_samples) < MAX_SAMPLES:
            scan.damaged_samples.append(DamagedLine(number, text[:MAX_SAMPLE_CHARACTERS]))
        return False
    _count(scan, event.key)
    if event.key in wanted:
        if scan.counts.get(event.key, MAX_EVENTS_PER_KEY + 1) <= MAX_EVENTS_PER_KEY:
            scan.events.append(event)
        else:
            scan.dropped_events += 1
    return not content.rstrip().endswith(b"}")


def _count(scan: LogScan, key: str) -> None:
    """Count an event by its key."""
    if key in scan.counts or len(scan.counts) < MAX_KEYS:
        scan.counts[key] = scan.counts.get(key, 0) + 1
