# SPDX-License-Identifier: Apache-2.0
"""The lines of MLPerf's run_and_time.sh: start and end of a timed run, and its result."""

from __future__ import annotations

import datetime
import os
import pwd


def _format(seconds: float) -> str:
    """Return a Unix time as local date and time, as `date +'%Y-%m-%d %r'` prints it."""
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %I:%M:%S %p")


def start_line(started: float) -> str:
    """Return the line for the start of a run at a Unix time."""
    return f"STARTING TIMING RUN AT {_format(started)}"


def end_line(ended: float) -> str:
    """Return the line for the end of a run at a Unix time."""
    return f"ENDING TIMING RUN AT {_format(ended)}"


def result_line(started: float, ended: float) -> str:
    """Return the RESULT line.

    Args:
        started: Unix time of the start, seconds.
        ended: Unix time of the end, seconds.
    """
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    seconds = int(ended) - int(started)
    return f"RESULT,IMAGE_CLASSIFICATION,,{seconds},{user},{_format(started)}"
