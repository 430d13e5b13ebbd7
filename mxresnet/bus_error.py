# SPDX-License-Identifier: Apache-2.0
"""Report in one line why a process is ended by SIGBUS.

DALI maps the record files into memory. The kernel sends SIGBUS to a thread that reads a page that
the file no longer has, or that its disk does not deliver. No Python code can run in such a thread,
and it must not go on. Python's faulthandler writes to a pipe in it, and then calls the handler from
before: the C library's sleep(), whose argument is the number of the signal. Meanwhile a thread that
reads the pipe ends the process. If it cannot, because the sleeping thread holds Python's lock, the
signal ends the process afterwards.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import threading

from mxresnet.errors import ExitStatus

_MESSAGE = (
    b"mxresnet: SIGBUS: a file was cut off, or its disk failed, while it was being read: do not "
    b"change the data set during a run (python -m prepare.verify checks it)\n"
)
# <signal.h>: call the handler once, and do not block the signal meanwhile.
_SA_RESETHAND, _SA_NODEFER = 0x80000000, 0x40000000
_SIGSET_BYTES = 128


class _SigAction(ctypes.Structure):
    """The C library's struct sigaction on Linux, x86-64."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * _SIGSET_BYTES),
        ("flags", ctypes.c_uint),
        ("restorer", ctypes.c_void_p),
    )


def report_bus_errors() -> None:
    """Print one line and end the process when a thread gets SIGBUS."""
    if faulthandler.is_enabled():  # PYTHONFAULTHANDLER: the user wants its output
        return
    libc = ctypes.CDLL(None, use_errno=True)
    sleep = ctypes.cast(libc.sleep, ctypes.c_void_p)
    action = _SigAction(handler=sleep.value, flags=_SA_RESETHAND | _SA_NODEFER)
    if libc.sigaction(signal.SIGBUS, ctypes.byref(action), None) != 0:
        return
    reader, writer = os.pipe()
    threading.Thread(target=_wait, args=(reader,), name="bus-error", daemon=True).start()
    faulthandler.enable(writer, all_threads=False)


def _wait(reader: int) -> None:
    """End the process when faulthandler reports a bus error; other signals end it themselves."""
    while True:
        report = os.read(reader, 4096)
        if b"Bus error" in report:
            os.write(2, _MESSAGE)
            os._exit(ExitStatus.USER_ERROR)
        if not report:
            return
