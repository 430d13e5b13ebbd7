# SPDX-License-Identifier: Apache-2.0
"""launch.run_log: no two runs share a log, and names of files stay in LOGDIR."""

import itertools
import os
import subprocess
import sys
import time

import pytest
from support.commands import ROOT

from mxresnet.errors import UserError
from mxresnet.launch import run_log
from mxresnet.launch.backends.base import Trial
from mxresnet.launch.trial_settings import read_trial_settings


@pytest.fixture
def fixed_time(monkeypatch):
    """All runs start in the same second."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)


def test_runs_of_the_same_second_have_their_own_logs(tmp_path, fixed_time):
    assert len({run_log.create_log({"LOGDIR": str(tmp_path)}) for _ in range(3)}) == 3


def test_runs_and_trials_of_the_same_second_have_their_own_stamps(tmp_path, fixed_time):
    first = run_log.create_log({"LOGDIR": str(tmp_path)})
    stamps = [run_log.reserve_stamp(str(tmp_path), "") for _ in range(3)]
    last = run_log.create_log({"LOGDIR": str(tmp_path)})
    logs = [os.path.basename(path)[: -len("_1.log")] for path in (first, last)]
    assert len({*logs, *stamps}) == 5
    assert len(os.listdir(tmp_path)) == 5


def test_many_processes_get_different_logs(tmp_path):
    program = "import os\nfrom mxresnet.launch import run_log\n"
    program += "for _ in range(20): print(run_log.create_log(os.environ))\n"
    env = {**os.environ, "LOGDIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE
        )
        for _ in range(3)
    ]
    paths = [process.communicate()[0].split() for process in processes]
    assert len(set(itertools.chain(*paths))) == 60


def test_a_log_that_exists_is_refused_and_not_changed(tmp_path):
    fixed = {"LOGDIR": str(tmp_path), "DATESTAMP": "today", "TRIAL": "2"}
    path = run_log.create_log(fixed)
    assert path == f"{tmp_path}/today_2.log"
    with pytest.raises(UserError, match=f"DATESTAMP=today, TRIAL=2: {path} is the log of another"):
        run_log.create_log(fixed)
    assert run_log.create_log({**fixed, "TRIAL": "3"}) == f"{tmp_path}/today_3.log"


def test_a_run_cannot_take_a_log_of_a_series_of_trials(tmp_path):
    stamp = run_log.reserve_stamp(str(tmp_path), "tt")
    trial = Trial(2, 7, stamp, str(tmp_path), cache_cleared=False).variables()
    environ = {"LOGDIR": str(tmp_path), "DATESTAMP": "tt", "TRIAL": "2"}
    with pytest.raises(UserError, match="DATESTAMP=tt is the stamp of a series of trials"):
        run_log.create_log(environ)
    assert os.listdir(tmp_path) == ["tt_summary.txt"]
    assert run_log.create_log({**environ, **trial}) == f"{tmp_path}/tt_2.log"


def test_a_log_is_not_written_through_a_link(tmp_path):
    (tmp_path / "today_1.log").symlink_to("/dev/full")
    with pytest.raises(UserError, match="is the log of another run"):
        run_log.create_log({"LOGDIR": str(tmp_path), "DATESTAMP": "today"})


@pytest.mark.parametrize("value", ["../x", "/../../dev/full", "a\nb", "x" * 201, "\udcff"])
@pytest.mark.parametrize("variable", ["DATESTAMP", "TRIAL"])
def test_a_name_that_is_no_part_of_a_name_is_refused(tmp_path, variable, value):
    with pytest.raises(UserError, match=f"^{variable}=") as error:
        run_log.create_log({"LOGDIR": str(tmp_path / "logs"), variable: value})
    assert "\n" not in str(error.value)
    if variable == "DATESTAMP":
        with pytest.raises(UserError, match="^DATESTAMP="):
            read_trial_settings([], {"DATESTAMP": value}, str(tmp_path / "logs"))
    assert os.listdir(tmp_path) == []


def test_the_longest_names_fit(tmp_path):
    environ = {"LOGDIR": str(tmp_path), "TRIAL": "t" * 60}
    path = run_log.create_log({**environ, "DATESTAMP": "\u00e9" * 90})
    (tmp_path / f"{path}.accuracy").touch()
    stamp = run_log.reserve_stamp(str(tmp_path), "s" * 180)
    (tmp_path / f"{stamp}_9999.log.accuracy").touch()
    for variable, length in (("DATESTAMP", 181), ("TRIAL", 61)):
        with pytest.raises(UserError, match=f"^{variable}=x*: .*more than {length - 1} bytes"):
            run_log.create_log({**environ, variable: "x" * length})


def test_a_folder_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match=f"LOGDIR={tmp_path} cannot be written"):
        run_log.create_log({"LOGDIR": str(tmp_path)})


def test_only_an_empty_log_is_removed(tmp_path):
    path = run_log.create_log({"LOGDIR": str(tmp_path)})
    assert run_log.remove_empty(path) and os.listdir(tmp_path) == []
    (tmp_path / "full").write_text("x")
    assert not run_log.remove_empty(str(tmp_path / "full"))
    assert os.listdir(tmp_path) == ["full"]
