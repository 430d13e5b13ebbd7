# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/gpu_batch_norm.py does without a GPU: its checks find mistakes, and it times the network's own batch norms."""

import ctypes
import importlib.util
import subprocess

import pytest
from conftest import ROOT, python

from mxresnet import extension_build, network
from mxresnet.config import Config
from mxresnet.ops import PlainOps

PATH = ROOT / "benchmarks" / "gpu_batch_norm.py"
spec = importlib.util.spec_from_file_location("gpu_batch_norm", PATH)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


def test_its_checks_find_nothing_wrong_with_the_plain_library():
    done = python(PATH, "--cpu")
    *lines, last = done.stdout.splitlines()
    assert done.returncode == 0 and last == "0 wrong on the plain C++ library", done.stdout + done.stderr
    assert len(lines) == 30 and all(line.endswith("right") for line in lines)


MUTATIONS = [
    ("variance * count / (count - 1)", "variance", "running_variance is off"),
    ("(1 - keep) * mean", "keep * mean", "running_mean is off"),
    ("if (!pass) value = 0;", "", "y is off"),
    ("dz[i] = static_cast<float>(gradient)", "dz[i] = dy[i]", "dz is off"),
    ("normalized * product / count", "0 * normalized * product", "dx is off"),
    ("gradient - sum / count", "gradient - sum / (count + 1)", "dx is off"),
    ("passed(mask, i) ?", "passed(mask, i + 1) ?", "dx is off"),
    ("call->dgamma[c] = static_cast<float>(product);", "call->dgamma[c] = static_cast<float>(product * 1.001);", "dgamma is off"),
    ("call->saved_inverse[c] = static_cast<float>(inverse);", "call->saved_inverse[c] = static_cast<float>(inverse) * NAN;", "saved_inverse is off"),
    ("y[i] = static_cast<float>(value);", "y[i] = y[i + 1] = static_cast<float>(value);", "y was written past its end")]


@pytest.mark.parametrize("right, wrong, said", MUTATIONS, ids=[said + f" ({wrong})" for _, wrong, said in MUTATIONS])
def test_its_checks_find_a_mistake(tmp_path, right, wrong, said):
    text = (extension_build.SOURCES / "batch_norm_cpu.cc").read_text()
    assert text.count(right) == 1
    (tmp_path / "wrong.cc").write_text(text.replace(right, wrong))
    extension_build.compile_library([tmp_path / "wrong.cc"], tmp_path / "libwrong.so", ["-I", extension_build.SOURCES])
    done = python(PATH, "--cpu", "--library", tmp_path / "libwrong.so")
    assert done.returncode == 1 and said in done.stdout, done.stdout + done.stderr


def test_its_structures_are_those_of_the_header(tmp_path):
    lines = [
        f'printf("{name} {field} %zu\\n", offsetof({name}, {field}));'
        for name, structure in (("MxresnetBatchNorm", benchmark.Call), ("MxresnetSizes", benchmark.Sizes)) for field, _ in structure._fields_]
    lines += ['printf("%zu %zu %d\\n", sizeof(MxresnetBatchNorm), sizeof(MxresnetSizes), MXRESNET_MESSAGE_BYTES);']
    (tmp_path / "offsets.c").write_text("#include <stdio.h>\n#include \"batch_norm.h\"\nint main(void) {" + "\n".join(lines) + "return 0; }\n")
    subprocess.run(["g++", "-x", "c++", "-I", extension_build.SOURCES, tmp_path / "offsets.c", "-o", tmp_path / "offsets"], check=True)
    *offsets, last = subprocess.run([tmp_path / "offsets"], text=True, capture_output=True, check=True).stdout.splitlines()
    structures = {"MxresnetBatchNorm": benchmark.Call, "MxresnetSizes": benchmark.Sizes}
    for line in offsets:
        name, field, offset = line.split()
        assert getattr(structures[name], field).offset == int(offset), line
    assert last == f"{ctypes.sizeof(benchmark.Call)} {ctypes.sizeof(benchmark.Sizes)} 512"


def test_it_times_the_batch_norms_of_the_network():
    config = Config(bn_gamma_init0=True)
    outputs = network.build(PlainOps(config), config, 1000).get_internals()
    shapes = dict(zip(outputs.list_outputs(), outputs.infer_shape(data=(1, 3, 224, 224))[1]))
    found = {}
    for _, name in network.layer_names(50):
        _, channels, size, _ = shapes[f"{name}_output"]
        kind = benchmark.BN if name.endswith("sc") else benchmark.BN_ADD_RELU if name.endswith("bn3") else benchmark.BN_RELU
        found[kind, size, channels] = found.get((kind, size, channels), 0) + 1
    assert found == {layer[:3]: layer[3] for layer in benchmark.RESNET50} and len(benchmark.RESNET50) == len(found)


@pytest.mark.skipif(extension_build.shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")
def test_without_a_gpu_it_says_so():
    done = python(PATH)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "PyTorch is not installed" in done.stderr or "no NVIDIA GPU" in done.stderr
