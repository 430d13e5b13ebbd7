# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu_batch_norm.py without a GPU.

Its checks find errors in a library. On a fake cuDNN they check the calls of cuDNN. It times the
batch norms of the network.
"""

import concurrent.futures
import ctypes
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support.commands import ROOT, python
from support.cudnn_bn import FAKE_CUDNN, copy_package, python_in

from mxresnet.config import Config
from mxresnet.errors import UserError
from mxresnet.model import resnet
from mxresnet.model.cudnn_bn import build
from mxresnet.model.ops import PlainOps

BENCHMARKS = ROOT / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_batch_norm.py"
sys.path.insert(0, str(BENCHMARKS))

import batch_norm_library as bn_library  # noqa: E402
import batch_norm_reference as bn_reference  # noqa: E402
import batch_norm_timing as bn_timing  # noqa: E402

STRUCTURES = {
    "MxresnetBatchNorm": bn_library.CallStruct,
    "MxresnetSizes": bn_library.SizesStruct,
}


def test_checks_pass_on_the_cpu_library():
    done = python(SCRIPT, "--cpu")
    *lines, last = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert last == "0 wrong on the C++ library on the CPU"
    assert len(lines) == 30 and all(line.endswith("right") for line in lines)


# (correct text of batch_norm_cpu.cc, wrong text, message of the checks)
MUTATIONS = [
    ("variance * count / (count - 1)", "variance", "running_variance is off"),
    ("(1 - momentum) * mean", "momentum * mean", "running_mean is off"),
    ("if (!pass) value = 0;", "", "y is off"),
    ("dz[i] = static_cast<float>(gradient)", "dz[i] = dy[i]", "dz is off"),
    ("normalized * dgamma / count", "0 * normalized * dgamma", "dx is off"),
    ("gradient - dbeta / count", "gradient - dbeta / (count + 1)", "dx is off"),
    ("relu_passed(mask, i) ?", "relu_passed(mask, i + 1) ?", "dx is off"),
    (
        "call->dgamma[c] = static_cast<float>(dgamma);",
        "call->dgamma[c] = static_cast<float>(dgamma * 1.001);",
        "dgamma is off",
    ),
    (
        "call->saved_inverse_std[c] = static_cast<float>(inverse_std);",
        "call->saved_inverse_std[c] = static_cast<float>(inverse_std) * NAN;",
        "saved_inverse_std is off",
    ),
    (
        "call->running_mean[c], inverse_std, nullptr",
        "0, inverse_std, nullptr",
        "evaluated_y is off",
    ),
    (
        "y[i] = static_cast<float>(value);",
        "y[i] = y[i + 1] = static_cast<float>(value);",
        "y was written past its end",
    ),
]


@pytest.mark.parametrize(
    "right, wrong, message", MUTATIONS, ids=[f"{message} ({w})" for _, w, message in MUTATIONS]
)
def test_checks_find_an_error(tmp_path, right, wrong, message):
    text = (build.SOURCES / "batch_norm_cpu.cc").read_text()
    assert text.count(right) == 1
    source, library = tmp_path / "wrong.cc", tmp_path / "libwrong.so"
    source.write_text(text.replace(right, wrong))
    build.compile_library([source], library, ["-I", build.SOURCES])
    done = python(SCRIPT, "--cpu", "--library", library)
    assert done.returncode == 1 and message in done.stdout, done.stdout + done.stderr


def test_structures_equal_those_of_the_header(tmp_path):
    lines = [
        f'printf("{name} {field} %zu\\n", offsetof({name}, {field}));'
        for name, structure in STRUCTURES.items()
        for field, _ in structure._fields_
    ]
    sizes = "sizeof(MxresnetBatchNorm), sizeof(MxresnetSizes), MXRESNET_MESSAGE_BYTES"
    lines.append(f'printf("%zu %zu %d\\n", {sizes});')
    source, program = tmp_path / "offsets.c", tmp_path / "offsets"
    main = "int main(void) {" + "\n".join(lines) + "return 0; }\n"
    source.write_text('#include <stdio.h>\n#include "batch_norm.h"\n' + main)
    subprocess.run(["g++", "-x", "c++", "-I", build.SOURCES, source, "-o", program], check=True)
    done = subprocess.run([program], text=True, capture_output=True, check=True)
    *offsets, last = done.stdout.splitlines()
    for line in offsets:
        name, field, offset = line.split()
        assert getattr(STRUCTURES[name], field).offset == int(offset), line
    sizes = [ctypes.sizeof(structure) for structure in STRUCTURES.values()]
    assert last.split() == [str(size) for size in [*sizes, bn_library.MESSAGE_BYTES]]


def test_timed_batch_norms_are_those_of_the_network():
    config = Config(bn_gamma_init0=True)
    outputs = resnet.build(PlainOps(config), config, 1000).get_internals()
    shapes = dict(zip(outputs.list_outputs(), outputs.infer_shape(data=(1, 3, 224, 224))[1]))
    found = {}
    for _, name in resnet.layer_names(50):
        _, channels, size, _ = shapes[f"{name}_output"]
        operation = bn_library.BN_RELU
        if name.endswith("sc"):
            operation = bn_library.BN
        elif name.endswith("bn3"):
            operation = bn_library.BN_ADD_RELU
        key = (operation, size, channels)
        found[key] = found.get(key, 0) + 1
    assert found == {layer[:3]: layer[3] for layer in bn_timing.RESNET50}
    assert len(bn_timing.RESNET50) == len(found)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")
def test_without_a_gpu_there_is_one_line():
    done = python(SCRIPT)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "PyTorch is not installed" in done.stderr or "no NVIDIA GPU" in done.stderr


class FakeGpuMemory(bn_library.HostMemory):
    """Host memory with the type and stream of a GPU: the fake cuDNN requires this stream."""

    dtype = np.dtype("float16")
    rounding = 2.0**-11
    smallest = 2.0**-24
    stream = 5
    name = "the fake cuDNN"


@pytest.fixture(scope="module")
def library_on_fake_cudnn(cuda_wheels, tmp_path_factory):
    """batch_norm_cudnn.cc linked with fake_cudnn.cc; both are compiled with cuDNN's headers."""
    folder = tmp_path_factory.mktemp("fake_cudnn")
    flags = build.CudaFiles([str(cuda_wheels)]).flags
    fake, library = folder / "libfake_cudnn.so", folder / "libbatch_norm.so"
    build.compile_library([FAKE_CUDNN], fake, flags)
    sources = [build.SOURCES / "batch_norm_cudnn.cc", fake]
    build.compile_library(sources, library, [*flags, f"-Wl,-rpath,{folder}"])
    return ctypes.CDLL(str(library))


def run_in_new_thread(function):
    """Run a function in a thread that has no cuDNN handle yet."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.mark.slow
def test_cudnn_calls_are_right(library_on_fake_cudnn, capsys):
    failures = bn_reference.run_checks(library_on_fake_cudnn, FakeGpuMemory(), small=True)
    assert failures == 0, capsys.readouterr().out


CUDNN_SOURCE = (build.SOURCES / "batch_norm_cudnn.cc").read_text()
CHECKED_FUNCTIONS = set(re.findall(r'check\("(\w+)"', CUDNN_SOURCE))


def test_every_cudnn_function_with_a_status_is_checked():
    """The fake has no other functions: batch_norm_cudnn.cc would not link."""
    fake = FAKE_CUDNN.read_text()
    functions = set(re.findall(r"^cudnnStatus_t (\w+)\([^;]*?\{\s*MAY_FAIL", fake, re.M))
    assert len(functions) == 14 and functions <= CHECKED_FUNCTIONS


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CHECKED_FUNCTIONS))
def test_failure_of_cudnn_is_reported(library_on_fake_cudnn, monkeypatch, name):
    monkeypatch.setenv("FAKE_CUDNN_FAILING_FUNCTION", name)
    shape = (2, 3, 5, 8)
    errors, _ = run_in_new_thread(
        lambda: bn_reference.check_shape(
            library_on_fake_cudnn, FakeGpuMemory(), bn_library.BN_ADD_RELU, shape
        )
    )
    assert len(errors) == 1
    assert re.search(rf"^{name}: a (cuDNN|CUDA) error \(data of 2 x 3 x 5 x 8\)$", errors[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        ({"reserve_bytes": 53}, "reserve of batch norm: 54 bytes are needed and 53 were given"),
        (
            {"workspace_bytes": 103},
            "workspace of batch norm: 104 bytes are needed and 103 were given",
        ),
        ({"h": 4}, "the plan is for another operation or shape"),
        ({"operation": bn_library.BN}, "the plan is for another operation or shape"),
    ],
)
def test_call_that_does_not_fit_its_plan_is_rejected(library_on_fake_cudnn, change, message):
    operation, shape = bn_library.BN_RELU, (2, 3, 5, 8)
    layer = bn_library.BatchNormLayer(library_on_fake_cudnn, FakeGpuMemory(), operation, *shape)
    layer.set(bn_reference.random_inputs(operation, shape, np.float16, 0))
    layer.forward()
    for name, value in change.items():
        setattr(layer.call, name, value)
    with pytest.raises(UserError) as error:
        layer.forward()
    assert message in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        ({"channel_last": 0}, "layout NCHW: cuDNN's fused batch norm is for NHWC only"),
        ({"c": 6}, "multiples of 4"),
        ({"n": 0}, "data has no elements"),
        ({"n": 1 << 40}, "more than 2^31 - 1 elements"),
    ],
)
def test_invalid_shape_is_rejected(library_on_fake_cudnn, change, message):
    call = bn_library.CallStruct(
        **{
            "operation": bn_library.BN_RELU,
            "channel_last": 1,
            "n": 2,
            "h": 3,
            "w": 5,
            "c": 8,
            **change,
        }
    )
    text = ctypes.create_string_buffer(bn_library.MESSAGE_BYTES)
    sizes, plan = bn_library.SizesStruct(), ctypes.c_void_p()
    pointers = map(ctypes.byref, (call, plan, sizes))
    assert library_on_fake_cudnn.mxresnet_plan_create(*pointers, text) == 1
    assert message in text.value.decode()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name for name in sorted(CHECKED_FUNCTIONS) if re.search("Create|Get.*Size|Derive", name)],
)
def test_a_layer_asks_cudnn_for_descriptors_and_sizes_once(
    library_on_fake_cudnn, monkeypatch, name
):
    operation, shape = bn_library.BN_ADD_RELU, (2, 3, 5, 8)
    layer = bn_library.BatchNormLayer(library_on_fake_cudnn, FakeGpuMemory(), operation, *shape)
    monkeypatch.setenv("FAKE_CUDNN_FAILING_FUNCTION", name)
    bn_reference.run_step(
        layer, bn_reference.random_inputs(operation, shape, np.float16, 0), operation
    )
    with pytest.raises(UserError, match=name):
        run_in_new_thread(
            lambda: bn_library.BatchNormLayer(
                library_on_fake_cudnn, FakeGpuMemory(), operation, *shape
            )
        )


GPU_SELF_TEST = """
import mxnet as mx
from mxresnet.model.cudnn_bn import runtime, self_test
runtime.device_kind = lambda device: "gpu"
try:
    self_test.run(mx.cpu())
    print("passed")
except runtime.UnavailableError as error:
    print("failed:", error)
"""


@pytest.mark.slow
def test_gpu_library_passes_its_self_test_on_fake_cudnn(cuda_wheels, tmp_path):
    """The complete GPU library, in float16, in MXNet on the CPU.

    Only the name of the device, the stream and the allocator of the workspace are replaced.
    """
    path = copy_package(tmp_path) / "csrc" / "operators.cc"
    text = path.read_text()
    for gpu, cpu in (
        ('"gpu", kTypeName', '"cpu", kTypeName'),
        ("resource.get_cuda_stream()", "reinterpret_cast<void *>(5)"),
        ("resource.alloc_gpu(", "resource.alloc_cpu("),
    ):
        assert text.count(gpu) == 1
        text = text.replace(gpu, cpu)
    path.write_text(text)
    flags = build.CudaFiles([str(cuda_wheels)]).flags
    fake_cuda = tmp_path / "cuda"
    for name in ("libcudnn.so.8", "libcudart.so.11.0"):
        build.compile_library([FAKE_CUDNN], fake_cuda / "lib64" / name, flags)
    command = ("-m", "mxresnet.model.cudnn_bn", "build", "--gpu")
    python_in(tmp_path, *command, "--cuda", fake_cuda, "--cuda", cuda_wheels)
    assert "passed\n" in python_in(tmp_path, "-c", GPU_SELF_TEST)
    # Rounding that decides which gradients pass the ReLU is not an error.
    assert "passed\n" in python_in(tmp_path, "-c", GPU_SELF_TEST, FAKE_CUDNN_ROUNDS="1")
    without_allowance = GPU_SELF_TEST.replace("try:", "self_test._KINK_WIDTH = 0\ntry:")
    output = python_in(tmp_path, "-c", without_allowance, FAKE_CUDNN_ROUNDS="1")
    assert "mxresnet_batch_norm_add_relu computes" in output
    for function, message in (
        ("cudnnBatchNormalizationBackwardEx", "{}: a cuDNN error (data of 3 x 5 x 7 x 12)"),
        ("cudnnBatchNormalizationForwardInference", "{}: a cuDNN error (data of 3 x 5 x 7 x 12)"),
        ("cudaMalloc", "{} of 512 bytes: a CUDA error"),
        ("cudaSetDevice", "GPU 0: a CUDA error"),
    ):
        output = python_in(tmp_path, "-c", GPU_SELF_TEST, FAKE_CUDNN_FAILING_FUNCTION=function)
        expected = f"mxresnet_batch_norm: {message.format(function)}"
        assert f"failed: its self-test failed: {expected}\n" in output
