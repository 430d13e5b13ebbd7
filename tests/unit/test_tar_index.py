# SPDX-License-Identifier: Apache-2.0
"""Test listing archives of all formats: each image is listed, or a problem is named."""

import io
import os
import subprocess
import tarfile

import pytest
from support.image_fixtures import (
    jpeg,
    small_dataset,
    tar_programs,
    write_files,
    write_official_archives,
    write_tar,
)
from support.tar_fixtures import make_member, read_all, read_with_tarfile, write_members

from prepare import tar_index
from prepare.plan import make_plan

NAMES_AND_SIZES = {
    "plain.jpg": 3,
    "d/" + "n" * 90 + ".jpg": 600,
    "d" * 90 + "/" + "e" * 40 + "/" + "n" * 80 + ".jpg": 512,  # fits ustar's prefix and name
    "d/" + "long" * 50 + ".jpg": 511,  # does not fit
    "d/\u00fc\u4e2d\U0001f600.jpg": 513,
    "d/with blank and 'quote'.jpg": 0,
    "empty size/x.jpg": 1,
}


@pytest.mark.parametrize("program", ["gnutar", "bsdtar", "python"])
@pytest.mark.parametrize("tar_format", ["v7", "ustar", "gnu", "pax"])
def test_formats_and_names(tmp_path, program, tar_format):
    if program not in tar_programs() or (tar_format == "v7" and program != "gnutar"):
        pytest.skip(f"{program} cannot write {tar_format} here")
    names = list(NAMES_AND_SIZES)
    if tar_format == "ustar":
        names = [name for name in names if "long" not in name]
        if program == "bsdtar":
            names = [name for name in names if name.isascii()]
    elif tar_format == "v7":
        names = [name for name in names if len(name) < 99]
    files = {name: jpeg(seed=name, size=NAMES_AND_SIZES[name]) for name in names}
    folder = tmp_path / "in"
    write_files(folder, files)
    os.link(folder / "plain.jpg", folder / "zz hard.jpg")
    os.symlink("../plain.jpg", folder / "d" / "zz soft.jpg")
    files.update({"zz hard.jpg": files["plain.jpg"], "d/zz soft.jpg": files["plain.jpg"]})
    write_tar(program, tar_format, tmp_path / "a.tar", folder, ["."])
    images, problems = read_all(tmp_path / "a.tar")
    assert problems == []
    assert images == files


def test_reads_what_tarfile_reads_whatever_the_padding(tmp_path):
    write_files(tmp_path / "in", small_dataset())
    archive = tmp_path / "a.tar"
    for blocking_factor in ("1", "20", "4096"):
        options = ["-b", blocking_factor, "-cf", str(archive), "-C", str(tmp_path / "in")]
        subprocess.run(["tar", *options, "train", "val"], check=True)
        assert read_all(archive) == (read_with_tarfile(archive), [])


def write_sparse_archive(program, tar_format, folder):
    """Write a.tar with two sparse files between two ordinary ones."""
    write_files(folder, {"in/first.jpg": jpeg(b"a"), "in/zz last.jpg": jpeg(b"b")})
    for number, holes in enumerate((2, 40)):
        with open(folder / "in" / f"sparse{number}.jpg", "wb") as stream:
            for hole in range(holes):
                stream.seek(hole * 1048576)
                stream.write(b"x" * 4096)
            stream.truncate(holes * 1048576 + 500000)
    names = sorted(os.listdir(folder / "in"))
    if program == "gnutar":
        command = ["tar", "--sparse", f"--format={tar_format}", "-cf"]
    else:
        command = ["bsdtar", "--read-sparse", "--format=pax", "-cf"]
    subprocess.run([*command, str(folder / "a.tar"), "-C", str(folder / "in"), *names], check=True)


@pytest.mark.parametrize(
    "program,tar_format", [("gnutar", "gnu"), ("gnutar", "pax"), ("bsdtar", "pax")]
)
def test_sparse_members_are_problems_and_are_skipped(tmp_path, program, tar_format):
    if program not in tar_programs():
        pytest.skip(f"{program} is not installed")
    write_sparse_archive(program, tar_format, tmp_path)
    images, problems = read_all(tmp_path / "a.tar")
    assert sorted(images) == ["first.jpg", "zz last.jpg"]
    if not problems and program == "bsdtar":
        pytest.skip("this file system or bsdtar does not detect the holes")
    assert len(problems) == 2
    for number, problem in enumerate(problems):
        assert f"sparse{number}.jpg" in str(problem) and "--sparse" in str(problem)


@pytest.mark.parametrize(
    "odd_member,reason",
    [
        (make_member("c/pipe.jpg", kind=tarfile.FIFOTYPE), "not a regular file"),
        (make_member("c/device.jpg", kind=tarfile.CHRTYPE), "not a regular file"),
        (make_member("c/odd.jpg", b"abc", kind=b"Z"), "not a regular file"),
        (make_member("c/continued.jpg", b"abc", kind=b"M"), "not a regular file"),
        (
            make_member("c/link.jpg", kind=tarfile.SYMTYPE, linkname="nowhere.jpg"),
            "no image in this archive",
        ),
        (
            make_member("c/hard.jpg", kind=tarfile.LNKTYPE, linkname="c/nowhere.jpg"),
            "no image in this archive",
        ),
        (make_member("c2", kind=tarfile.SYMTYPE, linkname="c"), "no image in this archive"),
        (make_member("c/a/../../../up.jpg", b"abc"), "contains .., which tar would not unpack"),
        (make_member("c/tab\there.jpg", b"abc"), "tab or a line break"),
        (make_member("n01.tar.gz", b"abc"), "packed archive"),
        (make_member("empty/", kind=tarfile.DIRTYPE), "0 images"),
        (make_member("c/1.jpg", b"again"), "more than one image has this name"),
    ],
)
def test_unusable_members_are_named(tmp_path, odd_member, reason):
    before, after = make_member("c/1.jpg", jpeg(b"1")), make_member("c/2.jpg", jpeg(b"2"))
    write_members(tmp_path / "a.tar", [before, odd_member, after])
    images, problems = read_all(tmp_path / "a.tar")
    assert len(problems) == 1 and reason in str(problems[0])
    assert images["c/2.jpg"] == jpeg(b"2")


def test_a_path_that_no_file_system_can_hold_is_a_problem(tmp_path):
    members = [make_member("d/" * 5000 + "1.jpg", b"1"), make_member("c/2.jpg", b"2")]
    write_members(tmp_path / "a.tar", members, tarfile.PAX_FORMAT)
    images, problems = read_all(tmp_path / "a.tar")
    assert images == {"c/2.jpg": b"2"}
    assert len(problems) == 1 and "a name of 10005 characters" in str(problems[0])


def test_folders_may_be_deeper_than_pythons_recursion_limit(tmp_path):
    name = "d/" * 2000 + "1.jpg"
    write_members(tmp_path / "a.tar", [make_member(name, b"1")], tarfile.PAX_FORMAT)
    assert read_all(tmp_path / "a.tar") == ({name: b"1"}, [])


def test_volume_labels_global_headers_and_other_files_are_ignored(tmp_path):
    members = [
        make_member("label", kind=b"V"),
        make_member("c/notes.txt", b"hello"),
        make_member("c", kind=tarfile.DIRTYPE),
        make_member("./c/1.jpg", jpeg(b"1")),
    ]
    write_members(tmp_path / "a.tar", members)
    with tarfile.open(
        tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 2000}
    ) as tar:
        info, content = make_member(
            "c/1.jpg", jpeg(b"1"), pax_headers={"SCHILY.xattr.user.a": "b", "mtime": "1.5"}
        )
        tar.addfile(info, io.BytesIO(content))
    expected = ({"c/1.jpg": jpeg(b"1")}, [])
    assert read_all(tmp_path / "a.tar") == read_all(tmp_path / "b.tar") == expected


def write_nested_archive(folder):
    """Write an archive of class archives; return its path."""
    write_files(folder / "in", small_dataset(train=3))
    write_official_archives(folder / "in", folder / "archives")
    return folder / "archives" / "ILSVRC2012_img_train.tar"


def test_an_archive_cut_short_anywhere(tmp_path):
    """A missing end is reported, unless it is only padding after the end mark."""
    path = write_nested_archive(tmp_path)
    content = path.read_bytes()
    whole, problems = read_all(path)
    assert len(whole) == 9 and problems == []
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512
    cut = tmp_path / "cut.tar"
    sizes = {0, 1, 511, 512, 513, 1024, end - 1, end}
    sizes.update(range(512, len(content), 1536), range(100, len(content), 3000))
    for size in sorted(sizes):
        cut.write_bytes(content[:size])
        images, problems = read_all(cut)
        assert images == whole or problems, f"cut to {size} of {len(content)} bytes"
        assert all(whole[name] == images[name] for name in images)
        if size < end:
            assert "cut short" in str(problems[-1]) or "empty" in str(problems[-1]), size


def test_a_damaged_header_anywhere(tmp_path):
    """A header that is overwritten, by zeros or other bytes, is reported."""
    path = write_nested_archive(tmp_path)
    content = path.read_bytes()
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == 12
    damaged = tmp_path / "damaged.tar"
    for at in headers:
        wrong_size = content[at : at + 124] + b"7" + content[at + 125 : at + 512]
        for header in (bytes(512), b"\xff" * 512, wrong_size):
            damaged.write_bytes(content[:at] + header + content[at + 512 :])
            _, problems = read_all(damaged)
            assert problems, at


def test_a_pax_header_without_its_member(tmp_path):
    """The member's header was overwritten by zeros."""
    info, _ = make_member("c/2.jpg", pax_headers={"path": "c/\u00fc.jpg"})
    header = info.tobuf(tarfile.PAX_FORMAT)[:1024]
    write_members(tmp_path / "a.tar", [make_member("c/1.jpg", jpeg(b"1"))])
    content = (tmp_path / "a.tar").read_bytes()[:1024]
    (tmp_path / "a.tar").write_bytes(content + header + bytes(1024))
    images, problems = read_all(tmp_path / "a.tar")
    assert images == {"c/1.jpg": jpeg(b"1")}
    assert len(problems) == 1 and "lacks the member" in str(problems[0])


def pax_header(line):
    content = line.encode() + b"\n"
    length = next(n for n in range(99) if n == len(content) + len(str(n)) + 1)
    return make_member("PaxHeader", b"%d %s" % (length, content), tarfile.XHDTYPE)


def test_two_headers_for_one_member(tmp_path):
    """GNU tar uses a pax record rather than its own long name, whatever their order."""
    path, image = tmp_path / "a.tar", make_member("1.jpg", jpeg(b"1"))
    pax = pax_header("path=pax.jpg")
    long_name = make_member("././@LongLink", b"long.jpg\0", tarfile.GNUTYPE_LONGNAME)
    for headers in ([pax, long_name], [long_name, pax]):
        write_members(path, [*headers, image])
        listed = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True)
        assert listed.stdout == "pax.jpg\n"
        assert read_all(path) == ({"pax.jpg": image[1]}, [])
    # Of two pax headers, GNU tar uses the last one only, and Python's tarfile the first one.
    write_members(path, [pax, pax_header("mtime=1"), image])
    images, (problem,) = read_all(path)
    assert images == {} and not problem.skippable
    assert problem.reason == "has two pax headers for one member at byte 1024"
    write_members(path, [pax, image, pax_header("path=2.jpg"), image])
    assert read_all(path) == ({"pax.jpg": image[1], "2.jpg": image[1]}, [])


def test_two_archives_in_one_file(tmp_path):
    path = write_nested_archive(tmp_path)
    path.write_bytes(path.read_bytes() * 2)
    assert "after its end mark" in str(read_all(path)[1][-1])


@pytest.mark.parametrize("option", ["--gzip", "--bzip2", "--xz"])
def test_a_compressed_archive_is_refused(tmp_path, option):
    write_files(tmp_path / "in", small_dataset())
    archive = str(tmp_path / "a.tar")
    packed = subprocess.run(
        ["tar", option, "-cf", archive, "-C", str(tmp_path / "in"), "train"],
        stderr=subprocess.PIPE,
    )
    if packed.returncode:
        pytest.skip(f"tar cannot compress with {option} here")
    assert "is compressed" in str(read_all(archive)[1][0])


def test_sizes_of_8_gib_and_more(tmp_path):
    """The GNU format has binary sizes from 8 GiB on; a sparse file has the size without data."""
    for tar_format, name in ((tarfile.GNU_FORMAT, "gnu.tar"), (tarfile.PAX_FORMAT, "pax.tar")):
        large, _ = make_member("c/large.jpg")
        large.size = 9 << 30
        small, content = make_member("c/small.jpg", jpeg(b"x"))
        with open(tmp_path / name, "wb") as stream:
            stream.write(large.tobuf(tar_format))
            stream.seek(large.size, os.SEEK_CUR)
            stream.write(small.tobuf(tar_format) + content.ljust(512, b"\0") + bytes(1024))
        listing = tar_index.list_archive(str(tmp_path / name), 1)
        folder = next(folder for folder in listing.folders if folder.path == "c")
        assert listing.problems == [] and folder.names == ["large.jpg", "small.jpg"]
        assert list(folder.sizes) == [9 << 30, len(content)]
        assert "512 MiB" in str(make_plan("train", listing).problems[0])


def test_a_link_in_a_class_archive_whose_name_a_list_cannot_hold(tmp_path):
    write_members(
        tmp_path / "a\tb.tar",
        [
            make_member("1.jpg", kind=tarfile.SYMTYPE, linkname="2.jpg"),
            make_member("2.jpg", jpeg(b"2")),
        ],
    )
    listing = tar_index.list_class_archives(str(tmp_path), ["a\tb.tar"], 1)
    assert not any(folder.names for folder in listing.folders) and len(listing.problems) == 2
