# SPDX-License-Identifier: Apache-2.0
"""process_guard: nothing outlives the process that started a command, however it ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from support.commands import ROOT
from support.process_marks import marked_processes, new_mark, wait_until_gone
from support.scripts import wait_for

GUARD = [sys.executable, "-I", "-S", str(ROOT / "mxresnet" / "process_guard.py")]
LAUNCHER = "import sys; from mxresnet.launch import processes; processes.run_to_end(sys.argv[1:])"
# A command that ignores SIGTERM, with descendants in other sessions that lose their parents.
STUBBORN = """
trap '' TERM
(setsid sh -c 'sleep 100 & exec sleep 100' &)
sh -c "sh -c 'sleep 100 & sleep 100' & sleep 100" &
while :; do sleep 0.05; done
"""
PROCESSES = 7  # of STUBBORN with its sleep, at least
GRACE_SECONDS = 2.0


@pytest.fixture
def mark():
    mark = new_mark()
    yield mark
    for pid in marked_processes(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def start_launcher(mark, *command):
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *command], cwd=ROOT, env={**os.environ, **mark}
    )


def guard(*arguments, parent=None, **options):
    return subprocess.run([*GUARD, str(parent or os.getpid()), *arguments], **options)


@pytest.mark.parametrize("script, status", [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137)])
def test_the_status_is_that_of_the_command(script, status):
    assert guard("sh", "-c", script).returncode == status


def test_a_command_is_not_started_for_a_parent_that_has_ended(tmp_path):
    assert guard("touch", tmp_path / "file", parent=os.getppid()).returncode == 127
    assert not (tmp_path / "file").exists()


def test_descendants_end_with_the_command(mark):
    script = "(setsid sleep 100 &); sleep 100 & nohup sleep 100 2>/dev/null & exit 3"
    assert guard("sh", "-c", script, env={**os.environ, **mark}).returncode == 3
    assert marked_processes(mark) == {}


@pytest.mark.parametrize("delay", [0, 0.02, 0.05, 0.1, 0.2])
def test_nothing_outlives_a_killed_launcher(mark, delay):
    launcher = start_launcher(mark, "bash", "-c", STUBBORN)
    time.sleep(delay)
    launcher.kill()
    launcher.wait()
    assert wait_until_gone(mark, GRACE_SECONDS + 1) == {}


def test_a_command_of_a_killed_launcher_can_clean_up(mark, tmp_path):
    script = "trap 'touch cleaned; exit' TERM; touch up; while sleep 0.1; do :; done"
    launcher = start_launcher(mark, "bash", "-c", f"cd {tmp_path}; {script}")
    wait_for((tmp_path / "up").exists)
    launcher.kill()
    launcher.wait()
    assert wait_until_gone(mark, GRACE_SECONDS) == {}
    assert (tmp_path / "cleaned").exists()


def test_nothing_outlives_a_killed_guard(mark):
    launcher = start_launcher(mark, "bash", "-c", STUBBORN)
    wait_for(lambda: len(marked_processes(mark)) >= PROCESSES + 2)
    (guard_pid,) = (
        pid for pid, command in marked_processes(mark).items() if "process_guard.py" in command
    )
    os.kill(guard_pid, signal.SIGKILL)
    launcher.wait(timeout=5)
    assert wait_until_gone(mark, 1) == {}


def test_a_stopped_command_ends(mark):
    launcher = start_launcher(mark, "sh", "-c", "kill -STOP $$; sleep 100")
    time.sleep(0.5)
    launcher.terminate()
    launcher.wait(timeout=5)
    assert wait_until_gone(mark, 1) == {}


def test_a_short_command_ends_with_its_launcher(mark):
    program = "import os; from mxresnet.launch import processes\n"
    program += "processes.capture_output(['sleep', '100'], os.environ)"
    launcher = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, **mark}
    )
    wait_for(lambda: len(marked_processes(mark)) == 2)
    launcher.kill()
    launcher.wait()
    assert wait_until_gone(mark, 1) == {}
