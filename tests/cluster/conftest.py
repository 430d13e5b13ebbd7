# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests on several machines."""

import pytest
from support import mpijob, network_hosts


@pytest.fixture
def start_job(few, tmp_path):
    """Return start(flag, ..., NAME=value, ...) -> mpijob.Job: a training run on two machines."""
    with network_hosts.Cluster(tmp_path) as cluster:

        def start(*flags, **env):
            return mpijob.start_job(
                cluster, few, tmp_path, *flags, output=tmp_path / "output", **env
            )

        yield start
