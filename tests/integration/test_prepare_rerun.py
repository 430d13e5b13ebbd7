# SPDX-License-Identifier: Apache-2.0
"""Test that a run after a finished one notices each change of the source, and only changes."""

import os
import shutil

import pytest
from support.conversions import (
    class_val_files,
    convert,
    flat_val_files,
    train_files,
    verify_records,
)
from support.image_fixtures import (
    LABEL_FILES,
    extract_tar,
    jpeg,
    read_files,
    write_class_archives,
    write_files,
    write_official_archives,
)
from support.manifests import make_version_1

COMPLETE = "already complete from an earlier run"


@pytest.fixture
def folders(tmp_path):
    """A source of class folders, and a finished conversion of it."""
    files = {**train_files("ca", "cb", "cc"), **class_val_files(["ca", "cb", "cc"])}
    write_files(tmp_path / "in", files)
    assert convert(tmp_path / "in", tmp_path / "out").status == 0
    return tmp_path / "in"


def change_bytes(path):
    """Write other bytes of the same number, within the same second or not."""
    content = path.read_bytes()
    path.write_bytes(content[:-3] + b"?" + content[-2:])


def change_size(path):
    status = path.stat()
    path.write_bytes(path.read_bytes() + b"more\xff\xd9")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_time(path):
    os.utime(path, ns=(0, 10**18))


def replace_with_older(path):
    """Replace the image as `cp -p` of an older one does."""
    change_bytes(path)
    os.utime(path, (10**9, 10**9))


@pytest.mark.parametrize("change", [change_bytes, change_size, change_time, replace_with_older])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_changed_image_is_noticed(folders, split, change):
    image = sorted((folders / split / "cb").iterdir())[0]
    change(image)
    out = folders.parent / "out"
    result = convert(folders, out)
    assert result.status == 3 and len(result.lines) == 1, result
    assert f"{out}/{split}.json: the split was made from {folders}/{split} as it" in result.stderr
    assert "was changed (size or time)" in result.stderr
    assert (f"cb/{image.name} was changed" in result.stderr) == (change is change_bytes)


def test_added_and_removed_images_are_named(folders):
    write_files(folders, {"train/ca/new.JPEG": jpeg(), "train/cb/new.JPEG": jpeg()})
    (folders / "train" / "cc" / "cc_0.JPEG").unlink()
    result = convert(folders, folders.parent / "out")
    assert result.status == 3
    names = "ca/new.JPEG and 1 more were added and cc/cc_0.JPEG was removed"
    assert f"since then, {names}: choose another" in result.stderr


@pytest.mark.parametrize("version", [1, 2])
def test_changes_that_do_not_concern_images_are_no_changes(folders, version):
    out = folders.parent / "out"
    write_files(folders, {"train/ca/notes.txt": b"x", "README": b"x"})
    shutil.copytree(folders, folders.parent / "copy")  # with the times of the files
    for source in (folders, folders.parent / "copy"):
        if version == 1:
            make_version_1(out / "train.json")
        result = convert(source, out)
        assert result.status == 0 and COMPLETE in result.stdout, result


def test_images_that_were_left_out_are_no_changes(folders):
    write_files(folders, {"train/ca/bad.JPEG": b"no image", "train/cb/empty.JPEG": b""})
    out = folders.parent / "skipped"
    assert convert(folders, out, "--on-error=skip").status == 0
    result = convert(folders, out, "--on-error=skip")
    assert result.status == 0 and COMPLETE in result.stdout
    (folders / "train" / "ca" / "ca_0.JPEG").unlink()
    result = convert(folders, out, "--on-error=skip")
    assert result.status == 3 and "since then, ca/ca_0.JPEG was removed: " in result.stderr


def test_a_changed_image_outside_class_folders_is_noticed(tmp_path):
    files = {**train_files("ca", "cb"), **flat_val_files(3), "val_labels.txt": b"ca\ncb\nca"}
    write_files(tmp_path / "in", files)
    assert convert(tmp_path / "in", tmp_path / "out").status == 0
    assert COMPLETE in convert(tmp_path / "in", tmp_path / "out").stdout
    change_bytes(tmp_path / "in" / "val" / "ILSVRC2012_val_00000002.JPEG")
    result = convert(tmp_path / "in", tmp_path / "out")
    assert result.status == 3 and "since then, ILSVRC2012_val_00000002.JPEG was" in result.stderr


@pytest.mark.parametrize("layout", ["official", "class archives"])
def test_a_changed_archive_is_noticed_without_listing_it(folders, layout):
    source, out = folders.parent / "archives", folders.parent / "from archives"
    if layout == "official":
        write_official_archives(folders, source)
        changed = source / "ILSVRC2012_img_train.tar"
    else:
        for split in ("train", "val"):
            write_class_archives(folders / split, source / split)
        changed = source / "train" / "cb.tar"
    assert convert(source, out).status == 0
    result = convert(source, out)
    assert result.status == 0 and COMPLETE in result.stdout and "listing" not in result.stdout
    content = changed.read_bytes()
    at = content.index(jpeg(b"cb 1"))
    changed.write_bytes(content[: at + 12] + b"?" + content[at + 13 :])
    result = convert(source, out)
    assert result.status == 3 and "since then, an archive was changed (size" in result.stderr
    assert verify_records(out, "--against", source).status == 1


def test_files_beside_archives_that_are_no_images_are_no_changes(folders):
    official, archives, out = (folders.parent / name for name in ("official", "archives", "new"))
    write_official_archives(folders, official)
    for split in ("train", "val"):
        write_class_archives(folders / split, archives / split)
    for source in (official, archives):
        shutil.rmtree(out, ignore_errors=True)
        assert convert(source, out).status == 0
        more = {"train/README": b"x"} if source == archives else {"val_labels.txt": b"ca\ncb\ncc"}
        write_files(source, more)
        result = convert(source, out)
        assert result.status == 0 and COMPLETE in result.stdout, result


@pytest.mark.parametrize("change", ["in place", "same time", "swapped"])
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_changed_label_in_a_devkit_folder_is_noticed(folders, change, interrupted):
    """The labels of the validation archive are swapped in a file below the devkit's folder."""
    source, out = folders.parent / "official", folders.parent / "from official"
    write_official_archives(folders, source, labels=["devkit"])
    extract_tar(source / "ILSVRC2012_devkit_t12.tar.gz", source)
    (source / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    for name in ("ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12/data"):
        os.utime(source / name, (10**9, 10**9))
    assert convert(source, out).status == 0
    result = convert(source, out)
    assert result.status == 0 and "listing" not in result.stdout
    if interrupted:  # between the splits
        for path in out.glob("train*"):
            path.unlink()
    data = source / "ILSVRC2012_devkit_t12" / "data"
    truth = data / "ILSVRC2012_validation_ground_truth.txt"
    status, lines = truth.stat(), truth.read_text().split()
    new = "".join(f"{line}\n" for line in [lines[1], lines[0], *lines[2:]])
    if change == "swapped":
        (data / "new").write_text(new)
        os.replace(data / "new", truth)
        os.utime(data, (10**9, 10**9))
    else:
        truth.write_text(new)
    if change == "same time":
        os.utime(truth, ns=(status.st_atime_ns, status.st_mtime_ns))
    before = read_files(out, os.listdir(out))
    result = convert(source, out)
    assert result.status == 3 and f"{out}/val.json: the split was made from" in result.stderr
    assert read_files(out, os.listdir(out)) == before


@pytest.mark.parametrize("kind", ["valprep.sh", "list", "devkit"])
def test_a_label_file_that_is_changed_in_size_and_time_of_before(folders, kind):
    source, out = folders.parent / "official", folders.parent / "from official"
    write_official_archives(folders, source, labels=[kind])
    assert convert(source, out).status == 0
    path = source / LABEL_FILES[kind]
    status, content = path.stat(), path.read_bytes()
    swapped = content.replace(b"ca\n", b"xx\n").replace(b"cb\n", b"ca\n").replace(b"xx\n", b"cb\n")
    if kind == "valprep.sh":
        swapped = (
            content.replace(b" ca/", b" xx/").replace(b" cb/", b" ca/").replace(b"xx/", b"cb/")
        )
    if kind == "devkit":
        swapped = content[:-8] + bytes(4) + content[-4:]  # the sum of its content is wrong
    path.write_bytes(swapped)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert convert(source, out).status == (1 if kind == "devkit" else 3)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_that_is_added_beside_an_official_archive(folders, split):
    source, out = folders.parent / "official", folders.parent / "from official"
    write_official_archives(folders, source)
    for name in ("train", "val"):
        archive = f"ILSVRC2012_img_{name}.tar"
        (source / name).mkdir()
        (source / archive).rename(source / name / archive)
    assert convert(source, out).status == 0
    result = convert(source, out)
    assert result.status == 0 and "listing" not in result.stdout
    write_files(source, {f"{split}/new.JPEG": jpeg()})
    result = convert(source, out)
    assert result.status == 1 and f"{split}/new.JPEG: is next to archives" in result.stderr


def test_a_split_is_completed_only_if_the_other_is_of_this_source(folders):
    out = folders.parent / "out"
    for path in out.glob("train.*"):
        path.unlink()
    change_bytes(folders / "val" / "cb" / "ILSVRC2012_val_00000002.JPEG")
    result = convert(folders, out)
    assert result.status == 3 and not list(out.glob("train*"))
