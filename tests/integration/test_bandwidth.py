# SPDX-License-Identifier: Apache-2.0
"""NCCL_TEST: the bandwidth between the ranks, by itself and before trials."""

import re

import pytest
from support.launchers import environment, run_and_time

from mxresnet.bandwidth import describe


def test_ranks_measure_the_bandwidth_and_do_not_train(few, tmp_path):
    done = run_and_time("--lr", "3", env=environment(few, tmp_path, NCCL_TEST="1"))
    assert done.returncode == 0 and done.stdout == "", done.stderr
    found = re.search(
        r"^all-reduce of 51.2 MB between 2 ranks \(cpu, float32\): ([\d.]+) ms, "
        r"algorithm bandwidth ([\d.]+) GB/s, bus bandwidth ([\d.]+) GB/s$",
        done.stderr,
        re.MULTILINE,
    )
    assert found, done.stderr
    milliseconds, algorithm, bus = (float(text) for text in found.groups())
    assert algorithm == pytest.approx(51.2 / milliseconds, abs=0.01) and bus == algorithm
    assert not list((tmp_path / "results").iterdir())


def test_a_wrong_setting_is_one_line_and_status_2(few, tmp_path):
    done = run_and_time("--lr", "zero", env=environment(few, tmp_path, NCCL_TEST="1"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--lr" in done.stderr


def test_the_bus_bandwidth_is_that_of_nccl_tests():
    line = describe(8, "gpu, float16", 0.001)
    assert "algorithm bandwidth 51.20 GB/s, bus bandwidth 89.60 GB/s" in line
    assert "1.00 ms" in line and "only one rank" in describe(1, "cpu, float32", 0.001)
