# SPDX-License-Identifier: Apache-2.0
"""A conversion that is killed anywhere goes on and ends with the same bytes; another one is never mixed in."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support import image_trees as trees

from prepare import record_writer

# Runs the command with small pieces and dies, as if by kill -9, at its n-th step that changes the disk; a write that is
# cut off writes half of its bytes. Prints the number of steps when it gets through.
DIE = """
import os, sys
from prepare import imagenet, plan, record_writer
deadline, steps = int(sys.argv[1]), 0
plan.PIECE_BYTES, record_writer.STAGE_BYTES = 20000, 65536

def dying(owner, name, half):
    inner = getattr(owner, name)
    def step(*arguments, **options):
        global steps
        steps += 1
        if steps == deadline:
            half(inner, *arguments)
            os._exit(137)
        return inner(*arguments, **options)
    setattr(owner, name, step)

nothing = lambda inner, *arguments: None
dying(os, "pwrite", lambda inner, file, data, at: inner(file, data[: len(data) // 2 // 4096 * 4096], at))
dying(os, "replace", nothing)
dying(os, "fsync", nothing)
dying(os, "ftruncate", nothing)
dying(record_writer.shutil, "rmtree", nothing)
dying(record_writer.Journal, "_append", lambda inner, self, line: (self._file.write(b'{"sha'), self._file.flush()))
keep = record_writer.Journal.keep
record_writer.Journal.keep = lambda self, count: (print("kept", count), keep(self, count))
status = imagenet.main(sys.argv[2:])
print("steps", steps)
sys.exit(status)
"""


def die(deadline, source, folder):
    command = [sys.executable, "-c", DIE, str(deadline), str(source), str(folder), "--workers=2"]
    return subprocess.run(
        command,
        cwd=trees.REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    files = trees.small(train=12, val=3)
    files["train/n01440764/cut.JPEG"] = trees.jpeg(b"pp" + trees.MAGIC * 3)
    trees.write(folder, files)
    return folder


def everything(folder):
    """All files of a finished output; two runs on the same source must agree in each."""
    return trees.contents(folder, sorted(os.listdir(str(folder))))


def test_dying_at_every_step(tmp_path, source):
    whole = die(0, source, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    steps = int(whole.stdout.split("steps")[1])
    assert steps > 30
    # One output dies at step 1, goes on and dies at its step 2, and so on; others die once, at each step.
    for deadline in range(1, steps + 1):
        folder = tmp_path / ("once %d" % deadline)
        # How often the journal is written depends on how fast the disk is, so the last steps may not come.
        assert die(deadline, source, folder).returncode == 137 or deadline > steps - 10
        again = die(0, source, folder)
        assert again.returncode == 0, again.stderr
        assert everything(folder) == everything(tmp_path / "whole"), "died at step %d" % deadline
    for deadline in range(1, steps + 1):
        if die(deadline, source, tmp_path / "often").returncode == 0:
            break
    last = die(0, source, tmp_path / "often")
    assert last.returncode == 0, last.stderr
    assert everything(tmp_path / "often") == everything(tmp_path / "whole")


def die_late(source, tmp_path):
    """A folder where the training set's conversion died with some pieces in its journal, and how many.

    At which step that is depends on how fast the disk is.
    """
    for deadline in range(60, 5, -1):
        folder = tmp_path / ("died at %d" % deadline)
        journal = folder / "train.part" / "journal"
        died = die(deadline, source, folder).returncode == 137
        if died and journal.exists() and (folder / "train.part" / "train.rec").exists():
            pieces = journal.read_bytes().count(b"\n") - 1
            if pieces >= 3:
                return folder, pieces
    raise AssertionError("never died late enough")


def test_goes_on_rather_than_begins_again(tmp_path, source):
    folder, pieces = die_late(source, tmp_path)
    assert "kept %d" % pieces in die(0, source, folder).stdout


def test_killed_at_random_moments(tmp_path):
    trees.write(tmp_path / "in", trees.small(train=1500, val=10))
    started = time.monotonic()
    assert trees.prepare(tmp_path / "in", tmp_path / "whole").returncode == 0
    moments, kills, seconds = random.Random(5), 0, time.monotonic() - started
    command = [
        sys.executable,
        "-m",
        "prepare.imagenet",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "--workers=2",
    ]
    for _ in range(12):
        process = subprocess.Popen(
            command, cwd=trees.REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(0.2, 0.7) * seconds)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    result = trees.prepare(tmp_path / "in", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_damage_to_what_was_written_is_made_good(tmp_path, source):
    """A power cut may lose blocks that the journal believes in."""
    assert die(0, source, tmp_path / "whole").returncode == 0
    folder, pieces = die_late(source, tmp_path)
    record = folder / "train.part" / "train.rec"
    content = bytearray(record.read_bytes())
    content[30000:34096] = bytes(4096)
    record.write_bytes(bytes(content))
    again = die(0, source, folder)
    assert again.returncode == 0 and "kept %d" % pieces not in again.stdout
    assert everything(folder) == everything(tmp_path / "whole")


def test_finished_output_is_left_alone(tmp_path, source):
    assert trees.prepare(source, tmp_path / "out").returncode == 0
    before = {
        name: os.stat(str(tmp_path / "out" / name)).st_mtime_ns
        for name in os.listdir(str(tmp_path / "out"))
    }
    result = trees.prepare(source, tmp_path / "out")
    assert result.returncode == 0 and "complete since an earlier run" in result.stdout
    # Without a bad image, how one would be treated makes no difference.
    assert trees.prepare(source, tmp_path / "out", "--on-error=skip").returncode == 0
    assert before == {
        name: os.stat(str(tmp_path / "out" / name)).st_mtime_ns
        for name in os.listdir(str(tmp_path / "out"))
    }


def test_other_source_or_option_is_refused(tmp_path, source):
    trees.write(tmp_path / "other", trees.small(seed=2))
    assert trees.prepare(source, tmp_path / "out").returncode == 0
    for arguments in ([tmp_path / "other"], [source, "--check=none"]):
        result = trees.prepare(arguments[0], tmp_path / "out", *arguments[1:])
        assert (
            result.returncode == 3
            and "was made from" in result.stderr
            and "with --check=ends --on-error=fail: " in result.stderr
        )
    assert die(3, source, tmp_path / "part").returncode == 137
    for arguments in ([tmp_path / "other"], [source, "--check=none"]):
        result = trees.prepare(arguments[0], tmp_path / "part", *arguments[1:])
        assert result.returncode == 3 and "unfinished conversion of another source" in result.stderr
    assert trees.prepare(source, tmp_path / "part").returncode == 0
    assert everything(tmp_path / "part") == everything(tmp_path / "out")


@pytest.mark.parametrize("name", ["train.rec", "val.lst"])
def test_files_from_elsewhere_are_never_overwritten(tmp_path, source, name):
    trees.write(tmp_path / "out", {name: b"somebody's work"})
    result = trees.prepare(source, tmp_path / "out")
    assert result.returncode == 3 and "exists without a manifest" in result.stderr
    assert os.listdir(str(tmp_path / "out")) == [name]


def test_damaged_output_is_refused(tmp_path, source):
    assert trees.prepare(source, tmp_path / "out").returncode == 0
    with open(str(tmp_path / "out" / "train.rec"), "r+b") as stream:
        stream.truncate(1000)
    result = trees.prepare(source, tmp_path / "out")
    assert result.returncode == 3 and "has 1000 bytes" in result.stderr
    (tmp_path / "out" / "train.json").write_text(json.dumps({"version": 7}))
    assert "is not a manifest" in trees.prepare(source, tmp_path / "out").stderr


def late(source, folder, meanwhile):
    """Runs the command; `meanwhile` is called when it has looked at both halves, as a slow listing would, and not yet begun to
    write: what it saw of the destination is old by then.
    """
    command = [
        sys.executable,
        "-c",
        trees.stopping_in("imagenet", "check_space"),
        str(source),
        str(folder),
    ]
    process = subprocess.Popen(
        command,
        cwd=trees.REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    meanwhile()
    process.send_signal(signal.SIGCONT)
    output, errors = process.communicate()
    assert "Traceback" not in errors
    return process.returncode, output, errors


def times(folder):
    return {name: os.stat(str(folder / name)).st_ctime_ns for name in os.listdir(str(folder))}


def test_a_half_that_another_process_finished_is_left_alone(tmp_path, source):
    found = {}

    def meanwhile():
        assert trees.prepare(source, tmp_path / "out").returncode == 0
        found.update(times(tmp_path / "out"))

    status, _, errors = late(source, tmp_path / "out", meanwhile)
    assert (status, errors) == (0, "")
    assert times(tmp_path / "out") == found  # a rename would show in these times too


def test_a_half_that_another_source_gave_meanwhile(tmp_path, source):
    trees.write(tmp_path / "other", trees.small(seed=2))
    found = {}

    def meanwhile():
        assert trees.prepare(tmp_path / "other", tmp_path / "out").returncode == 0
        found.update(times(tmp_path / "out"))

    status, _, errors = late(source, tmp_path / "out", meanwhile)
    assert status == 3 and "was made from" in errors
    assert times(tmp_path / "out") == found


def test_a_published_record_file_is_not_taken_back(tmp_path, source):
    assert trees.prepare(source, tmp_path / "out").returncode == 0
    found = times(tmp_path / "out")
    (tmp_path / "out" / "val.part").mkdir()
    with pytest.raises(record_writer.Refused, match="another conversion"):
        record_writer.take_back(str(tmp_path / "out"), "val")
    (tmp_path / "out" / "val.part").rmdir()
    assert times(tmp_path / "out") == found


def test_a_journal_that_was_removed_is_not_written_to(tmp_path, monkeypatch):
    """The one who had the lock finished and removed the folder after this one had opened the journal."""
    flock = record_writer.fcntl.flock
    monkeypatch.setattr(
        record_writer.fcntl,
        "flock",
        lambda file, how: (shutil.rmtree(str(tmp_path / "x.part")), flock(file, how)),
    )
    with pytest.raises(record_writer.Refused, match="run it again"):
        record_writer.Journal(str(tmp_path / "x.part"), {})


def unpublished(source, folder):
    """Dies when train.rec is renamed and its manifest is not."""
    program = """
import os, sys
from prepare import imagenet
replace = os.replace
def dying(old, new):
    if new.endswith("train.idx"): os._exit(137)
    replace(old, new)
os.replace = dying
sys.exit(imagenet.main(sys.argv[1:]))
"""
    assert (
        subprocess.run(
            [sys.executable, "-c", program, str(source), str(folder)], cwd=trees.REPOSITORY
        ).returncode
        == 137
    )
    assert (folder / "train.rec").exists() and not (folder / "train.json").exists()


def test_what_is_renamed_already_needs_no_space(tmp_path, source):
    unpublished(source, tmp_path / "out")
    size = os.path.getsize(str(tmp_path / "out" / "train.rec"))
    program = """
import shutil, sys
from prepare import imagenet
class Usage: free = %d
shutil.disk_usage = lambda _: Usage
sys.exit(imagenet.main(sys.argv[1:]))
""" % (size // 2)
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "out")]
    result = subprocess.run(command, cwd=trees.REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 0, result.stderr
    assert trees.prepare(source, tmp_path / "whole").returncode == 0
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_a_dry_run_removes_nothing(tmp_path, source):
    assert trees.prepare(source, tmp_path / "out").returncode == 0
    trees.write(tmp_path / "out", {"train.part/journal": b"{}\n"})
    assert trees.prepare(source, tmp_path / "out", "--dry-run").returncode == 0
    assert (tmp_path / "out" / "train.part" / "journal").exists()
    assert trees.prepare(source, tmp_path / "out").returncode == 0
    assert not (tmp_path / "out" / "train.part").exists()
