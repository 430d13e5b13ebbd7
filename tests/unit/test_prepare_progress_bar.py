# SPDX-License-Identifier: Apache-2.0
"""Test the progress of a conversion as it appears in a log file."""

import io

from prepare.progress_bar import Progress


def test_progress_in_a_log_is_plain_lines(monkeypatch):
    stream, clock_seconds = io.StringIO(), [0.0]
    monkeypatch.setattr("prepare.progress_bar.time.monotonic", lambda: clock_seconds[0])
    with Progress("train", 400, 4000000, stream) as progress:
        for _ in range(4):
            clock_seconds[0] += 6
            progress(100, 1000000)
    assert stream.getvalue() == (
        "train: 200 of 400 images, 0.00 of 0.00 GB, 0 MB/s, 17 images/s, 12 s left\n"
        "train: 400 of 400 images, 0.00 of 0.00 GB, 0 MB/s, 17 images/s, 0 s left\n"
    )
