# SPDX-License-Identifier: Apache-2.0
"""python -m mxresnet: one rank of a training run."""

import os
import sys

from mxresnet.cli import main

if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as end:  # --help
        sys.exit(end.code)
    # At once: the ranks have taken leave of each other, so nobody would notice one that is stopped while Python and the
    # libraries tidy up, for which they take a second. Logs are written line by line.
    os._exit(status)
