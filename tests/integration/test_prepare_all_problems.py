# SPDX-License-Identifier: Apache-2.0
"""Test that everything wrong in both splits is named, and that no class is lost in silence."""

import os
import tarfile

import pytest
from support.conversions import class_val_files, convert, train_files, verify_records
from support.image_fixtures import jpeg, write_class_archives, write_files
from support.tar_fixtures import make_member, write_members

SKIP = "--on-error=skip"


@pytest.fixture
def source(tmp_path):
    files = {**train_files("ca", "cb", "cc"), **class_val_files(["ca", "cb", "cc"])}
    write_files(tmp_path / "in", files)
    return tmp_path / "in"


def assert_refused(source, *options, named):
    """Assert that a conversion ends with status 1 and names exactly these paths."""
    result = convert(source, source.parent / "out", *options)
    assert result.status == 1, result
    paths = [line.split(": ")[1] for line in result.lines]
    expected = [str(source / name) for name in named]
    assert paths[: len(expected)] == expected, result.stderr
    if len(named) > 1:
        assert result.lines[-1].startswith(f"prepare.imagenet: {len(named)} problems, so the ")
    return result


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_bad_images_of_both_splits_are_named(source, content):
    """Empty images are found while listing, others while reading."""
    write_files(source, {"train/ca/x.JPEG": content, "val/cb/x.JPEG": content})
    result = assert_refused(source, named=["val/cb/x.JPEG", "train/ca/x.JPEG"])
    assert "omit these images with --on-error=skip" in result.lines[-1]
    assert not list(source.parent.glob("out/*.rec"))


def test_a_good_split_is_kept_when_the_other_has_bad_images(source):
    write_files(source, {"val/cb/x.JPEG": b"no image"})
    result = assert_refused(source, named=["val/cb/x.JPEG"])
    assert "1 problem, so the val records were not written: " in result.lines[-1]
    names = sorted(path.name for path in (source.parent / "out").iterdir())
    suffixes = (".idx", ".json", ".lst", ".rec", ".sums")
    assert names == [*(f"train{suffix}" for suffix in suffixes), "val.part"]
    (source / "val" / "cb" / "x.JPEG").unlink()
    result = convert(source, source.parent / "out")
    assert result.status == 0 and "train: done" not in result.stdout


def test_unusable_archives_of_both_splits_are_named(source):
    for split in ("train", "val"):
        (source / split).rename(source / f"{split} folder")
        with tarfile.open(source / f"{split}.tar", "w:gz") as tar:
            tar.add(source / f"{split} folder", arcname=".")
    result = assert_refused(source, named=["val.tar", "train.tar"])
    assert result.stderr.count("is compressed (gzip)") == 2


def test_all_archives_that_are_not_unpacked_are_named(source):
    paths = ["val/n1.tar", "train/n1.tar", "train/n2.tar"]
    write_files(source, dict.fromkeys(paths, b""))
    assert_refused(source, named=paths)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_split_and_the_problems_of_the_other_are_named(source, missing):
    other = "val" if missing == "train" else "train"
    out = source.parent / "out"
    assert convert(source, out).status == 0
    write_files(source, {f"{other}/ca/x.JPEG": b""})
    (source / missing).rename(source / "moved")
    result = convert(source, out)
    assert result.status == 1 and len(result.lines) == 3, result
    assert f"{source}: contains neither a folder {missing}/" in result.stderr
    assert f"{source}/{other}/ca/x.JPEG: empty" in result.stderr
    verified = verify_records(out, "--against", source)
    assert verified.status == 1 and f"neither a folder {missing}/" in verified.stderr


def test_problems_of_folders_labels_and_images_are_named_together(source):
    (source / "train" / "ca" / "again").symlink_to(source / "train")
    write_files(source, {"valprep.sh": b"mv x", "val_labels.txt": b"", "train/cb/x.JPEG": b""})
    result = convert(source, source.parent / "out")
    assert result.status == 1 and len(result.lines) == 5, result
    for text in ("valprep.sh: not a line", "val_labels.txt: not a list", "again: a symbolic link"):
        assert text in result.stderr
    assert "train/cb/x.JPEG: empty" in result.stderr


def test_damage_of_both_splits_is_named_by_verify(source):
    out = source.parent / "out"
    assert convert(source, out).status == 0
    for split in ("train", "val"):
        (out / f"{split}.lst").write_bytes(b"x")
    result = verify_records(out)
    assert result.status == 1 and "train.lst" in result.stderr and "val.lst" in result.stderr
    (out / "train.json").write_bytes(b"x")
    result = verify_records(out)
    assert result.status == 3 and "train.json" in result.stderr and "val.lst" in result.stderr
    (out / "val.json").unlink()
    result = verify_records(out)
    assert result.status == 3 and "train.json" in result.stderr and "no val.json" in result.stderr


def test_class_differences_are_named_in_both_directions_beside_bad_images(source):
    write_files(source, {"train/cd/x.JPEG": jpeg(), "val/ce/x.JPEG": jpeg()})
    write_files(source, {"val/cf/x.JPEG": jpeg(), "val/ca/empty.JPEG": b""})
    result = assert_refused(source, named=["val", "train", "val/ca/empty.JPEG"])
    assert "has no class cd, which" in result.lines[0]
    assert "has no class ce, cf, which" in result.lines[1]


def test_all_classes_without_a_usable_image_are_named(source):
    for name in ("cb", "cc"):
        for path in (source / "train" / name).iterdir():
            path.write_bytes(b"")
    assert_refused(source, SKIP, named=["train/cb", "train/cc"])


def make_dangling(path):
    os.symlink("/nowhere", path)


def make_link_to_itself(path):
    os.symlink(path.name, path)


def make_folder_of_unusable_names(path):
    write_files(path, {"a\tb.JPEG": jpeg()})


@pytest.mark.parametrize(
    "make", [os.mkdir, make_dangling, make_link_to_itself, make_folder_of_unusable_names]
)
def test_a_class_that_is_unusable_in_both_splits_is_not_skipped(source, make):
    """Its loss would change the labels of all later classes, equally in both splits."""
    for split in ("train", "val"):
        make(source / split / "bb")
    result = convert(source, source.parent / "out", SKIP)
    assert result.status == 1 and not (source.parent / "out").exists()
    for split in ("train", "val"):
        assert any(f"{source}/{split}/bb: " in line for line in result.lines), result.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to run as another user")
def test_a_class_folder_that_may_not_be_listed_in_both_splits_is_not_skipped(source):
    for split in ("train", "val"):
        (source / split / "cb").chmod(0)
    source.parent.chmod(0o755)
    process = os.fork()
    if not process:  # the child
        os.chdir(source.parent)  # that user may not search the folders above
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        result = convert(source.name, "out", SKIP)
        named = [
            f"{source.name}/{split}/cb: cannot be listed" in result.stderr
            for split in ("train", "val")
        ]
        os._exit(0 if all(named) and result.status == 1 else 1)
    assert os.waitpid(process, 0)[1] == 0


def test_the_folder_of_a_file_system_check_is_no_class(source):
    """Each split may be a file system of its own; only root may list this folder."""
    for split in ("train", "val"):
        (source / split / "lost+found").mkdir()
    assert convert(source, source.parent / "out").status == 0
    write_files(source, {"train/lost+found/1.jpg": jpeg(), "val/lost+found/1.jpg": jpeg()})
    assert convert(source, source.parent / "other").status == 0  # images are never ignored
    assert "lost+found/1.jpg" in (source.parent / "other" / "val.lst").read_text()


@pytest.mark.parametrize(
    "member",
    [
        make_member("bb/1.jpg", kind=tarfile.FIFOTYPE),
        make_member("bb/1.jpg", kind=tarfile.SYMTYPE, linkname="nowhere.jpg"),
        make_member("bb", kind=tarfile.SYMTYPE, linkname="ca"),
        make_member("bb.tar.gz", b"abc"),
    ],
    ids=lambda member: member[0].name + member[0].type.decode(),
)
def test_a_class_that_is_unusable_in_both_archives_is_not_skipped(tmp_path, member):
    good = [make_member(f"{name}/1.jpg", jpeg(name.encode())) for name in ("ca", "cc")]
    for split in ("train", "val"):
        (tmp_path / "in").mkdir(exist_ok=True)
        write_members(tmp_path / "in" / f"{split}.tar", [good[0], member, good[1]])
    result = convert(tmp_path / "in", tmp_path / "out", SKIP)
    assert result.status == 1, result
    for split in ("train", "val"):
        assert f"{split}.tar/bb" in result.stderr


@pytest.mark.parametrize("nested", [False, True])
def test_an_archive_of_classes_that_is_cut_short_is_not_skipped(source, nested):
    for split in ("train", "val"):
        folder = source / f"{split} folder"
        (source / split).rename(folder)
        if nested:
            names = write_class_archives(folder, source.parent / split)
            folder = source.parent / split
        else:
            names = sorted(os.listdir(folder))
        archive = source / f"{split}.tar"
        with tarfile.open(archive, "w") as tar:
            for name in names:
                tar.add(folder / name, arcname=name)
            end = tar.getmember(names[2]).offset
        os.truncate(archive, end + 100)
    result = convert(source, source.parent / "out", SKIP)
    assert result.status == 1 and result.stderr.count("is cut short") == 2, result
