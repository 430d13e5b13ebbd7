# SPDX-License-Identifier: Apache-2.0
"""Convert ImageNet, or any folder with one sub-folder per class, to MXNet RecordIO."""

import os
import sys


def _exit_after_uncaught_error(kind: type, error: BaseException, trace: object) -> None:
    """Report an error that no command has caught: a sys.excepthook.

    A SIGINT while modules are imported needs no further module to be reported.
    """
    if isinstance(error, KeyboardInterrupt):
        try:
            os.write(2, b"prepare: interrupted; run it again\n")
        finally:
            os._exit(130)
    from prepare import command

    command.exit_after_uncaught_error(error)


if sys.argv[:1] == ["-m"]:  # python -m starts a command of this package; its imports may fail
    # No command uses BLAS. Its threads need memory, and where there is little, it may wait forever.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.excepthook = _exit_after_uncaught_error
