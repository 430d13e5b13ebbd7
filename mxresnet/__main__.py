# SPDX-License-Identifier: Apache-2.0
"""python -m mxresnet: run one rank of a training run."""

from mxresnet.cli import exit_now, main

if __name__ == "__main__":
    # All ranks have finalized MPI: nothing would end a rank that hangs in a library's cleanup.
    exit_now(main())
