# SPDX-License-Identifier: Apache-2.0
"""Test that a class that is packed in both splits is never missing in silence."""

import io
import os
import shutil
import subprocess
import tarfile

import pytest
from support.image_fixtures import (
    CLASSES,
    jpeg,
    read_files,
    run_prepare,
    small_dataset,
    write_class_archives,
    write_files,
    write_tar,
)
from support.tar_fixtures import make_member, write_members

from prepare import imagenet

LAST = CLASSES[-1]
SPLITS = ("train", "val")


@pytest.fixture
def packed(tmp_path):
    """A source with an archive for each class in train/ and val/."""
    write_files(tmp_path / "in", small_dataset())
    for split in SPLITS:
        write_class_archives(tmp_path / "in" / split, tmp_path / "packed" / split)
    return tmp_path / "packed"


@pytest.fixture
def assert_refused(capsys):
    """Return a function that checks that a conversion names files in both splits."""

    def check(source, folder, *names, reason=""):
        for option in ("--on-error=fail", "--on-error=skip"):
            assert imagenet.main([str(source), str(folder), option]) == 1
            errors = capsys.readouterr().err
            assert "Traceback" not in errors
            for split in SPLITS:
                for name in names:
                    assert any(
                        split in line and name in line and reason in line
                        for line in errors.splitlines()
                    ), (split, name, errors)
            assert not folder.exists()

    return check


PACKED_NAMES = [
    *("n2.tar.gz", "n2.tgz", "n2.TAR", "n2.7z", "n2.zip", "n2.rar", "n2.tar.lz4", "n2.tar.zst"),
    *("n2.tar.part", "n2.tar.aa", "n2.zip.001", "n2.squashfs", "n2.tar~", "n2 (1).tar.xz"),
]


@pytest.mark.parametrize("name", PACKED_NAMES)
@pytest.mark.parametrize("place", ["class folders", "class archives", "outer archive"])
def test_a_class_that_is_packed_in_another_way(tmp_path, packed, assert_refused, name, place):
    source = tmp_path / "in" if place == "class folders" else packed
    for split in SPLITS:
        folder = source / split
        if place == "class folders":
            shutil.rmtree(folder / LAST)
        else:
            (folder / f"{LAST}.tar").unlink()
        write_files(folder, {name: b"packed"})
        if place == "outer archive":
            write_tar("gnutar", "gnu", source / f"{split}.tar", source, [split])
            shutil.rmtree(folder)
    assert_refused(source, tmp_path / "out", name, reason="packed archive")


@pytest.mark.parametrize("place", ["class folders", "class archives", "outer archive"])
@pytest.mark.parametrize("kind", ["tar", "gzip"])
def test_a_packed_class_is_recognized_by_its_content(tmp_path, packed, assert_refused, kind, place):
    source = tmp_path / "in" if place == "class folders" else packed
    for split in SPLITS:
        archive = packed / split / f"{LAST}.tar"
        content = archive.read_bytes()
        archive.unlink()
        if place == "class folders":
            shutil.rmtree(source / split / LAST)
        if kind == "gzip":
            content = subprocess.run(["gzip"], input=content, stdout=subprocess.PIPE).stdout
        write_files(source / split, {"n2": content, "notes.txt": b"x" * 600})
        if place == "outer archive":
            names = sorted(os.listdir(source / split))
            write_tar("gnutar", "gnu", source / f"{split}.tar", source / split, names)
            shutil.rmtree(source / split)
    assert_refused(source, tmp_path / "out", "n2", reason="packed archive")


@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
def test_a_class_archive_with_a_hole_in_a_sparse_archive(
    tmp_path, packed, assert_refused, tar_format
):
    for split in SPLITS:
        folder = packed / split
        with open(folder / f"{LAST}.tar", "ab") as stream:
            stream.truncate(stream.tell() + 1048576)
        options = ["--sparse", f"--format={tar_format}", "-C", str(folder)]
        names = sorted(os.listdir(folder))
        command = ["tar", *options, "-cf", str(packed / f"{split}.tar"), *names]
        subprocess.run(command, check=True)
        shutil.rmtree(folder)
    assert_refused(packed, tmp_path / "out", f"{LAST}.tar", reason="--sparse")


@pytest.mark.parametrize(
    "kind", [tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, b"M", b"Z"]
)
def test_a_class_archive_that_is_no_regular_member(tmp_path, packed, assert_refused, kind):
    for split in SPLITS:
        (packed / split / f"{LAST}.tar").unlink()
        members = [
            make_member(name, (packed / split / name).read_bytes())
            for name in sorted(os.listdir(packed / split))
        ]
        link = {"linkname": f"{CLASSES[0]}.tar"} if kind in b"12" else {}
        members.append(make_member(f"{LAST}.tar", kind=kind, **link))
        write_members(packed / f"{split}.tar", members)
        shutil.rmtree(packed / split)
    assert_refused(packed, tmp_path / "out", f"{LAST}.tar")


def test_an_archive_in_a_class_archive_in_an_archive(tmp_path, packed, assert_refused):
    for split in SPLITS:
        class_archive = packed / split / f"{LAST}.tar"
        class_archive.rename(packed / "inner.tar")
        write_tar("gnutar", "gnu", class_archive, packed, ["inner.tar"])
        write_tar("gnutar", "gnu", packed / f"{split}.tar", packed, [split])
        shutil.rmtree(packed / split)
    assert_refused(packed, tmp_path / "out", f"{LAST}/inner.tar", reason="packed archive")


def test_a_class_archive_beside_the_official_archive_that_lacks_it(
    tmp_path, packed, assert_refused
):
    for split in SPLITS:
        folder = packed / split
        names = [f"{name}.tar" for name in CLASSES[:-1]]
        write_tar("gnutar", "gnu", folder / f"ILSVRC2012_img_{split}.tar", folder, names)
    assert_refused(packed, tmp_path / "out", f"{LAST}.tar", reason="packed archive")


def test_files_that_are_no_lost_classes(tmp_path, packed):
    """They are there unpacked, too, or are label files, or are packed by their names only."""
    assert run_prepare(tmp_path / "in", tmp_path / "whole").returncode == 0
    for split in SPLITS:
        for name in CLASSES:
            shutil.copy(packed / split / f"{name}.tar", tmp_path / "in" / split)
            write_files(tmp_path / "in" / split / name, {f"{name}.tar": b"packed"})
        files = ["ILSVRC2012_img_train.tar", "ILSVRC2012_devkit_t12.tar.gz", f"{LAST}.zip"]
        files += ["._n1.tar", "n1.tar.md5", "notes.docx"]
        write_files(tmp_path / "in" / split, dict.fromkeys(files, b"PK\x03\x04"))
    result = run_prepare(tmp_path / "in", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")


def test_an_image_may_be_named_like_an_archive(tmp_path):
    files = small_dataset()
    for split in SPLITS:
        files[f"{split}/{LAST}/x.tar.jpg"] = jpeg(b"image")
        files[f"{split}/{LAST}/x.zip.png.JPEG"] = jpeg(b"image")
    write_files(tmp_path / "in", files)
    for split in SPLITS:
        write_tar("gnutar", "gnu", tmp_path / f"{split}.tar", tmp_path / "in" / split, ["."])
    for source, folder in ((tmp_path / "in", "folders"), (tmp_path, "archives")):
        result = run_prepare(source, tmp_path / folder)
        assert result.returncode == 0, result.stderr
    assert read_files(tmp_path / "folders") == read_files(tmp_path / "archives")


def gzip_of(content):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        info, data = make_member("1.jpg", content)
        tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


NO_ARCHIVES = {  # part of the reason -> content
    "is empty": b"",
    "page of HTML": b"<!DOCTYPE html><html>403 Forbidden</html>",
    "is compressed (lz4)": b"\x04\x22\x4d\x18" + bytes(600),
    "is compressed (7z)": b"7z\xbc\xaf\x27\x1c" + bytes(600),
    "is compressed (gzip)": gzip_of(jpeg()),
    "is no tar archive: it begins with 00 01 02": bytes(range(256)) * 4,
    "pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\n",
    "holds no file": bytes(10240),
    "cut short": b"short",
}


@pytest.mark.parametrize("reason", NO_ARCHIVES)
@pytest.mark.parametrize("place", ["class archives", "one of them", "inside", "outer archive"])
def test_the_reason_why_an_archive_holds_no_image(tmp_path, packed, assert_refused, reason, place):
    content = NO_ARCHIVES[reason]
    for split in SPLITS:
        folder = packed / split
        for name in os.listdir(folder)[: 1 if place == "one of them" else None]:
            (folder / name).write_bytes(content)
        if place == "inside":
            write_tar("gnutar", "gnu", packed / f"{split}.tar", packed, [split])
        if place in ("inside", "outer archive"):
            shutil.rmtree(folder)
        if place == "outer archive":
            (packed / f"{split}.tar").write_bytes(content)
    assert_refused(packed, tmp_path / "out", ".tar", reason=reason)


@pytest.mark.parametrize(
    "member",
    [
        make_member("../n1/1.jpg", jpeg()),
        make_member("c/pipe.jpg", kind=tarfile.FIFOTYPE),
        make_member("c/odd.jpg", jpeg(), kind=b"Z"),
        make_member("n1.tar.gz", b"x"),
        make_member("c", kind=tarfile.SYMTYPE, linkname="/elsewhere"),
    ],
    ids=lambda member: member[0].name,
)
def test_the_reason_why_the_only_member_is_not_used(tmp_path, assert_refused, member):
    for split in SPLITS:
        write_members(tmp_path / f"{split}.tar", [member])
    assert_refused(tmp_path, tmp_path / "out", member[0].name)


def test_a_class_without_usable_images_is_not_called_empty(tmp_path, capsys):
    write_files(tmp_path / "in", small_dataset())
    for split in SPLITS:
        folder = tmp_path / "in" / split
        os.rename(folder / LAST, os.fsencode(folder) + b"/latin1\xe9")
    assert imagenet.main([str(tmp_path / "in"), str(tmp_path / "out"), "--on-error=skip"]) == 1
    lines = capsys.readouterr().err.splitlines()
    for split in SPLITS:
        found = f"/in/{split}/latin1\\udce9: not one usable image in a class folder: fill or remove"
        assert any(found in line for line in lines), lines
