# SPDX-License-Identifier: Apache-2.0
"""The error that every package raises for wrong input, and the exit statuses of a training run."""

from __future__ import annotations

import enum
import os
import sys
from typing import NoReturn

MAX_MESSAGE_CHARACTERS = 2000


class UserError(Exception):
    """Wrong settings, data or environment.

    The message is one line that is shown without a traceback. It contains the name and the value of
    what is wrong, why it matters, and what to do.
    """

    def __init__(self, message: str) -> None:
        """Store the message as one line: a value or a name in it may have any characters."""
        super().__init__(one_line(message))


class Interrupted(Exception):  # noqa: N818 (not an error)
    """The run was stopped by SIGTERM after a checkpoint; it continues when it is started again."""


def one_line(text: str) -> str:
    """Return a text with spaces for line breaks and escapes for other control characters.

    The middle of a text of more than MAX_MESSAGE_CHARACTERS is left out.
    """
    if len(text) > MAX_MESSAGE_CHARACTERS:
        half = MAX_MESSAGE_CHARACTERS // 2
        text = f"{text[:half]} ... {text[-half:]}"
    joined = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)


class ExitStatus(enum.IntEnum):
    """Exit statuses of ``python -m mxresnet`` and of the launchers around it."""

    SUCCESS = 0  # the target accuracy was reached, or nothing was evaluated
    FAILURE = 1  # any other error; its traceback is on standard error
    USER_ERROR = 2  # wrong settings or data, reported in one line
    TARGET_MISSED = 3  # the last epoch ended below the target accuracy
    TERMINATED = 143  # ended by SIGTERM, after a checkpoint; 128 + its number, as in a shell
    INTERRUPTED = 130  # ended by SIGINT; the same as 128 + its number in a shell


def exit_now(status: ExitStatus) -> NoReturn:
    """End the process without the cleanup of Python and its libraries, which takes a second."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
