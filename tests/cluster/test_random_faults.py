# SPDX-License-Identifier: Apache-2.0
"""Nothing hangs: a random fault at a random moment between the start and the end of a job.

    RANDOM_FAULTS=40 ./run_tests.sh tests/cluster/test_random_faults.py -m slow

Variables:
    RANDOM_FAULTS       number of faults (6); -k '[7]' selects one of them
    RANDOM_FAULTS_SEED  repeats the draws of an earlier run, which prints its seed
    RANDOM_FAULTS_ONLY  part of the names of the faults to draw from
"""

import os
import random
import re
import secrets
import signal
import time
from typing import Callable, NamedTuple, Tuple

import pytest
from support import network_hosts
from support.mpijob import (
    LAUNCHER,
    LAUNCHER_PROCESS,
    RANK_PROCESS,
    WORKER_0,
    WORKER_1,
    causes,
)

COUNT = int(os.environ.get("RANDOM_FAULTS", "6"))
SEED = os.environ.get("RANDOM_FAULTS_SEED") or str(secrets.randbelow(10**6))
ONLY = os.environ.get("RANDOM_FAULTS_ONLY", "")
# A run of a few seconds that evaluates after its last epoch and accepts any accuracy.
RUN = [
    *("--num-epochs", "5", "--eval-period", "5", "--eval-offset", "4"),
    *("--accuracy-threshold", "0.001"),
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(network_hosts.unavailable_reason()), reason=str(network_hosts.unavailable_reason())
    ),
]


class Fault(NamedTuple):
    """A fault, and how the job must end after it."""

    inject: Callable  # (cluster) -> whether the fault was possible and was injected
    limit_seconds: float  # in which the job must end
    cause: str  # pattern of the explanation
    stopped: Tuple[str, ...] = ()  # machines whose processes are all stopped


def send_signal(machine, pattern, number):
    """Return a fault: the oldest process with this in its command line gets a signal."""

    def inject(cluster):
        found = cluster.process_ids(machine, pattern)
        if not found:
            return False
        os.kill(found[0], number)
        return True

    return inject


def stop_all(machine):
    """Return a fault: all processes of a machine are stopped."""

    def inject(cluster):
        for pid in cluster.process_ids(machine, ""):
            os.kill(pid, signal.SIGSTOP)
        return True

    return inject


def call(name, machine):
    """Return a fault: a method of the cluster is called for a machine."""

    def inject(cluster):
        getattr(cluster, name)(machine)
        return True

    return inject


def faults_of_worker(machine):
    number = machine[-1]
    for name in ("KILL", "TERM", "SEGV"):
        yield (
            f"{machine}: a rank gets SIG{name}",
            Fault(
                send_signal(machine, RANK_PROCESS, getattr(signal, f"SIG{name}")),
                30,
                f"rank {number} .*was ended by SIG{name}",
            ),
        )
    yield (
        f"{machine}: a rank is stopped",
        Fault(
            send_signal(machine, RANK_PROCESS, signal.SIGSTOP),
            60,
            f"no heartbeat from rank {number} on {machine}|did not connect to each other",
        ),
    )
    yield (
        f"{machine}: orted is killed",
        Fault(
            send_signal(machine, "bin/orted", signal.SIGKILL),
            30,
            f"{machine}.* was lost|no orted: one ended before",
        ),
    )
    yield f"{machine} is gone", Fault(call("remove", machine), 30, machine)
    yield f"{machine} is cut off", Fault(call("cut_link", machine), 30, machine)
    yield f"{machine} is stopped", Fault(stop_all(machine), 60, machine, (machine,))


def faults_of_launcher():
    yield (
        "the launcher is cut off",
        Fault(call("cut_link", LAUNCHER), 30, "was lost|cannot be reached"),
    )
    for name in ("TERM", "INT", "HUP"):
        yield (
            f"the launcher gets SIG{name}",
            Fault(
                send_signal(LAUNCHER, LAUNCHER_PROCESS, getattr(signal, f"SIG{name}")),
                30,
                f"stopped by SIG{name}",
            ),
        )
    yield (
        "mpirun gets SIGTERM",
        Fault(
            send_signal(LAUNCHER, "bin/mpirun", signal.SIGTERM),
            30,
            "mpirun was stopped by a signal from outside",
        ),
    )
    yield (
        "mpirun is killed",
        Fault(
            send_signal(LAUNCHER, "bin/mpirun", signal.SIGKILL), 30, "mpirun was ended by SIGKILL"
        ),
    )


FAULTS = dict(
    [*faults_of_worker(WORKER_0), *faults_of_worker(WORKER_1), *faults_of_launcher()],
)


@pytest.fixture(scope="module")
def run_seconds():
    """Duration of the run without a fault, in a list that the first test fills."""
    return []


def test_the_run_by_itself(start_job, run_seconds):
    started = time.monotonic()
    job = start_job(*RUN)
    assert job.process.wait(timeout=120) == 0 and "RESULT," in job.output(), job.output()
    run_seconds.append(time.monotonic() - started)


def inject_one(draw, cluster, moment):
    """Inject the first fault of a random order that is possible now; return its name."""
    names = sorted(name for name in FAULTS if ONLY in name)
    for name in draw.sample(names, len(names)):
        if FAULTS[name].inject(cluster):
            return name
    return pytest.skip(f"no fault is possible after {moment:.2f} s")


@pytest.mark.parametrize("number", range(COUNT))
def test_a_fault_at_a_random_moment(start_job, run_seconds, number):
    draw = random.Random(f"{SEED}/{number}")
    started = time.monotonic()
    job = start_job(*RUN, LAUNCH_WAIT="10")
    moment = draw.uniform(0, run_seconds[0] if run_seconds else 15)
    time.sleep(max(0, started + moment - time.monotonic()))
    assert job.process.poll() in (None, 0), f"the run failed before the fault:\n{job.output()}"
    name = inject_one(draw, job.cluster, moment)
    fault = FAULTS[name]
    now = time.monotonic()
    last_line = job.output().splitlines()[-1:]
    print(
        f"\nRANDOM_FAULTS_SEED={SEED}, number {number}, after {moment:.2f} s: {name}; {last_line}"
    )
    try:
        job.process.wait(timeout=fault.limit_seconds + 20)
    finally:
        took, out = time.monotonic() - now, job.output()
        remaining = job.cluster.wait_until_idle(
            max(2.0, fault.limit_seconds - took), ignored=fault.stopped
        )
        all_gone = time.monotonic() - now
        lines = [line for line in out[-6000:].splitlines() if not line.startswith(":::MLLOG")]
        print(
            f"status {job.process.returncode} after {took:.1f} s, no process after "
            f"{all_gone:.1f} s; {remaining}",
            *lines,
            sep="\n",
        )
    assert took < fault.limit_seconds and not remaining
    if job.process.returncode == 0:
        # The run had ended, or all its work was done.
        assert took < 5 and out.count("RESULT,") == 1 and not causes(out)
    else:
        assert len(causes(out)) == 1 and "RESULT," not in out
        assert re.search(fault.cause, causes(out)[0])
