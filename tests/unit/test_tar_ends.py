# SPDX-License-Identifier: Apache-2.0
"""Test archives whose last part was never written, so that zeros are in its place."""

import io
import os
import subprocess
import tarfile

import pytest
from support.image_fixtures import jpeg, write_files, write_official_archives
from support.tar_fixtures import make_member, read_all, write_members

from prepare import imagenet
from prepare.tar_format import is_padding

RECORD = 10240  # bytes, of the tar programs by default


def write_class_archive(path, count=8, size=5900):
    """Write an archive of images; return its bytes."""
    write_members(
        path, [make_member(f"{n}.jpg", jpeg(seed=n, size=size + n)) for n in range(count)]
    )
    return path.read_bytes()


def zero_from(path, content, offset):
    path.write_bytes(content[:offset] + bytes(len(content) - offset))


@pytest.mark.parametrize("step", [512, 4096])
def test_zeros_instead_of_the_last_part_of_an_archive(tmp_path, step):
    """An image is lost without a problem only where the file is a complete archive without it."""
    path = tmp_path / "n1.tar"
    content = write_class_archive(path)
    whole, problems = read_all(path)
    assert len(whole) == 8 and problems == []
    silent = set()
    for cut in range(0, len(content.rstrip(b"\0")), step):
        zero_from(path, content, cut)
        images, problems = read_all(path)
        if images != whole and not problems:
            with io.BytesIO() as stream:
                with tarfile.open(fileobj=stream, mode="w") as tar:
                    for number, image in enumerate(images.values()):
                        info, _ = make_member(f"{number}.jpg", image)
                        tar.addfile(info, io.BytesIO(image))
                assert stream.getvalue() == path.read_bytes(), cut
            silent.add(len(images))
        assert not any(problem.skippable for problem in problems)
    assert silent <= {7}


def test_zeros_instead_of_the_last_part_of_an_archive_of_archives(tmp_path):
    files = {
        f"{split}/n{c}/n{c}_{n}.JPEG": jpeg(seed=f"{c} {n}", size=5000)
        for split in ("train", "val")
        for c in range(3)
        for n in range(3)
    }
    write_files(tmp_path / "in", files)
    write_official_archives(tmp_path / "in", tmp_path / "archives")
    path = tmp_path / "archives" / "ILSVRC2012_img_train.tar"
    content = path.read_bytes()
    whole = read_all(path)[0]
    for cut in range(0, len(content) - 3 * RECORD, 1024):
        zero_from(path, content, cut)
        images, problems = read_all(path)
        assert images == whole or any(not problem.skippable for problem in problems), cut


@pytest.mark.parametrize("factor", [1, 2, 20, 32, 64, 128, 2048, 4096])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_the_padding_of_usual_blocking_factors(tmp_path, factor, images):
    write_files(tmp_path / "in", {f"{n}.jpg": jpeg(seed=n, size=4000) for n in range(images)})
    command = ["tar", "-b", str(factor), "-cf", str(tmp_path / "a.tar"), "-C", str(tmp_path / "in")]
    subprocess.run([*command, *(f"{n}.jpg" for n in range(images))], check=True)
    assert [len(found) for found in read_all(tmp_path / "a.tar")] == [images, 0]


@pytest.mark.parametrize("factor", [21, 24, 40, 60, 63, 100, 126, 128, 640])
@pytest.mark.parametrize("records", [1, 3, 5, 10, 32])
def test_any_blocking_factor_of_a_large_archive(tmp_path, factor, records):
    """The last member ends right before the last record but for the rest of the end mark."""
    record = 512 * factor
    size = 1000 * record + records * record
    for used in (size - record - 512, size - record, size - 1024):
        assert is_padding(used, size)
    assert not is_padding(size - 2 * 10240 - (1 << 21), size)


def test_an_archive_of_a_larger_blocking_factor(tmp_path):
    """The archive is sparse, so that it needs little space; factor 40 makes records of 20 KiB."""
    names = [f"{n}.jpg" for n in range(3)]
    write_files(tmp_path / "in", {name: jpeg(seed=name, size=9) for name in names})
    large = tmp_path / "in" / "large.bin"
    large.touch()
    os.truncate(large, 20480 * 1001 - 4 * 512)
    command = ["tar", "-b", "40", "-cf", tmp_path / "a.tar", "-C", tmp_path / "in", "large.bin"]
    subprocess.run([*command, *names], check=True)
    assert [len(found) for found in read_all(tmp_path / "a.tar")] == [3, 0]


@pytest.mark.parametrize("count", [32, 64, 96])
def test_sizes_that_are_multiples_of_the_usual_record_and_of_a_power_of_two(count):
    size = 10240 * count
    assert is_padding(size - 65536 - 512, size)  # tar --blocking-factor=128
    assert not is_padding(10240 * 31 - 65536 - 512, 10240 * 31)


@pytest.mark.parametrize(
    "image",
    [
        jpeg(b"x") + bytes(700),
        b"\x89PNG\r\n\x1a\n" + b"x" * 99 + b"IEND\xaeB`\x82" + bytes(9),
        b"BM" + bytes(2000),
        b"",
    ],
)
def test_a_last_image_that_may_end_in_zeros(tmp_path, image):
    write_members(tmp_path / "a.tar", [make_member("1.jpg", image)])
    assert read_all(tmp_path / "a.tar") == ({"1.jpg": image}, [])


def test_an_image_that_ends_in_zeros_before_another_member(tmp_path):
    cut = jpeg(b"x" * 900)[:-2] + bytes(400)
    write_members(tmp_path / "a.tar", [make_member("1.jpg", cut), make_member("2.txt", b"text")])
    assert read_all(tmp_path / "a.tar") == ({"1.jpg": cut}, [])


@pytest.mark.parametrize("option", ["--on-error=fail", "--on-error=skip"])
def test_an_incomplete_class_archive_ends_a_conversion(tmp_path, capsys, option):
    """Skipping leaves out single images only, not those that an archive lacks."""
    for split in ("train", "val"):
        (tmp_path / "in" / split).mkdir(parents=True)
        for name in ("n0", "n1", "n2"):
            write_class_archive(tmp_path / "in" / split / f"{name}.tar", 4)
    path = tmp_path / "in" / "train" / "n1.tar"
    content = path.read_bytes()
    for damaged in (content[:12288], content[:12288] + bytes(len(content) - 12288)):
        path.write_bytes(damaged)
        assert imagenet.main([str(tmp_path / "in"), str(tmp_path / "out"), option]) == 1
        assert "n1.tar: " in capsys.readouterr().err
        assert not (tmp_path / "out" / "train.json").exists()
