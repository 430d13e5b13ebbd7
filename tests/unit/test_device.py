# SPDX-License-Identifier: Apache-2.0
"""Which GPU each rank of a machine takes, and what a CPU cannot run."""

import subprocess
import sys

import pytest
from support.commands import ROOT

from mxresnet.config import Config
from mxresnet.device import choose_device, gpu_index
from mxresnet.errors import UserError
from mxresnet.parallel.world import World

# The driver's functions that visible_gpu_ids() calls, for the UUIDs in FAKE_GPUS, one letter each.
FAKE_DRIVER = r"""
#include <cstdlib>
#include <cstring>
static const char* gpus() { return std::getenv("FAKE_GPUS"); }
extern "C" {
int cuInit(unsigned) { return gpus() ? 0 : 100; }
int cuDriverGetVersion(int* version) {
  *version = std::atoi(std::getenv("FAKE_DRIVER_CUDA"));
  return 0;
}
int cuDeviceGetCount(int* count) { *count = std::strlen(gpus()); return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal + 40; return 0; }
int cuDeviceGetUuid(char* uuid, int device) {
  std::memset(uuid, gpus()[device - 40], 16);
  return 0;
}
}
"""
FAKE_COMPILER = """
extern "C" int nvrtcVersion(int* major, int* minor) {
  *major = 11;
  *minor = 8;
  return 0;
}
"""
PRINT_IDS = "from mxresnet.device import visible_gpu_ids; print(visible_gpu_ids())"
CHECK_DRIVER = """
from mxresnet.device import check_driver
from mxresnet.errors import UserError
try:
    check_driver()
    print("accepted")
except UserError as error:
    print(error)
"""
PRINT_FUSION = """
import os
import mxnet as mx
from mxresnet.device import disable_unsupported_fusion
print(disable_unsupported_fusion(mx.gpu(0), os.environ), os.environ.get("MXNET_USE_FUSION"))
"""


@pytest.mark.parametrize(
    "visible, indices",
    [
        ([["a"]], [0]),
        ([["a", "b", "c", "d"]] * 4, [0, 1, 2, 3]),
        ([["d", "c"]] * 2, [0, 1]),
        ([["a"], ["b"], ["c"], ["d"]], [0, 0, 0, 0]),  # srun --gpus-per-task=1
        ([["a", "b"], ["c", "d"]], [0, 0]),
        ([[], []], [0, 1]),  # identities that are not known
        ([["a"], ["a"]], [0, 1]),  # choose_device() reports that there are too few
    ],
)
def test_each_rank_takes_a_gpu_of_its_own(visible, indices):
    assert [gpu_index(visible, rank) for rank in range(len(visible))] == indices


@pytest.mark.parametrize("visible", [[["a", "b"], ["b", "c"]], [["a", "b"], ["b", "a"]]])
def test_gpus_that_ranks_share_in_part_are_rejected(visible):
    with pytest.raises(UserError, match="see different GPUs, and share some of them"):
        gpu_index(visible, 1)


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory):
    """A folder with a fake CUDA driver and a fake run-time compiler."""
    folder = tmp_path_factory.mktemp("cuda")
    for name, text in (("libcuda.so.1", FAKE_DRIVER), ("libnvrtc.so.11.2", FAKE_COMPILER)):
        command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", folder / name]
        subprocess.run(command, input=text, text=True, check=True)
    return folder


def output(code, **env):
    """Return what Python code prints, with only these variables set."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT), **env},
        text=True,
        capture_output=True,
        check=True,
    )
    return done.stdout.strip()


def test_identities_come_from_the_driver(fake_cuda):
    ids = [output(PRINT_IDS, LD_LIBRARY_PATH=str(fake_cuda), FAKE_GPUS=gpus) for gpus in ("ab", "")]
    assert ids == [str(["61" * 16, "62" * 16]), "[]"]
    assert output(PRINT_IDS, LD_LIBRARY_PATH=str(fake_cuda)) == "[]"  # cuInit fails


def test_fusion_needs_a_driver_as_new_as_the_compiler(fake_cuda):
    def fusion(driver, **env):
        env.update(LD_LIBRARY_PATH=str(fake_cuda), FAKE_DRIVER_CUDA=driver)
        return output(PRINT_FUSION, **env)

    assert fusion("11080") == fusion("12020") == "None None"
    assert fusion("11040", MXNET_USE_FUSION="0") == "None 0"
    assert fusion("11040") == (
        "MXNET_USE_FUSION: off, because this driver supports CUDA 11.4 and operators would be "
        "compiled by CUDA 11.8 (driver 520 supports 11.8) 0"
    )


def test_a_driver_older_than_cuda_11_is_refused(fake_cuda):
    def message(driver, **env):
        return output(CHECK_DRIVER, FAKE_DRIVER_CUDA=driver, **env)

    found = message("10020", LD_LIBRARY_PATH=str(fake_cuda))
    assert "supports CUDA 10.2, and MXNet needs CUDA 11.0: install driver 450 or newer" in found
    assert message("11000", LD_LIBRARY_PATH=str(fake_cuda)) == "accepted"
    assert message("10020") == "accepted"  # no driver


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"dtype": "float16"}, "float16 needs a GPU"),
        ({"conv_layout": "NHWC"}, "--conv-layout.*NHWC need a GPU"),
        ({"batchnorm_layout": "NHWC"}, "--batchnorm-layout.*NHWC need a GPU"),
    ],
)
def test_what_a_cpu_cannot_run_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        choose_device(Config(**settings), World())
