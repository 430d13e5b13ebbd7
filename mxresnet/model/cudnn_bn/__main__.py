# SPDX-License-Identifier: Apache-2.0
"""python -m mxresnet.model.cudnn_bn build|test: make the batch-norm library, or compare its operators with MXNet's."""

import sys

from mxresnet.model.cudnn_bn.runtime import main

if __name__ == "__main__":
    sys.exit(main())
