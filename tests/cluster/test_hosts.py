# SPDX-License-Identifier: Apache-2.0
"""Several machines for real: the launcher and two workers of an MPIJob over ssh, each with a network of its own.

./run_tests.sh tests/cluster/test_hosts.py -m "slow or not slow"; needs root, iproute2 and openssh.
"""

import os
import re
import signal
import subprocess
import time

import pytest
from support import network_hosts as hosts
from test_run_and_time import environment, run_and_time

pytestmark = pytest.mark.skipif(bool(hosts.why_not()), reason=str(hosts.why_not()))
EPOCHS = ["--num-epochs", "3", "--num-layers", "18", "--batch-size", "16"]
# Loaded by Python itself on every rank: says after each step what all parameters, momenta's effect included, are to the last bit.
TRACE = """
import importlib.abc, importlib.machinery, os, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, search, target=None):
        if name != "mxresnet.trainer":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, search, target)
        run = spec.loader.exec_module
        def exec_module(made):
            run(made)
            import hashlib
            update = made.Trainer.update
            def traced(self):
                update(self)
                made.mx.nd.waitall()
                sum = hashlib.sha256()
                for arrays in self._module._exec_group.param_arrays:
                    sum.update(arrays[0].asnumpy().tobytes())
                os.write(2, ("STEP of rank %s: %s\\n" % (os.environ["OMPI_COMM_WORLD_RANK"], sum.hexdigest())).encode())
            made.Trainer.update = traced
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def job(folder, records, *flags, workers=2, slots=1, before=lambda cluster: None, **env):
    """Run a job to its end: (process, output)."""
    with hosts.Cluster(folder, workers, slots) as cluster:
        before(cluster)
        process = cluster.launch(
            ["./run_and_time.sh", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                "DGXSYSTEM": "CPU_digits",
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
        assert cluster.wait_until_nothing_is_left(5) == {}
    return process, out


def course(text):
    """What a run learned: accuracy after each epoch."""
    return re.findall(r'"eval_accuracy", "value": ([\d.]+)', text)


def steps(text, rank):
    return re.findall(rf"STEP of rank {rank}: ([0-9a-f]{{64}})", text)


def test_two_machines_take_the_same_steps_as_one(few, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "sitecustomize.py").write_text(TRACE)
    flags = [*EPOCHS, "--eval-period", "3", "--eval-offset", "2", "--accuracy-threshold", "0.001"]
    more = {"SEED": "7", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "code")}
    one = run_and_time(*flags, env=environment(few, tmp_path, DATESTAMP="a", **more))
    assert one.returncode == 0, one.stderr
    (tmp_path / "two").mkdir()
    process, out = job(tmp_path / "two", few, *flags, **more)
    assert process.returncode == 0, out
    assert (
        out.count("RESULT,IMAGE_CLASSIFICATION") == 1
        and "2 x cpu" in out
        and "starting 2 ranks on 2 workers" in out
    )
    trace = steps(one.stderr, 0)
    assert len(set(trace)) >= 9 and trace == steps(one.stderr, 1) == steps(out, 0) == steps(out, 1)
    assert course(out) == course((tmp_path / "results" / "a_1.log").read_text()) != []
    assert len(list((tmp_path / "two" / "results").iterdir())) == 1


@pytest.mark.slow
def test_the_demo_reaches_its_target_on_two_machines(digits, tmp_path):
    """All of it: ResNet-50 to 97 % on the built-in data set, and the same course as on one machine."""
    one = run_and_time(
        env=environment(digits, tmp_path, SEED="7", OMP_NUM_THREADS="1", DATESTAMP="a"),
        timeout=1800,
    )
    assert one.returncode == 0, one.stderr
    process, out = job(tmp_path, digits)
    assert process.returncode == 0 and out.count("RESULT,IMAGE_CLASSIFICATION") == 1, out
    assert course(out) == course((tmp_path / "results" / "a_1.log").read_text())


@pytest.mark.slow
def test_two_ranks_on_each_of_two_machines(few, tmp_path):
    process, out = job(tmp_path, few, *EPOCHS, slots=2)
    assert process.returncode == 3 and "4 x cpu" in out, out


def test_ranks_that_are_not_the_configurations_are_refused(few, tmp_path):
    process, out = job(tmp_path, few, *EPOCHS, DGXNNODES="3")
    assert process.returncode == 2 and "has room for 2 ranks" in out and "is for 3" in out


def test_a_worker_that_does_not_come_is_named(few, tmp_path):
    def lose_one(cluster):
        cluster.remove(cluster.workers[1])

    started = time.monotonic()
    process, out = job(tmp_path, few, *EPOCHS, before=lose_one, LAUNCH_WAIT="4")
    assert (
        process.returncode == 2
        and "resnet-worker-1.resnet.default.svc cannot be reached after 4 s: nothing answers on port 22"
        in out
    )
    assert time.monotonic() - started < 30


def launched_without_the_second_worker(cluster, few, tmp_path):
    """The launcher, once it waits for that worker."""
    cluster.remove(cluster.workers[1])
    process = cluster.launch(
        ["./run_and_time.sh", *EPOCHS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={
            "DGXSYSTEM": "CPU_digits",
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


def test_a_launcher_that_waits_for_workers_can_be_told_to_stop(few, tmp_path):
    """It is its container's first process, which the kernel spares every signal that it does not handle."""
    with hosts.Cluster(tmp_path) as cluster:
        process = launched_without_the_second_worker(cluster, few, tmp_path)
        os.kill(cluster.inside(cluster.names[0], "bash /")[0], signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 143 and out.strip() == "run_and_time.sh: stopped by SIGTERM", (
            out
        )
        assert cluster.wait_until_nothing_is_left(5) == {}


@pytest.mark.slow
def test_a_worker_that_comes_late_is_waited_for(few, tmp_path):
    with hosts.Cluster(tmp_path) as cluster:
        process = launched_without_the_second_worker(cluster, few, tmp_path)
        cluster.start_worker(cluster.workers[1])
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 3 and "2 x cpu" in out, out


def test_open_mpi_5_is_refused(few, tmp_path):
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "mpirun").write_text("#!/bin/sh\necho 'mpirun (Open MPI) 5.0.11'\n")
    (fake / "mpirun").chmod(0o755)
    script = 'set -euo pipefail; hostfile=$2/hosts; die() { echo "$*"; exit 2; }; source ./k8s/launch.sh; check_mpirun "$1/mpirun"'
    from support.commands import ROOT

    done = subprocess.run(
        ["bash", "-c", script, "-", str(fake), str(tmp_path)],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert (
        done.returncode == 2
        and "Open MPI) 5.0.11" in done.stdout
        and "needs Open MPI 4.1" in done.stdout
    )
