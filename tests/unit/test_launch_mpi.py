# SPDX-License-Identifier: Apache-2.0
"""launch.mpi: what mpirun is asked to do, how a stuck one ends, and the causes that are named."""

import os
import re
import subprocess
import sys
import time

import pytest
from support.commands import ROOT

from mxresnet.errors import UserError
from mxresnet.launch import mpi, processes


def fake_mpirun(folder, script):
    path = folder / "mpirun"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_mpirun_beside_python_comes_first(tmp_path):
    beside, other = tmp_path / "beside", tmp_path / "other"
    for folder in (beside, other):
        folder.mkdir()
        fake_mpirun(folder, "true")
    environ = {"PATH": str(other)}
    assert mpi.find_mpirun(f"{beside}/python", environ) == f"{beside}/mpirun"
    assert mpi.find_mpirun("/nowhere/python", environ) == f"{other}/mpirun"
    with pytest.raises(UserError, match="mpirun is not found beside /nowhere/python nor on PATH"):
        mpi.find_mpirun("/nowhere/python", {"PATH": "/nowhere"})


def test_output_of_local_ranks_is_shown_as_it_comes_without_the_log(tmp_path, capfd):
    script = """
echo "$*" >"$0.arguments"; env >"$0.env"
printf 'one\\n:::MLLOG x\\ntwo'; sleep 1; printf ' and on\\n'; echo ' :::MLLOG kept'
echo own >&2; exit 3"""
    mpirun = fake_mpirun(tmp_path, script)
    result = mpi.run_local_ranks(mpirun, ["train", "--lr", "4"], 2, {"PATH": "/usr/bin:/bin"})
    assert (result.status, result.messages, result.killed) == (3, "own", False)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "one\ntwo and on\n :::MLLOG kept\n")
    arguments = (tmp_path / "mpirun.arguments").read_text()
    assert arguments.endswith(
        "-np 2 --oversubscribe --bind-to none --mca mpi_yield_when_idle 1 train --lr 4\n"
    )
    as_root = "OMPI_ALLOW_RUN_AS_ROOT=1" in (tmp_path / "mpirun.env").read_text()
    assert as_root == (os.getuid() == 0)


def test_lines_are_shown_as_soon_as_they_are_written(tmp_path):
    """The program writes its second line when the test has read the first."""
    read_end, write_end = os.pipe()
    pipe = tmp_path / "was_read"
    os.mkfifo(pipe)
    wait = f"timeout 60 sh -c 'read word <{pipe}'"
    mpirun = fake_mpirun(tmp_path, f"echo first; {wait} && echo second || echo late")
    child = os.fork()
    if child == 0:
        os.dup2(write_end, 2)
        os.close(write_end)
        mpi.run_local_ranks(mpirun, [], 1, dict(os.environ))
        os._exit(0)
    os.close(write_end)
    with open(read_end) as lines:
        assert lines.readline() == "first\n"
        pipe.write_text("word\n")
        assert lines.readline() == "second\n"
    os.waitpid(child, 0)


def test_an_mpirun_that_ends_at_once_shows_no_traceback(tmp_path):
    """The thread that watches its messages may start when they are already complete."""
    mpirun = fake_mpirun(tmp_path, "exit 7")
    program = (
        "import os, threading, time\nfrom mxresnet.launch import mpi\n"
        "read, main = mpi._read, threading.main_thread()\n"
        "def read_late(file):\n"
        "    if threading.current_thread() is not main:\n"
        "        time.sleep(0.5)\n"
        "    return read(file)\n"
        "mpi._read = read_late\n"
        f"print(mpi.start_ranks({mpirun!r}, [], os.environ).status)\n"
        "time.sleep(1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "7\n", "")


def test_an_mpirun_that_waits_for_lost_machines_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(mpi, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(mpi, "GRACE_SECONDS", 0.3)
    mpirun = fake_mpirun(
        tmp_path, "echo 'ORTE has lost communication with a remote daemon.' >&2; exec sleep 60"
    )
    started = time.monotonic()
    result = mpi.start_ranks(mpirun, [], dict(os.environ))
    assert result.killed and result.status == 137 and time.monotonic() - started < 10
    assert "lost communication" in result.messages


def test_an_mpirun_that_runs_is_not_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(mpi, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(mpi, "GRACE_SECONDS", 0.1)
    result = mpi.start_ranks(
        fake_mpirun(tmp_path, "echo a warning >&2; sleep 1"), [], dict(os.environ)
    )
    assert result == mpi.MpirunResult(0, "a warning", False)


RANK_KILLED = """--------------------------------------------------------------------------
Primary job  terminated normally, but 1 process returned
a non-zero exit code. Per user-direction, the job has been aborted.
--------------------------------------------------------------------------
mpirun noticed that process rank 1 with PID 41 on node w-1.svc exited on signal 9 (Killed)."""
IMPROPER = "mpirun has exited due to process rank 2 with PID 0 on\nnode w-2 exiting improperly."
DAEMON = "  HNP daemon   : [[1,0],0] on node launcher\n  Remote daemon: [[1,0],2] on node w-1.svc\n"
CLOSED = "Connection to w-1.svc closed by remote host.\n"
NO_START = "----\nORTE was unable to reliably start one or more daemons.\n----\n"
NAMED = "mpirun detected that ...\n  Process name: [[37,1],0]\n  Exit code: 137 non-zero"
ABORTED = "MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\nwith errorcode 5."


@pytest.mark.parametrize(
    "status, messages, cause",
    [
        (0, RANK_KILLED, None),
        (137, RANK_KILLED, r"rank 1 on w-1.svc was ended by SIGKILL \(often out of memory\)"),
        (
            139,
            RANK_KILLED.replace("signal 9", "signal 11"),
            "rank 1 on w-1.svc was ended by SIGSEGV",
        ),
        (
            142,
            RANK_KILLED,
            r"the ranks did not connect to each other within 9 s: .*WATCHDOG_LIMIT\)",
        ),
        (1, IMPROPER, "rank 2 on w-2 exited before the end of the run and gave no reason"),
        (205, DAEMON, "the machine w-1.svc was lost: .*"),
        (1, CLOSED, "the machine w-1.svc was lost: .*"),
        (1, NO_START, ".*cannot be reached.* no orted: w-1: nothing answers on port 22; "),
        (137, NAMED, r"rank 0 was ended by SIGKILL \(often out of memory\)"),
        (143, "", "mpirun was ended by SIGTERM"),
        (1, "no such option", "mpirun failed: no such option"),
        (1, "", "mpirun was stopped by a signal from outside this job"),
        (5, ABORTED, "a rank ended with status 5"),
        (255, ABORTED, "a rank ended with status 255"),
        (2, ABORTED, None),
        (3, "Exit code: 3 non-zero", None),
        (2, "ORTE_ERROR_LOG: Data unpack would read past end of buffer", None),
    ],
)
def test_the_cause_of_an_end(status, messages, cause):
    result = mpi.MpirunResult(status, mpi._one_line(messages), False)
    found = mpi.explain_exit(
        status,
        {"WATCHDOG_LIMIT": "9"},
        result,
        lambda: "w-1: nothing answers on port 22; ",
    )
    assert found is None if cause is None else re.fullmatch(cause, found), found


def test_unreachable_machines_that_answer_again():
    result = mpi.MpirunResult(1, mpi._one_line(NO_START), False)
    assert mpi.explain_exit(1, {}, result).endswith("no orted: one ended before it had answered")


def test_the_launchers_own_sigkill_is_not_named_as_the_cause():
    messages = "ORTE has lost communication with a remote daemon. " + mpi._one_line(DAEMON)
    found = mpi.explain_exit(137, {}, mpi.MpirunResult(137, messages, True))
    assert found.startswith("the machine w-1.svc was lost")


@pytest.mark.parametrize(
    "status, cause",
    [
        (0, None),
        (1, None),
        (2, None),
        (3, None),
        (4, "a rank ended with status 4"),
        (137, "a rank was ended by SIGKILL (often out of memory)"),
        (139, "a rank was ended by SIGSEGV"),
    ],
)
def test_the_cause_of_the_end_of_one_rank(status, cause):
    assert mpi.explain_exit(status, {}) == cause


def test_a_stop_of_the_launcher_is_the_first_cause(monkeypatch):
    monkeypatch.setattr(processes, "stopped_by", lambda: "SIGHUP")
    result = mpi.MpirunResult(137, mpi._one_line(RANK_KILLED), True)
    assert mpi.explain_exit(137, {}, result) == "stopped by SIGHUP"


def test_a_harmless_warning_of_mpirun_is_dropped():
    text = "a:\n-----------\nb   c\n[x] Warning: setpgid failed\n"
    assert mpi._one_line(text) == "a: -------- b c"
