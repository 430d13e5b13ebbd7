# SPDX-License-Identifier: Apache-2.0
"""How the operators' libraries are built, and what is said when they cannot be.

The GPU library is compiled, linked and loaded here, without a GPU (slow: it downloads cuDNN, 0.7 GB);
benchmarks/gpu_batch_norm.py tests its kernels.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from support.commands import ROOT, python

from mxresnet.errors import UserError
from mxresnet.model.cudnn_bn import build as extension_build

CSRC = ROOT / "mxresnet" / "model" / "cudnn_bn" / "csrc"
WHEELS = [
    "nvidia-cudnn-cu11==8.9.6.50",
    "nvidia-cuda-runtime-cu11==11.8.89",
    "nvidia-cuda-nvcc-cu11==11.8.89",
]


def package_in(folder):
    """Copy what the library is made of, to change and to build in; return the copy of the cudnn_bn package."""
    package = folder / "mxresnet"
    for name in ("__init__.py", "config.py", "errors.py", "model/__init__.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "mxresnet" / name, package / name)
    copy = package / "model" / "cudnn_bn"
    shutil.copytree(CSRC.parent, copy, ignore=shutil.ignore_patterns("build", "__pycache__"))
    return copy


def inside(folder, *arguments, **env):
    environ = {**os.environ, "PYTHONPATH": str(folder), **env}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=300,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ASK = """
import os
import mxnet as mx
from mxresnet.model.cudnn_bn import runtime
patience = runtime.SELF_TEST_SECONDS
for how in {ways}:
    os.environ["SPOILT"] = how
    runtime.SELF_TEST_SECONDS = 6 if how == "hang" else patience
    runtime.ready.cache_clear()
    print("says", runtime.unavailable_reason(mx.{device}()) or "", "|")
"""


def reasons_in(folder, *ways, device="cpu", **env):
    """What ready() says of the library there, asked by a process that goes on after it, once with each value of SPOILT."""
    said = re.findall(
        r"says (.*) \|\n", inside(folder, "-c", ASK.format(ways=ways, device=device), **env)
    )
    assert len(said) == len(ways)
    return said


def test_the_source_hash_sees_every_source(monkeypatch, tmp_path):
    monkeypatch.setattr(extension_build, "SOURCES", tmp_path / "csrc")
    shutil.copytree(CSRC, tmp_path / "csrc", ignore=shutil.ignore_patterns("build"))
    sums = {extension_build.source_hash()}
    for path in sorted((tmp_path / "csrc").iterdir()):
        path.write_text(path.read_text() + "\n")
        sums.add(extension_build.source_hash())
    assert len(sums) == 1 + 4


def test_what_is_missing_to_build_is_told_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mxresnet.model.cudnn_bn", "build", "--cpu"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={"PATH": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (
        2,
        "mxresnet: no C++ compiler (g++): apt-get install g++\n",
    )
    done = subprocess.run(  # a Python without MXNet
        [
            sys.executable,
            "-S",
            "-c",
            "import sys; from mxresnet.model.cudnn_bn import build as extension_build as b; b.mxnet_folder()",
        ],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 1 and done.stderr.endswith(
        "UserError: MXNet is not installed: ./setup_env.sh installs it\n"
    )


def cuda_folder(folder, cudnn, runtime):
    for name, text in (
        ("cudnn_version.h", f"#define CUDNN_MAJOR {cudnn}\n"),
        ("cuda_runtime_api.h", f"#define CUDART_VERSION  {runtime}\n"),
        ("crt/host_config.h", ""),
    ):
        (folder / "include" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "include" / name).write_text(text)
    return folder


def test_a_cuda_that_mxnet_cannot_share_is_refused(tmp_path):
    folder = cuda_folder(tmp_path, 9, 12040)
    (folder / "lib64").mkdir()
    for name in ("libcudnn.so.9", "libcudart.so.12"):
        (folder / "lib64" / name).touch()
    done = python("-m", "mxresnet.model.cudnn_bn", "build", "--gpu", "--cuda", folder)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "cuDNN 9 and CUDA 12 were found" in done.stderr and "--cuda DIR" in done.stderr


def test_headers_of_the_system_are_left_to_the_compiler(tmp_path, monkeypatch):
    """As in the image, where cuDNN's are in /usr/include: named to g++, that folder hides the C library from C++'s headers."""
    toolkit = cuda_folder(tmp_path, 8, 11080)
    (toolkit / "lib").mkdir()
    for name in ("libcudnn.so.8", "libcudart.so.11.0"):
        (toolkit / "lib" / name).touch()
    assert extension_build.CudaFiles([str(toolkit)]).flags == ["-isystem", toolkit / "include"]
    found = extension_build.CudaFiles._header
    monkeypatch.setattr(
        extension_build.pathlib.Path,
        "read_text",
        lambda path: (toolkit / "include" / path.name).open().read(),
    )
    monkeypatch.setattr(
        extension_build.CudaFiles,
        "_header",
        lambda self, name, wheel: (
            pathlib.Path("/usr/include") if wheel == "cudnn" else found(self, name, wheel)
        ),
    )
    assert extension_build.CudaFiles([str(toolkit)]).flags == ["-isystem", toolkit / "include"]


def test_cuda_headers_without_their_library_are_refused(tmp_path):
    with pytest.raises(UserError, match="libcudnn.so.7 is in no CUDA folder"):
        extension_build.CudaFiles([str(cuda_folder(tmp_path, 7, 11080))])


def test_a_failed_build_leaves_what_was_there(tmp_path):
    source, target = tmp_path / "broken.cc", tmp_path / "build" / "libbroken.so"
    source.write_text("int good() { return 0; }\nint bad() { return nothing; }\n")
    target.parent.mkdir()
    target.write_text("before")
    with pytest.raises(UserError) as error:
        extension_build.compile_library([source], target, [])
    assert "broken.cc:2" in str(error.value) and "\n" not in str(error.value)
    assert target.read_text() == "before" and sorted(p.name for p in target.parent.iterdir()) == [
        "libbroken.log",
        "libbroken.so",
    ]


def test_our_cpp_compiles_without_a_warning():
    mxnet = extension_build.mxnet_folder()
    command = [
        "g++",
        "-std=c++11",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-isystem",
        mxnet / "include",
        "-DMXRESNET_MXNET_VERSION=10901",
        '-DMXRESNET_BUILD=""',
        "-DMXRESNET_GPU",
        CSRC / "operators.cc",
        CSRC / "batch_norm_cpu.cc",
    ]
    done = subprocess.run(list(map(str, command)), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_image_builds_the_library_it_runs_with():
    build, run = (ROOT / "Dockerfile").read_text().split("\nFROM ")[-2:]
    assert (
        "python -m mxresnet.model.cudnn_bn build --gpu" in build
        and "COPY --from=build /workspace/mxresnet " in run
    )
    assert "mxresnet/model/cudnn_bn/csrc/build" in (ROOT / ".dockerignore").read_text().splitlines()
    ignored = subprocess.run(
        ["git", "check-ignore", "-q", "mxresnet/model/cudnn_bn/csrc/build/libmxresnet_gpu.so"],
        cwd=ROOT,
    )
    assert ignored.returncode == 0


# The GPU library, without a GPU

GPU_PROBE = """
import ctypes, sys
import mxnet as mx
from mxresnet.model.cudnn_bn import runtime
problem = runtime._unfit(mx.gpu()) or runtime._load(mx.cpu().__class__("gpu", 0))
assert not problem, problem
library = ctypes.CDLL(str(runtime.extension_build.library("gpu")))
library.mxresnet_use_device(-1)  # none: sizes are estimated
data, addend = mx.sym.var("data"), mx.sym.var("addend")
net = runtime.batch_norm(data, "bn", 64, addend=addend)
whole = net.get_internals()
shapes = dict(zip(whole.list_outputs(), whole.infer_shape(data=(4, 14, 14, 64), addend=(4, 14, 14, 64))[1]))
types = dict(zip(whole.list_outputs(), whole.infer_type(data="float16")[1]))
assert shapes["bn_output0"] == (4, 14, 14, 64) and shapes["bn_output1"] == shapes["bn_output2"] == (64,), shapes
assert shapes["bn_output3"][0] >= 4 * 14 * 14 * 64 // 8, shapes
assert [types[f"bn_output{i}"].__name__ for i in range(4)] == ["float16", "float32", "float32", "uint8"], types
assert types["addend"].__name__ == "float16" and types["bn_gamma"].__name__ == types["bn_moving_var"].__name__ == "float32"
def short(call):
    try:
        call()
    except mx.MXNetError as error:
        return runtime._short(error)
print(short(lambda: net.infer_type(data="float32")))
print(short(lambda: runtime.batch_norm(data, "bn", 64, layout="NCHW").infer_shape(data=(2, 64, 3, 3))))
print(short(lambda: runtime.batch_norm(data, "bn", 6).infer_shape(data=(2, 3, 3, 6))))
"""


@pytest.fixture(scope="module")
def cuda_wheels():
    """Headers and libraries of cuDNN 8 and CUDA 11 from the package index, kept: 1.1 GB."""
    folder = (
        pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        / "mxresnet"
        / "cuda11"
    )
    if not (folder / "complete").exists():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                "--upgrade",
                "--no-cache-dir",
                "--target",
                folder,
                *WHEELS,
            ],
            check=True,
        )
        (folder / "complete").touch()
    return folder


@pytest.mark.slow
def test_the_gpu_library_builds_and_loads(tmp_path, cuda_wheels):
    package_in(tmp_path)
    inside(tmp_path, "-m", "mxresnet.model.cudnn_bn", "build", "--gpu", "--cuda", cuda_wheels)
    libraries = os.pathsep.join(
        str(cuda_wheels / "nvidia" / part / "lib") for part in ("cudnn", "cuda_runtime")
    )
    said = inside(tmp_path, "-c", GPU_PROBE, LD_LIBRARY_PATH=libraries).splitlines()
    said = [
        line for line in said if line.startswith("mxresnet_")
    ]  # MXNet prints the arguments of a failed inference
    assert (
        said[0].endswith("data must be float16 in the gpu build")
        and "cuDNN's fused batch norm is for NHWC only" in said[1]
    )
    assert "channels in multiples of 4 (data of 2 x 3 x 3 x 6)" in said[2]
    # This MXNet has no GPU, and one may have no cuDNN: a reason, and no crash.
    assert reasons_in(tmp_path, "not at all", device="gpu", LD_LIBRARY_PATH=libraries) != [""]
    assert (
        "libcudnn.so.8: cannot open shared object file"
        in reasons_in(tmp_path, "not at all", device="gpu", LD_LIBRARY_PATH="")[0]
    )
