# SPDX-License-Identifier: Apache-2.0
"""Launchers with odd variables, arguments and moments of signals: one line and a fitting status."""

import json
import os
import signal
import subprocess
import sys

import pytest
from support.commands import ROOT
from support.scripts import finish, start_script, wait_for

from mxresnet.errors import UserError
from mxresnet.launch import processes, refused_variables, run
from mxresnet.launch.backends.slurm import SlurmBackend
from mxresnet.launch.builtin_data import make_builtin_data
from mxresnet.launch.trial_settings import read_trial_settings


@pytest.mark.parametrize(
    "environ, rank",
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "2"}, 1),
        ({"OMPI_COMM_WORLD_RANK": "", "PMIX_RANK": "0"}, 0),
        ({"SLURM_PROCID": "3"}, None),
        ({"SLURM_PROCID": "3", "SLURM_STEP_ID": "0"}, 3),
    ],
)
def test_the_rank_comes_from_what_started_it(environ, rank):
    assert run.launched_rank(environ) == rank


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID"])
def test_a_rank_that_is_no_number_is_refused(monkeypatch, capfd, name):
    for variable in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv(name, "x")
    monkeypatch.setattr(processes, "handle_stop_signals", lambda: None)
    assert run.main() == 2
    assert capfd.readouterr().err == f"run_and_time.sh: {name}=x is not the number of a rank\n"


def test_a_number_of_machines_that_is_none_is_refused():
    backend = SlurmBackend({"DGXSYSTEM": "CPU", "SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "x"})
    with pytest.raises(UserError, match="SLURM_JOB_NUM_NODES=x is not a number of machines"):
        backend.prepare([])


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"DGXNGPU": "99999"}, "DGXNGPU=99999: each rank needs at least"),
        ({"TMPDIR": "FOLDER/none"}, "TMPDIR=FOLDER/none cannot be used"),
        ({"PYTHONPATH": "FOLDER"}, "the module enum in FOLDER hides that of Python"),
    ],
)
def test_what_no_rank_could_start_with_is_refused(tmp_path, environ, words):
    (tmp_path / "enum.py").write_text("raise RuntimeError\n")
    environ = {name: value.replace("FOLDER", str(tmp_path)) for name, value in environ.items()}
    done = finish(
        start_script(["./run_and_time.sh"], tmp_path, DGXSYSTEM="CPU_digits", **environ), timeout=60
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("run_and_time.sh: ")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert words.replace("FOLDER", str(tmp_path)) in lines[0] and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "name, value",
    [
        ("PYTHONHASHSEED", "bad"),
        ("PYTHONHOME", "/nonexistent"),
        ("PYTHONUTF8", "2"),
        ("PYTHONMALLOC", "x"),
    ],
)
def test_a_variable_that_python_does_not_start_with_is_named(tmp_path, name, value):
    environ = {name: value, "PYTHONUNBUFFERED": "1", "DGXSYSTEM": "CPU_digits"}
    done = finish(start_script(["./run_and_time.sh", "--print-config"], tmp_path, **environ))
    message = f"setup_env.sh: {name}={value}: Python does not start with this value: unset {name}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_variables_that_change_what_python_does_are_ignored(tmp_path):
    names = ("PYTHONSAFEPATH", "PYTHONINSPECT", "PYTHONWARNINGS", "PYTHONIOENCODING")
    environ = dict(zip(names, ("1", "1", "error", "utf-16")))
    command = ["./run_and_time.sh", "--print-config"]
    done = finish(start_script(command, tmp_path, DGXSYSTEM="CPU_digits", **environ))
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["image_shape"] == [3, 32, 32]


def test_functions_of_the_caller_with_names_of_commands_are_not_used(tmp_path):
    script = """
        cd() { builtin cd "$@" && echo listing; }
        for name in dirname readlink env nproc grep cat sha256sum cut head sed uname; do
            eval "$name() { echo listing; }"
            export -f "$name"
        done
        export -f cd
        "$@"
    """
    environ = {"DGXSYSTEM": "CPU_digits", "DATAROOT": str(tmp_path)}
    for command in (["./run_and_time.sh", "--help"], ["./bind.sh", "--cpu=off", "--", "true"]):
        done = finish(start_script(["bash", "-c", script, "bash", *command], tmp_path, **environ))
        assert done.returncode == 0 and "listing" not in done.stdout + done.stderr, done.stderr


def test_output_of_the_callers_file_for_bash_is_not_mixed_with_that_of_scripts(tmp_path):
    (tmp_path / "noise").write_text("echo noise\n")
    environ = {"DGXSYSTEM": "CPU_digits", "BASH_ENV": str(tmp_path / "noise")}
    done = finish(start_script(["./run_and_time.sh", "--print-config"], tmp_path, **environ))
    noise, _, settings = done.stdout.partition("\n")
    assert done.returncode == 0 and noise == "noise", done.stderr
    assert json.loads(settings)["image_shape"] == [3, 32, 32]
    done = finish(
        start_script(["./bind.sh", "--cpu=off", "--", "echo", "here"], tmp_path, **environ)
    )
    assert done.returncode == 0 and done.stdout == "noise\nhere\n", done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_mistake_has_its_status_with_closed_descriptors(tmp_path, closed):
    script = f"./run_and_time.sh --lr x {closed}"
    done = finish(start_script(["bash", "-c", script], tmp_path, DGXSYSTEM="CPU_digits"))
    expected = "" if "2>" in closed else "--lr: 'x'"
    assert done.returncode == 2 and expected in done.stderr
    assert done.stderr.count("\n") == (0 if "2>" in closed else 1)


def test_an_empty_command_is_no_command():
    done = subprocess.run(
        ["./bind.sh", "--cpu=off", "--", ""], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 2 and done.stderr.startswith("bind.sh: no command")
    assert done.stderr.count("\n") == 1


def test_the_environment_is_found_without_a_temporary_folder(monkeypatch, tmp_path):
    """A disk that is full, or a file system that is read-only."""
    script = tmp_path / "setup_env.sh"
    script.write_text("#!/bin/sh\necho /some/python\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)

    def no_folder(*arguments, **options):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.TemporaryFile", no_folder)
    assert run.environment_python(os.environ) == "/some/python"


def test_the_parent_of_the_data_is_made_and_not_the_data(monkeypatch, tmp_path):
    root = tmp_path / "data" / "digits"
    environ = {"BUILTIN_DATA": "digits", "DATAROOT": f"{root}/"}
    commands = []
    monkeypatch.setattr(
        processes, "run_to_end", lambda command, **options: commands.append(command) or 0
    )
    make_builtin_data("run_and_time.sh", "python", environ)
    assert root.parent.is_dir() and not root.exists()
    assert commands[0][3:] == [f"{root}.images"]
    assert commands[1][3:] == [f"{root}.images", str(root)]


@pytest.mark.parametrize(
    "script", ["run_and_time.sh", "run_trials.sh", "run.sub", "run_with_docker.sh"]
)
def test_a_signal_during_the_start_of_python_is_handled(tmp_path, script):
    started = tmp_path / "started"
    # Not a shell script: dash unblocks signals.
    slow_python = tmp_path / "python"
    slow_python.write_text(
        f"#!{sys.executable}\nimport os, pathlib, sys, time\n"
        "if '-m' in sys.argv[1:3]:\n"
        f"    pathlib.Path({str(started)!r}).touch()\n    time.sleep(1)\n"
        f"os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
    )
    slow_python.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    process = start_script([f"./{script}"], tmp_path, PATH=path, DGXSYSTEM="PDP11")
    wait_for(started.exists)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert (done.returncode, done.stderr) == (130, f"{script}: stopped by SIGINT\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_script_looks_for_python_is_not_lost(tmp_path, number):
    """It is sent to the script alone, as by a process manager, not to its commands."""
    started = tmp_path / "started"
    slow_python = tmp_path / "python"
    slow_python.write_text(f"#!/bin/sh\ntouch {started}\nsleep 1\nexit 1\n")
    slow_python.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    process = start_script(["./run_and_time.sh"], tmp_path, PATH=path, DGXSYSTEM="PDP11")
    wait_for(started.exists)
    process.send_signal(number)
    done = finish(process)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


def test_a_folder_of_logs_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match=f"^LOGDIR={tmp_path} cannot be made"):
        read_trial_settings([], {}, str(tmp_path))


@pytest.mark.parametrize(
    "flags, environ",
    [(["--evaluate", "x"], {}), (["--evaluate=x"], {}), ([], {"EVALUATE": "x"})],
)
def test_an_evaluation_is_not_a_timed_run(flags, environ):
    with pytest.raises(UserError, match="use python -m mxresnet --evaluate CHECKPOINT"):
        refused_variables.check(environ, flags)
