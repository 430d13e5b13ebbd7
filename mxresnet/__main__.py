# SPDX-License-Identifier: Apache-2.0
"""python -m mxresnet: one rank of a training run."""

import sys

from mxresnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
