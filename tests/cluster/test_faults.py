# SPDX-License-Identifier: Apache-2.0
"""Nothing hangs: after each fault the job ends in time, explains one cause, and no process remains.

With real ranks on two machines made of network namespaces, and the launcher as mpi-operator runs
it. All tests: ./run_tests.sh tests/cluster/test_faults.py -m "slow or not slow"
"""

import os
import signal
import subprocess
import time

import pytest
from support import network_hosts
from support.commands import ROOT
from support.mpijob import LAUNCHER, LAUNCHER_PROCESS, WORKER_0, WORKER_1

needs_machines = pytest.mark.skipif(
    bool(network_hosts.unavailable_reason()), reason=str(network_hosts.unavailable_reason())
)

# Connects to every port that a machine listens on, as a port scanner does.
PORT_SCANNER = """
import socket
for line in open("/proc/net/tcp").read().splitlines()[1:]:
    _, local, _, state = line.split()[:4]
    if state == "0A":
        address = "127.0.0.1" if local.startswith("0100007F") else "10.77.0.11"
        connection = socket.create_connection((address, int(local[9:], 16)))
        connection.sendall(b"GET / HTTP/1.0\\n\\n")
        connection.close()
"""


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def running(start_job, **env):
    """Start a job; return it once it trains, and the time."""
    job = start_job(**env)
    job.wait_for("after epoch 2")
    return job, time.monotonic()


@needs_machines
class TestProcessesAndMachines:
    @pytest.mark.parametrize(
        "machine, cause",
        [
            (WORKER_1, r"rank 1 on resnet-worker-1\S* was ended by SIGKILL"),
            slow(WORKER_0, "rank 0 was ended by SIGKILL"),
        ],
    )
    def test_a_rank_is_killed(self, start_job, machine, cause):
        job, now = running(start_job)
        os.kill(job.cluster.rank_process_ids(machine)[0], signal.SIGKILL)
        job.check_end(now, within=30, cause=cause, statuses={137})

    @pytest.mark.slow
    def test_a_rank_gets_sigterm(self, start_job):
        job, now = running(start_job)
        os.kill(job.cluster.rank_process_ids(WORKER_1)[0], signal.SIGTERM)
        cause = r"rank 1 on resnet-worker-1\S* was ended by SIGTERM"
        job.check_end(now, within=30, cause=cause, statuses={143})

    @pytest.mark.slow
    def test_a_daemon_of_mpirun_is_killed(self, start_job):
        job, now = running(start_job)
        job.kill(WORKER_1, "bin/orted")
        job.check_end(now, within=30, cause=r"the machine resnet-worker-1\S* was lost")

    def test_a_machine_is_gone(self, start_job):
        job, now = running(start_job)
        job.cluster.remove(WORKER_1)
        job.check_end(now, within=30, cause=r"the machine resnet-worker-1\S* was lost")

    @pytest.mark.slow
    @pytest.mark.parametrize("machine", [WORKER_0, WORKER_1])
    def test_a_link_is_cut(self, start_job, machine):
        job, now = running(start_job)
        job.cluster.cut_link(machine)
        job.check_end(now, within=30, cause=rf"the machine {machine}\S* was lost")

    @pytest.mark.slow
    def test_the_link_of_the_launcher_is_cut(self, start_job):
        job, now = running(start_job)
        job.cluster.cut_link(LAUNCHER)
        cause = "the machines cannot be reached|was lost: it or its mpirun daemon"
        job.check_end(now, within=30, cause=cause)

    @pytest.mark.slow
    def test_a_run_continues_when_a_cut_link_comes_back(self, start_job):
        job, _ = running(start_job)
        job.cluster.cut_link(WORKER_1)
        time.sleep(4)
        job.cluster.restore_link(WORKER_1)
        job.wait_for("after epoch")
        assert job.process.poll() is None

    @pytest.mark.slow
    @pytest.mark.parametrize("machine", [WORKER_0, WORKER_1])
    def test_a_process_is_stopped(self, start_job, machine):
        job, now = running(start_job)
        os.kill(job.cluster.rank_process_ids(machine)[0], signal.SIGSTOP)
        cause = r"no heartbeat from rank \d on resnet-worker-\d for 40 s"
        out = job.check_end(now, within=60, cause=cause)
        assert f"from rank {machine[-1]} on {machine}" in out

    @pytest.mark.slow
    def test_a_process_that_is_stopped_for_a_shorter_time_continues(self, start_job):
        job, _ = running(start_job, WATCHDOG_LIMIT="7")
        for machine in (WORKER_1, WORKER_0):
            rank = job.cluster.rank_process_ids(machine)[0]
            os.kill(rank, signal.SIGSTOP)
            time.sleep(4)
            os.kill(rank, signal.SIGCONT)
            job.wait_for("after epoch")
        assert job.process.poll() is None

    @pytest.mark.slow
    def test_everything_on_a_machine_is_stopped(self, start_job):
        job, now = running(start_job)
        for pid in job.cluster.process_ids(WORKER_1, ""):
            os.kill(pid, signal.SIGSTOP)
        job.process.wait(timeout=70)
        out = job.output()
        assert job.process.returncode != 0 and time.monotonic() - now < 60, out
        assert (
            "from rank 1 on resnet-worker-1" in out
            or "machines cannot be reached" in out
            or "resnet-worker-1.resnet.default.svc was lost" in out
        )


@needs_machines
class TestSchedulers:
    def test_the_launcher_gets_sigterm(self, start_job):
        job, now = running(start_job)
        job.kill(LAUNCHER, LAUNCHER_PROCESS, signal.SIGTERM)
        job.check_end(now, within=30, cause="stopped by SIGTERM", statuses={143})

    @pytest.mark.slow
    def test_mpirun_gets_sigterm(self, start_job):
        job, now = running(start_job)
        job.kill(LAUNCHER, "bin/mpirun", signal.SIGTERM)
        job.check_end(now, within=30, cause="mpirun was stopped by a signal from outside")

    @pytest.mark.slow
    def test_mpirun_is_killed(self, start_job):
        job, now = running(start_job)
        job.kill(LAUNCHER, "bin/mpirun")
        job.check_end(now, within=30, cause="was ended by SIGKILL")


UPDATE = "mxresnet.trainer/Trainer.update"
NEXT_BATCH = "mxresnet.data.dali/DaliIterator.next_train_batch"
EVALUATE = "mxresnet.trainer/Trainer.evaluate"
WARM_UP = "mxresnet.trainer/Trainer.warm_up"
JOIN = "mxresnet.parallel.world/join"


def error_of(rank, when=""):
    return f"rank {rank} failed{when}:\n(.*\n)*RuntimeError: injected fault"


@needs_machines
class TestProgram:
    """A fault in the program of one rank."""

    @pytest.mark.parametrize(
        "function, rank, action, cause, within",
        [
            (UPDATE, 1, "raise", error_of(1), 30),
            slow(UPDATE, 0, "raise", error_of(0), 30),
            slow(NEXT_BATCH, 1, "raise", error_of(1), 30),
            slow(EVALUATE, 1, "raise", error_of(1), 30),
            slow(EVALUATE, 0, "raise", error_of(0), 30),
            slow(WARM_UP, 1, "raise", error_of(1), 30),
            slow(WARM_UP, 1, "SIGSEGV", r"rank 1 on \S+ was ended by SIGSEGV", 30),
            slow(JOIN, 1, "raise", error_of(1, " to join the others"), 30),
            slow(JOIN, 1, "SIGKILL", r"rank 1 on \S+ was ended by SIGKILL", 30),
            slow(JOIN, 1, "SIGSTOP", "did not connect to each other within 40 s", 60),
            slow(WARM_UP, 1, "SIGSTOP", "no heartbeat from rank 1", 60),
            slow(UPDATE, 1, "exit", r"rank 1 on \S+ exited before the end of the run", 30),
        ],
    )
    def test_a_fault_in_the_program_of_one_rank(
        self, start_job, function, rank, action, cause, within
    ):
        job = start_job(NCCL_FAULT_INJECTION=f"{function}:{rank}:{action}")
        job.wait_for("FAULT INJECTED\n")
        job.check_end(time.monotonic(), within=within, cause=cause)

    @pytest.mark.slow
    @pytest.mark.parametrize("size", ["16k", "64k"])  # before and after run_start
    def test_the_disk_for_logs_is_full(self, start_job, tmp_path, size):
        full = tmp_path / "results"
        full.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", full], check=True)
        try:
            job = start_job()
            job.cluster.remove(WORKER_0)
            job.cluster.start_worker(WORKER_0)  # the new one has the new file system
            cause = "cannot be written .No space left on device"
            out = job.check_end(time.monotonic(), within=60, cause=cause, statuses={2})
            assert "Failed to encode" not in out
        finally:
            subprocess.run(["umount", full], check=True)

    @pytest.mark.slow
    def test_connections_of_a_port_scanner_are_ignored(self, start_job):
        job, _ = running(start_job)
        enter = ["ip", "netns", "exec", job.cluster.namespace(WORKER_0)]
        subprocess.run([*enter, "python3", "-c", PORT_SCANNER], check=True)
        job.wait_for("after epoch")
        job.wait_for("after epoch")
        assert job.process.poll() is None


def test_fault_injection_is_not_in_the_product():
    for path in ROOT.glob("mxresnet/**/*.py"):
        assert "FAULT_INJECTION" not in path.read_text()
