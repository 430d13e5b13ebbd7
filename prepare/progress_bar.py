# SPDX-License-Identifier: Apache-2.0
"""What a person sees while work goes on: one live line on a terminal, a plain line now and then in a log."""

import sys
import time

SECONDS_BETWEEN_LINES = 10


def print_any_name():
    """Makes sys.stdout take names that it cannot encode, written with backslashes as sys.stderr does."""
    if hasattr(sys.stdout, "reconfigure"):  # what stands in for it, as in a notebook, may lack this
        sys.stdout.reconfigure(errors="backslashreplace")


class Progress:
    """Counts images and bytes. Call it with what was added; close it, or use it in a `with`."""

    def __init__(self, what, images, size, stream=None):
        self._what, self._images, self._bytes = what, images, size
        self._stream = stream or sys.stderr
        self._done_images = self._done_bytes = 0
        self._start = self._shown = time.monotonic()
        self._bar = self._make_bar() if self._stream.isatty() else None

    def _make_bar(self):
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        form = "{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"
        return tqdm(total=self._bytes, bar_format=form, file=self._stream, dynamic_ncols=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()

    def __call__(self, images, size):
        self._done_images += images
        self._done_bytes += size
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_description_str(
                "%s: %s" % (self._what, self._numbers(now)), refresh=False
            )
            self._bar.update(size)
        elif now - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = now
            left = (now - self._start) * (self._bytes / max(self._done_bytes, 1) - 1)
            text = "%s: %s, %d s left" % (self._what, self._numbers(now), left)
            print(text, file=self._stream, flush=True)

    def _numbers(self, now):
        seconds = max(now - self._start, 1e-3)
        return "%s of %s images, %.2f of %.2f GB, %.0f MB/s, %.0f images/s" % (
            format(self._done_images, ","),
            format(self._images, ","),
            self._done_bytes / 1e9,
            self._bytes / 1e9,
            self._done_bytes / 1e6 / seconds,
            self._done_images / seconds,
        )

    def summary(self):
        return self._numbers(time.monotonic())
