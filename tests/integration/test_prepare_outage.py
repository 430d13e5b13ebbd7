# SPDX-License-Identifier: Apache-2.0
"""Storage that fails or goes away in mid-run is no image's fault: status 4, and the same command goes on later."""

import os
import subprocess
import sys

import pytest
from support import image_trees as trees

# Runs the command with small pieces; what argv[1] says happens before the third piece of the training set is read.
PROGRAM = """
import errno, os, sys
from prepare import image_reader, imagenet, pieces, plan, record_writer
plan.PIECE_BYTES, record_writer.STAGE_BYTES = 20000, 65536
build, prefixes = pieces.build_piece, []
def step(what, *arguments):
    prefixes.append(what.prefix)
    if prefixes.count("train") == 3:
        exec(sys.argv[1])
    return build(what, *arguments)
pieces.build_piece = step
sys.exit(imagenet.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trees.write(folder / "in", trees.small(train=20, val=3))
    assert trees.prepare(folder / "in", folder / "out").returncode == 0
    return folder


@pytest.fixture
def source(tmp_path):
    trees.write(tmp_path / "in", trees.small(train=20, val=3))
    return tmp_path / "in"


def run(happening, *arguments):
    command = [sys.executable, "-c", PROGRAM, happening, *map(str, arguments), "--workers=1"]
    return subprocess.run(
        command,
        cwd=trees.REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def move_back(source):
    for folder, names, _ in os.walk(str(source)):
        for name in names:
            if name.endswith(".away"):
                place = os.path.join(folder, name)
                if os.path.isdir(place[:-5]):
                    os.rmdir(place[:-5])
                os.rename(place, place[:-5])
                return


@pytest.mark.parametrize("option", ["--on-error=fail", "--on-error=skip"])
@pytest.mark.parametrize(
    "gone,empty", [("train", False), ("train", True), ("train/n01443537", False)]
)
def test_a_source_that_goes_away(tmp_path, source, whole, option, gone, empty):
    place = str(source / gone)
    happening = "os.rename(%r, %r)" % (place, place + ".away")
    if empty:  # where a share was mounted
        happening += "; os.mkdir(%r)" % place
    result = run(happening, source, tmp_path / "out", option)
    assert result.returncode == 4, result.stderr
    assert (
        len(result.stderr.splitlines()) == 1
        and place + ": existed before and is missing now; " in result.stderr
    )
    assert (tmp_path / "out" / "train.part" / "train.rec").exists()
    move_back(source)
    again = run("", source, tmp_path / "out", option)
    assert again.returncode == 0, again.stderr
    assert "0 left out" in again.stdout
    assert trees.contents(tmp_path / "out") == trees.contents(whole / "out")


@pytest.mark.parametrize("many", [False, True])
def test_archives_that_go_away(tmp_path, source, many):
    """Each class's archive is opened at the start, or, when there are many, for each image."""
    for half in ("train", "val"):
        for name in os.listdir(str(source / half)):
            folder = source / half / name
            trees.pack(
                "python", "ustar", str(folder) + ".tar", folder, sorted(os.listdir(str(folder)))
            )
            subprocess.run(["rm", "-r", str(folder)], check=True)
    place = str(source / "train" / "n01443537.tar")
    moved = "os.rename(%r, %r)" % (place, place + ".away")
    program = PROGRAM.replace(
        "build, prefixes",
        "image_reader.ImageReader.MAX_OPEN_ARCHIVES = %d\nbuild, prefixes" % (0 if many else 64),
    )
    if not many:  # before the training set's turn
        program = program.replace('prefixes.count("train") == 3', 'prefixes == ["val"]')
    command = [
        sys.executable,
        "-c",
        program,
        moved,
        str(source),
        str(tmp_path / "out"),
        "--on-error=skip",
        "--workers=1",
    ]
    result = subprocess.run(command, cwd=trees.REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 4 and place + ": existed before and is missing now; " in result.stderr, (
        result.stderr
    )


@pytest.mark.parametrize(
    "name",
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
def test_storage_that_fails(tmp_path, source, name):
    happening = (
        """
def fail(*_): raise OSError(errno.%s, "storage failed")
image_reader.os.preadv = fail
"""
        % name
    )
    result = run(happening, source, tmp_path / "out", "--on-error=skip")
    assert result.returncode == 4, result.stderr
    assert str(source / "train") in result.stderr and ".JPEG: storage failed; " in result.stderr
    assert run("", source, tmp_path / "out", "--on-error=skip").returncode == 0


def test_a_source_that_is_away_for_a_moment(tmp_path, source, whole):
    happening = """
opened, failed = os.open, []
def fail_once(path, *arguments, opened=opened, failed=failed):  # exec's own names are not seen later
    if str(path).endswith(".JPEG") and not failed:
        failed.append(path)
        raise FileNotFoundError(errno.ENOENT, "No such file", path)
    return opened(path, *arguments)
os.open = fail_once
"""
    result = run(happening, source, tmp_path / "out", "--on-error=skip")
    assert result.returncode == 4 and ".JPEG: was missing for a moment; " in result.stderr, (
        result.stderr
    )
    result = run("", source, tmp_path / "out", "--on-error=skip")
    assert result.returncode == 0 and "0 left out" in result.stdout
    assert trees.contents(tmp_path / "out") == trees.contents(whole / "out")


def test_an_image_that_goes_away_is_a_bad_image(tmp_path, source):
    lost = "for name in sorted(os.listdir({0!r}))[:9]: os.unlink(os.path.join({0!r}, name))".format(
        str(source / "train" / "n01443537")
    )
    result = run(lost, source, tmp_path / "out")
    assert (
        result.returncode == 1 and "n01443537_0.JPEG: cannot be read: No such file" in result.stderr
    ), result.stderr


LISTING = """
import errno, os, sys
from prepare import folder_index, imagenet
scandir = os.scandir
def failing(path):
    if str(path).endswith("train/n01443537"):
        raise OSError(errno.%s, "storage failed", path)
    return scandir(path)
folder_index.os.scandir = failing
sys.exit(imagenet.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name", ["EMFILE", "ENFILE", "EIO", "ESTALE"])
def test_storage_that_fails_while_it_is_listed(tmp_path, source, name):
    command = [
        sys.executable,
        "-c",
        LISTING % name,
        str(source),
        str(tmp_path / "out"),
        "--on-error=skip",
    ]
    result = subprocess.run(command, cwd=trees.REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 4 and "train/n01443537: storage failed; " in result.stderr, (
        result.stderr
    )


@pytest.mark.parametrize(
    "place", ["train/loop", "train/n01443537/a loop", "train/n01443537/loop.JPEG"]
)
def test_a_link_to_itself_loses_nothing_else(tmp_path, source, whole, place):
    os.symlink(os.path.basename(place), str(source / place))
    result = trees.prepare(source, tmp_path / "out")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 2, result.stderr
    assert place + ": Too many levels of symbolic links" in result.stderr
    result = trees.prepare(source, tmp_path / "out", "--on-error=skip")
    assert (
        result.returncode == 0 and "train: done" in result.stdout and "1 left out" in result.stdout
    )
    assert trees.contents(tmp_path / "out") == trees.contents(whole / "out")
