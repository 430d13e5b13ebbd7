# SPDX-License-Identifier: Apache-2.0
"""The log of a run that is resumed reads as the log of one run."""

import json

import pytest
from support import checkpoints

from mxresnet import cli
from mxresnet.checkpoint import choice, log_file
from mxresnet.config import Config
from mxresnet.results.log_reader import read_log


def event(key, time_ms=1):
    return f":::MLLOG {json.dumps({'key': key, 'value': None, 'time_ms': time_ms})}\n"


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "run.log"
    path.write_text(event("run_start") + "epoch 1\n" + event("epoch_start"))
    return path


def test_events_after_the_checkpoint_become_text(log):
    position = log_file.position_of(str(log))
    before = log.read_bytes()
    lost = event("epoch_stop") + "text\n" + event("checkpoint") + event("run_stop")
    log.write_bytes(before + lost.encode() + b':::MLLOG {"key": "torn')
    assert log_file.is_continuable(str(log), position)
    log_file.mark_lost_lines(str(log), position)
    found = read_log(str(log))
    assert [e.key for e in found.events] == ["run_start", "epoch_start", "checkpoint"]
    assert found.damaged_lines == [] and log.read_bytes().startswith(before)
    assert log.read_text().endswith("torn\n") and "text\n" in log.read_text()
    # Killed again before another checkpoint.
    with open(log, "a") as file:
        file.write(event("resumed") + event("epoch_stop"))
    log_file.mark_lost_lines(str(log), position)
    keys = [e.key for e in read_log(str(log)).events]
    assert keys == ["run_start", "epoch_start", "checkpoint", "resumed"]
    assert ":::MLLOG" not in "".join(
        line for line in log.read_text().splitlines(True) if not line.startswith(":::MLLOG ")
    )


def test_a_log_behind_a_symbolic_link_stays_there(log, tmp_path):
    position = log_file.position_of(str(log))
    (tmp_path / "latest.log").symlink_to("run.log")
    with open(log, "a") as file:
        file.write(event("run_stop"))
    log_file.mark_lost_lines(str(tmp_path / "latest.log"), position)
    assert (tmp_path / "latest.log").is_symlink() and "lost" in log.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.log", "run.log"]


def test_another_log_is_not_continued(log, tmp_path):
    position = log_file.position_of(str(log))
    assert not log_file.is_continuable(str(tmp_path / "missing"), position)
    log.write_text(log.read_text().replace("epoch 1", "epoch 2") + "more")
    assert not log_file.is_continuable(str(log), position)
    log.write_text("")
    assert not log_file.is_continuable(str(log), position)


def test_all_events_of_a_run_that_starts_anew_become_text(log):
    with open(log, "a") as file:
        file.write(event("checkpoint") + event("resumed") + "text\n")
    lines = log.read_text().splitlines()
    log_file.mark_all_lines_lost(str(log))
    assert read_log(str(log)).events == [] and ":::MLLOG" not in log.read_text()
    assert len(log.read_text().splitlines()) == len(lines) and "text\n" in log.read_text()
    log_file.mark_all_lines_lost(str(log.parent / "missing"))


@pytest.mark.parametrize("resume", ["auto", "no"])
def test_a_second_run_does_not_write_to_the_log_of_a_running_one(log, resume):
    """It is not known to be the second one before it has the lock of the folder."""
    config, before = Config(log_file=str(log), resume=resume), log.read_bytes()
    folder = str(log.with_suffix(".checkpoints"))
    chosen = choice.choose(folder, checkpoints.fingerprint_of(), None, True, False)
    assert cli.start_log(config, 0) is not None
    assert log.read_bytes() == before
    chosen.lock.close()
