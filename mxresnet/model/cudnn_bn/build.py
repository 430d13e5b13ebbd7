# SPDX-License-Identifier: Apache-2.0
"""Compile csrc/ into csrc/build/libmxresnet_{cpu,gpu}.so with g++, for the installed MXNet.

This module never imports MXNet: the GPU package of MXNet cannot be imported without a driver, for
example while an image is built.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
from typing import Dict, List, Optional, Sequence, Union

from mxresnet.errors import UserError

SOURCES = pathlib.Path(__file__).resolve().parent / "csrc"
BUILD = SOURCES / "build"
COMMAND = "python -m mxresnet.model.cudnn_bn build"
# Major versions that MXNet's CUDA 11.2 package is linked with. A second cuDNN or CUDA runtime in
# the same process would have a state of its own.
CUDNN_MAJOR, CUDA_MAJOR = 8, 11
# -Bsymbolic: MXNet's library has functions of lib_api.cc with the same names and another C++ ABI,
# and Horovod makes them visible to all libraries. This library must call its own functions, or the
# process crashes when it loads the library.
FLAGS = ("-std=c++11", "-O2", "-fPIC", "-shared", "-Wl,--no-undefined", "-Wl,-Bsymbolic")
WHEELS = (  # from the Python package index, instead of a toolkit
    "nvidia-cudnn-cu11==8.9.6.50",
    "nvidia-cuda-runtime-cu11==11.8.89",
    "nvidia-cuda-nvcc-cu11==11.8.89",
)

_METADATA_PREFIX = "mxresnet-build:"  # precedes the JSON text that is compiled into a library
_LIBRARY_FOLDERS = ("lib64", "lib", "lib/x86_64-linux-gnu", "targets/x86_64-linux/lib")
_MXNET_FILES = ("include/mxnet/lib_api.h", "src/lib_api.cc", "libinfo.py")

Argument = Union[str, pathlib.Path]


def library_path(kind: str) -> pathlib.Path:
    """Return the path of the library for "cpu" or "gpu", whether or not it is built."""
    return BUILD / f"libmxresnet_{kind}.so"


def source_hash() -> str:
    """Return a hash of the sources and compiler flags, to detect a library that is out of date."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cc")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def read_build_metadata(path: pathlib.Path) -> Optional[Dict[str, str]]:
    """Return the metadata that build_library() compiled into a library.

    Returns:
        The values of kind, mxnet (version), interface (version) and sources (hash), or None if
        build_library() did not build the file.
    """
    match = re.search(_METADATA_PREFIX.encode() + rb"(\{[^\0]*\})\0", path.read_bytes())
    return json.loads(match.group(1)) if match else None


def mxnet_folder() -> pathlib.Path:
    """Return the folder of the installed MXNet.

    Raises:
        UserError: MXNet, or a file that external operators are built from, is missing.
    """
    spec = importlib.util.find_spec("mxnet")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("MXNet is not installed: run ./setup_env.sh to install it")
    folder = pathlib.Path(next(iter(spec.submodule_search_locations)))
    for name in _MXNET_FILES:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} is missing, and external operators are built from it: install "
                "MXNet 1.9.1 from its wheel, which has the file"
            )
    return folder


def mxnet_version(folder: pathlib.Path) -> str:
    """Return the version of the MXNet in a folder, such as 1.9.1.

    Raises:
        UserError: libinfo.py does not contain a version.
    """
    path = folder / "libinfo.py"
    match = re.search(r"__version__ = ['\"]([\d.]+)", path.read_text())
    if match is None:
        raise UserError(f"{path} does not define __version__: reinstall MXNet")
    return match.group(1)


def _read_define(path: pathlib.Path, name: str) -> int:
    """Return the integer value of a macro that a header defines.

    Raises:
        UserError: The header does not define it.
    """
    match = re.search(rf"#define\s+{name}\s+(\d+)", path.read_text())
    if match is None:
        raise UserError(f"{path} does not define {name}: its package is damaged or not supported")
    return int(match.group(1))


class CudaFiles:
    """Headers and libraries of the CUDA runtime and cuDNN.

    Attributes:
        includes: Include folders.
        flags: Compiler flags for the include folders.
        cudnn_major, cuda_major: Major versions.
        libraries: Paths of the shared libraries to link with.
    """

    def __init__(self, folders: Sequence[str]):
        """Search the folders, then $CUDA_HOME, the usual system folders and installed wheels.

        Args:
            folders: CUDA toolkits, or targets of pip install --target with NVIDIA's wheels.

        Raises:
            UserError: A header or library is not found.
        """
        self._roots = self._search_roots(folders)
        cudnn = self._find_include("cudnn_version.h", "cudnn")
        runtime = self._find_include("cuda_runtime_api.h", "cuda-runtime")
        host_config = self._find_include("crt/host_config.h", "cuda-nvcc")
        self.includes = list(dict.fromkeys((cudnn, runtime, host_config)))
        # g++ always searches /usr/include. With -isystem it would search it before the folders of
        # the C++ headers, which then cannot be compiled.
        self.flags: List[Argument] = []
        for folder in self.includes:
            if folder != pathlib.Path("/usr/include"):
                self.flags += ["-isystem", folder]
        self.cudnn_major = _read_define(cudnn / "cudnn_version.h", "CUDNN_MAJOR")
        cuda_version = _read_define(runtime / "cuda_runtime_api.h", "CUDART_VERSION")
        self.cuda_major = cuda_version // 1000
        soname_version = "11.0" if self.cuda_major == 11 else str(self.cuda_major)
        self.libraries = [
            self._find_library(f"libcudnn.so.{self.cudnn_major}"),
            self._find_library(f"libcudart.so.{soname_version}"),
        ]

    @staticmethod
    def _search_roots(folders: Sequence[str]) -> List[pathlib.Path]:
        """Return the folders that may have a subfolder include or lib, in search order."""
        roots: List[pathlib.Path] = []
        for folder in [*folders, os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", "/usr"]:
            if folder:
                path = pathlib.Path(folder)
                roots += [path, *sorted(path.glob("nvidia/*"))]
        spec = importlib.util.find_spec("nvidia")
        for wheels in (spec.submodule_search_locations or []) if spec else []:
            roots += sorted(pathlib.Path(wheels).glob("*"))
        return roots

    def _find_include(self, header: str, wheel: str) -> pathlib.Path:
        """Return the include folder that has a header.

        Args:
            header: Path below the include folder.
            wheel: Part of the name of NVIDIA's wheel that has the header, for the error message.
        """
        for root in self._roots:
            if (root / "include" / header).is_file():
                return root / "include"
        raise UserError(
            f"{header} is in no CUDA folder: install the CUDA {CUDA_MAJOR}.8 toolkit and cuDNN "
            f"{CUDNN_MAJOR}, or run pip install --target DIR --no-deps {' '.join(WHEELS)} and pass "
            f"--cuda DIR ({wheel} has the header)"
        )

    def _find_library(self, name: str) -> pathlib.Path:
        for root in self._roots:
            for folder in _LIBRARY_FOLDERS:
                if (root / folder / name).is_file():
                    return root / folder / name
        raise UserError(
            f"{name} is in no CUDA folder, although its headers are in {self.includes[0]}: pass "
            "the folder of the library with --cuda DIR"
        )


def compile_library(
    sources: Sequence[pathlib.Path], target: pathlib.Path, flags: Sequence[Argument]
) -> None:
    """Compile and link a shared library with g++ or $CXX.

    The target is replaced only when the build has succeeded.

    Raises:
        UserError: There is no compiler, or it fails.
    """
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise UserError(f"C++ compiler {compiler} not found: run apt-get install g++, or set CXX")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.stem}.{os.getpid()}.part.so")
    command = [compiler, *FLAGS, "-o", partial, *sources, *flags]
    result = subprocess.run(
        list(map(str, command)), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        if result.returncode:
            log = target.with_suffix(".log")
            log.write_text(result.stdout)
            errors = (line for line in result.stdout.splitlines() if "error" in line.lower())
            first_error = next(errors, "no message").strip()
            raise UserError(f"{compiler} failed: {first_error} (complete output: {log})")
        os.replace(partial, target)
    finally:
        if partial.exists():
            partial.unlink()


def build_library(kind: str, cuda_folders: Sequence[str] = ()) -> pathlib.Path:
    """Build the library for "cpu" or "gpu" and return its path.

    Args:
        kind: "cpu" or "gpu".
        cuda_folders: Folders to search first for CUDA and cuDNN; see CudaFiles.

    Raises:
        UserError: Something is missing, has the wrong version, or cannot be compiled.
    """
    mxnet = mxnet_folder()
    version = mxnet_version(mxnet)
    interface = _read_define(mxnet / "include/mxnet/lib_api.h", "MX_LIBRARY_VERSION")
    metadata = {
        "kind": kind,
        "mxnet": version,
        "interface": str(interface),
        "sources": source_hash(),
    }
    # MXNet passes its version, in this encoding, to a library that it loads.
    major, minor, patch = map(int, version.split("."))
    version_number = major * 10000 + minor * 100 + patch
    flags: List[Argument] = [
        "-I",
        SOURCES,
        "-isystem",
        mxnet / "include",
        f"-DMXRESNET_MXNET_VERSION={version_number}",
        "-DMXRESNET_BUILD=" + json.dumps(_METADATA_PREFIX + json.dumps(metadata)),
    ]
    if kind == "gpu":
        cuda = CudaFiles(cuda_folders)
        if (cuda.cudnn_major, cuda.cuda_major) != (CUDNN_MAJOR, CUDA_MAJOR):
            raise UserError(
                f"cuDNN {cuda.cudnn_major} and CUDA {cuda.cuda_major} were found "
                f"({', '.join(map(str, cuda.includes))}), but MXNet's package uses cuDNN "
                f"{CUDNN_MAJOR} and CUDA {CUDA_MAJOR}: pass their folder with --cuda DIR"
            )
        flags += ["-DMXRESNET_GPU", *cuda.flags, *cuda.libraries]
    implementation = "batch_norm_cudnn.cc" if kind == "gpu" else "batch_norm_cpu.cc"
    sources = [SOURCES / "operators.cc", SOURCES / implementation, mxnet / "src/lib_api.cc"]
    compile_library(sources, library_path(kind), flags)
    return library_path(kind)
