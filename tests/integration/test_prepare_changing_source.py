# SPDX-License-Identifier: Apache-2.0
"""A source that changes after it was listed never gives records of other images."""

import io
import os
import tarfile

import pytest
from support.conversions import class_val_files, convert, train_files, verify_records
from support.image_fixtures import jpeg, read_files, write_class_archives, write_files

from prepare import imagenet, val_labels
from prepare.image_reader import ImageReader
from prepare.pieces import LARGE_RECORD_BYTES

CLASSES = ["ca", "cb", "cc"]
IMAGES = {**train_files(*CLASSES), **class_val_files(CLASSES)}
IMAGE = "train/cb/cb_0.JPEG"


def class_archive(name):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for number in range(2):
            member = tarfile.TarInfo(f"{name}/{name}_{number}.JPEG")
            image = IMAGES[f"train/{name}/{name}_{number}.JPEG"]
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
    return content.getvalue()


def write_train_archive(path, classes):
    """Write an archive of class archives, in this order, of the same size for any order."""
    with tarfile.open(path, "w") as tar:
        for name in classes:
            content = class_archive(name)
            member = tarfile.TarInfo(f"{name}.tar")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def archives(tmp_path):
    """A source with train.tar, and another archive of the same size beside it."""
    write_files(tmp_path / "in", class_val_files(CLASSES))
    write_train_archive(tmp_path / "in" / "train.tar", CLASSES)
    write_train_archive(tmp_path / "new.tar", CLASSES[::-1])
    return tmp_path / "in"


def replace(source):
    os.replace(source.parent / "new.tar", source / "train.tar")


def replace_with_same_time(source):
    status = (source / "train.tar").stat()
    os.utime(source.parent / "new.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
    replace(source)


def write_in_place(source):
    (source / "train.tar").write_bytes((source.parent / "new.tar").read_bytes())


def cut_off(source):
    os.truncate(source / "train.tar", 3000)


def assert_refused(source, path, *options):
    """Assert that a conversion in which `path` changes ends with status 4."""
    result = convert(source, source.parent / "out", *options)
    assert result.status == 4 and len(result.lines) == 1, result
    assert f"{path}: has changed since it was listed; " in result.stderr
    assert not (source.parent / "out" / "train.json").exists()


def assert_same_as_fresh(source):
    for folder in ("out", "fresh"):
        assert convert(source, source.parent / folder).status == 0
    assert read_files(source.parent / "out") == read_files(source.parent / "fresh")
    assert verify_records(source.parent / "out", f"--against={source}").status == 0


def change_before_writing(monkeypatch, source, change):
    """Let `change` happen when the validation split is written, before the training split is."""
    convert_split = imagenet.convert_split

    def change_and_convert(plan, *arguments):
        if plan.prefix == "train":
            change(source)
        convert_split(plan, *arguments)

    monkeypatch.setattr(imagenet, "convert_split", change_and_convert)


def change_while_reading(monkeypatch, source, change):
    """Let `change` happen when the second training image has been read."""
    read, reads = ImageReader.read, []

    def read_and_change(self, record, view, begin=0):
        read(self, record, view, begin)
        if self._plan.prefix == "train":
            reads.append(record)
            if len(reads) == 2:
                change(source)

    monkeypatch.setattr(ImageReader, "read", read_and_change)


@pytest.mark.parametrize("option", ["--on-error=fail", "--on-error=skip"])
@pytest.mark.parametrize("change", [replace, replace_with_same_time, write_in_place, cut_off])
def test_an_archive_that_changes_after_it_was_listed(archives, monkeypatch, change, option):
    whole = (archives / "train.tar").read_bytes()
    with monkeypatch.context() as patch:
        change_before_writing(patch, archives, change)
        assert_refused(archives, archives / "train.tar", option)
    if change is cut_off:
        (archives / "train.tar").write_bytes(whole)
    assert_same_as_fresh(archives)


@pytest.mark.parametrize("max_open", [0, 64])
@pytest.mark.parametrize("change", [write_in_place, cut_off])
def test_an_archive_that_changes_while_it_is_read(archives, monkeypatch, change, max_open):
    whole = (archives / "train.tar").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(ImageReader, "MAX_OPEN_ARCHIVES", max_open)
        change_while_reading(patch, archives, change)
        assert_refused(archives, archives / "train.tar")
    if change is cut_off:
        (archives / "train.tar").write_bytes(whole)
    assert_same_as_fresh(archives)


@pytest.mark.parametrize("max_open", [0, 64])
def test_a_class_archive_that_is_replaced(tmp_path, monkeypatch, max_open):
    write_files(tmp_path / "images", IMAGES)
    write_files(tmp_path / "in", class_val_files(CLASSES))
    write_class_archives(tmp_path / "images" / "train", tmp_path / "in" / "train")
    path = tmp_path / "in" / "train" / "cb.tar"
    (tmp_path / "new.tar").write_bytes((path.parent / "ca.tar").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(ImageReader, "MAX_OPEN_ARCHIVES", max_open)
        change_before_writing(patch, path, lambda path: os.replace(tmp_path / "new.tar", path))
        assert_refused(tmp_path / "in", path)


def change_bytes(path):
    content = path.read_bytes()
    path.write_bytes(content[:-3] + b"?" + content[-2:])
    os.utime(path, ns=(0, 10**18))


def append(path):
    path.write_bytes(path.read_bytes() + b"more\xff\xd9")


@pytest.mark.parametrize("option", ["--on-error=fail", "--on-error=skip"])
@pytest.mark.parametrize("size", [100, LARGE_RECORD_BYTES])
@pytest.mark.parametrize("change", [change_bytes, append, lambda path: os.truncate(path, 50)])
def test_an_image_that_changes_after_it_was_listed(tmp_path, monkeypatch, change, size, option):
    source = tmp_path / "in"
    write_files(source, {**IMAGES, IMAGE: jpeg(bytes(size))})
    with monkeypatch.context() as patch:
        change_before_writing(patch, source / IMAGE, change)
        assert_refused(source, source / IMAGE, option)
    write_files(source, {IMAGE: jpeg(b"whole")})
    assert_same_as_fresh(source)


def test_a_label_file_that_changes_while_it_is_read(archives, monkeypatch):
    labels = archives / "val_labels.txt"
    labels.write_text("".join(f"{name}\n" for name in CLASSES))
    read_lines = val_labels.read_lines

    def read_and_change(path):
        lines = read_lines(path)
        labels.write_text("".join(f"{name}\n" for name in CLASSES[::-1]))
        os.utime(labels, ns=(0, 10**18))
        return lines

    with monkeypatch.context() as patch:
        patch.setattr(val_labels, "read_lines", read_and_change)
        result = convert(archives, archives.parent / "out")
    assert result.status == 4 and f"{labels}: has changed while it was read" in result.stderr
    assert not (archives.parent / "out").exists()


def test_times_that_do_not_fit_into_64_bits(tmp_path):
    source, year_2400 = tmp_path / "in", 13569465600
    write_files(source, IMAGES)
    write_class_archives(source / "train", tmp_path / "packed" / "train")
    write_files(tmp_path / "packed", class_val_files(CLASSES))
    os.utime(source / IMAGE, (year_2400, year_2400))
    if (source / IMAGE).stat().st_mtime != year_2400:
        pytest.skip("the file system cannot store such times")
    for path in (source / IMAGE, tmp_path / "packed" / "train" / "cb.tar"):
        os.utime(path, (year_2400, year_2400))
        folder = tmp_path / f"out {path.suffix}"
        top = source if path.suffix == ".JPEG" else tmp_path / "packed"
        for _ in range(2):
            assert convert(top, folder).status == 0
        os.utime(path, (year_2400 + 1, year_2400 + 1))
        assert convert(top, folder).status == 3
