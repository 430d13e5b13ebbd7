# SPDX-License-Identifier: Apache-2.0
"""Load the CUDA libraries of the environment before MXNet does, whatever LD_LIBRARY_PATH contains.

setup_env.sh links them into MXNet's folder, where libmxnet.so finds its own before any others. But
cuBLAS and cuDNN load further libraries by name, and the loader searches LD_LIBRARY_PATH first for
these: those of a toolkit there may have another version. A library that is loaded already is used
for each later request of its name.
"""

from __future__ import annotations

import os
import sys

# Each after those that it needs.
_LIBRARIES = (
    *("libcublasLt.so.11", "libcublas.so.11"),
    *("libcudnn_ops_infer.so.8", "libcudnn_ops_train.so.8"),
    *("libcudnn_cnn_infer.so.8", "libcudnn_cnn_train.so.8"),
)


class _BeforeMxnet:
    """An import finder that finds nothing; it loads the libraries just before MXNet is imported."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "mxnet" and _BeforeMxnet in sys.meta_path:
            sys.meta_path.remove(_BeforeMxnet)
            _load_libraries()


def _load_libraries() -> None:
    # Not at the top: environment.py names a module in PYTHONPATH that hides one of these.
    import ctypes
    import importlib.util

    spec = importlib.util.find_spec("mxnet")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for name in _LIBRARIES:
            path = os.path.join(folder, name)
            if os.path.islink(path):
                ctypes.CDLL(path)


def install() -> None:
    """Load the libraries when this process imports MXNet, if the environment has them."""
    if _BeforeMxnet not in sys.meta_path and "mxnet" not in sys.modules:
        sys.meta_path.insert(0, _BeforeMxnet)
