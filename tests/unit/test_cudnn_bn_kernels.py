# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/gpu_batch_norm.py does without a GPU: its checks find mistakes, and it times the network's own batch norms."""

import concurrent.futures
import ctypes
import importlib.util
import re
import subprocess

import numpy as np
import pytest
from support.commands import ROOT, python
from test_cudnn_bn_build import cuda_wheels, inside, package_in  # noqa: F401

from mxresnet.config import Config
from mxresnet.errors import UserError
from mxresnet.model import resnet
from mxresnet.model.cudnn_bn import build as extension_build
from mxresnet.model.ops import PlainOps

PATH = ROOT / "benchmarks" / "gpu_batch_norm.py"
spec = importlib.util.spec_from_file_location("gpu_batch_norm", PATH)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


def test_its_checks_find_nothing_wrong_with_the_plain_library():
    done = python(PATH, "--cpu")
    *lines, last = done.stdout.splitlines()
    assert done.returncode == 0 and last == "0 wrong on the plain C++ library", (
        done.stdout + done.stderr
    )
    assert len(lines) == 30 and all(line.endswith("right") for line in lines)


MUTATIONS = [
    ("variance * count / (count - 1)", "variance", "running_variance is off"),
    ("(1 - keep) * mean", "keep * mean", "running_mean is off"),
    ("if (!pass) value = 0;", "", "y is off"),
    ("dz[i] = static_cast<float>(gradient)", "dz[i] = dy[i]", "dz is off"),
    ("normalized * product / count", "0 * normalized * product", "dx is off"),
    ("gradient - sum / count", "gradient - sum / (count + 1)", "dx is off"),
    ("passed(mask, i) ?", "passed(mask, i + 1) ?", "dx is off"),
    (
        "call->dgamma[c] = static_cast<float>(product);",
        "call->dgamma[c] = static_cast<float>(product * 1.001);",
        "dgamma is off",
    ),
    (
        "call->saved_inverse[c] = static_cast<float>(inverse);",
        "call->saved_inverse[c] = static_cast<float>(inverse) * NAN;",
        "saved_inverse is off",
    ),
    (
        "y[i] = static_cast<float>(value);",
        "y[i] = y[i + 1] = static_cast<float>(value);",
        "y was written past its end",
    ),
]


@pytest.mark.parametrize(
    "right, wrong, said", MUTATIONS, ids=[said + f" ({wrong})" for _, wrong, said in MUTATIONS]
)
def test_its_checks_find_a_mistake(tmp_path, right, wrong, said):
    text = (extension_build.SOURCES / "batch_norm_cpu.cc").read_text()
    assert text.count(right) == 1
    (tmp_path / "wrong.cc").write_text(text.replace(right, wrong))
    extension_build.compile_library(
        [tmp_path / "wrong.cc"], tmp_path / "libwrong.so", ["-I", extension_build.SOURCES]
    )
    done = python(PATH, "--cpu", "--library", tmp_path / "libwrong.so")
    assert done.returncode == 1 and said in done.stdout, done.stdout + done.stderr


def test_its_structures_are_those_of_the_header(tmp_path):
    lines = [
        f'printf("{name} {field} %zu\\n", offsetof({name}, {field}));'
        for name, structure in (
            ("MxresnetBatchNorm", benchmark.Call),
            ("MxresnetSizes", benchmark.Sizes),
        )
        for field, _ in structure._fields_
    ]
    lines += [
        'printf("%zu %zu %d\\n", sizeof(MxresnetBatchNorm), sizeof(MxresnetSizes), MXRESNET_MESSAGE_BYTES);'
    ]
    (tmp_path / "offsets.c").write_text(
        '#include <stdio.h>\n#include "batch_norm.h"\nint main(void) {'
        + "\n".join(lines)
        + "return 0; }\n"
    )
    subprocess.run(
        [
            "g++",
            "-x",
            "c++",
            "-I",
            extension_build.SOURCES,
            tmp_path / "offsets.c",
            "-o",
            tmp_path / "offsets",
        ],
        check=True,
    )
    *offsets, last = subprocess.run(
        [tmp_path / "offsets"], text=True, capture_output=True, check=True
    ).stdout.splitlines()
    structures = {"MxresnetBatchNorm": benchmark.Call, "MxresnetSizes": benchmark.Sizes}
    for line in offsets:
        name, field, offset = line.split()
        assert getattr(structures[name], field).offset == int(offset), line
    assert last == f"{ctypes.sizeof(benchmark.Call)} {ctypes.sizeof(benchmark.Sizes)} 512"


def test_it_times_the_batch_norms_of_the_network():
    config = Config(bn_gamma_init0=True)
    outputs = resnet.build(PlainOps(config), config, 1000).get_internals()
    shapes = dict(zip(outputs.list_outputs(), outputs.infer_shape(data=(1, 3, 224, 224))[1]))
    found = {}
    for _, name in resnet.layer_names(50):
        _, channels, size, _ = shapes[f"{name}_output"]
        kind = (
            benchmark.BN
            if name.endswith("sc")
            else benchmark.BN_ADD_RELU
            if name.endswith("bn3")
            else benchmark.BN_RELU
        )
        found[kind, size, channels] = found.get((kind, size, channels), 0) + 1
    assert found == {layer[:3]: layer[3] for layer in benchmark.RESNET50} and len(
        benchmark.RESNET50
    ) == len(found)


@pytest.mark.skipif(
    extension_build.shutil.which("nvidia-smi") is not None, reason="this machine has a GPU"
)
def test_without_a_gpu_it_says_so():
    done = python(PATH)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "PyTorch is not installed" in done.stderr or "no NVIDIA GPU" in done.stderr


class HalfHost(benchmark.Host):
    """The host's memory as the GPU library sees its own: float16, on a stream that the double of cuDNN wants to see."""

    dtype, unit, tiny, stream, name = (
        np.dtype("float16"),
        2.0**-11,
        2.0**-24,
        5,
        "the double of cuDNN",
    )


@pytest.fixture(scope="module")
def on_the_double(cuda_wheels, tmp_path_factory):
    """batch_norm_cudnn.cc linked with tests/support/fake_cudnn.cc in place of cuDNN; both see cuDNN's own headers."""
    folder = tmp_path_factory.mktemp("double")
    flags = extension_build.CudaFiles([str(cuda_wheels)]).flags
    extension_build.compile_library(
        [ROOT / "tests" / "support" / "fake_cudnn.cc"], folder / "libdouble.so", flags
    )
    sources = [extension_build.SOURCES / "batch_norm_cudnn.cc", folder / "libdouble.so"]
    extension_build.compile_library(
        sources, folder / "libbatch_norm.so", [*flags, f"-Wl,-rpath,{folder}"]
    )
    return ctypes.CDLL(str(folder / "libbatch_norm.so"))


def in_a_thread(call):
    """A new thread has no cuDNN handle yet."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@pytest.mark.slow
def test_what_cudnn_is_asked_for_is_right(on_the_double, capsys):
    assert benchmark.run_checks(on_the_double, HalfHost(), small=True) == 0, capsys.readouterr().out


ASKED = re.findall(r'check\("(\w+)"', (extension_build.SOURCES / "batch_norm_cudnn.cc").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ASKED)))
def test_a_failure_of_cudnn_is_told(on_the_double, monkeypatch, name):
    """Every function of cuDNN and CUDA that has a status; none is forgotten, as the double has no other."""
    double = (ROOT / "tests" / "support" / "fake_cudnn.cc").read_text()
    assert set(re.findall(r"^cudnnStatus_t (\w+)\([^;]*?\{\s*MAY_FAIL", double, re.M)) <= set(ASKED)
    monkeypatch.setenv("CUDNN_DOUBLE_FAILS", name)
    with pytest.raises(
        UserError, match=rf"^{name}: a (cuDNN|CUDA) error \(data of 2 x 3 x 5 x 8\)$"
    ):
        in_a_thread(
            lambda: benchmark.check(on_the_double, HalfHost(), benchmark.BN_ADD_RELU, (2, 3, 5, 8))
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, said",
    [
        ({"reserve_bytes": 53}, "reserve of batch norm: 54 bytes are needed and 53 were given"),
        (
            {"workspace_bytes": 103},
            "workspace of batch norm: 104 bytes are needed and 103 were given",
        ),
        ({"channel_last": 0}, "layout NCHW: cuDNN's fused batch norm is for NHWC only"),
        ({"c": 6}, "multiples of 4"),
        ({"n": 0}, "data has no elements"),
        ({"n": 1 << 40}, "more than 2^31 - 1 elements"),
    ],
)
def test_a_call_that_cudnn_cannot_do_is_refused(on_the_double, change, said):
    layer = benchmark.Layer(on_the_double, HalfHost(), benchmark.BN_RELU, 2, 3, 5, 8)
    layer.set(benchmark.inputs(benchmark.BN_RELU, (2, 3, 5, 8), np.float16, 0))
    layer.forward()
    for name, value in change.items():
        setattr(layer._call, name, value)
    with pytest.raises(UserError) as error:
        layer.forward()
    assert said in str(error.value)


@pytest.mark.slow
def test_the_reserve_is_asked_for_on_the_device_that_is_used(on_the_double):
    call = benchmark.Call(
        operation=benchmark.BN_RELU, channel_last=1, n=2, h=3, w=5, c=8, epsilon=1e-5, stream=5
    )

    def reserve(device):
        size, message = ctypes.c_uint64(), ctypes.create_string_buffer(512)
        on_the_double.mxresnet_use_device(device)
        wrong = on_the_double.mxresnet_batch_norm_reserve(
            ctypes.byref(call), ctypes.byref(size), message
        )
        return message.value.decode() if wrong else size.value

    assert (
        reserve(-1) == 30 + 65536
    )  # before a device is chosen: the bits and something for padding
    assert reserve(0) == 30 + 24  # what the double wants
    assert reserve(1) == "cudaSetDevice: a CUDA error (data of 2 x 3 x 5 x 8)"


GPU_SELF_TEST = """
import mxnet as mx
from mxresnet.model.cudnn_bn import runtime
runtime._kind = lambda device: "gpu"
print("says", runtime._test(mx.cpu()), "|")
"""


@pytest.mark.slow
def test_the_gpu_library_passes_its_self_test_through_mxnet_on_the_double(cuda_wheels, tmp_path):
    """The GPU library whole, in float16, through MXNet's CPU: only the device's name, the stream and the scratch are changed."""
    path = package_in(tmp_path) / "csrc" / "operators.cc"
    text = path.read_text()
    for gpu, here in (
        ('"gpu", kTypeName', '"cpu", kTypeName'),
        ("resource.get_cuda_stream()", "reinterpret_cast<void *>(5)"),
        ("resource.alloc_gpu(", "resource.alloc_cpu("),
    ):
        assert text.count(gpu) == 1
        text = text.replace(gpu, here)
    path.write_text(text)
    flags = extension_build.CudaFiles([str(cuda_wheels)]).flags
    for name in ("libcudnn.so.8", "libcudart.so.11.0"):
        extension_build.compile_library(
            [ROOT / "tests" / "support" / "fake_cudnn.cc"],
            tmp_path / "cuda" / "lib64" / name,
            flags,
        )
    inside(
        tmp_path,
        "-m",
        "mxresnet.model.cudnn_bn",
        "build",
        "--gpu",
        "--cuda",
        tmp_path / "cuda",
        "--cuda",
        cuda_wheels,
    )
    said = inside(tmp_path, "-c", GPU_SELF_TEST)
    assert "says  |" in said, said
    said = inside(
        tmp_path, "-c", GPU_SELF_TEST, CUDNN_DOUBLE_FAILS="cudnnBatchNormalizationBackwardEx"
    )
    assert (
        "says its self-test failed: mxresnet_batch_norm: cudnnBatchNormalizationBackwardEx: a cuDNN error (data of 3 x 5 x 7 x 12) |"
        in said
    ), said
