# SPDX-License-Identifier: Apache-2.0
"""How long the parts of a run take, where that was asked for; and ranges for NVIDIA's profilers.

The tags and the form of the log lines are the reference's ("scaleout bridge"): TIME_TAGS and NVTX_FLAG time everything,
EPOCH_PROF the epochs. Timing waits for the device at both ends of a part, which slows a run down: without it nothing waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Set, Tuple

from mxresnet.config import Config

TAGS = ("fwd_time", "bwd_time", "opt_time", "load_time", "eval_time", "iter_time", "epoch_time")
_NOTHING = contextlib.nullcontext()


def _library(*names: str) -> Any:
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


class Timing:
    """wait() waits for the device. Spans of one tag do not nest in each other; those of different tags may."""

    def __init__(
        self,
        config: Config,
        wait: Callable[[], None],
        clock: Callable[[], float] = time.perf_counter,
    ):
        everything = config.time_tags > 0 or config.nvtx_flag > 0
        self._timed: Set[str] = (
            set(TAGS) if everything else {"epoch_time"} if config.epoch_prof else set()
        )
        self._nvtx = _library("libnvToolsExt.so.1") if config.nvtx_flag or config.profile else None
        self._cuda = (
            _library("libcudart.so", "libcudart.so.11.0", "libcudart.so.12")
            if config.profile
            else None
        )
        self._wait, self._clock = wait, clock
        self._seconds: Dict[str, List[float]] = {}

    def span(self, tag: str) -> ContextManager[None]:
        return self._span(tag) if tag in self._timed or self._nvtx else _NOTHING

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
        """Start or stop CUDA's profiler, with --profile on a machine that has it."""
        if self._cuda:
            (self._cuda.cudaProfilerStart if on else self._cuda.cudaProfilerStop)()

    def report(self) -> List[Tuple[str, float]]:
        """(key, value) for every tag that was timed: seconds in total, count, least and most seconds."""
        rows: List[Tuple[str, float]] = []
        for tag in TAGS:
            seconds = self._seconds.get(tag)
            if seconds:
                rows += [(f"{tag}_total", sum(seconds)), (f"{tag}_count", len(seconds))]
                rows += [(f"{tag}_min", min(seconds)), (f"{tag}_max", max(seconds))]
        return rows
