# SPDX-License-Identifier: Apache-2.0
"""Nothing hangs: each fault ends the job with a non-zero status, one cause on the terminal, in time, and nothing is left.

On real ranks: two machines made of network namespaces, and the launcher as mpi-operator runs it. All of it:
./run_tests.sh tests/cluster/test_faults.py -m "slow or not slow"
"""

import os
import re
import signal
import subprocess
import time

import pytest
from support import network_hosts as hosts
from support.commands import ROOT

WORKER_0, WORKER_1 = (f"{hosts.JOB}-worker-{i}" for i in range(2))
needs_hosts = pytest.mark.skipif(bool(hosts.why_not()), reason=str(hosts.why_not()))

# Loaded by Python itself on every rank: wraps one function of the program so that one rank does something bad in it.
SABOTAGE = """
import importlib.abc, importlib.machinery, os, signal, sys, time
where, rank, act = os.environ.get("NCCL_SABOTAGE", "::").split(":")
module, _, path = where.partition("/")

def bad(what, *args, **kwargs):
    os.write(2, b"NOW\\n")
    if act == "raise":
        raise RuntimeError("bad luck")
    if act == "exit":
        os._exit(0)
    os.kill(os.getpid(), getattr(signal, act))
    return what(*args, **kwargs)

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, search, target=None):
        if name != module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, search, target)
        run = spec.loader.exec_module
        def exec_module(made):
            run(made)
            owner = made
            *parents, last = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            original, calls = getattr(owner, last), [0]
            def wrapped(*args, **kwargs):
                calls[0] += 1
                return bad(original, *args, **kwargs) if calls[0] == 3 or last in ("join", "warm_up", "evaluate") else original(*args, **kwargs)
            setattr(owner, last, wrapped)
        spec.loader.exec_module = exec_module
        return spec

if module and os.environ.get("OMPI_COMM_WORLD_RANK") == rank:
    sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def job(few, tmp_path):
    """start(flag ..., NAME=value ...) starts a training run on two machines, by default a long one; returns (cluster, launcher's process)."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "sitecustomize.py").write_text(SABOTAGE)
    output = tmp_path / "output"
    with hosts.Cluster(tmp_path) as cluster, open(output, "w") as file:

        def start(*flags, **env):
            process = cluster.launch(
                [
                    "./run_and_time.sh",
                    *(flags or ("--num-epochs", "5000", "--accuracy-threshold", "1")),
                ],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={
                    "DGXSYSTEM": "CPU_digits",
                    "DGXNGPU": "1",
                    "DGXNNODES": "2",
                    "NUM_LAYERS": "18",
                    "DATAROOT": str(few),
                    "OMP_NUM_THREADS": "1",
                    "LOGDIR": str(tmp_path / "results"),
                    "SEED": "1",
                    "PYTHONPATH": str(tmp_path / "code"),
                    **env,
                },
            )
            process.output, process.heard = output, 0
            return cluster, process

        yield start


def rest(process):
    """What a job has said since wait_for."""
    return process.output.read_text()[process.heard :]


def wait_for(process, text):
    while text not in rest(process):
        assert process.poll() is None, f"the job ended before it said {text!r}:\n{rest(process)}"
        time.sleep(0.05)
    process.heard += rest(process).index(text) + len(text)


def ends(cluster, process, since, *, within, causes, statuses=None):
    """Check how a job ends after a fault; return what it said."""
    process.wait(timeout=within + 30)
    out = rest(process)
    took = time.monotonic() - since
    left = cluster.wait_until_nothing_is_left(max(1.0, within - took))
    gone = time.monotonic() - since
    print(
        f"\nended after {took:.1f} s with status {process.returncode}, all gone after {gone:.1f} s; it said:\n{out[-1500:]}"
    )
    assert process.returncode not in (0, None) and took < within and not left, left
    assert statuses is None or process.returncode in statuses
    said = [
        line for line in out.splitlines() if line.startswith(("mxresnet: ", "run_and_time.sh: "))
    ]
    assert len(said) == 1 and re.search(causes, out), out
    assert "RESULT" not in out and "------" not in out
    return out


def running(job, **env):
    cluster, process = job(**env)
    wait_for(process, "after epoch 2")
    return cluster, process, time.monotonic()


def kill(cluster, machine, pattern, number=signal.SIGKILL):
    found = cluster.inside(machine, pattern)
    assert found
    os.kill(found[0], number)  # the oldest: a script's own process, not a part of it


@needs_hosts
class TestProcessesAndMachines:
    @pytest.mark.parametrize(
        "machine, cause",
        [
            (WORKER_1, r"rank 1 on resnet-worker-1\S* was ended by SIGKILL"),
            pytest.param(WORKER_0, "rank 0 was ended by SIGKILL", marks=pytest.mark.slow),
        ],
    )
    def test_a_rank_is_killed(self, job, machine, cause):
        cluster, process, now = running(job)
        os.kill(cluster.ranks(machine)[0], signal.SIGKILL)
        ends(cluster, process, now, within=30, causes=cause, statuses={137})

    @pytest.mark.slow
    def test_a_rank_is_told_to_stop(self, job):
        cluster, process, now = running(job)
        os.kill(cluster.ranks(WORKER_1)[0], signal.SIGTERM)
        ends(
            cluster,
            process,
            now,
            within=30,
            causes=r"rank 1 on resnet-worker-1\S* was ended by SIGTERM",
            statuses={143},
        )

    @pytest.mark.slow
    def test_a_daemon_of_mpirun_is_killed(self, job):
        cluster, process, now = running(job)
        kill(cluster, WORKER_1, "bin/orted")
        ends(cluster, process, now, within=30, causes=r"the machine resnet-worker-1\S* was lost")

    def test_a_machine_is_gone(self, job):
        cluster, process, now = running(job)
        cluster.remove(WORKER_1)
        ends(cluster, process, now, within=30, causes=r"the machine resnet-worker-1\S* was lost")

    @pytest.mark.slow
    @pytest.mark.parametrize("machine", [WORKER_0, WORKER_1])
    def test_a_link_is_cut(self, job, machine):
        cluster, process, now = running(job)
        cluster.cut(machine)
        ends(cluster, process, now, within=30, causes=rf"the machine {machine}\S* was lost")

    @pytest.mark.slow
    def test_the_launchers_link_is_cut(self, job):
        cluster, process, now = running(job)
        cluster.cut(cluster.names[0])
        ends(
            cluster,
            process,
            now,
            within=30,
            causes="the machines cannot be reached|was lost: it or its mpirun daemon",
        )

    @pytest.mark.slow
    def test_a_link_that_comes_back_costs_nothing_but_time(self, job):
        cluster, process, _ = running(job)
        cluster.cut(WORKER_1)
        time.sleep(4)
        cluster.mend(WORKER_1)
        wait_for(process, "after epoch")
        assert process.poll() is None

    @pytest.mark.slow
    @pytest.mark.parametrize("machine", [WORKER_0, WORKER_1])
    def test_a_process_is_stopped(self, job, machine):
        cluster, process, now = running(job)
        os.kill(cluster.ranks(machine)[0], signal.SIGSTOP)
        out = ends(
            cluster,
            process,
            now,
            within=60,
            causes=r"no heartbeat from rank \d on resnet-worker-\d for 40 s",
        )
        assert f"from rank {machine[-1]} on {machine}" in out

    @pytest.mark.slow
    def test_a_process_that_is_stopped_for_less_goes_on(self, job):
        cluster, process, _ = running(job, WATCHDOG_LIMIT="7")
        for machine in (WORKER_1, WORKER_0):
            rank = cluster.ranks(machine)[0]
            os.kill(rank, signal.SIGSTOP)
            time.sleep(4)
            os.kill(rank, signal.SIGCONT)
            wait_for(process, "after epoch")
        assert process.poll() is None

    @pytest.mark.slow
    def test_everything_on_a_machine_is_stopped(self, job):
        cluster, process, now = running(job)
        for pid in cluster.inside(WORKER_1, ""):
            os.kill(pid, signal.SIGSTOP)
        process.wait(timeout=70)
        out = rest(process)
        assert process.returncode != 0 and time.monotonic() - now < 60, out
        assert (
            "from rank 1 on resnet-worker-1" in out
            or "machines cannot be reached" in out
            or "resnet-worker-1.resnet.default.svc was lost" in out
        )


@needs_hosts
class TestSchedulers:
    def test_the_launcher_is_told_to_stop(self, job):
        cluster, process, now = running(job)
        kill(cluster, cluster.names[0], "bash /", signal.SIGTERM)
        ends(cluster, process, now, within=30, causes="stopped by SIGTERM", statuses={143})

    @pytest.mark.slow
    def test_mpirun_is_told_to_stop(self, job):
        cluster, process, now = running(job)
        kill(cluster, cluster.names[0], "bin/mpirun", signal.SIGTERM)
        ends(cluster, process, now, within=30, causes="mpirun was told to stop")

    @pytest.mark.slow
    def test_mpirun_is_killed(self, job):
        cluster, process, now = running(job)
        kill(cluster, cluster.names[0], "bin/mpirun")
        ends(cluster, process, now, within=30, causes="was ended by SIGKILL")


@needs_hosts
class TestProgram:
    """A rank that does something bad at some point of the run."""

    @pytest.mark.parametrize(
        "where, rank, act, causes, within",
        [
            (
                "mxresnet.trainer/Trainer.update",
                1,
                "raise",
                "rank 1 failed:\n(.*\n)*RuntimeError: bad luck",
                30,
            ),
            pytest.param(
                "mxresnet.trainer/Trainer.update",
                0,
                "raise",
                "rank 0 failed:\n(.*\n)*RuntimeError: bad luck",
                30,
                marks=pytest.mark.slow,
            ),
            pytest.param(
                "mxresnet.data/dali.DaliIterator.next_train_batch",
                1,
                "raise",
                "rank 1 failed:\n(.*\n)*RuntimeError",
                30,
                marks=pytest.mark.slow,
            ),
            pytest.param(
                "mxresnet.trainer/Trainer.evaluate",
                1,
                "raise",
                "rank 1 failed:\n(.*\n)*RuntimeError",
                30,
                marks=pytest.mark.slow,
            ),
            pytest.param(
                "mxresnet.trainer/Trainer.evaluate",
                0,
                "raise",
                "rank 0 failed:\n(.*\n)*RuntimeError",
                30,
                marks=pytest.mark.slow,
            ),
            pytest.param(
                "mxresnet.trainer/Trainer.warm_up",
                1,
                "raise",
                "rank 1 failed:\n(.*\n)*RuntimeError",
                30,
                marks=pytest.mark.slow,
            ),
            pytest.param(
                "mxresnet.trainer/Trainer.warm_up",
                1,
                "SIGSEGV",
                r"rank 1 on \S+ was ended by SIGSEGV",
                30,
                marks=pytest.mark.slow,
            ),
            pytest.param(
                "mxresnet.parallel.world/join",
                1,
                "raise",
                "rank 1 failed to join the others:\n(.*\n)*RuntimeError: bad luck",
                30,
                marks=pytest.mark.slow,
            ),
            pytest.param(
                "mxresnet.parallel.world/join",
                1,
                "SIGKILL",
                r"rank 1 on \S+ was ended by SIGKILL",
                30,
                marks=pytest.mark.slow,
            ),
            pytest.param(
                "mxresnet.parallel.world/join",
                1,
                "SIGSTOP",
                "did not come together within 40 s",
                60,
                marks=pytest.mark.slow,
            ),
            pytest.param(
                "mxresnet.trainer/Trainer.warm_up",
                1,
                "SIGSTOP",
                "no heartbeat from rank 1",
                60,
                marks=pytest.mark.slow,
            ),
            pytest.param(
                "mxresnet.trainer/Trainer.update",
                1,
                "exit",
                "rank 1 on \\S+ ended before the run was over",
                30,
                marks=pytest.mark.slow,
            ),
        ],
    )
    def test_a_rank_misbehaves(self, job, where, rank, act, causes, within):
        where = where.replace("mxresnet.data/dali.", "mxresnet.data.dali/")
        cluster, process = job(NCCL_SABOTAGE=f"{where}:{rank}:{act}")
        wait_for(process, "NOW\n")
        ends(cluster, process, time.monotonic(), within=within, causes=causes)

    @pytest.mark.slow
    @pytest.mark.parametrize("size", ["16k", "64k"])  # before and after run_start
    def test_the_disk_for_logs_is_full(self, job, tmp_path, size):
        full = tmp_path / "results"
        full.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", full], check=True)
        try:
            cluster, process = job()
            cluster.remove(WORKER_0)
            cluster.start_worker(WORKER_0)  # it sees the new file system
            out = ends(
                cluster,
                process,
                time.monotonic(),
                within=60,
                causes="cannot be written .No space left on device",
                statuses={2},
            )
            assert "Failed to encode" not in out
        finally:
            subprocess.run(["umount", full], check=True)

    @pytest.mark.slow
    def test_a_port_scanner_is_no_rank(self, job):
        cluster, process, _ = running(job)
        scan = (
            "import socket\nfor line in open('/proc/net/tcp').read().splitlines()[1:]:\n    _, local, _, state = line.split()[:4]\n"
            "    if state == '0A':\n        s = socket.create_connection(('127.0.0.1' if local.startswith('0100007F') else '10.77.0.11', int(local[9:], 16)))\n"
            "        s.sendall(b'GET / HTTP/1.0\\n\\n'); s.close()\n"
        )
        subprocess.run(
            ["ip", "netns", "exec", cluster.namespace(WORKER_0), "python3", "-c", scan], check=True
        )
        wait_for(process, "after epoch")
        wait_for(process, "after epoch")
        assert process.poll() is None


def test_sabotage_is_not_in_the_product():
    assert not [path for path in ROOT.glob("mxresnet/**/*.py") if "SABOTAGE" in path.read_text()]
