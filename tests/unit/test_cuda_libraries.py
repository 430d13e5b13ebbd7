# SPDX-License-Identifier: Apache-2.0
"""MXNet gets the CUDA libraries of its environment, also where LD_LIBRARY_PATH has others."""

import os
import subprocess
import sys

from support.commands import ROOT

NAME = "libcudnn_ops_infer.so.8"
# In the place of MXNet: asks for a library as cuDNN does, by its name.
MXNET = f'import ctypes\nprint(ctypes.CDLL("{NAME}").version())\n'


def write_library(folder, version):
    folder.mkdir(parents=True)
    subprocess.run(
        ["g++", "-shared", "-fPIC", f"-Wl,-soname,{NAME}", "-x", "c++", "-", "-o", folder / NAME],
        input=f'extern "C" int version() {{ return {version}; }}\n',
        text=True,
        check=True,
    )


def test_a_library_of_another_version_is_not_used(tmp_path):
    write_library(tmp_path / "nvidia", 896)
    write_library(tmp_path / "toolkit", 821)
    (tmp_path / "mxnet").mkdir()
    (tmp_path / "mxnet" / "__init__.py").write_text(MXNET)

    def version(script):
        environ = {
            **os.environ,
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "LD_LIBRARY_PATH": str(tmp_path / "toolkit"),
        }
        return subprocess.check_output([sys.executable, "-c", script], env=environ, text=True)

    # No links in MXNet's folder: the CUDA libraries are those of the machine.
    assert version("import mxresnet, mxnet") == "821\n"
    (tmp_path / "mxnet" / NAME).symlink_to(f"../nvidia/{NAME}")
    assert version("import mxnet") == "821\n"
    assert version("import mxresnet, mxnet") == "896\n"
