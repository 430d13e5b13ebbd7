# SPDX-License-Identifier: Apache-2.0
"""Content of the destination that another conversion or another program wrote is never changed."""

import json
import operator
import os
import shutil
import signal
import subprocess
import sys

import pytest
from support import image_fixtures as images
from support.conversions import convert, verify_records

import prepare
from prepare import destination, imagenet, journal, manifest

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
    assert convert(source, tmp_path / "out").status == 0
    before = change_times(tmp_path / "out")
    result = convert(source, tmp_path / "out")
    assert result.status == 0 and "already complete from an earlier run" in result.stdout
    # Without a bad image, the treatment of bad images makes no difference.
    assert convert(source, tmp_path / "out", "--on-error=skip").status == 0
    assert change_times(tmp_path / "out") == before


def test_another_source_or_option_is_refused(tmp_path, source):
    images.write_files(tmp_path / "other", images.small_dataset(seed=2))
    different = ([tmp_path / "other"], [source, "--check=none"])
    assert convert(source, tmp_path / "out").status == 0
    for source_argument, *options in different:
        result = convert(source_argument, tmp_path / "out", *options)
        assert result.status == 3 and "was made from" in result.stderr
        assert "with --check=ends --on-error=fail: " in result.stderr
    killed = images.run_program(PROGRAM_KILLED_AT_FIRST_ENTRY, source, tmp_path / "part")
    assert killed.returncode == 137
    for source_argument, *options in different:
        result = convert(source_argument, tmp_path / "part", *options)
        assert result.status == 3 and "unfinished conversion of another source" in result.stderr
    assert convert(source, tmp_path / "part").status == 0
    names = sorted(os.listdir(str(tmp_path / "out")))
    assert sorted(os.listdir(str(tmp_path / "part"))) == names
    assert images.read_files(tmp_path / "part", names) == images.read_files(tmp_path / "out", names)


@pytest.mark.parametrize("name", ["train.rec", "val.lst"])
def test_files_without_a_manifest_are_never_overwritten(tmp_path, source, name):
    images.write_files(tmp_path / "out", {name: b"of another program"})
    result = convert(source, tmp_path / "out")
    assert result.status == 3 and "exists without a manifest" in result.stderr
    assert os.listdir(str(tmp_path / "out")) == [name]
    assert (tmp_path / "out" / name).read_bytes() == b"of another program"


def test_damaged_output_is_refused(tmp_path, source):
    assert convert(source, tmp_path / "out").status == 0
    os.truncate(str(tmp_path / "out" / "train.rec"), 1000)
    result = convert(source, tmp_path / "out")
    assert result.status == 3 and "has 1000 bytes" in result.stderr
    (tmp_path / "out" / "train.json").write_text(json.dumps({"version": 7}))
    assert "is not a manifest" in convert(source, tmp_path / "out").stderr


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
        assert convert(source, tmp_path / "out").status == 0
        found.update(change_times(tmp_path / "out"))

    status, errors = run_with_change_before_writing(source, tmp_path / "out", convert_meanwhile)
    assert (status, errors) == (0, "")
    assert change_times(tmp_path / "out") == found


def test_split_that_another_process_makes_from_another_source(tmp_path, source):
    images.write_files(tmp_path / "other", images.small_dataset(seed=2))
    found = {}

    def convert_meanwhile():
        assert convert(tmp_path / "other", tmp_path / "out").status == 0
        found.update(change_times(tmp_path / "out"))

    status, errors = run_with_change_before_writing(source, tmp_path / "out", convert_meanwhile)
    assert status == 3 and "was made from" in errors
    assert change_times(tmp_path / "out") == found


def test_published_record_file_is_not_rolled_back(tmp_path, source):
    assert convert(source, tmp_path / "out").status == 0
    found = change_times(tmp_path / "out")
    (tmp_path / "out" / "val.part").mkdir()
    with pytest.raises(manifest.DestinationError, match="another conversion"):
        destination.roll_back_publish(str(tmp_path / "out"), "val")
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
    assert convert(source, tmp_path / "out").status == 0
    images.write_files(tmp_path / "out", {"train.part/journal": b'{"digest": ""}\n'})
    assert convert(source, tmp_path / "out", "--dry-run").status == 0
    assert (tmp_path / "out" / "train.part" / "journal").exists()
    assert convert(source, tmp_path / "out").status == 0
    assert not (tmp_path / "out" / "train.part").exists()


def test_foreign_files_in_the_part_folder_are_kept(tmp_path, source):
    out = tmp_path / "out"
    images.write_files(out, {"val.part/notes": b"mine", "train.part/sub/notes": b"mine"})
    assert convert(source, out).status == 0
    assert convert(source, out).status == 0
    assert (out / "val.part" / "notes").read_bytes() == b"mine"
    assert (out / "train.part" / "sub" / "notes").read_bytes() == b"mine"
    assert sorted(os.listdir(str(out / "val.part"))) == ["notes"]
    # What a run with bad images has copied is used, and then removed, by the next one.
    images.write_files(tmp_path / "bad", {**images.small_dataset(), "val/n01440764/x.jpg": b"bad"})
    images.write_files(tmp_path / "other", {"val.part/notes": b"mine"})
    assert convert(tmp_path / "bad", tmp_path / "other").status == 1
    names = sorted(os.listdir(str(tmp_path / "other" / "val.part")))
    assert names == ["journal", "notes", "val.rec"]
    assert convert(tmp_path / "bad", tmp_path / "other", "--on-error=skip").status == 0
    assert os.listdir(str(tmp_path / "other" / "val.part")) == ["notes"]


FOREIGN = {  # path in the destination -> content
    "val.part": b"a file",
    "val.part/val.rec": b"of another program",
    "val.part/val.json": b"of another program",
    "val.part/journal": b"my travels\n",
    "val.part/journal/x": b"in a folder of this name",
    "val.json/x": b"in a folder of this name",
    "val.rec/x": b"in a folder of this name",
}


@pytest.mark.parametrize("path", FOREIGN)
def test_foreign_files_with_names_of_this_program_are_never_overwritten(tmp_path, source, path):
    images.write_files(tmp_path / "out", {path: FOREIGN[path]})
    result = convert(source, tmp_path / "out")
    assert result.status == 3 and len(result.lines) == 1, result
    assert (tmp_path / "out" / path).read_bytes() == FOREIGN[path]
    assert result.lines[0].startswith(f"prepare.imagenet: {tmp_path}/out/val.")
    assert not list((tmp_path / "out").glob("train*"))


@pytest.mark.parametrize("name", ["val.json", "val.part", "val.part/journal", "val.part/val.rec"])
def test_a_pipe_in_the_destination_does_not_hang(tmp_path, source, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    os.mkfifo(tmp_path / "out" / name)
    result = convert(source, tmp_path / "out")
    assert result.status == 3 and len(result.lines) == 1, result
    assert verify_records(tmp_path / "out").status == 3


def test_a_foreign_file_beside_a_finished_split_is_kept(tmp_path, source):
    assert convert(source, tmp_path / "out").status == 0
    images.write_files(tmp_path / "out", {"val.part/val.rec": b"mine"})
    assert convert(source, tmp_path / "out").status == 0
    assert (tmp_path / "out" / "val.part" / "val.rec").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "module,name,again",
    [
        ("record_writer.RecordWriter", "finish", False),
        ("record_writer.RecordWriter", "finish", True),
        ("convert", "_write_tables", False),
        ("convert", "_write_tables", True),
        ("destination", "write_durably", True),
        ("journal.Journal", "is_in_place", False),
        ("journal.Journal", "is_in_place", True),
        ("destination", "publish", False),
    ],
)
def test_a_destination_that_is_removed_in_mid_run(
    tmp_path, source, monkeypatch, module, name, again
):
    """The status is 4, after which a calling program retries; the second run succeeds."""
    out = tmp_path / "out"
    calls = []
    original = operator.attrgetter(f"{module}.{name}")(prepare)

    def remove_and_call(*arguments, **options):
        calls.append(name)
        if len(calls) == (2 if name == "is_in_place" else 1):
            shutil.rmtree(str(out))
            if again:  # by another conversion
                images.write_files(out, {"val.part/journal": b"{}\n", "val.part/val.rec": b"x"})
        return original(*arguments, **options)

    monkeypatch.setattr(f"prepare.{module}.{name}", remove_and_call)
    result = convert(source, out)
    assert result.status == 4 and len(result.lines) == 1, result
    assert not (out / "val.json").exists() and not (out / "val.rec").exists()
    shutil.rmtree(str(out), ignore_errors=True)
    assert convert(source, out).status == 0


@pytest.mark.parametrize("removed", ["", "val.rec", "val.json"])
def test_a_split_that_is_removed_while_the_other_is_written(tmp_path, source, monkeypatch, removed):
    convert_split = imagenet.convert_split

    def remove_and_convert(plan, folder, *arguments):
        if plan.prefix == "train":
            path = os.path.join(folder, removed)
            if removed:
                os.unlink(path)
            else:
                shutil.rmtree(path)
        convert_split(plan, folder, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(imagenet, "convert_split", remove_and_convert)
        result = convert(source, tmp_path / "out")
    assert result.status == 4 and len(result.lines) == 1, result
    assert "was removed while this command was running" in result.stderr


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 9), os.unlink])
@pytest.mark.parametrize("name", ["val.idx", "val.json"])
def test_the_advice_for_a_damaged_split_works(tmp_path, source, name, damage):
    out = tmp_path / "out"
    assert convert(source, out).status == 0
    before = images.read_files(out)
    damage(out / name)
    result = convert(source, out)
    assert result.status == 3 and len(result.lines) == 1, result
    if name != "val.json":
        assert "remove val{.rec,.idx,.lst,.sums,.json} to make the split again" in result.stderr
    for suffix in (".rec", ".idx", ".lst", ".sums", ".json"):
        (out / f"val{suffix}").unlink(missing_ok=True)
    result = convert(source, out)
    assert result.status == 0 and "train: done" not in result.stdout
    assert images.read_files(out) == before
