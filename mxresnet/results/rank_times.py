# SPDX-License-Identifier: Apache-2.0
"""Step times and input waits of the ranks, from the events that a run logs at epoch ends."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from mxresnet.results.log_reader import Event, finite_number

STEP_TIMES_KEY = "step_times"
_FIGURES = ("p50_ms", "p99_ms", "max_ms", "input_wait_seconds")
MAX_RANKS = 100_000


class RankTimes(NamedTuple):
    """The steps of one rank over all epochs after the first, which compiles and fills caches."""

    rank: int
    p50_ms: float  # median of the epochs' medians
    p99_ms: float  # median of the epochs' 99th percentiles
    max_ms: float
    input_wait_seconds: float  # sum


class EpochSteps(NamedTuple):
    """The steps of one epoch over all ranks."""

    epoch: int
    p50_ms: float  # median of the ranks' medians
    p99_ms: float  # slowest rank
    slowest_rank: int  # by its median
    input_wait_seconds: float  # of the rank that waits longest


@dataclass
class StepTimes:
    """Step times by rank and by epoch; empty where the log does not have them."""

    ranks: List[RankTimes] = field(default_factory=list)
    epochs: List[EpochSteps] = field(default_factory=list)

    @property
    def slowest(self) -> Optional[RankTimes]:
        """The rank with the longest median step."""
        return max(self.ranks, key=lambda rank: rank.p50_ms, default=None)

    @property
    def median_p50_ms(self) -> Optional[float]:
        return statistics.median(rank.p50_ms for rank in self.ranks) if self.ranks else None

    @property
    def longest_wait(self) -> Optional[RankTimes]:
        """The rank that waits longest for its input."""
        return max(self.ranks, key=lambda rank: rank.input_wait_seconds, default=None)


def _columns(value: Any) -> Optional[Dict[str, List[float]]]:
    """Return the lists of an event's value, all of one length, or None."""
    if not isinstance(value, dict):
        return None
    columns: Dict[str, List[float]] = {}
    for name in _FIGURES:
        numbers = value.get(name)
        if not isinstance(numbers, list) or not 0 < len(numbers) <= MAX_RANKS:
            return None
        found = [finite_number(number) for number in numbers]
        columns[name] = [number for number in found if number is not None]
    sizes = {len(column) for column in columns.values()}
    return columns if len(sizes) == 1 and sizes != {0} else None


def read_step_times(events: Sequence[Event]) -> StepTimes:
    """Return the step times of a run from its events; damaged ones are left out."""
    by_epoch: Dict[int, Dict[str, List[float]]] = {}
    for event in events:
        epoch, columns = finite_number(event.metadata.get("epoch_num")), _columns(event.value)
        if event.key == STEP_TIMES_KEY and epoch is not None and columns:
            by_epoch.setdefault(int(epoch), columns)
    if not by_epoch:
        return StepTimes()
    epochs = [_epoch_steps(epoch, by_epoch[epoch]) for epoch in sorted(by_epoch)]
    first = min(by_epoch)
    later = [columns for epoch, columns in by_epoch.items() if epoch > first]
    return StepTimes(_rank_times(later or list(by_epoch.values())), epochs)


def _epoch_steps(epoch: int, columns: Dict[str, List[float]]) -> EpochSteps:
    medians = columns["p50_ms"]
    return EpochSteps(
        epoch,
        statistics.median(medians),
        max(columns["p99_ms"]),
        medians.index(max(medians)),
        max(columns["input_wait_seconds"]),
    )


def _rank_times(epochs: List[Dict[str, List[float]]]) -> List[RankTimes]:
    number = min(len(columns["p50_ms"]) for columns in epochs)
    return [
        RankTimes(
            rank,
            statistics.median(columns["p50_ms"][rank] for columns in epochs),
            statistics.median(columns["p99_ms"][rank] for columns in epochs),
            max(columns["max_ms"][rank] for columns in epochs),
            sum(columns["input_wait_seconds"][rank] for columns in epochs),
        )
        for rank in range(number)
    ]
