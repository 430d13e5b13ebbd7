# SPDX-License-Identifier: Apache-2.0
"""Test the count of usable CPUs against control groups of versions 1 and 2."""

import os

import pytest

from prepare.cpus import parallel_map, usable_cpus


@pytest.fixture
def affinity():
    return len(os.sched_getaffinity(0))


def test_cgroup_v2_limits_apply_from_any_level(tmp_path, affinity):
    membership = tmp_path / "membership"
    membership.write_text("0::/pod/container\n")
    (tmp_path / "pod" / "container").mkdir(parents=True)
    (tmp_path / "pod" / "container" / "cpu.max").write_text("max 100000\n")
    assert usable_cpus(str(tmp_path), str(membership)) == affinity
    (tmp_path / "pod" / "cpu.max").write_text("50000 100000\n")
    assert usable_cpus(str(tmp_path), str(membership)) == 1


def test_cgroup_v1_limits_apply_when_the_group_is_seen_as_the_root(tmp_path):
    membership = tmp_path / "membership"
    membership.write_text("4:cpu,cpuacct:/docker/x\n1:name=systemd:/\n")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cpus(str(tmp_path), str(membership)) == 1


def test_without_control_groups_the_affinity_applies(tmp_path, affinity):
    assert usable_cpus(str(tmp_path), str(tmp_path / "nothing")) == affinity


@pytest.mark.parametrize("count", [0, 1, 4, 5, 100])
def test_parallel_map_keeps_the_order(count):
    assert parallel_map(lambda number: 2 * number, range(count), 3) == [
        2 * number for number in range(count)
    ]
