# SPDX-License-Identifier: Apache-2.0
"""Optional timing of a run's parts, NVTX ranges and CUDA's profiler.

The settings and the rows for the log are those of the reference benchmark's "scaleout bridge":

- TIME_TAGS times the parts of each step, the epochs and the evaluations;
- NVTX_FLAG marks the parts as NVTX ranges, and times the epochs and the evaluations;
- EPOCH_PROF times the epochs;
- PROFILE starts CUDA's profiler, and marks the epochs and the steps as NVTX ranges.

The program waits for the device before and after each timed part, which slows the run down;
without these settings it does not wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from dataclasses import dataclass
from typing import Callable, ContextManager, Dict, Iterator, List, Optional, Tuple

from mxresnet.config import Config

# An epoch with more steps ends the timing of the parts, as in the reference benchmark.
MAX_TIMED_STEPS = 1000
STEP_TAG = "opt_time"  # the part that counts the steps
_NO_SPAN = contextlib.nullcontext()

# Keys and values of the log: ("fwd_time_total", seconds).
Rows = List[Tuple[str, float]]


def _load_library(*names: str) -> Optional[ctypes.CDLL]:
    """Return the first of these libraries that the machine has."""
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


@dataclass
class _Statistic:
    """The times of one part, in seconds."""

    total: float = 0.0
    count: int = 0
    minimum: float = float("inf")
    maximum: float = 0.0

    def add(self, seconds: float) -> None:
        self.total += seconds
        self.count += 1
        self.minimum = min(self.minimum, seconds)
        self.maximum = max(self.maximum, seconds)


class Timing:
    """Times of the parts of a run, in seconds, by tag."""

    def __init__(
        self,
        config: Config,
        wait: Callable[[], None],
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Choose what to time.

        Args:
            config: the run's settings.
            wait: waits until the device has finished all queued work.
            clock: returns seconds.
        """
        self._times_parts = config.time_tags > 0
        self._times_evaluations = config.time_tags > 0 or config.nvtx_flag > 0
        self._times_epochs = self._times_evaluations or config.epoch_prof > 0
        self._marks_parts, self._marks_steps = config.nvtx_flag > 0, config.profile > 0
        self._nvtx = self._cuda = None
        if self._marks_parts or self._marks_steps:
            self._nvtx = _load_library("libnvToolsExt.so.1")
        if config.profile:
            self._cuda = _load_library("libcudart.so", "libcudart.so.11.0", "libcudart.so.12")
        self._wait, self._clock = wait, clock
        self._start = 0.0  # of the epoch or the evaluation
        self._statistics: Dict[str, _Statistic] = {}

    def start_epoch(self, epoch: int) -> None:
        """Start to time an epoch; epochs count from 1."""
        if self._marks_steps:
            self._push(f"epoch{epoch - 1}")
        self._start_if(self._times_epochs)

    def end_epoch(self) -> Rows:
        """Return the rows of the epoch that has ended, first those of its parts."""
        rows = self._take_statistics() + self._end_if(self._times_epochs, "epoch_time")
        if self._marks_steps:
            self._pop()
        return rows

    def start_evaluation(self) -> None:
        """Start to time an evaluation."""
        self._start_if(self._times_evaluations)

    def end_evaluation(self) -> Rows:
        """Return the log rows (key, seconds) of the evaluation; none if it is not timed."""
        return self._end_if(self._times_evaluations, "eval_time")

    def _start_if(self, timed: bool) -> None:
        if timed:
            self._wait()
            self._start = self._clock()

    def _end_if(self, timed: bool, key: str) -> Rows:
        if not timed:
            return []
        self._wait()
        return [(key, self._clock() - self._start)]

    def step(self, number: int) -> ContextManager[None]:
        """Return a context that times its body as one step; the steps of an epoch count from 1."""
        name = f"iter{number - 1}" if self._marks_steps else ""
        return self._span("iter_time", name) if name else self.part("iter_time")

    def part(self, tag: str) -> ContextManager[None]:
        """Return a context that times its body. Parts with the same tag must not nest."""
        return self._span(tag) if self._times_parts or self._marks_parts else _NO_SPAN

    @contextlib.contextmanager
    def _span(self, tag: str, name: str = "") -> Iterator[None]:
        """Time the body under a tag, and mark it as a range with a name, or else with the tag."""
        timed, marks = self._times_parts, [name] if name else []
        if timed:
            self._wait()
        start = self._clock()
        marks += [tag] if self._marks_parts else []
        for mark in marks:
            self._push(mark)
        yield
        if timed:
            self._wait()
            self._statistics.setdefault(tag, _Statistic()).add(self._clock() - start)
        for _ in marks:
            self._pop()

    def rows_at_limit(self) -> Rows:
        """Return the last rows of the parts after MAX_TIMED_STEPS steps of an epoch, else none."""
        steps = self._statistics.get(STEP_TAG)
        if steps is None or steps.count <= MAX_TIMED_STEPS:
            return []
        self._times_parts = False
        return self._take_statistics()

    def _take_statistics(self) -> Rows:
        """Return total, count, minimum and maximum of each part since the last call."""
        rows: Rows = []
        for tag, times in self._statistics.items():
            rows += [(f"{tag}_total", times.total), (f"{tag}_count", times.count)]
            rows += [(f"{tag}_min", times.minimum), (f"{tag}_max", times.maximum)]
        self._statistics.clear()
        return rows

    def _push(self, name: str) -> None:
        if self._nvtx:
            self._nvtx.nvtxRangePushA(name.encode())

    def _pop(self) -> None:
        if self._nvtx:
            self._nvtx.nvtxRangePop()

    def profiler(self, on: bool) -> None:
        """Start or stop CUDA's profiler when --profile is set and the machine has CUDA."""
        if self._cuda:
            (self._cuda.cudaProfilerStart if on else self._cuda.cudaProfilerStop)()
