# SPDX-License-Identifier: Apache-2.0
"""Makes mxresnet/model/cudnn_bn/csrc/build/libmxresnet_{cpu,gpu}.so with g++ from mxresnet/model/cudnn_bn/csrc and the MXNet that is installed.

Never imports MXNet: the GPU wheel cannot be imported where there is no driver, as in the build of an image.
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
from typing import Dict, List, Sequence

from mxresnet.errors import UserError

SOURCES = pathlib.Path(__file__).resolve().parent / "csrc"
BUILD = SOURCES / "build"
COMMAND = "python -m mxresnet.model.cudnn_bn build"
# What MXNet's CUDA 11.2 wheel is linked with. A second cuDNN or CUDA runtime in one process would not share its state.
CUDNN, CUDA = 8, 11
_MARK = "mxresnet-build:"
# Bsymbolic: MXNet's library has functions of lib_api.cc of the same names with another C++ ABI, and Horovod makes them visible
# to all. Ours must call our own, or the process dies as the library is loaded.
FLAGS = ("-std=c++11", "-O2", "-fPIC", "-shared", "-Wl,--no-undefined", "-Wl,-Bsymbolic")


def library(kind: str) -> pathlib.Path:
    """Where the library for "cpu" or "gpu" is, or would be."""
    return BUILD / f"libmxresnet_{kind}.so"


def source_hash() -> str:
    """A sum over the sources and how they are compiled, which says whether a library was built from them."""
    total = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cc")]):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def read_facts(path: pathlib.Path) -> Dict[str, str]:
    """What build() wrote into a library of kind, mxnet, interface and sources; empty when it did not build the file."""
    found = re.search(_MARK.encode() + rb"(\{[^\0]*\})\0", path.read_bytes())
    return json.loads(found.group(1)) if found else {}


def mxnet_folder() -> pathlib.Path:
    """The folder of the installed MXNet. Raises UserError without one, or without what extensions are built from."""
    spec = importlib.util.find_spec("mxnet")
    if spec is None:
        raise UserError("MXNet is not installed: ./setup_env.sh installs it")
    folder = pathlib.Path(next(iter(spec.submodule_search_locations)))
    for needed in ("include/mxnet/lib_api.h", "src/lib_api.cc", "libinfo.py"):
        if not (folder / needed).is_file():
            raise UserError(
                f"{folder / needed} is missing: MXNet 1.9.1's wheels have it, this MXNet cannot be extended"
            )
    return folder


def mxnet_version(folder: pathlib.Path) -> str:
    return re.search(r"__version__ = ['\"]([\d.]+)", (folder / "libinfo.py").read_text()).group(1)


def _defined(path: pathlib.Path, name: str) -> int:
    """The number that a header defines a name as."""
    return int(re.search(rf"#define\s+{name}\s+(\d+)", path.read_text()).group(1))


class CudaFiles:
    """Headers and libraries of CUDA's runtime and cuDNN, looked for in folders (toolkits, or pip --target folders with
    NVIDIA's wheels) and then in the usual places. Raises UserError when there are none."""

    def __init__(self, folders: Sequence[str]):
        spec = importlib.util.find_spec("nvidia")
        wheels = list(spec.submodule_search_locations) if spec else []
        places = [
            pathlib.Path(p)
            for p in [*folders, os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", "/usr"]
            if p
        ]
        self._roots = [
            root for place in places for root in (place, *sorted(place.glob("nvidia/*")))
        ]
        self._roots += [root for wheel in wheels for root in sorted(pathlib.Path(wheel).glob("*"))]
        headers = {
            name: self._header(*name)
            for name in (
                ("cudnn_version.h", "cudnn"),
                ("cuda_runtime_api.h", "cuda-runtime"),
                ("crt/host_config.h", "cuda-nvcc"),
            )
        }
        self.includes = list(dict.fromkeys(headers.values()))
        # The compiler looks in /usr/include anyway, and told to, it looks there before C++'s own headers, which then fail.
        self.flags = [
            word
            for folder in self.includes
            if folder != pathlib.Path("/usr/include")
            for word in ("-isystem", folder)
        ]
        version, runtime, _ = headers.values()
        self.cudnn = _defined(version / "cudnn_version.h", "CUDNN_MAJOR")
        self.cuda = _defined(runtime / "cuda_runtime_api.h", "CUDART_VERSION") // 1000
        suffix = (
            f"{self.cuda}.0" if self.cuda == 11 else str(self.cuda)
        )  # of the library's name, as CUDA has it
        self.libraries = [
            self._library(f"libcudnn.so.{self.cudnn}"),
            self._library(f"libcudart.so.{suffix}"),
        ]

    def _header(self, name: str, wheel: str) -> pathlib.Path:
        for root in self._roots:
            if (root / "include" / name).is_file():
                return root / "include"
        raise UserError(
            f"{name} is in no CUDA folder: install the CUDA {CUDA}.8 toolkit and cuDNN {CUDNN}, or pip install --target DIR --no-deps "
            f"nvidia-cudnn-cu11==8.9.6.50 nvidia-cuda-runtime-cu11==11.8.89 nvidia-cuda-nvcc-cu11==11.8.89 and give --cuda DIR ({wheel} has it)"
        )

    def _library(self, name: str) -> pathlib.Path:
        for root in self._roots:
            for folder in ("lib64", "lib", "lib/x86_64-linux-gnu", "targets/x86_64-linux/lib"):
                if (root / folder / name).is_file():
                    return root / folder / name
        raise UserError(
            f"{name} is in no CUDA folder, though its headers are in {self.includes[0]}: give its folder with --cuda DIR"
        )


def compile_library(
    sources: Sequence[pathlib.Path], target: pathlib.Path, flags: Sequence[str]
) -> None:
    """Compile and link with g++ (or $CXX), so that the target is there whole or not at all. Raises UserError."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise UserError(f"no C++ compiler ({compiler}): apt-get install g++")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.stem}.{os.getpid()}.part.so")
    command = [compiler, *FLAGS, "-o", partial, *sources, *flags]
    done = subprocess.run(
        list(map(str, command)), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        if done.returncode:
            log = target.with_suffix(".log")
            log.write_text(done.stdout)
            first = next(
                (line for line in done.stdout.splitlines() if "error" in line.lower()), "no message"
            )
            raise UserError(f"{compiler} failed: {first.strip()} (all of it: {log})")
        os.replace(partial, target)
    finally:
        if partial.exists():
            partial.unlink()


def build(kind: str, cuda_folders: Sequence[str] = ()) -> pathlib.Path:
    """Build the library for "cpu" or "gpu" and return its path. Raises UserError."""
    mxnet = mxnet_folder()
    version = mxnet_version(mxnet)
    interface = _defined(mxnet / "include/mxnet/lib_api.h", "MX_LIBRARY_VERSION")
    facts = {"kind": kind, "mxnet": version, "interface": str(interface), "sources": source_hash()}
    number = sum(int(part) * factor for part, factor in zip(version.split("."), (10000, 100, 1)))
    flags: List[str] = [
        "-I",
        SOURCES,
        "-isystem",
        mxnet / "include",
        f"-DMXRESNET_MXNET_VERSION={number}",
        "-DMXRESNET_BUILD=" + json.dumps(_MARK + json.dumps(facts)),
    ]
    sources = [
        SOURCES / "operators.cc",
        SOURCES / f"batch_norm_{'cudnn' if kind == 'gpu' else kind}.cc",
        mxnet / "src/lib_api.cc",
    ]
    if kind == "gpu":
        cuda = CudaFiles(cuda_folders)
        if (cuda.cudnn, cuda.cuda) != (CUDNN, CUDA):
            raise UserError(
                f"cuDNN {cuda.cudnn} and CUDA {cuda.cuda} were found ({', '.join(map(str, cuda.includes))}) and MXNet's wheel uses cuDNN {CUDNN} and CUDA {CUDA}: give their folder with --cuda DIR"
            )
        flags += ["-DMXRESNET_GPU", *cuda.flags, *cuda.libraries]
    compile_library(sources, library(kind), flags)
    return library(kind)
