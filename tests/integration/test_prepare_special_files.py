# SPDX-License-Identifier: Apache-2.0
"""Test that named pipes and devices in the place of files are named, and never waited for."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
from support.image_fixtures import (
    REPOSITORY,
    run_prepare,
    small_dataset,
    write_class_archives,
    write_files,
    write_official_archives,
)

SECONDS = 60  # a command that waits for a pipe would take forever


@pytest.fixture
def folders(tmp_path):
    """Class folders of both splits."""
    write_files(tmp_path / "in", small_dataset())
    return tmp_path / "in"


@pytest.fixture
def official(tmp_path, folders):
    """The official archives and a label file."""
    write_official_archives(folders, tmp_path / "official")
    return tmp_path / "official"


def replace_by_pipe(path):
    if path.exists():
        path.unlink()
    os.mkfifo(path)


def assert_refused(
    *arguments, named, reason="is a named pipe", status=1, module="prepare.imagenet"
):
    """Assert that a command ends soon, naming this path on one line."""
    result = run_prepare(*arguments, module=module, timeout=SECONDS)
    assert result.returncode == status and "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if f"{named}: {reason}" in line]
    assert len(lines) == 1, result.stderr


@pytest.mark.parametrize("path", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
@pytest.mark.parametrize("place", ["", "train", "val"])
def test_official_archive(tmp_path, official, path, place):
    split = path[len("ILSVRC2012_img_") : -len(".tar")]
    if place not in ("", split):
        pytest.skip("an official archive of the other split is not read")
    (official / place).mkdir(exist_ok=True)
    if place:
        (official / path).unlink()
    replace_by_pipe(official / place / path)
    assert_refused(official, tmp_path / "out", named=official / place / path)


def test_class_archives(tmp_path, folders):
    for split in ("train", "val"):
        write_class_archives(folders / split, tmp_path / "packed" / split)
    for path in ("train/n01440764.tar", "train/n0.tar", "val/n02085620.tar"):
        replace_by_pipe(tmp_path / "packed" / path)
        assert_refused(tmp_path / "packed", tmp_path / "out", named=tmp_path / "packed" / path)


@pytest.mark.parametrize("name", ["val_labels.txt", "valprep.sh", "ILSVRC2012_devkit_t12.tar.gz"])
def test_label_file_in_the_source(tmp_path, official, name):
    replace_by_pipe(official / name)
    assert_refused(official, tmp_path / "out", named=official / name)


def test_files_of_a_devkit_folder(tmp_path, official):
    data = official / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"):
        os.mkfifo(data / name)
    result = run_prepare(official, tmp_path / "out", timeout=SECONDS)
    assert result.returncode == 1 and "is a named pipe" in result.stderr


@pytest.mark.parametrize("module", ["prepare.imagenet", "prepare.verify"])
def test_label_file_of_the_command_line(tmp_path, official, module):
    labels = (official / "valprep.sh").rename(tmp_path / "labels.sh")
    arguments = [official, tmp_path / "out", f"--val-labels={labels}"]
    assert run_prepare(*arguments).returncode == 0
    if module == "prepare.verify":
        arguments = [tmp_path / "out", "--against", official]
    else:
        arguments = [official, tmp_path / "other"]
    os.mkfifo(tmp_path / "pipe")
    pipe = tmp_path / "pipe"
    assert_refused(*arguments, f"--val-labels={pipe}", named=pipe, status=2, module=module)
    command = [sys.executable, "-m", module, *map(str, arguments)]
    for argument in (f"<(cat {labels})", "/dev/zero"):
        line = " ".join([*command, "--val-labels", argument])
        result = subprocess.run(
            ["bash", "-c", line],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        assert "not a regular file" in result.stderr


def test_socket_and_device(tmp_path, folders):
    for split in ("train", "val"):
        write_class_archives(folders / split, tmp_path / "packed" / split)
    archive = tmp_path / "packed" / "train" / "n01440764.tar"
    archive.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(archive.parent)  # the path of a socket must be short
        listener.bind(archive.name)
    os.chdir(REPOSITORY)
    os.symlink("/dev/zero", archive.parent / "n0.tar")
    result = run_prepare(tmp_path / "packed", tmp_path / "out", timeout=SECONDS)
    assert result.returncode == 1
    assert "n01440764.tar: is a socket, not a regular file" in result.stderr
    assert "n0.tar: is a device, not a regular file" in result.stderr


@pytest.mark.parametrize("suffix", [".json", ".rec", ".idx", ".lst", ".sums"])
def test_pipe_in_the_destination(tmp_path, folders, suffix):
    out = tmp_path / "out"
    assert run_prepare(folders, out).returncode == 0
    replace_by_pipe(out / f"train{suffix}")
    options = ["--fast"] if suffix == ".rec" else []
    status, reason = (3, "is not a file") if suffix == ".json" else (1, "is a named pipe")
    expected = {"named": out / f"train{suffix}", "status": status, "reason": reason}
    assert_refused(out, *options, **expected, module="prepare.verify")
    result = run_prepare(folders, out, timeout=SECONDS)
    assert result.returncode == 3 and f"train{suffix}: " in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["journal", "train.rec"])
def test_pipe_in_an_unfinished_conversion(tmp_path, folders, name):
    out = tmp_path / "out"
    (out / "train.part").mkdir(parents=True)
    os.mkfifo(out / "train.part" / name)
    result = run_prepare(folders, out, timeout=SECONDS)
    assert result.returncode == 3 and f"train.part/{name}: would be" in result.stderr
    shutil.rmtree(out / "train.part")
    assert run_prepare(folders, out).returncode == 0


def test_pipe_in_the_digits(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("cv2")
    assert run_prepare(tmp_path / "digits", module="prepare.digits").returncode == 0
    replace_by_pipe(tmp_path / "digits" / "train" / "digit_0" / "0000.jpg")
    result = run_prepare(tmp_path / "digits", module="prepare.digits", timeout=SECONDS)
    assert result.returncode == 2 and "is not the digits data set" in result.stderr
