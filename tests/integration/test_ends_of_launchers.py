# SPDX-License-Identifier: Apache-2.0
"""The end of a launcher at any moment: nothing outlives it, and a stop shows no traceback."""

import contextlib
import os
import pathlib
import signal
import subprocess
import time

import pytest
from support.commands import ROOT
from support.launchers import environment
from support.process_marks import marked_processes, new_mark, wait_until_gone

SECONDS = 3.5  # mpirun or another command has 2 seconds to end by itself
EPOCHS = ["--num-epochs", "77", "--num-layers", "18", "--batch-size", "16"]
LISTENING = "0A"


@pytest.fixture
def start(few, tmp_path):
    """Start a launcher in a session of its own, like a terminal; return (process, mark)."""
    mark = new_mark()

    def start_script(script, **variables):
        env = environment(few, tmp_path, **mark, NEXP="2", CLEAR_CACHES="0", **variables)
        process = subprocess.Popen(
            [script, *EPOCHS],
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        return process, mark

    yield start_script
    for pid in marked_processes(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for_training(process):
    for line in process.stderr:
        if "images/s" in line:
            return
    raise AssertionError("the run ended")


@pytest.mark.parametrize("script", ["./run_and_time.sh", "./run_trials.sh"])
@pytest.mark.parametrize("delay", [0.05, 0.3, 1.2])
def test_nothing_outlives_a_script_that_is_killed_while_it_starts(start, script, delay):
    process, mark = start(script)
    time.sleep(delay)
    process.kill()
    process.wait()
    assert wait_until_gone(mark, SECONDS) == {}


@pytest.mark.parametrize("delay", [0.02, 0.1, 0.2, 0.3, 0.5, 1.0])
def test_a_stop_during_the_start_shows_no_traceback(start, delay):
    process, mark = start("./run_and_time.sh")
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in err and "Error" not in err, err
    # No line from bash, before it has started the program.
    assert err.count("stopped by SIGINT") <= (process.returncode == 130)
    assert wait_until_gone(mark, 1) == {}


def listening_addresses(pids):
    """Return the addresses, in the hexadecimal form of /proc, on which processes listen for TCP."""
    sockets = set()
    for pid in pids:
        for descriptor in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(descriptor))
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in pathlib.Path("/proc/net", name).read_text().splitlines()[1:]
    ]
    return {
        words[1].partition(":")[0]
        for words in lines
        if words[3] == LISTENING and f"socket:[{words[9]}]" in sockets
    }


def test_ranks_of_one_machine_listen_nowhere_and_do_not_outlive_a_killed_script(start):
    process, mark = start("./run_and_time.sh")
    wait_for_training(process)
    ranks = [
        pid
        for pid, command in marked_processes(mark).items()
        if "-m mxresnet " in command and "mpirun" not in command
    ]
    assert len(ranks) == 2 and listening_addresses(ranks) == set()
    process.kill()
    process.wait()
    assert wait_until_gone(mark, SECONDS) == {}
    process.stderr.close()


def test_nothing_outlives_trials_that_are_killed(start):
    process, mark = start("./run_trials.sh")
    wait_for_training(process)
    process.kill()
    process.wait()
    assert wait_until_gone(mark, SECONDS) == {}
    process.stderr.close()
