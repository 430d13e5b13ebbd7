# SPDX-License-Identifier: Apache-2.0
"""launch.run: the end of a timed run whose log is lost, with a fake of the ranks."""

import os
import pathlib
import shutil
import sys

import pytest
from support.commands import ROOT
from support.mlperf_log import COMPLETE_LOG
from support.report_logs import DEMO_LOGS

from mxresnet.launch import run


@pytest.fixture
def timed_run(tmp_path, monkeypatch, capfd):
    """Run with fake ranks, which write a complete log and call a function with its path."""

    def start(status, damage):
        def run_ranks(context, mpirun, environ):
            path = pathlib.Path(environ["LOG_FILE"])
            path.write_text(COMPLETE_LOG)
            damage(path)
            return status

        monkeypatch.setattr(run, "run_ranks", run_ranks)
        environ = {"LOGDIR": str(tmp_path / "results"), "DATESTAMP": "s", "DGXNGPU": "1"}
        settings = {"resume": "no", "checkpoints": False, "checkpoint_dir": ""}
        returned = run.run_timed(run.Run([], environ, 0, "python"), "", settings)
        return (returned, *capfd.readouterr())

    return start


def test_a_run_whose_log_is_kept_has_a_result(timed_run, tmp_path):
    status, out, err = timed_run(0, lambda path: None)
    assert status == 0 and out.startswith("RESULT,")
    assert err.endswith(f"log: {tmp_path}/results/s_1.log\n")


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize(
    "damage, reason",
    [
        (os.unlink, "No such file or directory"),
        (lambda path: shutil.move(path.parent, f"{path.parent}.old"), "No such file or directory"),
        (lambda path: path.write_text(""), "it has no run_stop"),
        (lambda path: path.write_text(COMPLETE_LOG.splitlines()[0]), "it has no run_stop"),
        (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    ],
    ids=["removed", "moved", "emptied", "cut", "replaced"],
)
def test_a_run_whose_log_is_lost_failed(timed_run, tmp_path, status, damage, reason):
    returned, out, err = timed_run(status, damage)
    assert (returned, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith(f"run_and_time.sh: log {tmp_path}/results/s_1.log: {reason}: the file")


def test_a_run_started_by_hand_prints_the_path_of_its_report(tmp_path, monkeypatch, capfd):
    log = tmp_path / "s_1.log"
    log.write_text(DEMO_LOGS[0].read_text())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    environ = {**os.environ, "REPORT": "1"}
    run.write_report(run.Run([], environ, None, sys.executable), str(log))
    assert capfd.readouterr().err == f"report: {tmp_path}/s_1.html\n"
    assert "28.41 minutes" in (tmp_path / "s_1.html").read_text()


@pytest.mark.parametrize(
    "rank, environ", [(0, {}), (None, {"SERIES_STAMP": "s"}), (None, {"REPORT": "0"})]
)
def test_other_runs_make_no_report(tmp_path, capfd, rank, environ):
    log = tmp_path / "s_1.log"
    log.write_text(COMPLETE_LOG)
    run.write_report(run.Run([], environ, rank, "/no/such/python"), str(log))
    assert capfd.readouterr() == ("", "") and os.listdir(tmp_path) == ["s_1.log"]


def test_a_failed_run_names_only_a_log_that_exists(timed_run):
    status, _, err = timed_run(137, os.unlink)
    assert status == 137 and "log" not in err
