# SPDX-License-Identifier: Apache-2.0
"""Convert ImageNet, or any folder with one sub-folder per class, to MXNet RecordIO."""

import os
import sys


def exit_while_importing(*_: object) -> None:
    """End the process on a SIGINT that comes before a command has started: a signal handler.

    Libraries turn a KeyboardInterrupt during their import into errors of other kinds.
    """
    try:
        os.write(2, b"prepare: interrupted; run it again\n")
    finally:
        os._exit(130)


def _exit_after_uncaught_error(kind: type, error: BaseException, trace: object) -> None:
    """Report an error that no command has caught: a sys.excepthook."""
    if isinstance(error, KeyboardInterrupt):
        exit_while_importing()
    from prepare import command

    command.exit_after_uncaught_error(error)


if sys.argv[:1] == ["-m"]:  # python -m starts a command of this package; its imports may fail
    sys.excepthook = _exit_after_uncaught_error
    import signal
    import warnings

    warnings.simplefilter("ignore")  # with PYTHONWARNINGS=error, one of a library would be an error
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored
        signal.signal(signal.SIGINT, exit_while_importing)
    # No command uses BLAS. Its threads need memory, and where there is little, it may wait forever.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
