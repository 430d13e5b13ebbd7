# SPDX-License-Identifier: Apache-2.0
"""Exit statuses of this package's commands, and the help text that lists them."""

from __future__ import annotations

import enum
from typing import Dict


class ExitStatus(enum.IntEnum):
    """Exit status of a command. A calling script can decide by it whether to retry."""

    SUCCESS = 0
    BAD_DATA = 1  # the source of a conversion, or the records that are verified
    USAGE_ERROR = 2
    BAD_DESTINATION = 3
    IO_ERROR = 4
    INTERNAL_ERROR = 70  # EX_SOFTWARE; not Python's own 1, which means bad data here
    INTERRUPTED = 130  # 128 + SIGINT


def exit_status_help(meanings: Dict[ExitStatus, str]) -> str:
    """Return a paragraph for --help with one line per exit status."""
    lines = (f"  {status.value:<5}{meaning}\n" for status, meaning in meanings.items())
    return "exit status:\n" + "".join(lines)
