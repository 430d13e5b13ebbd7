# SPDX-License-Identifier: Apache-2.0
"""A conversion that is killed at any moment resumes and ends with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from support import image_fixtures as images

# Runs prepare.imagenet with small pieces and exits, as if by kill -9, at its n-th step that changes
# the disk; a write that is interrupted writes half of its bytes. Prints the number of steps if it
# completes. argv: n, and the arguments of prepare.imagenet.
PROGRAM_WITH_KILL_FAULT = """
import json, os, sys
from prepare import destination, imagenet, plan, record_writer
from prepare.journal import Journal
kill_step, steps = int(sys.argv[1]), 0
plan.PIECE_BYTES, record_writer.STAGE_BYTES = 20000, 65536

def inject_kill(owner, name, do_partly):
    original = getattr(owner, name)
    def call(*arguments, **options):
        global steps
        steps += 1
        if steps == kill_step:
            do_partly(original, *arguments)
            os._exit(137)
        return original(*arguments, **options)
    setattr(owner, name, call)

def do_nothing(original, *arguments):
    pass

def write_half(original, file, data, offset):
    original(file, data[: len(data) // 2 // 4096 * 4096], offset)

def append_half_a_line(original, journal, entry):
    line = json.dumps(entry).encode()
    journal._file.write(line[: len(line) // 2])
    journal._file.flush()

inject_kill(os, "pwrite", write_half)
inject_kill(os, "replace", do_nothing)
inject_kill(os, "fsync", do_nothing)
inject_kill(os, "ftruncate", do_nothing)
inject_kill(destination, "remove_part_folder", do_nothing)
inject_kill(os, "rmdir", do_nothing)
inject_kill(Journal, "_append", append_half_a_line)

truncate = Journal.truncate
def print_and_truncate(journal, count):
    print("kept pieces:", count)
    truncate(journal, count)
Journal.truncate = print_and_truncate

status = imagenet.main(sys.argv[2:])
print("steps:", steps)
sys.exit(status)
"""
NO_KILL = 0


def run_with_kill_at_step(step, source, folder):
    return images.run_program(PROGRAM_WITH_KILL_FAULT, step, source, folder, "--workers=2")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    files = images.small_dataset(train=12, val=3)
    files["train/n01440764/split.JPEG"] = images.jpeg(b"pp" + images.MAGIC * 3)
    images.write_files(folder, files)
    return folder


def read_output(folder):
    """Return all files of a finished output; two runs on the same source must agree in each."""
    return images.read_files(folder, sorted(os.listdir(str(folder))))


def test_kill_at_every_step(tmp_path, source):
    complete = run_with_kill_at_step(NO_KILL, source, tmp_path / "complete")
    assert complete.returncode == 0, complete.stderr
    steps = int(complete.stdout.split("steps:")[1])
    assert steps > 30
    # One output is killed at step 1, resumed and killed at its step 2, and so on; the others are
    # killed once, each at another step.
    for step in range(1, steps + 1):
        folder = tmp_path / f"killed once at {step}"
        # The number of journal writes depends on the speed of the disk, so the last steps may not
        # be reached.
        killed = run_with_kill_at_step(step, source, folder)
        assert killed.returncode == 137 or step > steps - 10
        resumed = run_with_kill_at_step(NO_KILL, source, folder)
        assert resumed.returncode == 0, resumed.stderr
        assert read_output(folder) == read_output(tmp_path / "complete"), f"killed at step {step}"
    for step in range(1, steps + 1):
        if run_with_kill_at_step(step, source, tmp_path / "killed often").returncode == 0:
            break
    last = run_with_kill_at_step(NO_KILL, source, tmp_path / "killed often")
    assert last.returncode == 0, last.stderr
    assert read_output(tmp_path / "killed often") == read_output(tmp_path / "complete")


def kill_late(source, tmp_path):
    """Return a folder where the training split was killed with pieces in its journal, and how many.

    The step at which that happens depends on the speed of the disk.
    """
    for step in range(60, 5, -1):
        folder = tmp_path / f"killed at {step}"
        journal = folder / "train.part" / "journal"
        killed = run_with_kill_at_step(step, source, folder).returncode == 137
        if killed and journal.exists() and (folder / "train.part" / "train.rec").exists():
            pieces = journal.read_bytes().count(b"\n") - 1
            if pieces >= 3:
                return folder, pieces
    raise AssertionError("never killed late enough")


def test_resumed_run_keeps_finished_pieces(tmp_path, source):
    folder, pieces = kill_late(source, tmp_path)
    assert f"kept pieces: {pieces}\n" in run_with_kill_at_step(NO_KILL, source, folder).stdout


def test_damaged_record_file_is_rewritten_on_resume(tmp_path, source):
    """A power failure may lose blocks that the journal covers."""
    complete = run_with_kill_at_step(NO_KILL, source, tmp_path / "complete")
    assert complete.returncode == 0
    folder, pieces = kill_late(source, tmp_path)
    record_file = folder / "train.part" / "train.rec"
    content = bytearray(record_file.read_bytes())
    content[30000:34096] = bytes(4096)
    record_file.write_bytes(bytes(content))
    resumed = run_with_kill_at_step(NO_KILL, source, folder)
    assert resumed.returncode == 0
    assert f"kept pieces: {pieces}\n" not in resumed.stdout
    assert read_output(folder) == read_output(tmp_path / "complete")


def test_kills_at_random_times(tmp_path):
    images.write_files(tmp_path / "in", images.small_dataset(train=1500, val=10))
    started = time.monotonic()
    assert images.run_prepare(tmp_path / "in", tmp_path / "complete").returncode == 0
    seconds = time.monotonic() - started
    generator, kills = random.Random(5), 0
    command = [sys.executable, "-m", "prepare.imagenet", tmp_path / "in", tmp_path / "out"]
    for _ in range(12):
        process = subprocess.Popen(
            [*map(str, command), "--workers=2"],
            cwd=images.REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(generator.uniform(0.2, 0.7) * seconds)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    result = images.run_prepare(tmp_path / "in", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert read_output(tmp_path / "out") == read_output(tmp_path / "complete")


def test_renamed_record_file_needs_no_more_space(tmp_path, source):
    kill_before_manifest(source, tmp_path / "out")
    size = os.path.getsize(str(tmp_path / "out" / "train.rec"))
    program = f"""
import shutil, sys
from prepare import imagenet
class Usage:
    free = {size // 2}
shutil.disk_usage = lambda path: Usage
sys.exit(imagenet.main(sys.argv[1:]))
"""
    result = images.run_program(program, source, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert images.run_prepare(source, tmp_path / "complete").returncode == 0
    assert read_output(tmp_path / "out") == read_output(tmp_path / "complete")


def kill_before_manifest(source, folder):
    """Kill a conversion after train.rec is renamed and before its manifest is."""
    program = """
import os, sys
from prepare import imagenet
original = os.replace
def replace(old, new):
    if new.endswith("train.idx"):
        os._exit(137)
    original(old, new)
os.replace = replace
sys.exit(imagenet.main(sys.argv[1:]))
"""
    assert images.run_program(program, source, folder).returncode == 137
    assert (folder / "train.rec").exists() and not (folder / "train.json").exists()
