# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a run continues from: damaged, foreign and finished ones, locks, settings."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from support import checkpoints
from support.commands import ROOT

from mxresnet.checkpoint import choice, store
from mxresnet.checkpoint.fingerprint import MAY_DIFFER
from mxresnet.checkpoint.manifest import Position
from mxresnet.config import FIELDS, Config, flag_of
from mxresnet.errors import ExitStatus, UserError
from mxresnet.launch import requeue, unfinished

SETTINGS = checkpoints.fingerprint_of().settings


def run_file(folder, run_id="run", outcome="", **changes):
    description = store.RunDescription(run_id, {**SETTINGS, "seed": 5}, 1, "", 1.0, outcome)
    store.write_run(str(folder), dataclasses.replace(description, **changes))


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    monkeypatch.setattr(choice, "LOCK_WAIT_SECONDS", 0.3)


@pytest.fixture
def folder(tmp_path):
    """The folder of an unfinished run with three checkpoints."""
    path = tmp_path / "run.checkpoints"
    path.mkdir()
    run_file(path)
    for epoch in (1, 2, 3):
        checkpoints.publish(path, *checkpoints.tiny_states(), position=Position(epoch, 7))
    return path


def choose(folder, resume=True, seed=None, fingerprint=None, threads=False):
    fingerprint = fingerprint or checkpoints.fingerprint_of()
    return choice.choose(str(folder), fingerprint, seed, resume, threads)


def content(folder):
    """Return all files of a folder, but the lock."""
    return {
        str(path): path.read_bytes()
        for path in pathlib.Path(folder).rglob("*")
        if path.is_file() and path.name != "lock"
    }


def test_the_newest_checkpoint_is_chosen(folder):
    chosen = choose(folder)
    assert chosen.checkpoint == str(folder / "epoch_003_step_000007") and chosen.notes == []
    assert chosen.manifest.position == Position(3, 7) and chosen.folder == str(folder)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(bytes(data))


DAMAGES = {
    "truncated": lambda path: os.truncate(path / "model-0000.params", 60),
    "flipped": lambda path: flip(path / "optimizer.npz"),
    "flipped manifest": lambda path: flip(path / "manifest.json"),
    "removed": lambda path: (path / "rank_0000.npz").unlink(),
    "torn": lambda path: (path / "manifest.json").unlink(),
    "a file": lambda path: (shutil.rmtree(path), path.write_text("")),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_one_line(folder, how):
    DAMAGES[how](folder / "epoch_003_step_000007")
    chosen = choose(folder)
    assert chosen.checkpoint == str(folder / "epoch_002_step_000007")
    assert len(chosen.notes) == 1 and "epoch_003_step_000007 is passed over" in chosen.notes[0]


def test_an_unreadable_checkpoint_is_passed_over(folder):
    if os.getuid() == 0:
        pytest.skip("root reads everything: see the test with a directory in place of a file")
    os.chmod(folder / "epoch_003_step_000007", 0)
    chosen = choose(folder)
    assert chosen.checkpoint == str(folder / "epoch_002_step_000007") and len(chosen.notes) == 1


def test_a_file_that_cannot_be_read_is_passed_over(folder):
    path = folder / "epoch_003_step_000007" / "manifest.json"
    path.unlink()
    path.mkdir()
    assert choose(folder).checkpoint == str(folder / "epoch_002_step_000007")


def test_a_named_pipe_is_not_waited_for(folder):
    path = folder / "epoch_003_step_000007" / "manifest.json"
    for pipe in (folder / "run.json", path):
        pipe.unlink()
        os.mkfifo(pipe)
    chosen = choose(folder)
    assert chosen.checkpoint == str(folder / "epoch_002_step_000007") and len(chosen.notes) == 2


def test_one_of_another_run_is_passed_over(folder, tmp_path):
    (tmp_path / "other").mkdir()
    position = Position(3, 7)
    path = checkpoints.publish(
        tmp_path / "other", *checkpoints.tiny_states(), position=position, run_id="other"
    )
    shutil.rmtree(folder / position.folder_name)
    shutil.copytree(path, folder / position.folder_name)
    chosen = choose(folder)
    assert chosen.checkpoint == str(folder / "epoch_002_step_000007")
    assert chosen.notes[0].endswith("it is of another run")


def test_without_an_intact_one_the_run_starts_anew_and_touches_nothing(folder):
    for path in folder.glob("epoch_*"):
        flip(path / "optimizer.npz")
    before = content(folder)
    chosen = choose(folder)
    assert chosen.checkpoint is None and chosen.folder == str(folder / "run_2")
    assert len(chosen.notes) == 4 and content(folder) == before


@pytest.mark.parametrize("finished", [False, True])
def test_a_new_run_touches_nothing(folder, finished):
    if finished:
        run_file(folder, outcome="success")
    before = content(folder)
    chosen = choose(folder, resume=finished)
    assert (chosen.checkpoint, chosen.folder) == (None, str(folder / "run_2"))
    assert content(folder) == before
    chosen.lock.close()
    run_file(folder / "run_2", "second")
    checkpoints.publish(
        folder / "run_2", *checkpoints.tiny_states(), position=Position(1, 1), run_id="second"
    )
    again = choose(folder)
    assert again.checkpoint == str(folder / "run_2" / "epoch_001_step_000001")
    again.lock.close()
    assert choose(folder, resume=False).folder == str(folder / "run_3")
    assert {key: value for key, value in content(folder).items() if "run_2" not in key} == before


def test_two_runs_in_one_folder(folder):
    chosen = choose(folder)
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from support import checkpoints\n"
        "from mxresnet.checkpoint import choice\n"
        "choice.LOCK_WAIT_SECONDS = 0.3\n"
        "choice.choose(sys.argv[1], checkpoints.fingerprint_of(), None, True, False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], cwd=ROOT, text=True, capture_output=True
    )
    assert "in use by another run (process " in done.stderr and str(os.getpid()) in done.stderr
    assert choice.is_locked(str(folder))
    chosen.lock.close()
    assert not choice.is_locked(str(folder)) and choose(folder).checkpoint


def other_value(name):
    """Return a valid value of a setting that is not its value here."""
    value = SETTINGS[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return [4, 32, 32] if isinstance(value, list) else "other"


@pytest.mark.parametrize("name", FIELDS)
def test_one_setting_changed(folder, name):
    fingerprint = checkpoints.fingerprint_of()
    settings = {**fingerprint.settings, name: other_value(name) if name != "seed" else 5}
    changed = dataclasses.replace(fingerprint, settings=settings)
    if name in MAY_DIFFER:
        assert choose(folder, fingerprint=changed).checkpoint
    else:
        with pytest.raises(UserError, match=f"differs from this one \\({flag_of(name)} .*, there"):
            choose(folder, fingerprint=changed)


def test_other_data_ranks_versions_and_seed_are_refused(folder):
    base = checkpoints.fingerprint_of()
    for changed, text in (
        (dataclasses.replace(base, ranks=2), "2 ranks, there 1"),
        (dataclasses.replace(base, data={"train": 21}), r"the data set differs \(train\)"),
        (dataclasses.replace(base, versions={"mxnet": "1.9.0"}), "mxnet 1.9.0, there 1.9.1"),
    ):
        with pytest.raises(UserError, match=text):
            choose(folder, fingerprint=changed)
    with pytest.raises(UserError, match="--seed 6, there 5"):
        choose(folder, seed=6)
    assert choose(folder, seed=5).checkpoint


def test_what_may_differ_are_settings():
    assert set(FIELDS) >= MAY_DIFFER
    threads = dataclasses.replace(
        checkpoints.fingerprint_of(), settings={**SETTINGS, "dali_threads": 9}
    )
    assert not threads.differences(checkpoints.fingerprint_of())
    assert threads.differences(checkpoints.fingerprint_of(), with_input_threads=True)


class TestLauncher:
    """What the launchers find in LOGDIR."""

    def find(self, folder, ranks=1, stamp="", **changes):
        environ = {"LOGDIR": str(folder.parent), "DATESTAMP": stamp, "TRIAL": "1"}
        return unfinished.find(environ, {**SETTINGS, **changes}, ranks)

    @pytest.fixture
    def beside(self, folder):
        (folder.parent / "a_1.log").write_text("")
        return folder.rename(folder.parent / "a_1.checkpoints")

    def test_the_log_beside_the_checkpoints(self, beside):
        log = str(beside.parent / "a_1.log")
        assert self.find(beside).log == log and self.find(beside).started == 1.0
        assert self.find(beside, stamp="a").log == log and self.find(beside, stamp="b") is None
        assert self.find(beside, seed=5).log == log and self.find(beside, watchdog_limit=9)

    def test_the_log_of_a_run_with_a_folder_for_checkpoints(self, beside, tmp_path):
        """It need not be beside that folder, whatever its name; one that is gone is not needed."""
        (tmp_path / "logs").mkdir()
        log = tmp_path / "logs" / "b_1.log"
        run_file(beside, log=str(log))
        assert self.find(beside, checkpoint_dir=str(beside)).log == str(log)
        (tmp_path / "logs").rmdir()
        assert self.find(beside, checkpoint_dir=str(beside)).log == ""

    def test_no_run_to_continue(self, beside):
        assert self.find(beside, ranks=2) is None and self.find(beside, lr=7.0) is None
        assert self.find(beside, seed=6) is None and self.find(beside, resume="no") is None
        assert self.find(beside, checkpoints=False) is None
        chosen = choose(beside)
        assert self.find(beside) is None  # a run that is in use
        chosen.lock.close()
        assert self.find(beside)
        run_file(beside, outcome="aborted")
        assert self.find(beside) is None

    @pytest.mark.parametrize("has_folder", [False, True])
    def test_a_run_that_the_job_has_finished(self, folder, tmp_path, has_folder):
        """The checkpoints are beside the log, or in --checkpoint-dir."""
        settings = {**SETTINGS, "checkpoint_dir": str(folder) if has_folder else ""}
        if not has_folder:
            folder = folder.rename(folder.parent / "a_1.checkpoints")
        logs = tmp_path / "elsewhere" if has_folder else folder.parent
        environ = {"LOGDIR": str(logs), "JOB_UID": "7"}
        run_file(folder, outcome="aborted", job="7")
        assert unfinished.finished_status(environ, settings) == ExitStatus.TARGET_MISSED
        assert unfinished.finished_status({**environ, "JOB_UID": "8"}, settings) is None
        run_file(folder, job="7")
        assert unfinished.finished_status(environ, settings) is None

    @pytest.mark.parametrize(
        "in_log, outcome, expected",
        [
            ("success", "success", ExitStatus.SUCCESS),
            ("success", "", ExitStatus.SUCCESS),
            ("aborted", "aborted", ExitStatus.TARGET_MISSED),
            ("aborted", "", None),  # an error ended it, such as the loss of a machine
            ("", "", None),
        ],
    )
    def test_a_trial_of_a_job_that_is_queued_again(self, beside, in_log, outcome, expected):
        log, event = beside.parent / "a_1.log", {"key": "run_stop", "metadata": {"status": in_log}}
        log.write_text(f":::MLLOG {json.dumps(event)}\n" if in_log else "")
        run_file(beside, outcome=outcome)
        assert requeue.finished_status(str(log)) == expected and log.exists()
        for path in beside.glob("epoch_*"):
            shutil.rmtree(path)
        assert requeue.finished_status(str(log)) == expected
        assert log.exists() == (expected is not None)  # else it starts anew

    def test_a_run_without_checkpoints_is_not_continued(self, beside):
        for path in beside.glob("epoch_*"):
            shutil.rmtree(path)
        assert self.find(beside) is None


def test_config_has_no_setting_that_only_checkpoints_know():
    assert {"checkpoints", "checkpoint_dir", "checkpoint_minutes", "resume"} <= MAY_DIFFER
    assert Config().checkpoints
