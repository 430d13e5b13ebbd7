# SPDX-License-Identifier: Apache-2.0
"""launch.copy_dataset: a data set on a disk of the machine, complete or refused."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from support.commands import ROOT

from mxresnet.errors import UserError
from mxresnet.launch import copy_dataset

NAMES = [f"{split}.{kind}" for split in ("train", "val") for kind in ("rec", "idx", "lst", "json")]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text(name * 1000)
        os.utime(folder / name, (1, 1_600_000_000))
    (folder / "other").write_text("of the user")
    return folder


def run(source, destination):
    copy_dataset.copy_dataset(str(source), str(destination))


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_the_files_of_a_data_set_are_copied_the_manifests_last(source, tmp_path, monkeypatch):
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(b.name), replace(a, b)))
    run(source, tmp_path / "a" / "copy")
    assert contents(tmp_path / "a" / "copy") == {name: name * 1000 for name in NAMES}
    assert set(order[-2:]) == {"train.json", "val.json"} and sorted(order) == sorted(NAMES)


def test_only_what_is_missing_is_copied_again(source, tmp_path, capfd):
    copy = tmp_path / "copy"
    run(source, copy)
    run(source, copy)
    assert capfd.readouterr().err.count("copying") == len(NAMES)
    (copy / "val.rec").unlink()
    (copy / ".val.rec.part").write_text("half")
    run(source, copy)
    assert capfd.readouterr().err.count("copying") == 1
    assert contents(copy) == {name: name * 1000 for name in NAMES}


def test_a_data_set_without_manifests_is_copied(source, tmp_path):
    for name in ("train.json", "val.json", "train.lst", "val.lst"):
        (source / name).unlink()
    run(source, tmp_path / "copy")
    assert sorted(contents(tmp_path / "copy")) == ["train.idx", "train.rec", "val.idx", "val.rec"]


@pytest.mark.parametrize("change", ["size", "time", "link"])
def test_another_file_of_the_destination_is_never_replaced(source, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    if change == "size":
        (copy / "val.rec").write_text("mine")
    elif change == "time":
        os.utime(copy / "val.rec")
    else:
        (copy / "val.rec").unlink()
        (copy / "val.rec").symlink_to("nowhere")
    before = {path: path.lstat() for path in copy.iterdir()}
    with pytest.raises(UserError, match=f"{copy}/val.rec is another file"):
        run(source, copy)
    assert {path: path.lstat() for path in copy.iterdir()} == before


def test_a_source_that_is_no_data_set_is_refused(source, tmp_path):
    (source / "val.idx").unlink()
    with pytest.raises(UserError, match=f"COPY_DATASET={source} has no val.idx"):
        run(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_disk_without_room_is_refused_before_anything_is_copied(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="needs 0.0 GB in .*copy, which has room for 0.0 GB"):
        run(source, tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())


def test_a_copy_onto_itself_changes_nothing(source):
    before = contents(source)
    run(source, pathlib.Path(f"{source}/../source"))
    assert contents(source) == before


@pytest.mark.parametrize("destination", ["/proc/copy", "/dev/null", "/dev/null/copy"])
def test_a_destination_that_cannot_be_written_is_one_line_and_status_2(source, destination):
    command = [sys.executable, "-m", "mxresnet.launch.copy_dataset", source, destination]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"COPY_DATASET={source} cannot be copied to {destination}" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["a"], ["a", "b", "c"]])
def test_a_wrong_number_of_arguments_shows_the_usage(arguments):
    command = [sys.executable, "-m", "mxresnet.launch.copy_dataset", *arguments]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    usage = "usage: python -m mxresnet.launch.copy_dataset SOURCE DESTINATION\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", usage)
