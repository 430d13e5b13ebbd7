# SPDX-License-Identifier: Apache-2.0
"""Errors that every package raises, and the exit statuses of a training run."""

from __future__ import annotations

import enum


class UserError(Exception):
    """A mistake of the user: shown as one line that names the thing, the value and what to do."""


class ExitStatus(enum.IntEnum):
    """Exit statuses of ``python -m mxresnet`` and of the launchers around it."""

    SUCCESS = 0  # the target accuracy was reached, or nothing was evaluated
    FAILURE = 1
    USER_ERROR = 2  # in settings or data, shown in one line
    TARGET_MISSED = 3
