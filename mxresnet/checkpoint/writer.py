# SPDX-License-Identifier: Apache-2.0
"""A thread that writes one checkpoint at a time beside the running steps."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import Callable, List, Optional


@dataclass(frozen=True)
class Written:
    """The end of a write: its folder, or why there is none.

    Attributes:
        path: of the checkpoint; None if it could not be written.
        error: the reason then, one line.
        seconds: that the write took.
    """

    path: Optional[str]
    error: str
    seconds: float


class BackgroundWriter:
    """Runs the functions that write checkpoints. The thread must not call MXNet or MPI."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], str]] = queue.Queue()
        self._results: queue.Queue[Written] = queue.Queue()
        self._unfinished = 0
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def submit(self, write: Callable[[], str]) -> None:
        """Start a write, which returns the path of the checkpoint or raises OSError."""
        self._unfinished += 1
        self._jobs.put(write)

    @property
    def is_busy(self) -> bool:
        """Whether a write has not ended, or its result was not taken."""
        return self._unfinished > 0

    def results(self, wait: bool = False) -> List[Written]:
        """Return how the writes since the previous call have ended.

        Args:
            wait: wait for the end of all of them.
        """
        results = []
        while self._unfinished and (wait or not self._results.empty()):
            results.append(self._results.get())
            self._unfinished -= 1
        return results

    def _run(self) -> None:
        while True:
            write = self._jobs.get()
            start = time.perf_counter()
            try:
                path, error = write(), ""
            except OSError as failure:
                path, error = "", failure.strerror or str(failure)
            except Exception as failure:  # the run goes on, as after a full disk
                path, error = "", f"{type(failure).__name__}: {failure}"
            self._results.put(Written(path or None, error, time.perf_counter() - start))
            del write  # and the copy of the state in it
