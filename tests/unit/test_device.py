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
int cuDeviceGetCount(int* count) { *count = std::strlen(gpus()); return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal + 40; return 0; }
int cuDeviceGetUuid(char* uuid, int device) {
  std::memset(uuid, gpus()[device - 40], 16);
  return 0;
}
}
"""
PRINT_IDS = "from mxresnet.device import visible_gpu_ids; print(visible_gpu_ids())"


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


def test_identities_come_from_the_driver(tmp_path):
    source = tmp_path / "cuda.cc"
    source.write_text(FAKE_DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library], check=True)

    def ids(**env):
        done = subprocess.run(
            [sys.executable, "-c", PRINT_IDS],
            env={"PYTHONPATH": str(ROOT), **env},
            text=True,
            capture_output=True,
            check=True,
        )
        return done.stdout.strip()

    folder = str(tmp_path)
    assert ids(LD_LIBRARY_PATH=folder, FAKE_GPUS="ab") == str(["61" * 16, "62" * 16])
    assert ids(LD_LIBRARY_PATH=folder, FAKE_GPUS="") == "[]"
    assert ids(LD_LIBRARY_PATH=folder) == "[]"  # cuInit fails


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
