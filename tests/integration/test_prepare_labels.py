# SPDX-License-Identifier: Apache-2.0
"""Test conversions whose validation classes come from label files, right or wrong ones."""

import os
import random
import shutil

import pytest
from support.conversions import convert, verify_records
from support.image_fixtures import (
    CLASSES,
    LABEL_FILES,
    extract_tar,
    jpeg,
    read_files,
    small_dataset,
    write_devkit,
    write_files,
    write_official_archives,
    write_tar,
)

GROUND_TRUTH = [CLASSES[number * 7 % 5 % 3] for number in range(1, 13)]


def val_name(number, extension=".JPEG"):
    return f"ILSVRC2012_val_{number:08d}{extension}"


def train_files():
    return {path: content for path, content in small_dataset().items() if path.startswith("train")}


@pytest.fixture
def source(tmp_path):
    """Write class folders, and the official archives with all kinds of label files."""
    files = train_files()
    for number, label in enumerate(GROUND_TRUTH, 1):
        files[f"val/{label}/{val_name(number)}"] = jpeg(f"{number}".encode())
    write_files(tmp_path / "folders", files)
    write_official_archives(
        tmp_path / "folders", tmp_path / "archives", labels=("valprep.sh", "list", "devkit")
    )
    return tmp_path


@pytest.fixture
def flat_source(tmp_path):
    """Write training images in class folders, and validation images directly in val/."""
    files = train_files()
    for number in range(1, len(GROUND_TRUTH) + 1):
        files[f"val/{val_name(number)}"] = jpeg(f"{number}".encode())
    write_files(tmp_path / "in", files)
    return tmp_path / "in"


def write_synset_list(source):
    content = "".join(f"{label}\n" for label in GROUND_TRUTH).encode()
    write_files(source, {LABEL_FILES["list"]: content})


def failed_line(source, folder, *options):
    """Return the single line on standard error of a conversion that must fail."""
    result = convert(source, folder, *options)
    assert result.status == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize("kind", list(LABEL_FILES))
@pytest.mark.parametrize("with_option", [False, True])
def test_each_kind_of_label_file(source, kind, with_option):
    archives = source / "archives"
    for other, name in LABEL_FILES.items():
        if other != kind:
            (archives / name).unlink()
    options = []
    if with_option:
        shutil.move(str(archives / LABEL_FILES[kind]), str(source / "labels"))
        options = ["--val-labels", source / "labels"]
    for name, more in (("folders", []), ("archives", options)):
        result = convert(source / name, source / f"from {name}", *more)
        assert result.status == 0, result.stderr
    assert read_files(source / "from archives") == read_files(source / "from folders")


def test_flat_validation_folder_and_folder_of_class_archives(source):
    archives, mixed = source / "archives", source / "mixed"
    extract_tar(archives / "ILSVRC2012_img_train.tar", mixed / "train")
    extract_tar(archives / "ILSVRC2012_img_val.tar", mixed / "val")
    extract_tar(archives / "ILSVRC2012_devkit_t12.tar.gz", mixed)
    for name in ("folders", "mixed"):
        result = convert(source / name, source / f"from {name}")
        assert result.status == 0, result.stderr
    assert read_files(source / "from mixed") == read_files(source / "from folders")
    result = verify_records(source / "from mixed", "--against", source / "folders")
    assert result.status == 0, result.stderr


def test_labels_that_disagree(source):
    path = source / "archives" / LABEL_FILES["list"]
    labels = path.read_text().splitlines()
    labels[4] = next(name for name in CLASSES if name != labels[4])
    path.write_text("\n".join(labels))
    shutil.copy(path, source / "folders")
    for name in ("archives", "folders"):
        result = convert(source / name, source / "out")
        assert result.status == 1 and val_name(5) in result.stderr
        assert not (source / "out").exists()


def test_no_labels(source):
    for name in LABEL_FILES.values():
        (source / "archives" / name).unlink()
    assert "--val-labels" in failed_line(source / "archives", source / "out")


def test_a_missing_validation_image_does_not_shift_the_labels_of_others(source):
    archive, folder = source / "archives" / "ILSVRC2012_img_val.tar", source / "val"
    extract_tar(archive, folder)
    (folder / val_name(3)).unlink()
    write_tar("python", "ustar", archive, folder, sorted(os.listdir(folder)))
    result = convert(source / "archives", source / "out")
    assert result.status == 1 and f"{val_name(3)}: does not exist" in result.stderr
    assert convert(source / "archives", source / "out", "--on-error=skip").status == 0
    for line in (source / "out" / "val.lst").read_text().splitlines():
        _, label, path = line.split("\t")
        assert (source / "folders" / "val" / path).exists()
        assert CLASSES[int(float(label))] == path.split("/")[0]


@pytest.mark.parametrize("extra", [0, 2])  # the class whose folder is walked first or last
def test_an_image_name_in_two_class_folders(flat_source, extra):
    write_synset_list(flat_source)
    for number, label in enumerate(GROUND_TRUTH, 1):
        write_files(flat_source, {f"val/{label}/{val_name(number)}": jpeg(b"x")})
        (flat_source / "val" / val_name(number)).unlink()
    assert convert(flat_source, flat_source.parent / "good").status == 0
    name = val_name(GROUND_TRUTH.index(CLASSES[1]) + 1)
    write_files(flat_source, {f"val/{CLASSES[extra]}/{name}": jpeg(b"x")})
    line = failed_line(flat_source, flat_source.parent / "out")
    assert f"{name}: is in {CLASSES[extra]}, but its class is {CLASSES[1]} in " in line


@pytest.mark.parametrize("extension", [".jpg", ".png", ".jpeg"])
@pytest.mark.parametrize("kind", ["list", "devkit"])
def test_labels_by_number_whatever_the_extension(flat_source, extension, kind):
    out = flat_source.parent / "out"
    if kind == "list":
        write_synset_list(flat_source)
    else:
        write_devkit(str(flat_source / LABEL_FILES["devkit"]), CLASSES, GROUND_TRUTH)
    for number in range(1, len(GROUND_TRUTH) + 1):
        image = flat_source / "val" / val_name(number)
        image.rename(flat_source / "val" / val_name(number, extension))
    result = convert(flat_source, out)
    assert result.status == 0, result.stderr
    rows = [line.split("\t") for line in (out / "val.lst").read_text().splitlines()]
    assert {path: float(label) for _, label, path in rows} == {
        f"{label}/{val_name(number, extension)}": float(CLASSES.index(label))
        for number, label in enumerate(GROUND_TRUTH, 1)
    }
    shutil.rmtree(out)
    (flat_source / "val" / val_name(3, extension)).unlink()
    result = convert(flat_source, out)
    assert result.status == 1 and val_name(3) in result.stderr
    assert result.stderr.count("does not exist") == 1


def test_a_damaged_devkit_is_one_line(flat_source):
    path = flat_source / LABEL_FILES["devkit"]
    write_devkit(str(path), CLASSES, random.Random(7).choices(CLASSES, k=30000))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 60] = bytes(60)
    path.write_bytes(bytes(content))
    line = failed_line(flat_source, flat_source.parent / "out")
    assert f"prepare.imagenet: {path}: " in line
