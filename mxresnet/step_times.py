# SPDX-License-Identifier: Apache-2.0
"""Times of an epoch's steps on the host, of which every run logs a summary.

Nothing here waits for the device. A device that works in the background lets the host run ahead by
two steps at most, until the input pipeline needs a buffer that the device still reads. After that a
step takes as long on the host as on the device.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Callable, List, Sequence


@dataclass(frozen=True)
class StepTimes:
    """Summary of one rank's steps of an epoch.

    Attributes:
        p50_ms: median time of a step, milliseconds.
        p99_ms: 99th percentile.
        max_ms: the slowest step.
        input_wait_seconds: time in which the rank waited for images in this epoch.
    """

    p50_ms: float
    p99_ms: float
    max_ms: float
    input_wait_seconds: float


def percentile(sorted_values: Sequence[float], percent: float) -> float:
    """Return the smallest value that is not below `percent` of the values (nearest rank)."""
    return sorted_values[max(0, math.ceil(percent / 100 * len(sorted_values)) - 1)]


class StepClock:
    """Measures the steps of one epoch, one after the other, from its creation on."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        """Start to measure; `clock` returns seconds."""
        self._clock = clock
        self._seconds: List[float] = []
        self._step_start = clock()

    def step_done(self) -> None:
        """End a step. The next one starts at the same moment."""
        now = self._clock()
        self._seconds.append(now - self._step_start)
        self._step_start = now

    def summary(self, input_wait_seconds: float) -> StepTimes:
        """Return the summary; 0 where no step was left in a resumed epoch."""
        ordered = sorted(self._seconds) or [0.0]
        p50, p99, longest = (
            round(1000 * percentile(ordered, percent), 3) for percent in (50, 99, 100)
        )
        return StepTimes(p50, p99, longest, round(input_wait_seconds, 6))
