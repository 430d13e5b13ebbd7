# SPDX-License-Identifier: Apache-2.0
"""MXNet is imported with a NumPy that has no numpy.bool, as NumPy 1.24 and newer."""

import os
import subprocess
import sys

from support.commands import ROOT

# NumPy 1.24 and newer raise AttributeError; NumPy 2 has the name again.
WITHOUT_BOOL = """
import numpy, sys
vars(numpy).pop("bool", None)
others = numpy.__getattr__
def without_bool(name):
    if name == "bool":
        raise AttributeError("module 'numpy' has no attribute 'bool'")
    return others(name)
numpy.__getattr__ = without_bool
"""


def run_python(script, **environ):
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environ},
        text=True,
        capture_output=True,
    )


def test_mxnet_is_imported_without_numpy_bool():
    done = run_python(
        f"{WITHOUT_BOOL}import mxresnet, mxnet as mx\n"
        "print(mx.np.ones(1, dtype=bool).dtype, mx.nd.ones(2).asnumpy().sum())"
    )
    assert (done.returncode, done.stdout) == (0, "bool 2.0\n"), done.stderr


def test_numpy_is_changed_only_for_mxnet():
    done = run_python(f"{WITHOUT_BOOL}import mxresnet.config, json; print(hasattr(numpy, 'bool'))")
    assert done.stdout == "False\n", done.stderr


def test_without_numpy_looking_for_mxnet_is_no_error(tmp_path):
    """The launchers run on any Python, also on one that has no NumPy."""
    (tmp_path / "numpy.py").write_text("raise ImportError('no NumPy here')")
    done = run_python(
        "import mxresnet, importlib.util; print(importlib.util.find_spec('mxnet') is not None)",
        PYTHONPATH=str(tmp_path),
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
