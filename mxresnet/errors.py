# SPDX-License-Identifier: Apache-2.0
"""The error that every package raises for wrong input, and the exit statuses of a training run."""

from __future__ import annotations

import enum


class UserError(Exception):
    """Wrong settings, data or environment.

    The message is one line that is shown without a traceback. It contains the name and the value of
    what is wrong, why it matters, and what to do.
    """


class ExitStatus(enum.IntEnum):
    """Exit statuses of ``python -m mxresnet`` and of the launchers around it."""

    SUCCESS = 0  # the target accuracy was reached, or nothing was evaluated
    FAILURE = 1  # any other error; its traceback is on standard error
    USER_ERROR = 2  # wrong settings or data, reported in one line
    TARGET_MISSED = 3  # the last epoch ended below the target accuracy
