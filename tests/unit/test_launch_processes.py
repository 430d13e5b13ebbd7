# SPDX-License-Identifier: Apache-2.0
"""launch.processes: a command ends with its launcher, and no signal is lost."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support.commands import ROOT

from mxresnet.launch import processes

RUN = """
import sys
from mxresnet.launch import processes
processes.handle_stop_signals()
try:
    print("ready", flush=True)
    status = processes.run_to_end(sys.argv[1:])
    print("status", status, processes.stopped_by(), flush=True)
except processes.StoppedBySignal as stop:
    status = stop.status
    print(stop, flush=True)
sys.exit(status)
"""
# Prints "running", and "got TERM" for every SIGTERM; ends a second after the first.
CHILD = """
import signal, time
got = []
signal.signal(signal.SIGTERM, lambda *_: (got.append(1), print("got TERM", flush=True)))
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
print("running", flush=True)
while not got:
    time.sleep(0.05)
time.sleep(1)
"""


def start(*command, program=RUN, **options):
    return subprocess.Popen(
        [sys.executable, "-c", program, *command],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def read_until(process, line):
    while process.stdout.readline() != f"{line}\n":
        assert process.poll() is None


@pytest.mark.parametrize("command, status", [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137)])
def test_the_status_is_that_of_the_command(command, status):
    assert processes.run_to_end(["sh", "-c", command]) == status


def test_a_command_gets_environment_streams_and_no_input(tmp_path):
    with open(tmp_path / "out", "w+") as out:
        command = ["sh", "-c", 'echo "$A"; cat; echo err >&2']
        env = {"PATH": os.environ["PATH"], "A": "x"}
        status = processes.run_to_end(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    assert status == 0 and (tmp_path / "out").read_text() == "x\nerr\n"


def test_a_command_that_cannot_be_started_is_named():
    with pytest.raises(processes.UserError, match="/no/command cannot be started: No such file"):
        processes.run_to_end(["/no/command"])


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in processes.STOP_SIGNALS]
    processes.run_to_end(["true"])
    assert [signal.getsignal(number) for number in processes.STOP_SIGNALS] == before


@pytest.mark.parametrize("number", processes.STOP_SIGNALS)
def test_a_signal_ends_the_command_by_one_sigterm(number):
    process = start(sys.executable, "-c", CHILD)
    read_until(process, "running")
    process.send_signal(number)
    read_until(process, "got TERM")
    process.send_signal(signal.SIGTERM)  # a second signal changes nothing
    out, err = process.communicate(timeout=20)
    assert out == f"status {128 + number} {number.name}\n" and err == ""
    assert process.returncode == 128 + number


def test_a_signal_at_any_moment_of_the_start_is_not_lost():
    for delay in range(12):
        process = start("sleep", "60")
        read_until(process, "ready")
        time.sleep(0.001 * delay)
        process.terminate()
        process.communicate(timeout=20)
        assert process.returncode == 143


def test_a_signal_between_commands_raises():
    program = "import time\n" + RUN.replace(
        "status = processes.run_to_end(sys.argv[1:])", "time.sleep(60)"
    )
    process = start(program=program)
    read_until(process, "ready")
    process.terminate()
    assert process.communicate(timeout=20) == ("stopped by SIGTERM\n", "")
    assert process.returncode == 143


def test_a_signal_that_was_blocked_is_handled():
    """As during the start of Python, with env --block-signal."""
    block = (
        "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    program = RUN.replace(
        "processes.handle_stop_signals()\ntry:\n", "try:\n    processes.handle_stop_signals()\n"
    )
    process = start("sleep", "60", program=block + program)
    assert process.communicate(timeout=20) == ("stopped by SIGTERM\n", "")
    assert process.returncode == 143


def test_an_ignored_signal_stays_ignored():
    """As with nohup."""
    ignore = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{RUN}"
    process = start("sh", "-c", "echo running; sleep 1; exit 5", program=ignore)
    read_until(process, "running")
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=20)[0] == "status 5 None\n"


@pytest.mark.skipif(os.getuid() != 0, reason="a process id namespace needs root")
def test_the_first_process_of_a_container_can_be_stopped():
    enter = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    probe = subprocess.run([*enter, "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("no namespaces here")
    process = subprocess.Popen(
        [*enter, sys.executable, "-c", RUN, sys.executable, "-c", CHILD],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
    )
    read_until(process, "running")
    (first,) = subprocess.run(
        ["pgrep", "-P", str(process.pid)], text=True, capture_output=True
    ).stdout.split()
    os.kill(int(first), signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert out == "got TERM\nstatus 143 SIGTERM\n" and process.returncode == 143


def test_replacing_this_process_restores_default_signals():
    program = (
        "import os, sys\nfrom mxresnet.launch import processes\n"
        "processes.handle_stop_signals()\n"
        "processes.replace_process(['sh', '-c', 'grep SigIgn /proc/$$/status'], os.environ)\n"
    )
    out, err = start(program=program).communicate(timeout=20)
    ignored = int(out.split()[1], 16)
    assert err == "" and not ignored & 1 << (signal.SIGPIPE - 1)
