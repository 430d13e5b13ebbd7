# SPDX-License-Identifier: Apache-2.0
"""Progress of a long operation: a live bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Any, Optional, TextIO

SECONDS_BETWEEN_LINES = 10


def print_line(text: str) -> None:
    """Print a line immediately, also when the output is a pipe."""
    print(text, flush=True)


class Progress:
    """Show the images and bytes done: a context manager that is called with the numbers added."""

    def __init__(
        self, name: str, total_images: int, total_bytes: int, stream: Optional[TextIO] = None
    ) -> None:
        """Start the clock. `stream` is sys.stderr by default."""
        self._name, self._total_images, self._total_bytes = name, total_images, total_bytes
        self._stream = stream or sys.stderr
        self._done_images = self._done_bytes = 0
        self._start = self._last_line = time.monotonic()
        self._bar = self._make_bar() if self._stream.isatty() else None

    def _make_bar(self) -> Optional[Any]:
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        layout = "{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"
        return tqdm(
            total=self._total_bytes, bar_format=layout, file=self._stream, dynamic_ncols=True
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, images: int, num_bytes: int) -> None:
        """Add `images` and `num_bytes` to what is done."""
        self._done_images += images
        self._done_bytes += num_bytes
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_description_str(f"{self._name}: {self._numbers(now)}", refresh=False)
            self._bar.update(num_bytes)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            elapsed_seconds = now - self._start
            left_seconds = elapsed_seconds * (self._total_bytes / max(self._done_bytes, 1) - 1)
            text = f"{self._name}: {self._numbers(now)}, {int(left_seconds)} s left"
            print(text, file=self._stream, flush=True)

    def _numbers(self, now: float) -> str:
        seconds = max(now - self._start, 1e-3)
        return (
            f"{self._done_images:,} of {self._total_images:,} images, "
            f"{self._done_bytes / 1e9:.2f} of {self._total_bytes / 1e9:.2f} GB, "
            f"{self._done_bytes / 1e6 / seconds:.0f} MB/s, "
            f"{self._done_images / seconds:.0f} images/s"
        )

    def summary(self) -> str:
        """Return the images, bytes and speeds so far as text."""
        return self._numbers(time.monotonic())
