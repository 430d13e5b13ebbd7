# SPDX-License-Identifier: Apache-2.0
"""Several machines: the launcher and two workers of an MPIJob over ssh, each with its own network.

./run_tests.sh tests/cluster/test_hosts.py -m "slow or not slow"; needs root, iproute2 and openssh.
"""

import os
import re
import signal
import subprocess
import time

import pytest
from support import network_hosts
from support.commands import ROOT
from support.launchers import environment, run_and_time
from support.mpijob import LAUNCHER, LAUNCHER_PROCESS

pytestmark = pytest.mark.skipif(
    bool(network_hosts.unavailable_reason()), reason=str(network_hosts.unavailable_reason())
)
EPOCHS = ["--num-epochs", "3", "--num-layers", "18", "--batch-size", "16"]
STEP_TRACE = ROOT / "tests" / "support" / "step_trace"


def run_job(folder, records, *flags, workers=2, slots=1, before=lambda cluster: None, **env):
    """Run a job to its end; return (process, output)."""
    with network_hosts.Cluster(folder, workers, slots) as cluster:
        before(cluster)
        process = cluster.launch(
            ["./run_and_time.sh", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                "DGXSYSTEM": "CPU_digits",
                "CHECKPOINTS": "0",
                "DGXNGPU": str(slots),
                "DGXNNODES": str(workers),
                "DATAROOT": str(records),
                "OMP_NUM_THREADS": "1",
                "LOGDIR": str(folder / "results"),
                "SEED": "7",
                **env,
            },
        )
        out, _ = process.communicate(timeout=900)
        assert cluster.wait_until_idle(5) == {}
    return process, out


def accuracies(text):
    """Return the accuracy after each epoch, as in the log."""
    return re.findall(r'"eval_accuracy", "value": ([\d.]+)', text)


def steps(text, rank):
    """Return the hash of the parameters after each step of a rank."""
    return re.findall(rf"STEP of rank {rank}: ([0-9a-f]{{64}})", text)


def test_two_machines_take_the_same_steps_as_one(few, tmp_path):
    flags = [*EPOCHS, "--eval-period", "3", "--eval-offset", "2", "--accuracy-threshold", "0.001"]
    more = {"SEED": "7", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(STEP_TRACE)}
    one = run_and_time(*flags, env=environment(few, tmp_path, DATESTAMP="a", **more))
    assert one.returncode == 0, one.stderr
    (tmp_path / "two").mkdir()
    process, out = run_job(tmp_path / "two", few, *flags, **more)
    assert process.returncode == 0, out
    assert out.count("RESULT,IMAGE_CLASSIFICATION") == 1
    assert "2 x cpu" in out and "starting 2 ranks on 2 workers" in out
    trace = steps(one.stderr, 0)
    assert len(set(trace)) >= 9 and trace == steps(one.stderr, 1) == steps(out, 0) == steps(out, 1)
    assert accuracies(out) == accuracies((tmp_path / "results" / "a_1.log").read_text()) != []
    assert len(list((tmp_path / "two" / "results").iterdir())) == 1


@pytest.mark.slow
def test_the_demo_reaches_its_target_on_two_machines(digits, tmp_path):
    """ResNet-50 reaches 97 % on the built-in data, by the same accuracies as on one machine."""
    env = environment(digits, tmp_path, SEED="7", OMP_NUM_THREADS="1", DATESTAMP="a")
    one = run_and_time(env=env, timeout=1800)
    assert one.returncode == 0, one.stderr
    process, out = run_job(tmp_path, digits)
    assert process.returncode == 0 and out.count("RESULT,IMAGE_CLASSIFICATION") == 1, out
    assert accuracies(out) == accuracies((tmp_path / "results" / "a_1.log").read_text())


@pytest.mark.slow
def test_two_ranks_on_each_of_two_machines(few, tmp_path):
    process, out = run_job(tmp_path, few, *EPOCHS, slots=2)
    assert process.returncode == 3 and "4 x cpu" in out, out


def test_a_number_of_ranks_that_differs_from_the_configuration_is_refused(few, tmp_path):
    process, out = run_job(tmp_path, few, *EPOCHS, DGXNNODES="3")
    assert process.returncode == 2 and "has room for 2 ranks" in out and "is for 3" in out


def test_a_variable_that_the_configuration_overrides_is_reported_once(few, tmp_path):
    process, out = run_job(tmp_path, few, *EPOCHS, LR="3")
    assert process.returncode == 3, out
    notes = [line for line in out.splitlines() if line.startswith("note: LR=")]
    assert notes == [
        "note: LR=3 from the environment is overridden by config_CPU_digits.sh (LR=4): use --lr 3"
    ]


def test_a_worker_that_does_not_start_is_named(few, tmp_path):
    def remove_second_worker(cluster):
        cluster.remove(cluster.workers[1])

    started = time.monotonic()
    process, out = run_job(tmp_path, few, *EPOCHS, before=remove_second_worker, LAUNCH_WAIT="4")
    worker = "resnet-worker-1.resnet.default.svc"
    assert process.returncode == 2
    assert f"{worker} cannot be reached after 4 s: nothing answers on port 2222" in out
    assert time.monotonic() - started < 30


def launch_without_the_second_worker(cluster, few, tmp_path):
    """Return the launcher's process, once it waits for that worker."""
    cluster.remove(cluster.workers[1])
    process = cluster.launch(
        ["./run_and_time.sh", *EPOCHS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={
            "DGXSYSTEM": "CPU_digits",
            "CHECKPOINTS": "0",
            "DGXNGPU": "1",
            "DGXNNODES": "2",
            "DATAROOT": str(few),
            "LOGDIR": str(tmp_path / "results"),
        },
    )
    for line in process.stdout:
        if "waiting for resnet-worker-1" in line:
            break
    return process


def test_a_launcher_that_waits_for_workers_can_be_stopped(few, tmp_path):
    """It is PID 1 of its container: the kernel delivers to it only signals that it handles."""
    with network_hosts.Cluster(tmp_path) as cluster:
        process = launch_without_the_second_worker(cluster, few, tmp_path)
        os.kill(cluster.process_ids(LAUNCHER, LAUNCHER_PROCESS)[0], signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 143, out
        assert out.strip() == "run_and_time.sh: stopped by SIGTERM"
        assert cluster.wait_until_idle(5) == {}


@pytest.mark.slow
def test_a_worker_that_starts_late_is_waited_for(few, tmp_path):
    with network_hosts.Cluster(tmp_path) as cluster:
        process = launch_without_the_second_worker(cluster, few, tmp_path)
        cluster.start_worker(cluster.workers[1])
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 3 and "2 x cpu" in out, out
