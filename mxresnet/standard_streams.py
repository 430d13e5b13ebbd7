# SPDX-License-Identifier: Apache-2.0
"""Standard streams that are closed, full, or whose reader has ended; and SIGINT.

Python raises an exception at each write to such a stream, also for a message or a traceback. Here
text that cannot be written is lost, and the caller asks for the reason where the loss matters.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from typing import Any, Optional, TextIO, Union

from mxresnet.errors import ExitStatus, UserError

_STANDARD_DESCRIPTORS = (0, 1, 2)
_interrupted = threading.Lock()


class TolerantStream:
    """A text stream that loses what cannot be written; `error` is the first reason, or None."""

    def __init__(self, stream: Optional[TextIO]) -> None:
        """Wrap a stream; None stands for one that was closed before Python started."""
        self._stream = stream or _open_null()
        self.error: Optional[Union[OSError, ValueError]] = None
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped stream."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text; return the number of its characters."""
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._discard_rest(error)
        return len(text)

    def flush(self) -> None:
        """Write what is in memory."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._discard_rest(error)

    def _discard_rest(self, error: Union[OSError, ValueError]) -> None:
        """Send all further text to /dev/null, also the text of libraries and child processes."""
        self.error = self.error or error
        null = _open_null()
        with contextlib.suppress(OSError, ValueError):  # it is closed, or is no file
            os.dup2(null.fileno(), self._stream.fileno())
        self._stream = null


def _open_null() -> TextIO:
    return open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)


def prepare_streams() -> None:
    """Replace standard output and standard error by tolerant streams; end in one line on SIGINT.

    Call this before a module stores sys.stdout or sys.stderr. In the place of a closed descriptor
    /dev/null is opened: otherwise the next file to be opened would get its number, and messages
    would be written into that file.
    """
    for descriptor in _STANDARD_DESCRIPTORS:
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = TolerantStream(sys.stdout), TolerantStream(sys.stderr)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # not ignored by the caller
        _handle_interrupts()


def _handle_interrupts() -> None:
    """End the process on SIGINT, also while the main thread waits for a library.

    Python calls a handler only when the library returns, for MXNet at the end of an epoch. It
    writes the signal's number to the pipe at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGINT, _end_interrupted)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait() -> None:
        while signal.SIGINT not in os.read(reader, 1):
            pass
        _end_interrupted()

    threading.Thread(target=wait, name="interrupts", daemon=True).start()


def _end_interrupted(*_: Any) -> None:
    """End the process: a handler of SIGINT.

    KeyboardInterrupt would be lost where libraries ignore exceptions, as in a finalizer. When this
    rank has ended, the launcher ends the others.
    """
    if not _interrupted.acquire(blocking=False):
        return  # the other thread ends the process
    with contextlib.suppress(OSError):
        os.write(2, b"mxresnet: interrupted\n")  # sys.stderr may be in use by the code below
    os._exit(ExitStatus.INTERRUPTED)


def output_error() -> Optional[Union[OSError, ValueError]]:
    """Return why text on standard output was lost, or None if none was.

    A stream that was closed before the program started loses nothing: its text is not wanted.
    """
    sys.stdout.flush()
    return getattr(sys.stdout, "error", None)


def check_output() -> None:
    """Raise UserError if text on standard output was lost, unless its reader has ended."""
    error = output_error()
    if error is not None and getattr(error, "errno", None) != errno.EPIPE:
        raise UserError(f"standard output cannot be written ({describe_error(error)})")


def describe_error(error: Union[OSError, ValueError]) -> str:
    return getattr(error, "strerror", None) or str(error)
