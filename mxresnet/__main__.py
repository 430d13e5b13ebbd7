# SPDX-License-Identifier: Apache-2.0
"""python -m mxresnet: run one rank of a training run."""

from mxresnet.cli import exit_now, main

if __name__ == "__main__":
    # The ranks have left MPI together: nothing would end one that hangs in a library's cleanup.
    exit_now(main())
