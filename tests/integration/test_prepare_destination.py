# SPDX-License-Identifier: Apache-2.0
"""Content of the destination that another conversion or another program wrote is never changed."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from support import image_fixtures as images

from prepare import journal, manifest

# Exits, as if by kill -9, when the journal's first entry is written.
PROGRAM_KILLED_AT_FIRST_ENTRY = """
import os, sys
from prepare import imagenet, journal
journal.Journal.add = lambda *arguments: os._exit(137)
sys.exit(imagenet.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    images.write_files(folder, images.small_dataset(train=12, val=3))
    return folder


def change_times(folder):
    """Return the time of the last change of each file; a rename changes it too."""
    return {name: os.stat(str(folder / name)).st_ctime_ns for name in os.listdir(str(folder))}


def test_finished_output_is_not_written_again(tmp_path, source):
    assert images.run_prepare(source, tmp_path / "out").returncode == 0
    before = change_times(tmp_path / "out")
    result = images.run_prepare(source, tmp_path / "out")
    assert result.returncode == 0 and "already complete from an earlier run" in result.stdout
    # Without a bad image, the treatment of bad images makes no difference.
    assert images.run_prepare(source, tmp_path / "out", "--on-error=skip").returncode == 0
    assert change_times(tmp_path / "out") == before


def test_another_source_or_option_is_refused(tmp_path, source):
    images.write_files(tmp_path / "other", images.small_dataset(seed=2))
    different = ([tmp_path / "other"], [source, "--check=none"])
    assert images.run_prepare(source, tmp_path / "out").returncode == 0
    for source_argument, *options in different:
        result = images.run_prepare(source_argument, tmp_path / "out", *options)
        assert result.returncode == 3 and "was made from" in result.stderr
        assert "with --check=ends --on-error=fail: " in result.stderr
    killed = images.run_program(PROGRAM_KILLED_AT_FIRST_ENTRY, source, tmp_path / "part")
    assert killed.returncode == 137
    for source_argument, *options in different:
        result = images.run_prepare(source_argument, tmp_path / "part", *options)
        assert result.returncode == 3 and "unfinished conversion of another source" in result.stderr
    assert images.run_prepare(source, tmp_path / "part").returncode == 0
    names = sorted(os.listdir(str(tmp_path / "out")))
    assert sorted(os.listdir(str(tmp_path / "part"))) == names
    assert images.read_files(tmp_path / "part", names) == images.read_files(tmp_path / "out", names)


@pytest.mark.parametrize("name", ["train.rec", "val.lst"])
def test_files_without_a_manifest_are_never_overwritten(tmp_path, source, name):
    images.write_files(tmp_path / "out", {name: b"of another program"})
    result = images.run_prepare(source, tmp_path / "out")
    assert result.returncode == 3 and "exists without a manifest" in result.stderr
    assert os.listdir(str(tmp_path / "out")) == [name]
    assert (tmp_path / "out" / name).read_bytes() == b"of another program"


def test_damaged_output_is_refused(tmp_path, source):
    assert images.run_prepare(source, tmp_path / "out").returncode == 0
    os.truncate(str(tmp_path / "out" / "train.rec"), 1000)
    result = images.run_prepare(source, tmp_path / "out")
    assert result.returncode == 3 and "has 1000 bytes" in result.stderr
    (tmp_path / "out" / "train.json").write_text(json.dumps({"version": 7}))
    assert "is not a manifest" in images.run_prepare(source, tmp_path / "out").stderr


def run_with_change_before_writing(source, folder, change):
    """Run prepare.imagenet; call `change` when it has read source and destination.

    It has not locked the destination then, so the change makes what it has read outdated.
    """
    program = images.program_stopping_in("imagenet", "check_space")
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(source), str(folder)],
        cwd=images.REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    change()
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate()
    assert "Traceback" not in errors
    return process.returncode, errors


def test_split_that_another_process_finishes_is_not_written_again(tmp_path, source):
    found = {}

    def convert_meanwhile():
        assert images.run_prepare(source, tmp_path / "out").returncode == 0
        found.update(change_times(tmp_path / "out"))

    status, errors = run_with_change_before_writing(source, tmp_path / "out", convert_meanwhile)
    assert (status, errors) == (0, "")
    assert change_times(tmp_path / "out") == found


def test_split_that_another_process_makes_from_another_source(tmp_path, source):
    images.write_files(tmp_path / "other", images.small_dataset(seed=2))
    found = {}

    def convert_meanwhile():
        assert images.run_prepare(tmp_path / "other", tmp_path / "out").returncode == 0
        found.update(change_times(tmp_path / "out"))

    status, errors = run_with_change_before_writing(source, tmp_path / "out", convert_meanwhile)
    assert status == 3 and "was made from" in errors
    assert change_times(tmp_path / "out") == found


def test_published_record_file_is_not_rolled_back(tmp_path, source):
    assert images.run_prepare(source, tmp_path / "out").returncode == 0
    found = change_times(tmp_path / "out")
    (tmp_path / "out" / "val.part").mkdir()
    with pytest.raises(manifest.DestinationError, match="another conversion"):
        manifest.roll_back_publish(str(tmp_path / "out"), "val")
    (tmp_path / "out" / "val.part").rmdir()
    assert change_times(tmp_path / "out") == found


def test_removed_journal_is_not_written_to(tmp_path, monkeypatch):
    """The previous owner of the lock removes the folder after this process opened the journal."""
    flock = journal.fcntl.flock

    def remove_and_lock(file, operation):
        shutil.rmtree(str(tmp_path / "x.part"))
        flock(file, operation)

    monkeypatch.setattr(journal.fcntl, "flock", remove_and_lock)
    with pytest.raises(manifest.DestinationError, match="run the same command again"):
        journal.Journal(str(tmp_path / "x.part"), {})


def test_dry_run_removes_nothing(tmp_path, source):
    assert images.run_prepare(source, tmp_path / "out").returncode == 0
    images.write_files(tmp_path / "out", {"train.part/journal": b"{}\n"})
    assert images.run_prepare(source, tmp_path / "out", "--dry-run").returncode == 0
    assert (tmp_path / "out" / "train.part" / "journal").exists()
    assert images.run_prepare(source, tmp_path / "out").returncode == 0
    assert not (tmp_path / "out" / "train.part").exists()
