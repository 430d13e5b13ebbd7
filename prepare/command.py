# SPDX-License-Identifier: Apache-2.0
"""What the commands of this package share: their output, file names, and errors of any kind.

Needs the standard library only: it also reports that the other modules cannot be imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from typing import Any, Iterator, NoReturn, Optional, TextIO, Union

from prepare import exit_while_importing
from prepare.exit_status import ExitStatus

STANDARD_DESCRIPTORS = (0, 1, 2)
NO_THREAD = "can't start new thread"  # in the RuntimeError of Python's threading


class OutputStream:
    """A text stream that loses what cannot be written; `error` is the reason, or None.

    A conversion of hours must not end because the program that reads its messages has ended.
    """

    def __init__(self, stream: Optional[TextIO]) -> None:
        """Wrap `stream`; None stands for a stream that was closed before Python started."""
        self._stream = stream or _open_null()
        self.error: Optional[Union[OSError, ValueError]] = None
        if hasattr(self._stream, "reconfigure"):  # a notebook's streams may not have this method
            self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped stream."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`; return the number of its characters."""
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Write what is in memory."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Union[OSError, ValueError]) -> None:
        """Send the rest nowhere, also what Python writes to the stream when it exits."""
        self.error = self.error or error
        null = _open_null()
        with contextlib.suppress(OSError, ValueError):  # it is closed, or is no file
            os.dup2(null.fileno(), self._stream.fileno())
        self._stream = null


def _open_null() -> TextIO:
    return open(os.devnull, "w")  # noqa: SIM115


@contextlib.contextmanager
def tolerant_output(command: str) -> Iterator[None]:
    """Let output that cannot be written be lost, and escape characters that cannot be encoded.

    The end of the command reports lost lines of standard output on standard error.

    Args:
        command: name of the command, for the message.
    """
    reserve_standard_descriptors()
    streams = sys.stdout, sys.stderr
    output, errors = (OutputStream(stream) for stream in streams)
    sys.stdout, sys.stderr = output, errors
    try:
        yield
    finally:
        output.flush()
        if output.error is not None:
            reason = getattr(output.error, "strerror", None) or output.error
            print_error(command, f"standard output: {reason}: lines of the output are lost")
        errors.flush()
        sys.stdout, sys.stderr = streams


def reserve_standard_descriptors() -> None:
    """Open /dev/null in the place of standard streams that are closed.

    Otherwise the next file to be opened would get the number of standard error, and a library's
    message would be written into it.
    """
    for descriptor in STANDARD_DESCRIPTORS:
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def print_error(command: str, text: str) -> None:
    """Print an error message of a command as one line, whatever the names in it."""
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    print(f"{command}: {line}", file=sys.stderr, flush=True)


def report_unexpected(command: str, error: BaseException, advice: str) -> ExitStatus:
    """Report an error that is no fault of the command line or of the data.

    Args:
        command: name of the command, for the message.
        error: the error.
        advice: what to do, such as "run the same command again".

    Returns:
        The exit status.
    """
    if isinstance(error, KeyboardInterrupt):
        print_error(command, f"interrupted; {advice}")
        return ExitStatus.INTERRUPTED
    if is_shortage(error):
        print_error(command, f"not enough memory: {advice}")
        return ExitStatus.IO_ERROR
    if isinstance(error, OSError) and error.filename is not None:
        name, reason = os.fsdecode(error.filename), error.strerror
        print_error(command, f"{name}: {reason}; fix this and {advice}")
        return ExitStatus.IO_ERROR
    traceback.print_exception(type(error), error, error.__traceback__)
    print_error(command, f"failed with the unexpected error above; {advice}")
    return ExitStatus.INTERNAL_ERROR


def is_shortage(error: BaseException) -> bool:
    """Return whether an error says that there is too little memory, or that threads are limited."""
    return isinstance(error, MemoryError) or NO_THREAD in str(error)


def exit_after_uncaught_error(error: BaseException) -> NoReturn:
    """Report an error that no command has caught, such as one of an import, and exit.

    Python's own exit status would be 1, which means bad data here.
    """
    status = ExitStatus.INTERNAL_ERROR
    with contextlib.suppress(OSError, ValueError):
        if isinstance(error, ImportError):
            reason = " ".join(str(error).split()) or "a package cannot be imported"
            print_error("prepare", f"cannot start: {reason}")
        else:
            status = report_unexpected("prepare", error, "run it again")
    os._exit(status)


def start(module: str) -> None:
    """Prepare this process for a command; may restart it. All modules have been imported.

    Args:
        module: name of the running module.
    """
    restart_with_utf8_names(module)
    if signal.getsignal(signal.SIGINT) is exit_while_importing:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def restart_with_utf8_names(module: str) -> None:
    """Restart this process if Python would take file names for another encoding than UTF-8.

    A .lst file holds the bytes of a file name, which im2rec copies in every locale. In a locale
    such as en_US.ISO-8859-1, Python would decode each byte as a character of its own.

    Args:
        module: name of the running module.
    """
    if sys.getfilesystemencoding() == "utf-8" or "utf8" in sys._xoptions:
        return
    environment = dict(os.environ)
    if sys.stdout is not None:  # messages keep the encoding of the terminal
        environment.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    arguments = [sys.executable, "-X", "utf8", "-m", module, *sys.argv[1:]]
    os.execve(sys.executable, arguments, environment)
