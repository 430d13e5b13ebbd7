# SPDX-License-Identifier: Apache-2.0
"""Test devkit archives with several files that could be the labels."""

import tarfile

import pytest
from support.image_fixtures import CLASSES, write_devkit
from support.tar_fixtures import make_member, write_members

from prepare import devkit_files, val_labels
from prepare.listing import SourceError

pytest.importorskip("scipy")
TOP = "ILSVRC2012_devkit_t12"
TRUTH, META = devkit_files.GROUND_TRUTH_FILE, devkit_files.META_FILE
LABELS = [CLASSES[number % 3] for number in range(6)]
OTHER = b"1\n" * 6


@pytest.fixture
def files(tmp_path):
    """Return {file name: content} of a devkit."""
    write_devkit(str(tmp_path / "whole.tar.gz"), CLASSES, LABELS)
    return devkit_files.read_devkit_files(str(tmp_path / "whole.tar.gz"))


def read_labels(path):
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 7)]
    return list(val_labels.read_label_file(str(path)).classes_of(names).values())


def write_archive(path, files, more):
    members = [make_member(f"{TOP}/data/{name}", content) for name, content in files.items()]
    first = [make_member(name, content) for name, content in more if name.startswith("a/")]
    last = [make_member(name, content) for name, content in more if not name.startswith("a/")]
    write_members(path, [*first, *members, *last])


@pytest.mark.parametrize("folder", [f"{TOP}/old/", "a/", "", f"{TOP}/data.old/"])
def test_files_outside_data_are_no_labels(tmp_path, files, folder):
    write_archive(tmp_path / "kit.tar", files, [(folder + TRUTH, OTHER), (folder + META, b"x")])
    assert read_labels(tmp_path / "kit.tar") == LABELS


@pytest.mark.parametrize("folder", [f"{TOP}/data", f"./{TOP}/data", "a/data", "old/data"])
@pytest.mark.parametrize("name", [TRUTH, META])
def test_different_files_in_data_are_refused(tmp_path, files, folder, name):
    write_archive(tmp_path / "kit.tar", files, [(f"{folder}/{name}", OTHER)])
    with pytest.raises(SourceError, match=f"{name}.* keep one of them"):
        read_labels(tmp_path / "kit.tar")
    write_archive(tmp_path / "kit.tar", files, [(f"{folder}/{name}", files[name])])
    assert read_labels(tmp_path / "kit.tar") == LABELS


def test_files_of_an_archive_without_data(tmp_path, files):
    members = [make_member(f"x/{name}", content) for name, content in files.items()]
    write_members(tmp_path / "kit.tar", members)
    assert read_labels(tmp_path / "kit.tar") == LABELS
    write_members(tmp_path / "kit.tar", [*members, make_member(f"y/{TRUTH}", OTHER)])
    with pytest.raises(SourceError, match=f"x/{TRUTH} and y/{TRUTH} in it differ"):
        read_labels(tmp_path / "kit.tar")


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_in_place_of_the_labels_is_refused(tmp_path, files, kind):
    link = make_member(f"{TOP}/data/{TRUTH}", kind=kind, linkname=f"{TOP}/old/{TRUTH}")
    meta = make_member(f"{TOP}/data/{META}", files[META])
    write_members(tmp_path / "kit.tar", [make_member(f"{TOP}/old/{TRUTH}", OTHER), meta, link])
    with pytest.raises(SourceError, match=f"data/{TRUTH} in it is a link"):
        read_labels(tmp_path / "kit.tar")
