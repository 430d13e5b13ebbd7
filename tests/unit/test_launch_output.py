# SPDX-License-Identifier: Apache-2.0
"""Launchers whose standard output is full or closed: one line and status 1, no traceback."""

import os
import subprocess
import sys

import pytest
from support.commands import ROOT

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
SLURM_RANKS = """
from mxresnet.launch.backends.slurm import stdout_without_mlperf_log
with stdout_without_mlperf_log() as stdout:
    os.write(stdout, b"line\\n")
"""


def run_without_stdout(program, place, *arguments):
    """Run a Python program with a standard output that cannot be written."""
    redirection = {"full": ">/dev/full", "closed": ">&-", "left": "| true; exit ${PIPESTATUS[0]}"}
    script = f'"$@" {redirection[place]}'
    # "true" ends before the program writes.
    program = f"import os, sys, time\ntime.sleep({0.5 if place == 'left' else 0})\n{program}"
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


@pytest.mark.parametrize("place", ["full", "closed", "left"])
def test_lost_output_of_ranks_shows_no_traceback(place):
    assert run_without_stdout(SLURM_RANKS, place).stderr == ""


def test_output_that_can_be_written_is_complete():
    program = "from mxresnet.launch.terminal import write_to_stdout\n"
    program += "write_to_stdout(b'x' * 300_000)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, env=dict(os.environ)
    )
    assert (done.returncode, len(done.stdout), done.stderr) == (0, 300_000, b"")
