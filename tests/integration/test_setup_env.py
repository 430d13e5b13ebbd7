# SPDX-License-Identifier: Apache-2.0
"""setup_env.sh with a fake Python: what it installs when, failures, interruptions."""

import fcntl
import pathlib
import shutil
import signal
import subprocess

import pytest
from support.commands import ROOT
from support.fake_setup import Environment
from support.scripts import wait_for


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path)


RUN, DEV = ["build", "cpu", "horovod"], ["dev"]


def test_test_packages_are_installed_only_for_developers(environment):
    python = f"{environment.folder}/.venv/bin/python\n"
    assert environment.run()[:2] == (0, python)
    assert environment.installed() == RUN
    assert environment.run()[:2] == (0, python)
    assert environment.calls.read_text() == ""
    assert environment.run("--dev")[:2] == (0, python)
    assert environment.installed() == DEV
    assert environment.run("--dev")[:2] == (0, python)
    assert environment.calls.read_text() == ""


def test_a_changed_version_updates_both_levels(environment):
    environment.run("--dev")
    assert environment.installed() == sorted(RUN + DEV)
    with open(environment.folder / "requirements" / "cpu.txt", "a") as requirements:
        requirements.write("new-package==1\n")
    environment.run()
    assert environment.installed() == RUN
    environment.run("--dev")
    assert environment.installed() == DEV


def test_a_failed_build_names_its_log_and_the_next_call_continues(environment):
    status, out, err = environment.run(BUILD="echo no space left; exit 1")
    assert (status, out) == (1, "")
    assert "no space left" in err
    assert "'Horovod (compiled from source), DALI and other packages' failed" in err
    assert f"{environment.folder}/.venv/build_horovod.log" in err
    assert not (environment.folder / ".venv" / ".ready").exists()
    assert environment.run()[0] == 0


def wait_for_file(path):
    wait_for(lambda: path.read_text().strip())
    return int(path.read_text())


def is_running(pid):
    """Return whether a process exists and is not a zombie."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_commands_that_run(environment, number):
    """Also one in a session of its own, as the commands of ninja are."""
    pids = [environment.folder / "pid", environment.folder / "other_pid"]
    sleep = "echo $$ >{}; exec sleep 100"
    build = f"setsid sh -c '{sleep.format(pids[0])}' & sh -c '{sleep.format(pids[1])}'"
    process = environment.start(BUILD=build)
    commands = [wait_for_file(path) for path in pids]
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: not any(map(is_running, commands)), seconds=3)
    subprocess.run(["flock", "-w", "1", environment.folder / ".venv" / ".lock", "true"], check=True)
    assert environment.run()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_wait_for_another_set_up(environment, number):
    lock = environment.folder / ".venv" / ".lock"
    lock.parent.mkdir()
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = environment.start()
        for line in process.stderr:
            if "waiting for it" in line:
                break
        process.send_signal(number)
        process.communicate(timeout=10)
        assert process.returncode != 0
    subprocess.run(["flock", "-w", "3", lock, "true"], check=True)


def test_horovod_is_not_compiled_again_after_an_interruption(environment):
    started = environment.folder / "started"
    process = environment.start(INSTALL=f"echo 1 >{started}; sleep 100")
    wait_for_file(started)
    process.kill()
    process.communicate(timeout=30)
    assert " wheel --" in environment.calls.read_text()
    assert environment.run()[0] == 0
    assert " wheel --" not in environment.calls.read_text()
    assert not (environment.folder / ".venv" / "wheels").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_set_up_ends_with_run_tests(environment, number):
    shutil.copy(ROOT / "run_tests.sh", environment.folder)
    pid_file = environment.folder / "pid"
    process = environment.start(
        script="run_tests.sh", BUILD=f"sh -c 'echo $$ >{pid_file}; exec sleep 100'"
    )
    command = wait_for_file(pid_file)
    process.send_signal(number)
    wait_for(lambda: not is_running(command), seconds=4)
    process.communicate(timeout=30)


def test_an_unknown_option_is_an_error(environment):
    status, out, err = environment.run("--test")
    assert (status, out) == (1, "")
    assert "--test is not an option" in err


def test_a_folder_that_may_not_be_written_is_reported(environment):
    (environment.folder / ".venv").write_text("no folder can be made here, not even by root")
    status, out, err = environment.run()
    assert (status, out) == (1, "")
    assert f"setup_env.sh: {environment.folder}/.venv cannot be written" in err
