# SPDX-License-Identifier: Apache-2.0
"""Optional timing of a run's parts, NVTX ranges and CUDA's profiler.

Tags and log lines have the format of the reference benchmark's "scaleout bridge". TIME_TAGS and
NVTX_FLAG time every part, EPOCH_PROF only the epochs. The program waits for the device before and
after each timed part, which slows the run down; without these settings it does not wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from typing import Callable, ContextManager, Dict, Iterator, List, Optional, Set, Tuple

from mxresnet.config import Config

TAGS = ("fwd_time", "bwd_time", "opt_time", "load_time", "eval_time", "iter_time", "epoch_time")
_NO_SPAN = contextlib.nullcontext()


def _load_library(*names: str) -> Optional[ctypes.CDLL]:
    """Return the first of these libraries that the machine has."""
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


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
        all_parts = config.time_tags > 0 or config.nvtx_flag > 0
        epochs = {"epoch_time"} if config.epoch_prof else set()
        self._timed: Set[str] = set(TAGS) if all_parts else epochs
        self._nvtx = self._cuda = None
        if config.nvtx_flag or config.profile:
            self._nvtx = _load_library("libnvToolsExt.so.1")
        if config.profile:
            self._cuda = _load_library("libcudart.so", "libcudart.so.11.0", "libcudart.so.12")
        self._wait, self._clock = wait, clock
        self._seconds: Dict[str, List[float]] = {}

    def span(self, tag: str) -> ContextManager[None]:
        """Return a context that times its body. Spans of the same tag must not nest."""
        return self._span(tag) if tag in self._timed or self._nvtx else _NO_SPAN

    @contextlib.contextmanager
    def _span(self, tag: str) -> Iterator[None]:
        if self._nvtx:
            self._nvtx.nvtxRangePushA(tag.encode())
        if tag in self._timed:
            self._wait()
        start = self._clock()
        yield
        if tag in self._timed:
            self._wait()
            self._seconds.setdefault(tag, []).append(self._clock() - start)
        if self._nvtx:
            self._nvtx.nvtxRangePop()

    def profiler(self, on: bool) -> None:
        """Start or stop CUDA's profiler when --profile is set and the machine has CUDA."""
        if self._cuda:
            (self._cuda.cudaProfilerStart if on else self._cuda.cudaProfilerStop)()

    def report(self) -> List[Tuple[str, float]]:
        """Return (key, value) rows for each timed tag: total, count, minimum, maximum."""
        rows: List[Tuple[str, float]] = []
        for tag in TAGS:
            seconds = self._seconds.get(tag)
            if seconds:
                rows += [(f"{tag}_total", sum(seconds)), (f"{tag}_count", len(seconds))]
                rows += [(f"{tag}_min", min(seconds)), (f"{tag}_max", max(seconds))]
        return rows
