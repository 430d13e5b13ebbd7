# SPDX-License-Identifier: Apache-2.0
"""Test that every fault of a source's images is named in one line and nothing is written."""

import json
import os

import pytest
from support.image_fixtures import (
    jpeg,
    run_im2rec,
    run_prepare,
    run_program,
    small_dataset,
    write_files,
)


@pytest.fixture
def source(tmp_path):
    write_files(tmp_path / "in", small_dataset())
    return tmp_path / "in"


def failed_lines(source, folder, *options, status=1):
    """Return the lines on standard error of a run that must fail and publish no training file."""
    before = sorted(os.listdir(folder)) if folder.exists() else []
    result = run_prepare(source, folder, *options)
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert all(line.startswith("prepare.imagenet: ") for line in result.stderr.splitlines())
    if folder.exists():  # the validation split, converted first, may be complete
        kept = ("val.", "train.part")  # what was copied is used by a later run
        left = sorted(name for name in os.listdir(folder) if not name.startswith(kept))
        assert left == [name for name in before if not name.startswith("val.")]
    return result.stderr.splitlines()


def assert_named(lines, reasons):
    """Assert that a line names each path of {end of path: part of the reason}."""
    for path, reason in reasons.items():
        assert any(f"{path}: " in line and reason in line for line in lines), (path, lines)


BAD_FILES = {
    "empty.JPEG": (b"", "empty"),
    "text.JPEG": (b"<html>", "neither a JPEG nor a PNG: it begins with 3c 68 74"),
    "cut.JPEG": (
        jpeg(b"x" * 5000)[:-2],
        "truncated: a JPEG without its end marker; DALI",
    ),
    # A camera's thumbnail has an end marker of its own, before the image's data begin.
    "thumbnail.JPEG": (
        b"\xff\xd8\xff\xe1\x00\x0aEx\xff\xd9yyyy\xff\xda" + b"z" * 500,
        "truncated: a JPEG",
    ),
    "cut.png": (b"\x89PNG\r\n\x1a\n" + b"x" * 100, "truncated: a PNG"),
    "tiny.JPEG": (b"\xff\xd8", "neither"),
}


def test_every_bad_image_is_named(tmp_path, source):
    not_empty = {name: entry for name, entry in BAD_FILES.items() if entry[0]}
    class_folder = source / "train" / "n01443537"
    write_files(class_folder, {name: content for name, (content, _) in not_empty.items()})
    lines = failed_lines(source, tmp_path / "out")
    assert_named(
        lines, {f"train/n01443537/{name}": reason for name, (_, reason) in not_empty.items()}
    )
    assert len(lines) == len(not_empty) + 1


def test_problems_found_by_listing_are_named_before_anything_is_written(tmp_path, source):
    write_files(source / "train" / "n01443537", {"text.JPEG": b"<html>", "empty.JPEG": b""})
    os.symlink("nowhere", source / "val" / "n01440764" / "dangling.JPEG")
    os.symlink("nowhere", source / "val" / "n09999999")
    os.mkfifo(source / "val" / "n01440764" / "pipe.JPEG")
    (source / "train" / "n00000001").mkdir()
    lines = failed_lines(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert_named(
        lines,
        {
            "train/n01443537/empty.JPEG": "empty",
            "val/n01440764/dangling.JPEG": "symbolic link",
            "val/n09999999": "symbolic link",
            "val/n01440764/pipe.JPEG": "not a regular file",
            "train/n00000001": "0 images",
        },
    )


def test_skipping_bad_images_equals_converting_the_good_ones(tmp_path, source):
    class_folder = source / "train" / "n01443537"
    write_files(class_folder, {f"zz{name}": content for name, (content, _) in BAD_FILES.items()})
    os.symlink("nowhere", class_folder / "zzdangling.JPEG")
    result = run_prepare(source, tmp_path / "out", "--on-error=skip")
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "out" / "train.json").read_text())
    assert manifest["examples"] == 21
    skipped = {os.path.basename(problem["path"]) for problem in manifest["skipped"]}
    assert all(problem["reason"] for problem in manifest["skipped"])
    assert skipped == {f"zz{name}" for name in BAD_FILES} | {"zzdangling.JPEG"}
    assert "zz" not in (tmp_path / "out" / "train.lst").read_text()
    verified = run_prepare(tmp_path / "out", "--against", source, module="prepare.verify")
    assert verified.returncode == 0, verified.stderr
    # A finished conversion with another value of an option is something else in the destination.
    assert failed_lines(source, tmp_path / "out", status=3)


def test_im2rec_leaves_out_the_same_unreadable_images(tmp_path, source):
    pytest.importorskip("mxnet")
    class_folder = source / "train" / "n01443537"
    assert run_prepare(source, tmp_path / "whole").returncode == 0
    run_im2rec(source, tmp_path / "reference")
    # im2rec keeps the other images' keys when an image disappears after the list is made.
    name = sorted(os.listdir(class_folder))[3]
    (class_folder / name).write_bytes(b"not an image")
    assert run_prepare(source, tmp_path / "out", "--on-error=skip").returncode == 0
    reference = (tmp_path / "reference" / "train.lst").read_text().splitlines()
    keys = [line.split("\t")[0] for line in reference if name not in line]
    index = (tmp_path / "out" / "train.idx").read_text().splitlines()
    assert [line.split("\t")[0] for line in index] == keys


def test_a_class_without_a_usable_image(tmp_path, source):
    for path in (source / "train" / "n01443537").iterdir():
        path.write_bytes(b"not an image")
    lines = failed_lines(source, tmp_path / "out", "--on-error=skip")
    assert "not one usable image in this class" in lines[0] and len(lines) == 1


def test_classes_must_be_the_same(tmp_path, source):
    write_files(source, {"val/n09999999/x.JPEG": jpeg()})
    lines = failed_lines(source, tmp_path / "out")
    assert len(lines) == 1 and "has no class n09999999" in lines[0]


def test_names_that_a_list_cannot_hold(tmp_path, source):
    class_folder = os.fsencode(source / "train" / "n01440764")
    for name in (b"a\tb.JPEG", b"a\nb.JPEG", b"latin1\xe9.JPEG"):
        with open(os.path.join(class_folder, name), "wb") as stream:
            stream.write(jpeg())
    text = "\n".join(failed_lines(source, tmp_path / "out"))
    assert text.count("tab or a line break") == 2 and text.count("not UTF-8") == 1


def test_folder_that_contains_itself(tmp_path, source):
    os.symlink("..", source / "train" / "n01440764" / "again")
    lines = failed_lines(source, tmp_path / "out")
    assert len(lines) == 1 and "leads back" in lines[0]


def test_half_unpacked_class_archives(tmp_path, source):
    write_files(source / "train", {"n02085620.tar": b"", "n03000000.tar": b""})
    lines = failed_lines(source, tmp_path / "out")
    assert len(lines) == 1 and "n03000000.tar: not unpacked" in lines[0]


def test_image_that_is_removed_before_it_is_read(tmp_path, source):
    program = """
import os, sys
from prepare import imagenet
check_space = imagenet.check_space
def change_source(*arguments):
    os.unlink(sys.argv[1] + "/train/n01440764/n01440764_0.JPEG")
    check_space(*arguments)
imagenet.check_space = change_source
sys.exit(imagenet.main(sys.argv[1:]))
"""
    result = run_program(program, source, tmp_path / "out")
    assert result.returncode == 1
    assert "n01440764_0.JPEG: cannot be read: No such file" in result.stderr
