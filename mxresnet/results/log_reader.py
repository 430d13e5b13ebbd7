# SPDX-License-Identifier: Apache-2.0
"""Read the MLPerf log of a run: the `:::MLLOG` lines of a log file, as typed events.

No other module reads these lines. A log file also holds progress lines, and the last line of a run
that was killed may be incomplete. Lines without the prefix are skipped. Lines with the prefix that
cannot be parsed are kept as `damaged_lines`. The prefix may be anywhere in a line: mpirun and srun
put the rank before it, and the lines of several ranks may be joined.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional

from mxresnet.bounded_read import read_file

PREFIX = b":::MLLOG "
_DECODER = json.JSONDecoder()
MAX_LOG_BYTES = 256 << 20  # a run on 4,216 GPUs has a log of a few MB
# Keys of the events that the log of a complete run has.
REQUIRED_KEYS = ("submission_org", "run_start", "eval_accuracy", "run_stop")


@dataclass(frozen=True)
class Event:
    """One event of the MLPerf log."""

    key: str
    value: Any = None
    metadata: Dict[str, Any] = field(default_factory=dict)
    time_ms: Optional[float] = None  # since the epoch; None: the line has no valid time


class DamagedLine(NamedTuple):
    """A line that has the prefix of an event and cannot be parsed."""

    number: int  # in the file, from 1
    text: str


class Evaluation(NamedTuple):
    """The result of one evaluation."""

    accuracy: float  # top-1, a fraction
    epoch: int  # from 1


@dataclass(frozen=True)
class RunLog:
    """The MLPerf log of one run."""

    events: List[Event]
    damaged_lines: List[DamagedLine]

    def last_event(self, key: str) -> Optional[Event]:
        """Return the last event with this key, or None when there is none."""
        return next((event for event in reversed(self.events) if event.key == key), None)

    @property
    def missing_keys(self) -> List[str]:
        """The keys in REQUIRED_KEYS that no event has."""
        found = {event.key for event in self.events}
        return [key for key in REQUIRED_KEYS if key not in found]

    @property
    def minutes(self) -> Optional[float]:
        """Minutes from run_start to run_stop; None when one of them or its time is missing."""
        start, stop = self.last_event("run_start"), self.last_event("run_stop")
        if not start or not stop or start.time_ms is None or stop.time_ms is None:
            return None
        return (stop.time_ms - start.time_ms) / 60_000

    @property
    def last_evaluation(self) -> Optional[Evaluation]:
        """The last evaluation; None when the run evaluated nothing."""
        event = self.last_event("eval_accuracy")
        if event is None:
            return None
        accuracy, epoch = finite_number(event.value), finite_number(event.metadata.get("epoch_num"))
        return None if accuracy is None or epoch is None else Evaluation(accuracy, int(epoch))

    @property
    def submission(self) -> Dict[str, Any]:
        """The values of the submission_* events by key."""
        return {
            event.key: event.value for event in self.events if event.key.startswith("submission_")
        }


def finite_number(value: Any) -> Optional[float]:
    """Return a JSON value as a finite float, or None when it is not one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def parse_event(text: str) -> Event:
    """Parse the JSON of one event, without the prefix; what follows the JSON is ignored.

    Raises:
        ValueError: The text does not begin with the JSON of an event.
    """
    try:
        content, _ = _DECODER.raw_decode(text.lstrip())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict) or not isinstance(content.get("key"), str):
        raise ValueError("not an object with a key")
    metadata = content.get("metadata")
    return Event(
        content["key"],
        content.get("value"),
        metadata if isinstance(metadata, dict) else {},
        finite_number(content.get("time_ms")),
    )


def decode(content: bytes) -> str:
    """Return a part of a log as text: UTF-8, or Latin-1 where it is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def parse_log(content: bytes) -> RunLog:
    """Parse the content of a log file. Any content is accepted."""
    events: List[Event] = []
    damaged: List[DamagedLine] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        for part in line.split(PREFIX)[1:]:
            text = decode(part)
            try:
                events.append(parse_event(text))
            except ValueError:
                damaged.append(DamagedLine(number, text))
    return RunLog(events, damaged)


def read_log(path: str) -> RunLog:
    """Read a log file.

    Raises:
        OSError: The file cannot be read, or is larger than MAX_LOG_BYTES.
    """
    return parse_log(read_file(path, MAX_LOG_BYTES))


def with_sufficient_accuracy(content: bytes) -> bytes:
    """Return the content of a log whose last accuracy is replaced by one above every target."""
    lines = content.split(b"\n")
    for position in reversed(range(len(lines))):
        line = lines[position]
        before, prefix, text = line.rpartition(PREFIX)
        if prefix and b'"eval_accuracy"' in text:
            with contextlib.suppress(ValueError):
                fields = {**json.loads(text), "value": 0.999}
                lines[position] = before + PREFIX + json.dumps(fields).encode()
                break
    return b"\n".join(lines)


def has_evaluation(path: str) -> bool:
    """Return whether the log has an evaluation; False when the file cannot be read."""
    try:
        return read_log(path).last_evaluation is not None
    except OSError:
        return False
