# SPDX-License-Identifier: Apache-2.0
"""Our batch-norm operators, built and loaded for real: the CPU library against numpy and against MXNet's own operators.

The GPU library is compiled, linked and loaded here, without a GPU (slow: it downloads cuDNN); benchmarks/gpu_batch_norm.py
tests its kernels.
"""

import ctypes
import os
import pathlib
import re
import shutil
import subprocess
import sys

import mxnet as mx
import numpy as np
import pytest
from conftest import ROOT, python

from mxresnet import extension, extension_build
from mxresnet.config import UserError

CSRC = ROOT / "mxresnet" / "csrc"
WHEELS = ["nvidia-cudnn-cu11==8.9.6.50", "nvidia-cuda-runtime-cu11==11.8.89", "nvidia-cuda-nvcc-cu11==11.8.89"]
OPERATIONS = ["plain", "relu", "add_relu"]


@pytest.fixture(scope="module")
def operators():
    """The CPU library, made by its command and loaded into this process."""
    done = python("-m", "mxresnet.extension", "build", "--cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(extension_build.library("cpu"))]
    assert extension.ready(mx.cpu()) == ""
    return extension


def package_in(folder):
    """A copy of what the extension is made of, to change and to build in."""
    package = folder / "mxresnet"
    package.mkdir()
    for name in ("__init__.py", "config.py", "extension.py", "extension_build.py"):
        shutil.copy(ROOT / "mxresnet" / name, package)
    shutil.copytree(CSRC, package / "csrc", ignore=shutil.ignore_patterns("build"))
    return package


def inside(folder, *arguments, **env):
    environ = {**os.environ, "PYTHONPATH": str(folder), **env}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, text=True, capture_output=True, timeout=300, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


ASK = """
import os
import mxnet as mx
from mxresnet import extension
patience = extension.SELF_TEST_SECONDS
for how in {ways}:
    os.environ["SPOILT"] = how
    extension.SELF_TEST_SECONDS = 6 if how == "hang" else patience
    extension.ready.cache_clear()
    print("says", extension.ready(mx.{device}()), "|")
"""


def reasons_in(folder, *ways, device="cpu", **env):
    """What ready() says of the library there, asked by a process that goes on after it, once with each value of SPOILT."""
    said = re.findall(r"says (.*) \|\n", inside(folder, "-c", ASK.format(ways=ways, device=device), **env))
    assert len(said) == len(ways)
    return said


# The operators


def reference(operation, x, z, gamma, beta, dy, mean, variance, eps, momentum):
    """The step in float64, channels last: by name as extension.batch_norm's symbol has it."""
    axes, count = (0, 1, 2), x[..., 0].size
    inverse = 1 / np.sqrt(x.var(axes) + eps)
    normal = (x - x.mean(axes)) * inverse
    y = normal * gamma + beta + (z if operation == "add_relu" else 0)
    through = dy * ((y > 0) | (operation == "plain"))
    found = {
        "output": y if operation == "plain" else np.maximum(y, 0), "bn_gamma": (through * normal).sum(axes), "bn_beta": through.sum(axes),
        "data": gamma * inverse * (through - through.mean(axes) - normal * (through * normal).mean(axes)),
        "bn_moving_mean": momentum * mean + (1 - momentum) * x.mean(axes),
        "bn_moving_var": momentum * variance + (1 - momentum) * x.var(axes) * count / (count - 1)}
    return {**found, "addend": through} if operation == "add_relu" else found


def make(operation, channels, layout, **attributes):
    addend = mx.sym.var("addend") if operation == "add_relu" else None
    return extension.batch_norm(mx.sym.var("data"), "bn", channels, layout=layout, relu=operation == "relu", addend=addend, **attributes)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 5, 7, 3), (1, 9, 2, 17), (4, 3, 3, 64)])
def test_an_operator_equals_numpy(operators, operation, layout, shape):
    random = np.random.RandomState(sum(shape))
    channels = shape[3]
    x, z, dy = (random.randn(*shape) * 3 + 5 for _ in range(3))
    gamma, beta, mean = (random.randn(channels) for _ in range(3))
    gamma[0], variance = 0, random.rand(channels) + 0.5
    expected = reference(operation, x, z, gamma, beta, dy, mean, variance, 1e-3, 0.7)
    turned = (lambda a: a.transpose(0, 3, 1, 2)) if layout == "NCHW" else (lambda a: a)
    symbol = make(operation, channels, layout, eps=1e-3, momentum=0.7)
    arrays = dict(bn_gamma=gamma, bn_beta=beta, bn_moving_mean=mean, bn_moving_var=variance)
    arrays.update(data=turned(x), addend=turned(z), head=turned(dy))
    found = extension._step(symbol, mx.cpu(), arrays, "float32")
    assert set(found) == set(expected)
    for name, value in expected.items():
        value = turned(value) if value.ndim == 4 else value
        # Two values a channel have a gradient of next to nothing, by cancellation.
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=2e-5 * max(1, abs(value).max()), err_msg=name)


def test_names_order_and_first_values_are_those_of_stock_batch_norm(operators):
    data = mx.sym.var("data")
    ours, stock = extension.batch_norm(data, "bn", 8), mx.sym.BatchNorm(data, name="bn", fix_gamma=False)
    assert ours.list_arguments() == stock.list_arguments() and ours.list_auxiliary_states() == stock.list_auxiliary_states()
    assert len(ours.list_outputs()) == 1
    for name in stock.list_arguments() + stock.list_auxiliary_states():
        assert ours.attr_dict().get(name, {}).get("__init__") == stock.attr_dict().get(name, {}).get("__init__"), name


class Stock:
    @staticmethod
    def norm(x, name, channels, relu=False, addend=None):
        y = mx.sym.BatchNorm(x, name=name, fix_gamma=False, eps=1e-5, momentum=0.9)
        y = y if addend is None else y + addend
        return mx.sym.relu(y) if relu else y


class Ours:
    @staticmethod
    def norm(x, name, channels, relu=False, addend=None):
        return extension.batch_norm(x, name, channels, layout="NCHW", relu=relu, addend=addend)


class OursChannelLast:
    @staticmethod
    def norm(x, name, channels, relu=False, addend=None):
        last = lambda y: mx.sym.transpose(y, axes=(0, 2, 3, 1))  # noqa: E731
        y = extension.batch_norm(last(x), name, channels, relu=relu, addend=None if addend is None else last(addend))
        return mx.sym.transpose(y, axes=(0, 3, 1, 2))


def residual_network(ops):
    """A stem, a residual unit with a projection and one without: every way in which the operators are used."""
    conv = lambda x, name, filters, kernel: mx.sym.Convolution(  # noqa: E731
        x, name=name, num_filter=filters, kernel=(kernel, kernel), pad=(kernel // 2, kernel // 2), no_bias=True)
    x = ops.norm(conv(mx.sym.var("data"), "conv0", 8, 3), "bn0", 8, relu=True)
    for unit in (1, 2):
        y = ops.norm(conv(x, f"u{unit}_conv1", 4, 3), f"u{unit}_bn1", 4, relu=True)
        y = conv(y, f"u{unit}_conv2", 12, 1)
        shortcut = ops.norm(conv(x, "u1_conv1sc", 12, 1), "u1_bnsc", 12) if unit == 1 else x
        x = ops.norm(y, f"u{unit}_bn2", 12, relu=True, addend=shortcut)
    x = mx.sym.FullyConnected(mx.sym.Pooling(x, global_pool=True, pool_type="avg", kernel=(1, 1)), num_hidden=5, name="fc1")
    return mx.sym.SoftmaxOutput(x, name="softmax")


def train_step(ops, weights=None):
    """(output, gradients, statistics, first weights) of one step through Module, as the trainer does it."""
    random = np.random.RandomState(3)
    module = mx.mod.Module(residual_network(ops), context=mx.cpu())
    module.bind([("data", (6, 3, 9, 11))], [("softmax_label", (6,))])
    mx.random.seed(1)
    module.init_params(mx.init.Xavier())
    first = {name: array.asnumpy() for part in module.get_params() for name, array in part.items()}
    if weights:
        module.set_params(*({n: mx.nd.array(weights[n]) for n in part} for part in module.get_params()))
    images, labels = mx.nd.array(random.randn(6, 3, 9, 11)), mx.nd.array(random.randint(0, 5, 6))
    module.forward(mx.io.DataBatch([images], [labels]), is_train=True)
    module.backward()
    mx.nd.waitall()
    group = module._exec_group
    gradients = {name: arrays[0].asnumpy() for name, arrays in zip(group.param_names, group.grad_arrays)}
    statistics = {name: arrays[0].asnumpy() for name, arrays in zip(group.aux_names, group.aux_arrays)}
    return module.get_outputs()[0].asnumpy(), gradients, statistics, first


@pytest.mark.parametrize("ops", [Ours, OursChannelLast])
def test_a_residual_network_equals_the_one_of_stock_operators(operators, ops):
    output, gradients, statistics, first = train_step(Stock)
    ours = train_step(ops, first)
    assert residual_network(ops).list_arguments() == residual_network(Stock).list_arguments()
    assert residual_network(ops).list_auxiliary_states() == residual_network(Stock).list_auxiliary_states()
    assert set(ours[1]) == set(gradients) and len(gradients) == 20
    for name, value in ours[3].items():
        if not name.endswith("weight"):  # random
            np.testing.assert_array_equal(value, first[name], err_msg=name)
    np.testing.assert_allclose(ours[0], output, rtol=1e-4, atol=1e-6)
    count = 6 * 9 * 11
    for name, value in statistics.items():
        if name.endswith("var"):  # MXNet's own on a CPU keeps the biased one
            value = 0.9 + (value - 0.9) * count / (count - 1)
        np.testing.assert_allclose(ours[2][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for name, value in gradients.items():
        assert np.linalg.norm(ours[1][name] - value) <= 1e-4 * np.linalg.norm(value) + 1e-6, name


def test_a_second_step_goes_on_from_the_running_statistics(operators):
    symbol = make("relu", 4, "NHWC")
    x = np.random.RandomState(0).randn(5, 3, 2, 4) + 2
    executor = symbol.simple_bind(mx.cpu(), data=x.shape)
    executor.aux_dict["bn_moving_var"][:] = 1
    for _ in range(2):
        executor.forward(is_train=True, data=mx.nd.array(x))
    mx.nd.waitall()
    np.testing.assert_allclose(executor.aux_dict["bn_moving_mean"].asnumpy(), 0.19 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(executor.aux_dict["bn_moving_var"].asnumpy(), 0.81 + 0.19 * x.var((0, 1, 2), ddof=1), rtol=1e-5)


def test_what_is_not_a_number_is_not_hidden(operators):
    arrays = {name: np.ones((2, 2, 2, 4)) for name in ("data", "head")}
    arrays.update({name: np.ones(4) for name in ("bn_gamma", "bn_beta", "bn_moving_mean", "bn_moving_var")})
    arrays["data"][0, 0, 0, 1] = np.nan
    output = extension._step(make("relu", 4, "NHWC"), mx.cpu(), arrays, "float32")["output"]
    assert np.isnan(output[..., 1]).all() and not np.isnan(output[..., [0, 2, 3]]).any()


def imperative(data, count, **attributes):
    return mx.nd.mxresnet_batch_norm(data, *[mx.nd.ones(3)] * count, **attributes)


MISTAKES = [
    (lambda: make("plain", 8, "NHWC").infer_shape(data=(2, 3, 4, 9)), r"must have shape \(9\), one of them has \(8\)"),
    (lambda: make("plain", 4, "NCHW").infer_shape(data=(2, 3, 4, 4)), r"must have shape \(3\), one of them has \(4\)"),
    (lambda: make("plain", 4, "NHWC").infer_shape(data=(2, 3, 4)), r"data has shape \(2, 3, 4\), and 4 axes are needed"),
    (lambda: make("plain", 4, "NHWC").infer_shape(), "the shape of data is not known"),
    (lambda: make("plain", 4, "NHWC").infer_shape(data=(1, 1, 1, 4)), "a channel has one value only"),
    (lambda: make("add_relu", 4, "NHWC").infer_shape(data=(2, 3, 4, 4), addend=(2, 3, 4, 1)), r"addend has shape \(2, 3, 4, 1\), data \(2, 3, 4, 4\)"),
    (lambda: make("plain", 4, "NHWC").infer_type(data="float16"), "data must be float32 in the cpu build"),
    (lambda: make("plain", 4, "NHWC").infer_type(data="float32", bn_gamma="float16"), "gamma, beta, moving_mean and moving_var must be float32"),
    (lambda: make("plain", 4, "NHWC", eps=0), "attribute eps=0: eps above 0"),
    (lambda: make("plain", 4, "NHWC", momentum="much"), "attribute momentum=much"),
    (lambda: make("plain", 4, "CHWN"), "attribute layout=CHWN"),
    (lambda: imperative(mx.nd.ones((2, 2, 2, 3)), 4, axis=1), "attribute axis=1"),
    (lambda: imperative(mx.nd.ones((2, 2, 2, 3)).tostype("row_sparse"), 4), "sparse arrays are not supported"),
    (lambda: imperative(mx.nd.ones((2, 2, 2, 3)), 3), "number of inputs")]


@pytest.mark.parametrize("mistake, said", MISTAKES, ids=[said for _, said in MISTAKES])
def test_a_mistake_is_told_and_does_not_crash(operators, mistake, said):
    with pytest.raises(mx.MXNetError) as error:
        mistake()
    short = extension._short(error.value)
    assert re.search(said, short) and "\n" not in short and "/" not in short.partition("mxresnet_")[0] or "number of inputs" in said, short


# Whether the library can be used


def test_a_library_that_misbehaves_is_refused_and_the_process_goes_on(tmp_path):
    """Wrong numbers, a crash, a hang: all in one library, chosen by a variable."""
    spoilt = """
  const char *how = std::getenv("SPOILT") ? std::getenv("SPOILT") : "";
  if (!std::strcmp(how, "crash")) std::abort();
  while (!std::strcmp(how, "hang")) pause();
  const double dropped = std::strcmp(how, "wrong") ? 1 : 0;
"""

    def change(text):
        text = text.replace("#include <cmath>", "#include <cmath>\n#include <cstdlib>\n#include <cstring>\n#include <unistd.h>")
        start = text.index("int mxresnet_batch_norm_backward")
        body = text.index("{", start) + 1
        return text[:body] + spoilt + text[body:].replace("normalized * product", "dropped * normalized * product")

    path = package_in(tmp_path) / "csrc" / "batch_norm_cpu.cc"
    path.write_text(change(path.read_text()))
    inside(tmp_path, "-m", "mxresnet.extension", "build", "--cpu")
    crash, hang, wrong, good = reasons_in(tmp_path, "crash", "hang", "wrong", "not at all")
    assert crash == "its self-test was ended by signal 6" and hang == "its self-test did not end within 6 s" and good == ""
    assert re.fullmatch(r"mxresnet_batch_norm computes data with an error of 0.\d+ \(at most 0.0001\)", wrong)


def test_a_library_that_does_not_fit_is_refused(operators, tmp_path, monkeypatch):
    path = tmp_path / "libmxresnet_cpu.so"
    monkeypatch.setattr(extension_build, "library", lambda kind: path)
    built = (extension_build.BUILD / path.name).read_bytes()
    facts = extension_build.read_facts(extension_build.BUILD / path.name)
    assert facts == {"kind": "cpu", "mxnet": mx.__version__, "interface": "11", "sources": extension_build.source_hash()}

    def reason(content):
        path.write_bytes(content)
        extension.ready.cache_clear()
        return extension.ready(mx.cpu())

    assert "is not built (python -m mxresnet.extension build --cpu)" in extension._unfit(mx.cpu())
    assert "was not made by python -m mxresnet.extension build" in reason(b"\177ELF")
    assert "was not made by" in reason(built.replace(b'"kind": "cpu"', b'"kind": "gpu"'))
    assert "was built for MXNet 1.8.0 and this is 1.9.1" in reason(built.replace(b'"mxnet": "1.9.1"', b'"mxnet": "1.8.0"'))
    assert "is older than its sources" in reason(built.replace(facts["sources"].encode(), b"0" * 16))
    monkeypatch.setenv("MXNET_EXEC_ENABLE_ADDTO", "1")
    assert reason(built) == "MXNET_EXEC_ENABLE_ADDTO is on, which its operators cannot do"
    extension.ready.cache_clear()


def test_a_library_that_cannot_be_loaded_is_refused(operators, tmp_path):
    """A file that only looks right: its first page is gone."""
    path = package_in(tmp_path) / "csrc" / "build" / "libmxresnet_cpu.so"
    path.parent.mkdir()
    path.write_bytes(b"\0" * 4096 + extension_build.library("cpu").read_bytes()[4096:])
    said, = reasons_in(tmp_path, "not at all")
    assert re.search("libmxresnet_cpu.so does not load: .*(invalid ELF header|file too short)", said)


def test_the_source_hash_sees_every_source(monkeypatch, tmp_path):
    monkeypatch.setattr(extension_build, "SOURCES", tmp_path / "csrc")
    shutil.copytree(CSRC, tmp_path / "csrc", ignore=shutil.ignore_patterns("build"))
    sums = {extension_build.source_hash()}
    for path in sorted((tmp_path / "csrc").iterdir()):
        path.write_text(path.read_text() + "\n")
        sums.add(extension_build.source_hash())
    assert len(sums) == 1 + 4


# Building


def test_what_is_missing_to_build_is_told_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mxresnet.extension", "build", "--cpu"], cwd=ROOT, text=True, capture_output=True, env={"PATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (2, "mxresnet: no C++ compiler (g++): apt-get install g++\n")
    done = subprocess.run(  # a Python without MXNet
        [sys.executable, "-S", "-c", "import sys; from mxresnet import extension_build as b; b.mxnet_folder()"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1 and done.stderr.endswith("UserError: MXNet is not installed: ./setup_env.sh installs it\n")


def cuda_folder(folder, cudnn, runtime):
    for name, text in (("cudnn_version.h", f"#define CUDNN_MAJOR {cudnn}\n"), ("cuda_runtime_api.h", f"#define CUDART_VERSION  {runtime}\n"), ("crt/host_config.h", "")):
        (folder / "include" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "include" / name).write_text(text)
    return folder


def test_a_cuda_that_mxnet_cannot_share_is_refused(tmp_path):
    folder = cuda_folder(tmp_path, 9, 12040)
    (folder / "lib64").mkdir()
    for name in ("libcudnn.so.9", "libcudart.so.12"):
        (folder / "lib64" / name).touch()
    done = python("-m", "mxresnet.extension", "build", "--gpu", "--cuda", folder)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "cuDNN 9 and CUDA 12 were found" in done.stderr and "--cuda DIR" in done.stderr


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
    assert target.read_text() == "before" and sorted(p.name for p in target.parent.iterdir()) == ["libbroken.log", "libbroken.so"]


def test_our_cpp_compiles_without_a_warning():
    mxnet = extension_build.mxnet_folder()
    command = [
        "g++", "-std=c++11", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-isystem", mxnet / "include", "-DMXRESNET_MXNET_VERSION=10901",
        '-DMXRESNET_BUILD=""', "-DMXRESNET_GPU", CSRC / "operators.cc", CSRC / "batch_norm_cpu.cc"]
    done = subprocess.run(list(map(str, command)), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_image_builds_the_library_it_runs_with():
    build, run = (ROOT / "Dockerfile").read_text().split("\nFROM ")[-2:]
    assert "python -m mxresnet.extension build --gpu" in build and "COPY --from=build /workspace/mxresnet " in run
    assert "mxresnet/csrc/build" in (ROOT / ".dockerignore").read_text().splitlines()
    ignored = subprocess.run(["git", "check-ignore", "-q", "mxresnet/csrc/build/libmxresnet_gpu.so"], cwd=ROOT)
    assert ignored.returncode == 0


# The GPU library, without a GPU

GPU_PROBE = """
import ctypes, sys
import mxnet as mx
from mxresnet import extension
problem = extension._unfit(mx.gpu()) or extension._load(mx.cpu().__class__("gpu", 0))
assert not problem, problem
library = ctypes.CDLL(str(extension.extension_build.library("gpu")))
library.mxresnet_use_device(-1)  # none: sizes are estimated
data, addend = mx.sym.var("data"), mx.sym.var("addend")
net = extension.batch_norm(data, "bn", 64, addend=addend)
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
        return extension._short(error)
print(short(lambda: net.infer_type(data="float32")))
print(short(lambda: extension.batch_norm(data, "bn", 64, layout="NCHW").infer_shape(data=(2, 64, 3, 3))))
print(short(lambda: extension.batch_norm(data, "bn", 6).infer_shape(data=(2, 3, 3, 6))))
"""


@pytest.fixture(scope="module")
def cuda_wheels():
    """Headers and libraries of cuDNN 8 and CUDA 11 from the package index, kept: 1.1 GB."""
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mxresnet" / "cuda11"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--no-cache-dir", "--target", folder, *WHEELS], check=True)
        (folder / "complete").touch()
    return folder


@pytest.mark.slow
def test_the_gpu_library_builds_and_loads(tmp_path, cuda_wheels):
    package_in(tmp_path)
    inside(tmp_path, "-m", "mxresnet.extension", "build", "--gpu", "--cuda", cuda_wheels)
    libraries = os.pathsep.join(str(cuda_wheels / "nvidia" / part / "lib") for part in ("cudnn", "cuda_runtime"))
    said = inside(tmp_path, "-c", GPU_PROBE, LD_LIBRARY_PATH=libraries).splitlines()
    assert said[0].endswith("data must be float16 in the gpu build") and "cuDNN's fused batch norm is for NHWC only" in said[1]
    assert "channels in multiples of 4 (data of 2 x 3 x 3 x 6)" in said[2]
    # This MXNet has no GPU, and one may have no cuDNN: a reason, and no crash.
    assert reasons_in(tmp_path, "not at all", device="gpu", LD_LIBRARY_PATH=libraries) != [""]
    assert "libcudnn.so.8: cannot open shared object file" in reasons_in(tmp_path, "not at all", device="gpu", LD_LIBRARY_PATH="")[0]
