# SPDX-License-Identifier: Apache-2.0
"""Build cudnn_bn's libraries, and report what is missing to build them.

The GPU library is compiled, linked and loaded here without a GPU (slow: it downloads 0.7 GB of
cuDNN and CUDA). benchmarks/gpu_batch_norm.py tests its kernels.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from support.commands import ROOT, python
from support.cudnn_bn import PACKAGE, copy_package, python_in, unavailable_reasons

from mxresnet.errors import UserError
from mxresnet.model.cudnn_bn import build

CSRC = PACKAGE / "csrc"


def test_source_hash_covers_every_source(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    shutil.copytree(CSRC, tmp_path / "csrc", ignore=shutil.ignore_patterns("build"))
    hashes = {build.source_hash()}
    for path in sorted((tmp_path / "csrc").iterdir()):
        path.write_text(path.read_text() + "\n")
        hashes.add(build.source_hash())
    assert len(hashes) == 1 + 4


def test_missing_tools_are_reported_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mxresnet.model.cudnn_bn", "build", "--cpu"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={"PATH": str(tmp_path)},
    )
    message = "mxresnet: C++ compiler g++ not found: run apt-get install g++, or set CXX\n"
    assert (done.returncode, done.stderr) == (2, message)
    without_site_packages = "from mxresnet.model.cudnn_bn import build; build.mxnet_folder()"
    done = subprocess.run(
        [sys.executable, "-S", "-c", without_site_packages],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    message = "UserError: MXNet is not installed: run ./setup_env.sh to install it\n"
    assert done.returncode == 1 and done.stderr.endswith(message)


def fake_cuda_headers(folder, cudnn_major, cuda_version):
    for name, text in (
        ("cudnn_version.h", f"#define CUDNN_MAJOR {cudnn_major}\n"),
        ("cuda_runtime_api.h", f"#define CUDART_VERSION  {cuda_version}\n"),
        ("crt/host_config.h", ""),
    ):
        (folder / "include" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "include" / name).write_text(text)
    return folder


def fake_cuda_libraries(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).touch()


def test_cuda_of_another_version_is_rejected(tmp_path):
    folder = fake_cuda_headers(tmp_path, 9, 12040)
    fake_cuda_libraries(folder / "lib64", "libcudnn.so.9", "libcudart.so.12")
    done = python("-m", "mxresnet.model.cudnn_bn", "build", "--gpu", "--cuda", folder)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "cuDNN 9 and CUDA 12 were found" in done.stderr and "--cuda DIR" in done.stderr


def test_system_headers_are_left_to_the_compiler(tmp_path, monkeypatch):
    """In the image, cuDNN's headers are in /usr/include.

    If that folder is named to g++, C++'s headers do not find those of the C library.
    """
    toolkit = fake_cuda_headers(tmp_path, 8, 11080)
    fake_cuda_libraries(toolkit / "lib", "libcudnn.so.8", "libcudart.so.11.0")
    assert build.CudaFiles([str(toolkit)]).flags == ["-isystem", toolkit / "include"]
    find_include = build.CudaFiles._find_include

    def read_header(path):
        with (toolkit / "include" / path.name).open() as header:
            return header.read()

    def find_cudnn_in_usr_include(self, header, wheel):
        found = find_include(self, header, wheel)
        return pathlib.Path("/usr/include") if wheel == "cudnn" else found

    monkeypatch.setattr(build.pathlib.Path, "read_text", read_header)
    monkeypatch.setattr(build.CudaFiles, "_find_include", find_cudnn_in_usr_include)
    assert build.CudaFiles([str(toolkit)]).flags == ["-isystem", toolkit / "include"]


def test_cuda_headers_without_their_library_are_rejected(tmp_path):
    with pytest.raises(UserError, match="libcudnn.so.7 is in no CUDA folder"):
        build.CudaFiles([str(fake_cuda_headers(tmp_path, 7, 11080))])


def test_failed_build_keeps_the_previous_library(tmp_path):
    source, target = tmp_path / "broken.cc", tmp_path / "build" / "libbroken.so"
    source.write_text("int good() { return 0; }\nint bad() { return nothing; }\n")
    target.parent.mkdir()
    target.write_text("previous")
    with pytest.raises(UserError) as error:
        build.compile_library([source], target, [])
    assert "broken.cc:2" in str(error.value) and "\n" not in str(error.value)
    assert target.read_text() == "previous"
    names = sorted(path.name for path in target.parent.iterdir())
    assert names == ["libbroken.log", "libbroken.so"]


def test_sources_compile_without_a_warning():
    command = [
        *("g++", "-std=c++11", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"),
        *("-isystem", build.mxnet_folder() / "include"),
        *("-DMXRESNET_MXNET_VERSION=10901", '-DMXRESNET_BUILD=""', "-DMXRESNET_GPU"),
        *(CSRC / "operators.cc", CSRC / "batch_norm_cpu.cc"),
    ]
    done = subprocess.run(list(map(str, command)), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_image_builds_the_library_that_it_runs_with():
    build_stage, run_stage = (ROOT / "Dockerfile").read_text().split("\nFROM ")[-2:]
    assert "SETUP_DEVICE=gpu ./setup_env.sh" in build_stage
    set_up = (ROOT / "mxresnet" / "launch" / "setup_gpu.sh").read_text()
    assert "-m mxresnet.model.cudnn_bn build --gpu" in set_up
    assert "COPY --from=build /workspace/mxresnet " in run_stage
    assert "mxresnet/model/cudnn_bn/csrc/build" in (ROOT / ".dockerignore").read_text().splitlines()
    library = "mxresnet/model/cudnn_bn/csrc/build/libmxresnet_gpu.so"
    ignored = subprocess.run(["git", "check-ignore", "-q", library], cwd=ROOT)
    assert ignored.returncode == 0


WITHOUT_CUDNN_BN = """
import mxnet as mx
from mxresnet.config import Config
from mxresnet.model import ops, resnet
from mxresnet.model.select_ops import cudnn_bn_unavailable_reason, select_ops
assert ops.cudnn_bn is None
layouts = {f"{kind}_layout": "NHWC" for kind in ("input", "conv", "batchnorm", "pooling")}
config = Config(dtype="float16", **layouts)
reason = cudnn_bn_unavailable_reason(config, mx.gpu(0))
selected = select_ops(config, True, reason)
assert type(selected) is ops.PlainOps, selected
network = resnet.build(selected, config, 1000)
print(reason, len(network.list_arguments()))
"""


def test_without_the_folder_the_stock_operators_are_used(tmp_path):
    ignored = shutil.ignore_patterns("cudnn_bn", "__pycache__")
    shutil.copytree(ROOT / "mxresnet", tmp_path / "mxresnet", ignore=ignored)
    printed = python_in(tmp_path, "-c", WITHOUT_CUDNN_BN)
    assert printed == "mxresnet/model/cudnn_bn is not installed 163\n"


# Loads the GPU library into the CPU package of MXNet, and infers shapes and types.
GPU_LIBRARY_PROBE = """
import mxnet as mx
from mxresnet.model.cudnn_bn import runtime
runtime.check_and_load(mx.gpu(0))
data, addend = mx.sym.var("data"), mx.sym.var("addend")
net = runtime.batch_norm(data, "bn", 64, addend=addend)
internals = net.get_internals()
names, shape = internals.list_outputs(), (4, 14, 14, 64)
shapes = dict(zip(names, internals.infer_shape(data=shape, addend=shape)[1]))
types = {n: t.__name__ for n, t in zip(names, internals.infer_type(data="float16")[1])}
assert shapes["bn_output"] == shape and types["bn_output"] == "float16", (shapes, types)
assert types["addend"] == "float16", types
assert types["bn_gamma"] == types["bn_moving_var"] == "float32", types
for mistake in (
    lambda: net.infer_type(data="float32"),
    lambda: runtime.batch_norm(data, "bn", 64, layout="NCHW").infer_shape(data=(2, 64, 3, 3)),
    lambda: runtime.batch_norm(data, "bn", 6).infer_shape(data=(2, 3, 3, 6)),
):
    try:
        mistake()
    except mx.MXNetError as error:
        print(runtime.short_message(error))
"""


@pytest.mark.slow
def test_gpu_library_builds_and_loads(tmp_path, cuda_wheels):
    copy_package(tmp_path)
    python_in(tmp_path, "-m", "mxresnet.model.cudnn_bn", "build", "--gpu", "--cuda", cuda_wheels)
    libraries = os.pathsep.join(
        str(cuda_wheels / "nvidia" / part / "lib") for part in ("cudnn", "cuda_runtime")
    )
    output = python_in(tmp_path, "-c", GPU_LIBRARY_PROBE, LD_LIBRARY_PATH=libraries)
    # MXNet prints the arguments of a failed inference too.
    messages = [line for line in output.splitlines() if line.startswith("mxresnet_")]
    assert messages[0].endswith("data must be float16 in the gpu build")
    assert "cuDNN's fused batch norm is for NHWC only" in messages[1]
    assert "channels in multiples of 4 (data of 2 x 3 x 3 x 6)" in messages[2]
    # This MXNet has no GPU, and there may be no cuDNN: there is a reason, and no crash.
    (reason,) = unavailable_reasons(tmp_path, "none", device="gpu", LD_LIBRARY_PATH=libraries)
    assert reason != "None"
    (reason,) = unavailable_reasons(tmp_path, "none", device="gpu", LD_LIBRARY_PATH="")
    assert "libcudnn.so.8: cannot open shared object file" in reason
