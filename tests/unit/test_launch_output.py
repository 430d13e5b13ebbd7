# SPDX-License-Identifier: Apache-2.0
"""Launchers whose standard output is full or closed: one line and status 1, no traceback."""

import os
import select
import signal
import subprocess
import sys
import time

import pytest
from support.commands import ROOT
from support.mlperf_log import COMPLETE_LOG

TIMED_RUN = """
from mxresnet.launch import run
from mxresnet.launch.terminal import write_to_stdout
run.run = lambda *arguments: write_to_stdout(b"RESULT\\n") or 0
sys.exit(run.main())
"""
TRIALS = """
from mxresnet.launch import trials
from mxresnet.launch.backends.local import LocalBackend
from mxresnet.launch.trial_settings import TrialSettings
trials.read_trial_settings = lambda *arguments: TrialSettings([7], False, sys.argv[1], "s")
LocalBackend.prepare = lambda *arguments: None
LocalBackend.check_settings = lambda *arguments: 0
LocalBackend.run_trial = lambda *arguments: 9
sys.exit(trials.run_trials(LocalBackend({}), []))
"""
GOOD_TRIALS = """
from mxresnet.launch import trials
from mxresnet.launch.backends.local import LocalBackend
LocalBackend.prepare = lambda *arguments: None
LocalBackend.check_settings = lambda *arguments: 0
LocalBackend.run_python = lambda *arguments, **options: 0
def run_and_time(self, trial, flags, stdout):
    with open(f"{trial.logdir}/{trial.stamp}_{trial.number}.log", "w") as log:
        log.write(sys.argv[2])
    return subprocess.call(["sh", "-c", "echo RESULT"], stdout=stdout)
LocalBackend._run_and_time = run_and_time
environ = {"LOGDIR": sys.argv[1], "DATESTAMP": "s", "NEXP": "2", "CLEAR_CACHES": "0"}
sys.exit(trials.run_trials(LocalBackend(environ), []))
"""
SLURM_RANKS = """
from mxresnet.launch.backends.slurm import stdout_without_mlperf_log
with stdout_without_mlperf_log() as stdout:
    for _ in range(3):
        os.write(stdout, b"line\\n")
        time.sleep(0.1)
    os.write(2, b"ranks ended\\n")
"""


def run_without_stdout(program, place, *arguments):
    """Run a Python program with a standard output that cannot be written."""
    redirection = {"full": ">/dev/full", "closed": ">&-", "left": "| true; exit ${PIPESTATUS[0]}"}
    script = f'"$@" {redirection[place]}'
    # "true" ends before the program writes.
    program = (
        f"import os, subprocess, sys, time\ntime.sleep({0.5 if place == 'left' else 0})\n{program}"
    )
    command = ["bash", "-c", script, "bash", sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    "place, reason",
    [
        ("full", "No space left on device"),
        ("closed", "Bad file descriptor"),
        ("left", "Broken pipe"),
    ],
)
def test_a_lost_result_is_a_failure(tmp_path, place, reason):
    message = f"standard output cannot be written: {reason}\n"
    done = run_without_stdout(TIMED_RUN, place)
    assert (done.returncode, done.stderr) == (1, f"run_and_time.sh: {message}")
    done = run_without_stdout(TRIALS, place, tmp_path)
    assert (done.returncode, done.stderr.splitlines(True)[-1]) == (1, f"run_trials.sh: {message}")
    assert "Traceback" not in done.stderr
    # The summary is not lost.
    assert "FAILED (status 9)" in (tmp_path / "s_summary.txt").read_text()


@pytest.mark.parametrize("place", ["full", "left"])
def test_trials_go_on_without_standard_output(tmp_path, place):
    """Their results are in the logs, the summary and the submission."""
    done = run_without_stdout(GOOD_TRIALS, place, tmp_path, COMPLETE_LOG)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("note: standard output cannot be written") == 2
    assert "s_package" in done.stderr and "run_trials.sh: standard output cannot" in done.stderr
    summary = (tmp_path / "s_summary.txt").read_text()
    assert summary.count("reached") == 2 and "FAILED" not in summary


@pytest.mark.parametrize("place", ["full", "closed", "left"])
def test_lost_output_of_ranks_shows_no_traceback(place):
    assert run_without_stdout(SLURM_RANKS, place).stderr == "ranks ended\n"


STOPPED = """
from mxresnet.launch import mpi, run
from mxresnet.launch.terminal import print_to_stderr
def run_ranks(*arguments):
    os.write(1, b"ready\\n")
    PLACE
    return 143
mpi._DRAIN_SECONDS = 1000
run.run = run_ranks
sys.exit(run.main())
"""
WRITES = "while True: print_to_stderr('x' * 100)"
FILTERS_RANKS = "mpi.run_local_ranks(sys.argv[1], [], 1, os.environ)"


@pytest.mark.parametrize("place", [WRITES, FILTERS_RANKS])
def test_a_stop_does_not_wait_for_a_reader_of_standard_error(tmp_path, place):
    """A pager that was left open, or a terminal after Ctrl-S."""
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/bin/sh\nexec yes\n")
    mpirun.chmod(0o755)
    program = "import os, sys\n" + STOPPED.replace("PLACE", place)
    command = [sys.executable, "-c", program, str(mpirun)]
    read_end, write_end = os.pipe()
    writable = select.poll()
    writable.register(write_end, select.POLLOUT)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=write_end) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            while writable.poll(0):
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 143
        finally:
            process.kill()
            os.close(read_end)
            os.close(write_end)


def test_output_that_can_be_written_is_complete():
    program = "from mxresnet.launch.terminal import write_to_stdout\n"
    program += "write_to_stdout(b'x' * 300_000)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, env=dict(os.environ)
    )
    assert (done.returncode, len(done.stdout), done.stderr) == (0, 300_000, b"")
