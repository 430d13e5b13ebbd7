# SPDX-License-Identifier: Apache-2.0
"""Test wrong paths, permissions and options: each gives one line and its exit status."""

import os
import stat
import subprocess
import sys

import pytest
from support.conversions import convert, verify_records
from support.image_fixtures import (
    REPOSITORY,
    jpeg,
    run_prepare,
    small_dataset,
    write_files,
    write_official_archives,
)


@pytest.fixture
def source(tmp_path):
    write_files(tmp_path / "in", small_dataset())
    return tmp_path / "in"


needs_root = pytest.mark.skipif(
    os.getuid() != 0, reason="needs root, to run the command as a user with fewer permissions"
)


def run_as_nobody(folder, *arguments, module="imagenet"):
    """Run a command in `folder` as a user who does not own its files.

    Its process starts as root, as nobody may not have access to the interpreter's packages nor to
    the folders above this one.
    """
    program = f"""
import locale, os, sys
from prepare import imagenet, verify
os.chdir(sys.argv[1])
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit({module}.main(sys.argv[2:]))
"""
    folder.chmod(folder.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    command = [sys.executable, "-c", program, str(folder), *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in result.stderr
    return result


@needs_root
def test_unreadable_file_and_folder(tmp_path, source):
    (source / "train" / "n01440764" / "n01440764_0.JPEG").chmod(0)
    (source / "train" / "n02085620").chmod(0)
    result = run_as_nobody(tmp_path, "in", "out")
    assert result.returncode == 1
    assert "in/train/n01440764/n01440764_0.JPEG: cannot be read: permission denied" in result.stderr
    assert "in/train/n02085620: cannot be listed: Permission denied" in result.stderr


@needs_root
@pytest.mark.parametrize(
    "path, mode", [("in", 0o700), ("in/train", 0o700), ("in/val", 0o700), ("labels.txt", 0o600)]
)
def test_a_source_that_may_not_be_read_is_a_wrong_path(tmp_path, source, path, mode):
    """The status is not 4, after which a calling program would retry."""
    write_files(
        tmp_path,
        {"labels.txt": b"n01440764", "in/val/n01440764/ILSVRC2012_val_00000001.JPEG": jpeg()},
    )
    assert run_prepare(source, tmp_path / "done").returncode == 0
    (tmp_path / path).chmod(mode)
    options = ["--val-labels", "labels.txt"] if path == "labels.txt" else []
    converted = run_as_nobody(tmp_path, "in", "out", *options)
    verified = run_as_nobody(tmp_path, "done", "--against", "in", *options, module="verify")
    for command, result in (("imagenet", converted), ("verify", verified)):
        assert result.returncode == 2, result.stderr
        assert result.stderr.startswith(f"prepare.{command}: {path}")
        assert result.stderr.endswith(": Permission denied\n")


@needs_root
def test_an_archive_that_may_not_be_read_is_a_wrong_path(tmp_path, source):
    write_official_archives(source, tmp_path / "archives")
    (tmp_path / "archives" / "ILSVRC2012_img_train.tar").chmod(0o600)
    result = run_as_nobody(tmp_path, "archives", "out")
    message = "prepare.imagenet: archives/ILSVRC2012_img_train.tar: Permission denied\n"
    assert result.returncode == 2 and result.stderr == message


@needs_root
def test_a_destination_that_may_not_be_written_is_a_failure(tmp_path, source):
    result = run_as_nobody(tmp_path, "in", "out")
    assert result.returncode == 4
    assert result.stderr.startswith("prepare.imagenet: out: Permission denied; fix this")


@pytest.mark.parametrize(
    "arguments,status,reason",
    [
        (["nowhere", "out"], 2, "nowhere: No such file"),
        (["empty", "out"], 1, "contains neither a folder train/"),
        (["no images", "out"], 1, "contains no image"),
        (["in", "out", "--val-labels", "nowhere"], 2, "nowhere: No such file"),
        (["in", "a file"], 2, "a file: File exists"),
    ],
)
def test_wrong_paths(tmp_path, source, arguments, status, reason):
    write_files(
        tmp_path,
        {"no images/train/c/notes.txt": b"x", "no images/val/c/notes.txt": b"x", "a file": b"x"},
    )
    (tmp_path / "empty").mkdir()
    environment = dict(os.environ, PYTHONPATH=REPOSITORY)
    result = run_prepare(*arguments, cwd=tmp_path, env=environment)
    assert result.returncode == status and reason in result.stderr, result.stderr
    # A source without images lacks those of both splits.
    assert len(result.stderr.splitlines()) == (3 if arguments[0] == "no images" else 1)


@pytest.mark.parametrize("path", ["loop", "in/train/c.tar"])
def test_an_archive_or_a_source_that_links_to_itself(tmp_path, path):
    write_files(tmp_path, {"in/val/c/1.JPEG": jpeg(), "in/train/d.tar": bytes(1024)})
    os.symlink(os.path.basename(path), tmp_path / path)
    result = run_prepare(tmp_path / path.split("/")[0], tmp_path / "out")
    assert result.returncode == 2, result.stderr
    message = f"prepare.imagenet: {tmp_path / path}: Too many levels of symbolic links\n"
    assert result.stderr == message


@pytest.mark.parametrize(
    "option", ["--workers=0", "--workers=many", "--check=some", "--on-error=maybe", "--unknown"]
)
def test_wrong_options(tmp_path, source, option):
    result = run_prepare(source, tmp_path / "out", option)
    assert result.returncode == 2 and "error: " in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["prepare.imagenet", "prepare.verify"])
@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5", ""])
def test_workers_must_be_a_whole_number(tmp_path, source, module, value):
    arguments = [source, tmp_path / "out"] if module == "prepare.imagenet" else [tmp_path / "out"]
    result = run_prepare(*arguments, f"--workers={value}", module=module)
    assert result.returncode == 2
    assert result.stderr.endswith(
        f"error: argument --workers: must be a whole number from 1 to 512, not {value!r}\n"
    )


@pytest.mark.parametrize("folder", ["train", "train/out", "val/n01440764", "link/out"])
def test_a_destination_inside_the_source(tmp_path, source, folder):
    os.symlink("train", source / "link")
    before = sorted(str(path) for path in source.rglob("*"))
    result = run_prepare(source, source / folder)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert f"{source / folder}: is in the source's own folder" in result.stderr
    assert sorted(str(path) for path in source.rglob("*")) == before
    # A folder next to train/ whose name only begins with the same letters is fine.
    assert run_prepare(source, source / "training").returncode == 0


def test_dry_run_writes_nothing(tmp_path, source):
    result = run_prepare(source, tmp_path / "out", "--dry-run")
    assert result.returncode == 0
    assert "would write" in result.stdout and "21 images in 3 classes" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_any_name_can_be_printed(tmp_path, source, encoding):
    class_folder = os.fsencode(source / "train" / "n01440764")
    for name in (b"latin1\xe9", b"x.latin1\xe9", "x.\u00e9".encode()):
        with open(os.path.join(class_folder, name), "wb"):
            pass
    environment = dict(os.environ, PYTHONIOENCODING=encoding)
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/out\xe9")
    result = run_prepare(source, folder, env=environment)
    assert result.returncode == 0, result.stderr
    assert "1 .latin1\\udce9" in result.stdout and "out\\udce9: writing" in result.stdout
    assert run_prepare(folder, module="prepare.verify", env=environment).returncode == 0


@pytest.mark.parametrize("link", ["train/n01440764", "train", "val/n02085620"])
@pytest.mark.parametrize("below", ["", "out", "new/out"])
def test_a_destination_in_a_folder_that_the_source_links_to(tmp_path, source, link, below):
    outside = tmp_path / "elsewhere"
    (source / link).rename(outside)
    (source / link).symlink_to(outside)
    destination = outside / below
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    result = convert(source, destination)
    assert result.status == 2 and len(result.lines) == 1, result
    assert f"{destination}: is in the source's own folder {outside}: " in result.stderr
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert convert(source, tmp_path / "elsewhere too").status == 0


@pytest.mark.parametrize(
    "arguments",
    [["", "out"], ["in", ""], ["in", "out", "--val-labels", ""], ["in", "out", "--val-labels="]],
)
def test_an_empty_path_is_not_the_current_folder(tmp_path, source, monkeypatch, arguments):
    monkeypatch.chdir(source)  # which could be converted
    result = convert(*arguments)
    assert result.status == 2 and result.lines[-1].endswith(": must be a path, not ''"), result
    verified = [verify_records(""), verify_records("out", "--against=")]
    assert [each.status for each in verified] == [2, 2]
    assert sorted(os.listdir(source)) == ["train", "val"]


@pytest.mark.parametrize(
    "name", ["x" * 256, "x/" * 2100, "a file/x"], ids=["name", "path", "in a file"]
)
def test_a_path_that_no_file_can_have(tmp_path, source, name):
    write_files(tmp_path, {"a file": b"x"})
    path = tmp_path / name
    for arguments in ([path, tmp_path / "out"], [source, tmp_path / "out", "--val-labels", path]):
        result = convert(*arguments)
        assert result.status == 2 and len(result.lines) == 1, result
    result = convert(source, path)
    assert result.status == 2 and len(result.lines) == 1, result
    assert verify_records(path).status == 2
