# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a source is named, one line each, with a status that says what sort of thing it is."""

import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from support import image_trees as trees
from support.image_trees import jpeg

from prepare import imagenet


@pytest.fixture
def source(tmp_path):
    trees.write(tmp_path / "in", trees.small())
    return tmp_path / "in"


def refused(source, folder, *options, status=1):
    """The lines on standard error of a run that must fail, write nothing and show no traceback."""
    before = sorted(os.listdir(str(folder))) if os.path.exists(str(folder)) else None
    result = trees.prepare(source, folder, *options)
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert all(line.startswith("prepare.imagenet: ") for line in result.stderr.splitlines())
    if os.path.exists(str(folder)):  # the other half may be whole; nothing half-written is left
        left = sorted(name for name in os.listdir(str(folder)) if not name.startswith("val."))
        assert left == [name for name in before or [] if not name.startswith("val.")]
    return result.stderr.splitlines()


BAD_FILES = {
    "empty.JPEG": (b"", "empty"),
    "text.JPEG": (b"<html>", "neither a JPEG nor a PNG: it begins with 3c 68 74"),
    "cut.JPEG": (jpeg(b"x" * 5000)[:-2], "truncated: a JPEG without its end marker"),
    # The thumbnail of a camera has an end marker of its own, before the image's data begin.
    "thumbnail.JPEG": (
        b"\xff\xd8\xff\xe1\x00\x0aEx\xff\xd9yyyy\xff\xda" + b"z" * 500,
        "truncated: a JPEG",
    ),
    "cut.png": (b"\x89PNG\r\n\x1a\n" + b"x" * 100, "truncated: a PNG"),
    "tiny.JPEG": (b"\xff\xd8", "neither"),
}


def test_every_bad_image_is_named(tmp_path, source):
    trees.write(
        source / "train" / "n01443537",
        {name: content for name, (content, _) in BAD_FILES.items() if content},
    )
    lines = refused(source, tmp_path / "out")
    for name, (content, reason) in BAD_FILES.items():
        if content:
            assert any("train/n01443537/" + name in line and reason in line for line in lines), (
                name,
                lines,
            )
    assert len(lines) == len(BAD_FILES) - 1 + 1
    # What indexing can tell comes before anything is read.
    trees.write(source / "train" / "n01443537", {"empty.JPEG": b""})
    os.symlink("nowhere", str(source / "val" / "n01440764" / "dangling.JPEG"))
    os.symlink("nowhere", str(source / "val" / "n09999999"))
    os.mkfifo(str(source / "val" / "n01440764" / "pipe.JPEG"))
    (source / "train" / "n00000001").mkdir()
    lines = refused(source, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()
    for path, reason in {
        "train/n01443537/empty.JPEG": "empty",
        "val/n01440764/dangling.JPEG": "symbolic link",
        "val/n09999999": "symbolic link",
        "val/n01440764/pipe.JPEG": "not a regular file",
        "train/n00000001": "0 images",
    }.items():
        assert any(path + ": " in line and reason in line for line in lines), (path, lines)


def test_skipping_gives_what_the_good_images_give(tmp_path, source):
    trees.write(
        source / "train" / "n01443537",
        {"zz" + name: content for name, (content, _) in BAD_FILES.items()},
    )
    os.symlink("nowhere", str(source / "train" / "n01443537" / "zzdangling.JPEG"))
    result = trees.prepare(source, tmp_path / "out", "--on-error=skip")
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "out" / "train.json").read_text())
    assert manifest["examples"] == 21
    skipped = {os.path.basename(fault["path"]): fault["reason"] for fault in manifest["skipped"]}
    assert set(skipped) == {"zz" + name for name in BAD_FILES} | {"zzdangling.JPEG"}
    assert "zz" not in (tmp_path / "out" / "train.lst").read_text()
    assert (
        trees.prepare(tmp_path / "out", "--against", source, module="prepare.verify").returncode
        == 0
    )
    # Resuming with the other way of treating errors is another option now.
    assert refused(source, tmp_path / "out", status=3)


def test_im2rec_leaves_out_the_same_unreadable_images(tmp_path, source):
    pytest.importorskip("mxnet")
    place = source / "train" / "n01443537"
    assert trees.prepare(source, tmp_path / "whole").returncode == 0
    trees.im2rec(source, tmp_path / "reference")
    # The list is made, then an image goes: im2rec keeps the other images' keys, and so do we.
    name = sorted(os.listdir(str(place)))[3]
    (place / name).write_bytes(b"not an image")
    assert trees.prepare(source, tmp_path / "out", "--on-error=skip").returncode == 0
    keys = [
        line.split("\t")[0]
        for line in (tmp_path / "reference" / "train.lst").read_text().splitlines()
        if name not in line
    ]
    assert [
        line.split("\t")[0] for line in (tmp_path / "out" / "train.idx").read_text().splitlines()
    ] == keys


def test_a_class_that_would_be_lost(tmp_path, source):
    for name in os.listdir(str(source / "train" / "n01443537")):
        (source / "train" / "n01443537" / name).write_bytes(b"nothing of the sort")
    lines = refused(source, tmp_path / "out", "--on-error=skip")
    assert "not one usable image in this class" in lines[0] and len(lines) == 1


def test_classes_must_be_the_same(tmp_path, source):
    trees.write(source, {"val/n09999999/x.JPEG": jpeg()})
    lines = refused(source, tmp_path / "out")
    assert len(lines) == 1 and "has no class n09999999" in lines[0]


as_nobody = pytest.mark.skipif(
    os.getuid() != 0, reason="needs root, to become somebody who may not read everything"
)


def run_as_nobody(folder, *arguments, module="imagenet"):
    """The command in `folder`, by a user whose the files are not: a child that keeps what root has opened and imported."""
    program = (
        """
import locale, os, sys
from prepare import imagenet, verify
os.chdir(sys.argv[1])
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(%s.main(sys.argv[2:]))
"""
        % module
    )
    for parent in [folder, *folder.parents][:3]:
        parent.chmod(parent.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    command = [sys.executable, "-c", program, str(folder), *arguments]
    result = subprocess.run(command, cwd=trees.REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in result.stderr
    return result


@as_nobody
def test_unreadable_file_and_folder(tmp_path, source):
    victim = source / "train" / "n01440764" / "n01440764_0.JPEG"
    victim.chmod(0)
    (source / "train" / "n02085620").chmod(0)
    result = run_as_nobody(tmp_path, "in", "out")
    assert result.returncode == 1
    assert "in/train/n01440764/n01440764_0.JPEG: cannot be read: permission denied" in result.stderr
    assert "in/train/n02085620: cannot be listed: Permission denied" in result.stderr


@as_nobody
@pytest.mark.parametrize(
    "path, mode", [("in", 0o700), ("in/train", 0o700), ("in/val", 0o700), ("labels.txt", 0o600)]
)
def test_a_source_that_may_not_be_read_is_a_wrong_path(tmp_path, source, path, mode):
    # Not status 4, with which a program would try again.
    trees.write(
        tmp_path,
        {"labels.txt": b"n01440764", "in/val/n01440764/ILSVRC2012_val_00000001.JPEG": jpeg()},
    )
    assert trees.prepare(source, tmp_path / "done").returncode == 0
    (tmp_path / path).chmod(mode)
    options = ["--val-labels", "labels.txt"] if path == "labels.txt" else []
    made = run_as_nobody(tmp_path, "in", "out", *options)
    compared = run_as_nobody(tmp_path, "done", "--against", "in", *options, module="verify")
    for command, result in (("imagenet", made), ("verify", compared)):
        assert result.returncode == 2, result.stderr
        assert result.stderr.startswith(
            "prepare.%s: %s" % (command, path)
        ) and result.stderr.endswith(": Permission denied\n")


@as_nobody
def test_an_archive_that_may_not_be_read_is_a_wrong_path(tmp_path, source):
    trees.official(source, tmp_path / "archives")
    (tmp_path / "archives" / "ILSVRC2012_img_train.tar").chmod(0o600)
    result = run_as_nobody(tmp_path, "archives", "out")
    assert (
        result.returncode == 2
        and result.stderr
        == "prepare.imagenet: archives/ILSVRC2012_img_train.tar: Permission denied\n"
    )


@as_nobody
def test_a_destination_that_may_not_be_written_is_a_failure(tmp_path, source):
    result = run_as_nobody(tmp_path, "in", "out")
    assert result.returncode == 4 and result.stderr.startswith(
        "prepare.imagenet: out: Permission denied; fix this"
    )


def test_names_that_a_list_cannot_hold(tmp_path, source):
    place = os.fsencode(str(source / "train" / "n01440764"))
    for name in (b"a\tb.JPEG", b"a\nb.JPEG", b"latin1\xe9.JPEG"):
        with open(os.path.join(place, name), "wb") as stream:
            stream.write(jpeg())
    lines = refused(source, tmp_path / "out")
    text = "\n".join(lines)
    assert text.count("tab or a line break") == 2 and text.count("not UTF-8") == 1


def test_folder_that_contains_itself(tmp_path, source):
    os.symlink("..", str(source / "train" / "n01440764" / "again"))
    lines = refused(source, tmp_path / "out")
    assert len(lines) == 1 and "leads back" in lines[0]


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
    trees.write(
        tmp_path,
        {"no images/train/c/notes.txt": b"x", "no images/val/c/notes.txt": b"x", "a file": b"x"},
    )
    (tmp_path / "empty").mkdir()
    environment = dict(os.environ, PYTHONPATH=trees.REPOSITORY)
    result = trees.prepare(*arguments, cwd=str(tmp_path), env=environment)
    assert (
        result.returncode == status
        and reason in result.stderr
        and len(result.stderr.splitlines()) == 1
    ), result.stderr


@pytest.mark.parametrize("path", ["loop", "in/train/c.tar"])
def test_an_archive_or_a_source_that_links_to_itself(tmp_path, path):
    trees.write(tmp_path, {"in/val/c/1.JPEG": jpeg(), "in/train/d.tar": bytes(1024)})
    os.symlink(os.path.basename(path), str(tmp_path / path))
    result = trees.prepare(tmp_path / path.split("/")[0], tmp_path / "out")
    assert result.returncode == 2, result.stderr
    assert result.stderr == "prepare.imagenet: %s: Too many levels of symbolic links\n" % (
        tmp_path / path
    )


@pytest.mark.parametrize(
    "option", ["--workers=0", "--workers=many", "--check=some", "--on-error=maybe", "--unknown"]
)
def test_wrong_options(tmp_path, source, option):
    result = trees.prepare(source, tmp_path / "out", option)
    assert result.returncode == 2 and "error: " in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["prepare.imagenet", "prepare.verify"])
@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5", ""])
def test_workers_must_be_a_whole_number(tmp_path, source, module, value):
    arguments = [source, tmp_path / "out"] if module == "prepare.imagenet" else [tmp_path / "out"]
    result = trees.prepare(*arguments, "--workers=" + value, module=module)
    assert result.returncode == 2
    assert result.stderr.endswith(
        "error: argument --workers: must be a whole number above 0, not %r\n" % value
    )


def test_half_unpacked_class_archives(tmp_path, source):
    trees.write(source / "train", {"n02085620.tar": b"", "n03000000.tar": b""})
    lines = refused(source, tmp_path / "out")
    assert len(lines) == 1 and "n03000000.tar: not unpacked" in lines[0]


@pytest.mark.parametrize("place", ["train", "train/out", "val/n01440764", "link/out"])
def test_a_destination_where_images_are_looked_for(tmp_path, source, place):
    os.symlink("train", str(source / "link"))
    before = sorted(str(path) for path in source.rglob("*"))
    result = trees.prepare(source, source / place)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "%s: is in the source's own folder" % (source / place) in result.stderr
    assert sorted(str(path) for path in source.rglob("*")) == before
    assert (
        trees.prepare(source, source / "training").returncode == 0
    )  # its name only begins like that


def test_dry_run_writes_nothing(tmp_path, source):
    result = trees.prepare(source, tmp_path / "out", "--dry-run")
    assert (
        result.returncode == 0
        and "would write" in result.stdout
        and "21 images in 3 classes" in result.stdout
    )
    assert not (tmp_path / "out").exists()


def test_source_that_changes_while_it_is_read(tmp_path, source):
    program = """
import sys
from prepare import imagenet
check = imagenet.check_space
def change(*arguments):
    with open(sys.argv[1] + "/train/n01440764/n01440764_0.JPEG", "ab") as stream: stream.write(b"more")
    with open(sys.argv[1] + "/train/n01440764/n01440764_1.JPEG", "wb") as stream: stream.write(b"")
    check(*arguments)
imagenet.check_space = change
sys.exit(imagenet.main(sys.argv[1:]))
"""
    trees.write(source, {"train/n01440764/n01440764_1.JPEG": jpeg(b"x" * 100)})
    result = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "out")],
        cwd=trees.REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert result.returncode == 1
    assert "n01440764_0.JPEG: longer than when it was listed" in result.stderr
    assert "n01440764_1.JPEG: shorter than when it was listed" in result.stderr


def test_interrupted(tmp_path):
    trees.write(tmp_path / "in", trees.small(train=3000, val=3))
    command = [
        sys.executable,
        "-m",
        "prepare.imagenet",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(
        command, cwd=trees.REPOSITORY, stderr=subprocess.PIPE, universal_newlines=True
    )
    while not (tmp_path / "out" / "train.part").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (
        process.returncode == 130
        and "run the same command again" in errors
        and "Traceback" not in errors
    )
    assert trees.prepare(tmp_path / "in", tmp_path / "out").returncode == 0


def test_two_at_once(tmp_path, source):
    command = [
        sys.executable,
        "-c",
        trees.stopping_in("convert", "copy_pieces"),
        str(source),
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, cwd=trees.REPOSITORY, stdout=subprocess.DEVNULL)
    for _ in ("val", "train"):
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        other = trees.prepare(source, tmp_path / "out")
        process.send_signal(signal.SIGCONT)
        assert other.returncode == 3 and "another conversion is writing here" in other.stderr
    assert process.wait() == 0
    assert trees.prepare(tmp_path / "out", module="prepare.verify").returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(tmp_path / "disk")],
        stderr=subprocess.PIPE,
    )
    if made.returncode:
        pytest.skip("cannot mount a small file system here")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_full_disk(tmp_path, small_disk):
    trees.write(tmp_path / "in", trees.small(train=200, val=3))
    whole = trees.prepare(tmp_path / "in", tmp_path / "whole")
    assert whole.returncode == 0
    size = os.path.getsize(str(tmp_path / "whole" / "train.rec"))
    assert 1000000 < size < 2500000
    (small_disk / "ballast").write_bytes(bytes(3145728 - size // 2))
    lines = refused(tmp_path / "in", small_disk / "out", status=4)
    assert "needs" in lines[0] and "are free" in lines[0]
    # What was free when it began need not be free for long.
    program = "import sys; from prepare import imagenet; imagenet.check_space = lambda *_: None; sys.exit(imagenet.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, str(tmp_path / "in"), str(small_disk / "out")]
    result = subprocess.run(command, cwd=trees.REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert (
        result.returncode == 4
        and "No space left" in result.stderr
        and "Traceback" not in result.stderr
    )
    (small_disk / "ballast").unlink()
    again = trees.prepare(tmp_path / "in", small_disk / "out")
    assert again.returncode == 0, again.stderr
    assert trees.contents(small_disk / "out") == trees.contents(tmp_path / "whole")


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_any_name_can_be_printed(tmp_path, source, encoding):
    for name in (b"latin1\xe9", b"x.latin1\xe9", "x.\u00e9".encode()):
        with open(os.fsencode(str(source / "train" / "n01440764")) + b"/" + name, "wb"):
            pass
    environment = dict(os.environ, PYTHONIOENCODING=encoding)
    odd = os.fsdecode(os.fsencode(str(tmp_path)) + b"/out\xe9")
    result = trees.prepare(source, odd, env=environment)
    assert result.returncode == 0, result.stderr
    assert "1 .latin1\\udce9" in result.stdout and "out\\udce9: writing" in result.stdout
    assert trees.prepare(odd, module="prepare.verify", env=environment).returncode == 0


def test_a_failure_that_is_not_the_sources_has_a_status_of_its_own(tmp_path, monkeypatch, capsys):
    """1 would tell the data pod that the archives are bad."""

    def no_memory(arguments):
        raise MemoryError("no more")

    monkeypatch.setattr(imagenet, "run", no_memory)
    assert imagenet.main([str(tmp_path), str(tmp_path / "out")]) == 70
    assert "MemoryError: no more" in capsys.readouterr().err
