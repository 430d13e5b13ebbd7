# SPDX-License-Identifier: Apache-2.0
"""Test conversions of archives with outer folders, unusable names and other files next to them."""

import os
import shutil

import pytest
from support.image_fixtures import (
    jpeg,
    read_files,
    run_prepare,
    small_dataset,
    write_class_archives,
    write_files,
    write_official_archives,
    write_tar,
)


@pytest.mark.parametrize(
    "kind", ["train.tar of train/", "class archives of class folders", "train.tar of class folders"]
)
def test_archives_with_an_outer_folder(tmp_path, kind):
    write_files(tmp_path / "in", small_dataset())
    assert run_prepare(tmp_path / "in", tmp_path / "from folders").returncode == 0
    for split in ("train", "val"):
        folder, packed = tmp_path / "in" / split, tmp_path / "packed"
        (packed / split).mkdir(parents=True)
        if kind == "train.tar of train/":
            write_tar("gnutar", "gnu", packed / f"{split}.tar", tmp_path / "in", [split])
        elif kind == "train.tar of class folders":
            write_tar("gnutar", "gnu", packed / f"{split}.tar", folder, ["."])
        else:
            for name in sorted(os.listdir(folder)):
                write_tar("gnutar", "gnu", packed / split / f"{name}.tar", folder, [name])
    result = run_prepare(tmp_path / "packed", tmp_path / "from archives")
    assert result.returncode == 0, result.stderr
    assert read_files(tmp_path / "from archives") == read_files(tmp_path / "from folders")


def write_source_of_class_archives(tmp_path):
    """Write a source with an archive for each class of both splits; return its path."""
    write_files(tmp_path / "in", small_dataset())
    for split in ("train", "val"):
        write_class_archives(tmp_path / "in" / split, tmp_path / "packed" / split)
    return tmp_path / "packed"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", [b"a\tb", b"a\nb", b"a\rb", b"latin1\xe9"])
def test_a_class_archive_whose_name_a_list_cannot_hold(tmp_path, name, nested):
    source = write_source_of_class_archives(tmp_path)
    for split in ("train", "val"):
        folder = source / split
        os.rename(folder / "n01443537.tar", os.path.join(os.fsencode(folder), name + b".tar"))
        if nested:
            names = [os.fsdecode(path) for path in sorted(os.listdir(os.fsencode(folder)))]
            write_tar("python", "gnu", source / f"{split}.tar", folder, names)
            shutil.rmtree(folder)
    result = run_prepare(source, tmp_path / "out")
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    reason = "not UTF-8" if b"\xe9" in name else "tab or a line break"
    assert result.stderr.count(reason) == 7 + 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("official", [False, True])
def test_images_next_to_archives_are_named(tmp_path, official):
    source = write_source_of_class_archives(tmp_path)
    if official:
        shutil.rmtree(source)
        write_official_archives(tmp_path / "in", source)
        for split in ("train", "val"):
            (source / split).mkdir()
            name = f"ILSVRC2012_img_{split}.tar"
            (source / name).rename(source / split / name)
    assert run_prepare(source, tmp_path / "whole").returncode == 0
    names = ["train/loose.jpg", "val/loose.png", "train/notes.txt", "train/.hidden"]
    write_files(source, dict.fromkeys(names, jpeg()))
    os.symlink("nowhere", source / "train" / "dangling.JPEG")
    result = run_prepare(source, tmp_path / "out")
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and len(lines) == 4, result.stderr
    for path, reason in (
        ("train/loose.jpg", "in no class"),
        ("val/loose.png", "in no class"),
        ("train/dangling.JPEG", "symbolic link"),
    ):
        assert any(f"{source / path}: " in line and reason in line for line in lines)
    assert "train: other files, ignored: 1 .hidden, 1 .txt" in result.stdout
    result = run_prepare(source, tmp_path / "out", "--on-error=skip")
    assert result.returncode == 0 and "2 left out" in result.stdout
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")


def test_archives_that_are_not_read_are_named(tmp_path):
    """Folders next to them may be the result of an unpacking that was interrupted."""
    write_files(tmp_path / "in", small_dataset())
    source = tmp_path / "in"
    for name in ("train.tar", "ILSVRC2012_img_val.tar", "val.tar"):
        write_tar("python", "ustar", source / name, source, ["train"])
    write_class_archives(source / "train", source / "train")
    shutil.copy(source / "val.tar", source / "val" / "ILSVRC2012_img_val.tar")
    result = run_prepare(source, tmp_path / "out", "--dry-run")
    assert result.returncode == 0, result.stderr
    because = f"is not read, because {source}"
    assert f"train: {source}/train.tar {because}/train is not empty\n" in result.stdout
    assert f"val: {source}/ILSVRC2012_img_val.tar {because}/val is not empty\n" in result.stdout
    assert f"val: {source}/val/ILSVRC2012_img_val.tar is not read, because of" in result.stdout
    assert f"train: 3 class archives in {source}/train, such as n01440764.tar" in result.stdout
    shutil.rmtree(source / "train")
    shutil.copy(source / "train.tar", source / "ILSVRC2012_img_train.tar")
    result = run_prepare(source, tmp_path / "out", "--dry-run")
    because += "/ILSVRC2012_img_train.tar is next to it"
    assert f"train: {source}/train.tar {because}\n" in result.stdout
