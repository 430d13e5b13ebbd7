# SPDX-License-Identifier: Apache-2.0
"""Launchers that are called from another folder or through a symlink."""

import json
import os
import subprocess

import pytest
from support.commands import ROOT
from support.launchers import environment

from mxresnet.launch.caller_paths import make_absolute

PRINT = ["--print-config"]


def call(command, folder, env, *flags):
    return subprocess.run(
        [command, *flags], cwd=folder, env=env, text=True, capture_output=True, timeout=60
    )


@pytest.mark.parametrize("link", ["absolute", "relative", "chain", "folder", "path", "none"])
def test_relative_paths_are_those_of_the_callers_folder(few, tmp_path, link):
    """Through each kind of symlink, and from another folder."""
    script = ROOT / "run_and_time.sh"
    folder = tmp_path / "caller"
    folder.mkdir()
    (folder / "link").symlink_to(
        {"relative": os.path.relpath(script, folder), "folder": ROOT}.get(link, script)
    )
    (folder / "chain").symlink_to("link")
    names = {"folder": "./link/run_and_time.sh", "chain": "./chain", "path": "link"}
    command = str(script) if link == "none" else names.get(link, "./link")
    env = environment(few, tmp_path, DATAROOT="../data", CDPATH="/usr:..")
    if link == "path":
        env["PATH"] = f"{folder}:{env['PATH']}"
    done = call(command, folder, env, *PRINT, "--data-val", "sub/val.rec")
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)
    assert config["data_root"] == f"{folder}/../data"
    assert config["data_val"] == f"{folder}/sub/val.rec"


@pytest.mark.parametrize(
    "script", ["run_trials.sh", "run_with_docker.sh", "run.sub", "setup_env.sh", "bind.sh"]
)
def test_every_script_can_be_called_through_a_symlink(few, tmp_path, script):
    (tmp_path / "link").symlink_to(ROOT / script)
    env = environment(few, tmp_path, DGXSYSTEM="PDP11", CONT="x", DATADIR=".")
    flags = {"setup_env.sh": ["--launcher-python"], "bind.sh": ["--cpu=off", "true"]}
    done = call("./link", tmp_path, env, *flags.get(script, []))
    assert "DGXSYSTEM=PDP11 has no" in done.stderr or done.returncode == 0, done.stderr


def test_paths_in_flags_and_variables():
    environ = {
        "CALLER_FOLDER": "/a",
        "LOGDIR": "./logs",
        "DATADIR": "/data",
        "DATA_TRAIN": "../t.rec",
        "DATAROOT": "",
        "CONT": "./image.sqsh",
        "SEED": "1",
    }
    flags = ["--data-root=x", "--init-from", "./y", "--lr", "x", "--data-val-idx"]
    assert make_absolute(flags, environ) == (
        ["--data-root=/a/x", "--init-from", "/a/y", "--lr", "x", "--data-val-idx"],
        {
            "LOGDIR": "/a/logs",
            "DATADIR": "/data",
            "DATA_TRAIN": "/a/../t.rec",
            "DATAROOT": "",
            "CONT": "/a/image.sqsh",
            "SEED": "1",
        },
    )


def test_without_logdir_the_logs_go_to_the_folder_of_the_project(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert make_absolute([], {"CALLER_FOLDER": "/a"})[1] == {"LOGDIR": f"{tmp_path}/results"}
    assert make_absolute([], {"CALLER_FOLDER": str(tmp_path)})[1] == {}
    assert make_absolute([], {"CONT": "image"})[1] == {"CONT": "image"}
