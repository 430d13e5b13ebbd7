# SPDX-License-Identifier: Apache-2.0
"""Convert ImageNet, or any folder with one sub-folder per class, to MXNet RecordIO."""

import os
import sys

if sys.argv[:1] == ["-m"]:  # python -m starts a command of this package; its imports may fail
    # No command uses BLAS. Its threads need memory, and where there is little, it may wait forever.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from prepare import command

    sys.excepthook = command.exit_after_uncaught_error
