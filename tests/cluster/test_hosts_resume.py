# SPDX-License-Identifier: Apache-2.0
"""A job on several machines that loses a rank at a random step, and is started again.

The operator starts the launcher again on the same workers; here the test does.
./run_tests.sh tests/cluster/test_hosts_resume.py -m slow; needs root, iproute2 and openssh.
"""

import random
import signal
import time

import pytest
from support import network_hosts
from support.launchers import environment, run_and_time
from support.mlperf_log import log_lines
from support.mpijob import LAUNCHER, LAUNCHER_PROCESS, RANK_PROCESS, WORKER_0, WORKER_1, start_job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(network_hosts.unavailable_reason()), reason=str(network_hosts.unavailable_reason())
    ),
]
FLAGS = [
    *("--num-epochs", "6", "--num-layers", "18", "--batch-size", "8", "--eval-period", "2"),
    *("--accuracy-threshold", "1", "--disp-batches", "1", "--checkpoint-minutes", "0.001"),
]
FAULTS = {
    "a rank is killed": (WORKER_1, RANK_PROCESS, signal.SIGKILL, None),
    "rank 0 is killed": (WORKER_0, RANK_PROCESS, signal.SIGKILL, None),
    "preStop of a worker": (WORKER_1, RANK_PROCESS, signal.SIGUSR2, {143}),
    "SIGTERM of the launcher": (LAUNCHER, LAUNCHER_PROCESS, signal.SIGTERM, {143}),
}


def result(folder):
    """Return the model of the last checkpoint, and the accuracies in the log."""
    (log,) = folder.glob("*.log")
    (run,) = folder.glob("*.checkpoints")
    last = sorted(run.glob("epoch_*"))[-1]
    lines = log_lines(log.read_text())
    scores = [line["value"] for line in lines if line["key"] == "eval_accuracy"]
    resumed = [line["metadata"]["checkpoint"] for line in lines if line["key"] == "resumed"]
    return (last.name, (last / "model-0000.params").read_bytes(), scores), resumed


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """The result of the same run on one machine."""
    folder = tmp_path_factory.mktemp("whole")
    env = environment(few, folder, SEED="1", CHECKPOINTS="1", NUM_LAYERS="18")
    done = run_and_time(*FLAGS, env=env, timeout=600)
    assert done.returncode == 3, done.stderr
    return result(folder / "results")[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_job_started_again_ends_with_the_same_weights(few, tmp_path, whole, fault):
    machine, pattern, number, statuses = FAULTS[fault]
    choose = random.Random(fault)
    with network_hosts.Cluster(tmp_path) as cluster:
        options = {"CHECKPOINTS": "1", "JOB_UID": "1"}
        for attempt in range(2):
            output = tmp_path / f"output{attempt}"
            job = start_job(cluster, few, tmp_path, *FLAGS, output=output, **options)
            job.wait_for(f"epoch {choose.randint(2 + attempt, 3 + attempt)}, step")
            time.sleep(choose.random())
            job.kill(machine, pattern, number)
            assert job.process.wait(timeout=90) != 0
            assert statuses is None or job.process.returncode in statuses, output.read_text()
            assert cluster.wait_until_idle(20) == {}
        for _ in range(2):  # the second time the operator repeats a job that missed its target
            job = start_job(cluster, few, tmp_path, *FLAGS, output=tmp_path / "last", **options)
            assert job.process.wait(timeout=300) == 3, (tmp_path / "last").read_text()
        assert "has finished its run already" in (tmp_path / "last").read_text()
    found, resumed = result(tmp_path / "results")
    assert found == whole and len(resumed) == 2
