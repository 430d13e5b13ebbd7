# SPDX-License-Identifier: Apache-2.0
"""Turns ImageNet, or any folder with one sub-folder per class, into MXNet RecordIO."""
