# SPDX-License-Identifier: Apache-2.0
"""Make MXNet 1.9.1 importable with NumPy 1.24 or newer, as on Python 3.12.

MXNet uses the alias numpy.bool of Python's bool, which NumPy 1.24 removed. NumPy releases that have
it have no packages for Python 3.12.
"""

from __future__ import annotations

import contextlib
import sys


class _BeforeMxnet:
    """An import finder that restores the alias just before MXNet is imported, and finds nothing."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "mxnet":
            with contextlib.suppress(ImportError):
                import numpy

                vars(numpy).setdefault("bool", bool)


def install() -> None:
    """Restore numpy.bool when this process imports MXNet. A second call changes nothing."""
    if _BeforeMxnet not in sys.meta_path:
        sys.meta_path.insert(0, _BeforeMxnet)
