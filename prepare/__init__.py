# SPDX-License-Identifier: Apache-2.0
"""Convert ImageNet, or any folder with one sub-folder per class, to MXNet RecordIO."""
