# SPDX-License-Identifier: Apache-2.0
"""Training of ResNet-50 on MXNet. Importing this package makes MXNet importable on Python 3.12."""

from mxresnet import numpy_bool

numpy_bool.install()
