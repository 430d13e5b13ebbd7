# SPDX-License-Identifier: Apache-2.0
"""Training of ResNet-50 on MXNet. Importing this package prepares the import of MXNet."""

from mxresnet import cuda_libraries, numpy_bool

numpy_bool.install()
cuda_libraries.install()
