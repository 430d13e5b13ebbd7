# SPDX-License-Identifier: Apache-2.0
"""Test storage that fails during a conversion: status 4, no image is called bad, it can resume."""

import os
import shutil

import pytest
from support.image_fixtures import (
    read_files,
    run_prepare,
    run_program,
    small_dataset,
    write_class_archives,
    write_files,
)

# prepare.imagenet with small pieces; executes FAULT before it reads a piece when CONDITION is true.
PROGRAM = """
import errno, os, sys
from prepare import image_reader, imagenet, pieces, plan, record_writer
plan.PIECE_BYTES, record_writer.STAGE_BYTES = 20000, 65536
image_reader.ImageReader.MAX_OPEN_ARCHIVES = MAX_OPEN
build_piece, prefixes = pieces.build_piece, []
def inject_fault(plan, *arguments):
    prefixes.append(plan.prefix)
    if CONDITION:
        FAULT
    return build_piece(plan, *arguments)
pieces.build_piece = inject_fault
sys.exit(imagenet.main(sys.argv[1:]))
"""
THIRD_TRAINING_PIECE = 'prefixes.count("train") == 3'
FIRST_PIECE = 'prefixes == ["val"]'


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the output of a conversion without faults."""
    folder = tmp_path_factory.mktemp("whole")
    write_files(folder / "in", small_dataset(train=20, val=3))
    assert run_prepare(folder / "in", folder / "out").returncode == 0
    return read_files(folder / "out")


@pytest.fixture
def source(tmp_path):
    write_files(tmp_path / "in", small_dataset(train=20, val=3))
    return tmp_path / "in"


def run_with_fault(fault, *arguments, condition=THIRD_TRAINING_PIECE, max_open=64):
    """Run a conversion that executes the statements `fault` before it reads a certain piece."""
    program = PROGRAM.replace("CONDITION", condition).replace("= MAX_OPEN", f"= {max_open}")
    program = program.replace("FAULT", "\n        ".join(fault.strip().splitlines()))
    return run_program(program, *arguments, "--workers=1")


@pytest.mark.parametrize("option", ["--on-error=fail", "--on-error=skip"])
@pytest.mark.parametrize(
    "lost,leave_empty", [("train", False), ("train", True), ("train/n01443537", False)]
)
def test_a_source_folder_that_disappears(tmp_path, source, whole, option, lost, leave_empty):
    folder, moved = source / lost, tmp_path / "moved"
    fault = f"os.rename({str(folder)!r}, {str(moved)!r})"
    if leave_empty:  # as an unmounted share does
        fault += f"; os.mkdir({str(folder)!r})"
    result = run_with_fault(fault, source, tmp_path / "out", option)
    assert result.returncode == 4, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert f"{folder}: existed before and is missing now; " in result.stderr
    assert (tmp_path / "out" / "train.part" / "train.rec").exists()
    if leave_empty:
        folder.rmdir()
    moved.rename(folder)
    again = run_with_fault("pass", source, tmp_path / "out", option)
    assert again.returncode == 0, again.stderr
    assert "0 left out" in again.stdout
    assert read_files(tmp_path / "out") == whole


@pytest.mark.parametrize("many", [False, True])
def test_archives_that_disappear(tmp_path, source, many):
    """Class archives are opened at the start of a split, or, if there are many, for each image."""
    for split in ("train", "val"):
        write_class_archives(source / split, tmp_path / "archives" / split)
    shutil.rmtree(source)
    archive = tmp_path / "archives" / "train" / "n01443537.tar"
    result = run_with_fault(
        f"os.rename({str(archive)!r}, {str(tmp_path / 'moved.tar')!r})",
        tmp_path / "archives",
        tmp_path / "out",
        "--on-error=skip",
        condition=THIRD_TRAINING_PIECE if many else FIRST_PIECE,
        max_open=0 if many else 64,
    )
    assert result.returncode == 4, result.stderr
    assert f"{archive}: existed before and is missing now; " in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        "EIO",
        "ESTALE",
        "ETIMEDOUT",
        "ENOTCONN",
        "EHOSTDOWN",
        "ENODEV",
        "ENXIO",
        "EREMOTEIO",
        "EMFILE",
    ],
)
def test_storage_that_fails(tmp_path, source, error):
    fault = f"""
def fail(*_): raise OSError(errno.{error}, "storage failed")
image_reader.os.preadv = fail
"""
    result = run_with_fault(fault, source, tmp_path / "out", "--on-error=skip")
    assert result.returncode == 4, result.stderr
    assert str(source / "train") in result.stderr and ".JPEG: storage failed" in result.stderr
    again = run_with_fault("pass", source, tmp_path / "out", "--on-error=skip")
    assert again.returncode == 0, again.stderr


def test_a_source_that_is_missing_for_a_moment(tmp_path, source, whole):
    fault = """
opened, failed = os.open, []
def fail_once(path, *arguments):
    if str(path).endswith(".JPEG") and not failed:
        failed.append(path)
        raise FileNotFoundError(errno.ENOENT, "No such file", path)
    return opened(path, *arguments)
os.open = fail_once
"""
    result = run_with_fault(fault, source, tmp_path / "out", "--on-error=skip")
    assert result.returncode == 4, result.stderr
    assert ".JPEG: was missing for a moment; " in result.stderr
    result = run_with_fault("pass", source, tmp_path / "out", "--on-error=skip")
    assert result.returncode == 0 and "0 left out" in result.stdout
    assert read_files(tmp_path / "out") == whole


def test_an_image_that_disappears_is_a_bad_image(tmp_path, source):
    folder = str(source / "train" / "n01443537")
    fault = (
        f"for name in sorted(os.listdir({folder!r}))[:9]: os.unlink(os.path.join({folder!r}, name))"
    )
    result = run_with_fault(fault, source, tmp_path / "out")
    assert result.returncode == 1, result.stderr
    assert "n01443537_0.JPEG: cannot be read: No such file" in result.stderr


@pytest.mark.parametrize("error", ["EMFILE", "ENFILE", "EIO", "ESTALE"])
def test_storage_that_fails_while_it_is_listed(tmp_path, source, error):
    program = f"""
import errno, os, sys
from prepare import folder_index, imagenet
scandir = os.scandir
def fail_in_one_folder(path):
    if str(path).endswith("train/n01443537"):
        raise OSError(errno.{error}, "storage failed", path)
    return scandir(path)
folder_index.os.scandir = fail_in_one_folder
sys.exit(imagenet.main(sys.argv[1:]))
"""
    result = run_program(program, source, tmp_path / "out", "--on-error=skip")
    assert result.returncode == 4, result.stderr
    assert "train/n01443537: storage failed" in result.stderr


@pytest.mark.parametrize(
    "link", ["train/loop", "train/n01443537/a loop", "train/n01443537/loop.JPEG"]
)
def test_only_a_link_to_itself_is_left_out(tmp_path, source, whole, link):
    os.symlink(os.path.basename(link), source / link)
    result = run_prepare(source, tmp_path / "out")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 2, result.stderr
    assert f"{link}: Too many levels of symbolic links" in result.stderr
    result = run_prepare(source, tmp_path / "out", "--on-error=skip")
    assert result.returncode == 0, result.stderr
    assert "train: done" in result.stdout and "1 left out" in result.stdout
    assert read_files(tmp_path / "out") == whole
