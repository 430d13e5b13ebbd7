# SPDX-License-Identifier: Apache-2.0
"""Nothing hangs, whenever it happens: a fault drawn at random, at a random moment between a job's start and its end.

    RANDOM_FAULTS=40 ./run_tests.sh tests/cluster/test_random_faults.py -m slow

RANDOM_FAULTS is how many (6), RANDOM_FAULTS_SEED repeats what an earlier run drew and printed; -k '[7]' takes one of them.
RANDOM_FAULTS_ONLY is a part of the names of the faults to draw from.
"""

import os
import random
import re
import secrets
import signal
import time

import pytest
from support import network_hosts as hosts
from test_faults import WORKER_0, WORKER_1, job, needs_hosts, rest  # noqa: F401 (job is a fixture)

COUNT = int(os.environ.get("RANDOM_FAULTS", "6"))
SEED = os.environ.get("RANDOM_FAULTS_SEED") or str(secrets.randbelow(10**6))
LAUNCHER = f"{hosts.JOB}-launcher"
# A run of a few seconds that evaluates after its last epoch, whereupon any accuracy will do. Workers are waited for 10 s.
RUN = [
    "--num-epochs",
    "5",
    "--eval-period",
    "5",
    "--eval-offset",
    "4",
    "--accuracy-threshold",
    "0.001",
]
pytestmark = [pytest.mark.slow, needs_hosts]


def signals(machine, pattern, number):
    """A fault: the oldest process of this machine with this in its command line gets a signal."""

    def act(cluster):
        found = cluster.inside(machine, pattern)
        if not found:
            return False
        os.kill(found[0], number)
        return True

    return act


def stops_all(machine):
    def act(cluster):
        for pid in cluster.inside(machine, ""):
            os.kill(pid, signal.SIGSTOP)
        return True

    return act


def calls(name, machine):
    def act(cluster):
        getattr(cluster, name)(machine)
        return True

    return act


RANK = "python -m mxresnet"
# What it is called: (what is done, seconds in which the job has to end, machines where nobody is left to end anything, cause).
FAULTS = {
    **{
        f"{machine}: a rank gets SIG{name}": (
            signals(machine, RANK, getattr(signal, f"SIG{name}")),
            30,
            (),
            f"rank {machine[-1]} .*was ended by SIG{name}",
        )
        for machine in (WORKER_0, WORKER_1)
        for name in ("KILL", "TERM", "SEGV")
    },
    **{
        f"{machine}: a rank is stopped": (
            signals(machine, RANK, signal.SIGSTOP),
            60,
            (),
            f"no heartbeat from rank {machine[-1]} on {machine}|did not come together",
        )
        for machine in (WORKER_0, WORKER_1)
    },
    **{
        f"{machine}: orted is killed": (
            signals(machine, "bin/orted", signal.SIGKILL),
            30,
            (),
            f"{machine}.* was lost|no orted: one ended before",
        )
        for machine in (WORKER_0, WORKER_1)
    },
    **{
        f"{machine} is gone": (calls("remove", machine), 30, (), machine)
        for machine in (WORKER_0, WORKER_1)
    },
    **{
        f"{machine} is cut off": (calls("cut", machine), 30, (), machine)
        for machine in (WORKER_0, WORKER_1)
    },
    "the launcher is cut off": (calls("cut", LAUNCHER), 30, (), "was lost|cannot be reached"),
    **{
        f"{machine} is stopped": (stops_all(machine), 60, (machine,), machine)
        for machine in (WORKER_0, WORKER_1)
    },
    **{
        f"the launcher gets SIG{name}": (
            signals(LAUNCHER, "bash /", getattr(signal, f"SIG{name}")),
            30,
            (),
            f"stopped by SIG{name}",
        )
        for name in ("TERM", "INT", "HUP")
    },
    "mpirun gets SIGTERM": (
        signals(LAUNCHER, "bin/mpirun", signal.SIGTERM),
        30,
        (),
        "mpirun was told to stop",
    ),
    "mpirun is killed": (
        signals(LAUNCHER, "bin/mpirun", signal.SIGKILL),
        30,
        (),
        "mpirun was ended by SIGKILL",
    ),
}


@pytest.fixture(scope="module")
def length():
    """Seconds that the run takes by itself; filled in by the first test."""
    return []


def test_the_run_by_itself(job, length):  # noqa: F811
    started = time.monotonic()
    cluster, process = job(*RUN)
    assert process.wait(timeout=120) == 0 and "RESULT," in rest(process), rest(process)
    length.append(time.monotonic() - started)


@pytest.mark.parametrize("number", range(COUNT))
def test_a_fault_at_a_random_moment(job, length, number):  # noqa: F811
    draw = random.Random(f"{SEED}/{number}")
    started = time.monotonic()
    cluster, process = job(*RUN, LAUNCH_WAIT="10")
    moment = draw.uniform(0, length[0] if length else 15)
    time.sleep(max(0, started + moment - time.monotonic()))
    assert process.poll() in (None, 0), f"it failed by itself:\n{rest(process)}"
    # What cannot happen yet, or any more, is passed over.
    among = sorted(name for name in FAULTS if os.environ.get("RANDOM_FAULTS_ONLY", "") in name)
    names = draw.sample(among, len(among))
    name = next((name for name in names if FAULTS[name][0](cluster)), None) or pytest.skip(
        f"nothing to do after {moment:.2f} s"
    )
    _, limit, lost, cause = FAULTS[name]
    now, said_before = time.monotonic(), rest(process).splitlines()
    print(
        f"\nRANDOM_FAULTS_SEED={SEED}, number {number}, after {moment:.2f} s: {name}; last said: {said_before[-1:]}"
    )
    try:
        process.wait(timeout=limit + 20)
    finally:
        took, out = time.monotonic() - now, rest(process)
        left = cluster.wait_until_nothing_is_left(max(2.0, limit - took), but=lost)
        print(
            f"status {process.returncode} after {took:.1f} s, nothing left after {time.monotonic() - now:.1f} s; {left}\n"
            + "\n".join(
                line for line in out[-6000:].splitlines() if not line.startswith(":::MLLOG")
            )
        )
    assert took < limit and not left
    causes = [
        line for line in out.splitlines() if line.startswith(("mxresnet: ", "run_and_time.sh: "))
    ]
    if process.returncode == 0:
        # It was over, or as good as over.
        assert took < 5 and out.count("RESULT,") == 1 and not causes
    else:
        assert len(causes) == 1 and re.search(cause, causes[0]) and "RESULT," not in out
