# SPDX-License-Identifier: Apache-2.0
"""A training run on two machines, as an MPIJob: start it, follow its output, check its end."""

import os
import pathlib
import re
import signal
import subprocess
import time

from support import network_hosts
from support.commands import ROOT

LAUNCHER = f"{network_hosts.JOB}-launcher"
WORKER_0, WORKER_1 = (f"{network_hosts.JOB}-worker-{i}" for i in range(2))
# Command lines: of the launcher, and of a rank.
LAUNCHER_PROCESS = "-m mxresnet.launch.run"
RANK_PROCESS = "-m mxresnet "
LONG = ("--num-epochs", "5000", "--accuracy-threshold", "1")
FAULT_INJECTION = ROOT / "tests" / "support" / "fault_injection"


class Job:
    """A running job.

    Attributes:
        cluster: Its machines.
        process: The process of its launcher.
    """

    def __init__(self, cluster: network_hosts.Cluster, process: subprocess.Popen, output):
        self.cluster, self.process = cluster, process
        self._output, self._position = pathlib.Path(output), 0

    def output(self) -> str:
        """Return the output since the last wait_for."""
        return self._output.read_text()[self._position :]

    def wait_for(self, text: str) -> None:
        """Wait until the output has a text; continue after it."""
        while text not in self.output():
            assert self.process.poll() is None, f"the job ended before {text!r}:\n{self.output()}"
            time.sleep(0.05)
        self._position += self.output().index(text) + len(text)

    def kill(self, machine: str, pattern: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to the oldest process of a machine with this in its command line."""
        found = self.cluster.process_ids(machine, pattern)
        assert found
        os.kill(found[0], number)

    def check_end(self, since: float, *, within: float, cause: str, statuses=None) -> str:
        """Check how the job ends after a fault; return its output.

        Args:
            since: Monotonic time of the fault, seconds.
            within: Seconds in which all processes must have ended.
            cause: Pattern that the output must contain.
            statuses: Exit statuses that are right. Default: any but 0.
        """
        self.process.wait(timeout=within + 30)
        out = self.output()
        took = time.monotonic() - since
        remaining = self.cluster.wait_until_idle(max(1.0, within - took))
        all_gone = time.monotonic() - since
        status = self.process.returncode
        print(
            f"\nended after {took:.1f} s with status {status}, no process after {all_gone:.1f} s;"
            f" output:\n{out[-1500:]}"
        )
        assert status not in (0, None) and took < within and not remaining, remaining
        assert statuses is None or status in statuses
        assert len(causes(out)) == 1 and re.search(cause, out), out
        assert "RESULT" not in out and "------" not in out
        return out


def causes(output: str) -> list:
    """Return the lines that explain the end of a run."""
    return [
        line for line in output.splitlines() if line.startswith(("mxresnet: ", "run_and_time.sh: "))
    ]


def start_job(cluster, records, folder, *flags: str, output, **env: str) -> Job:
    """Start a job on two machines, by default a long one, with its output in a file."""
    with open(output, "w") as file:
        process = cluster.launch(
            ["./run_and_time.sh", *(flags or LONG)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={
                "DGXSYSTEM": "CPU_digits",
                "CHECKPOINTS": "0",
                "DGXNGPU": "1",
                "DGXNNODES": "2",
                "NUM_LAYERS": "18",
                "DATAROOT": str(records),
                "OMP_NUM_THREADS": "1",
                "LOGDIR": str(folder / "results"),
                "SEED": "1",
                "PYTHONPATH": str(FAULT_INJECTION),
                **env,
            },
        )
    return Job(cluster, process, output)
