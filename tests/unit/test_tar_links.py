# SPDX-License-Identifier: Apache-2.0
"""Test links in archives: they become what tar and im2rec would make of them."""

import os
import subprocess
import tarfile

import pytest
from support.image_fixtures import jpeg, tar_programs, write_files, write_tar
from support.tar_fixtures import make_member, read_all, write_members

from prepare.folder_index import list_folder
from prepare.tar_format import HARD_LINK, SYMBOLIC_LINK, TarMember
from prepare.tar_links import final_targets


def link(name, target, kind=tarfile.SYMTYPE):
    return make_member(name, kind=kind, linkname=target)


@pytest.mark.parametrize("program", ["gnutar", "bsdtar", "python"])
@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
def test_links_are_read_as_they_are_unpacked(tmp_path, program, tar_format):
    if program not in tar_programs():
        pytest.skip(f"{program} is not installed")
    top = tmp_path / "in"
    write_files(top, {"c/1.jpg": jpeg(b"1"), "c/a.txt": b"text", "d/2.jpg": jpeg(b"2")})
    for name in ("c/hard.txt", "d/hard.jpg"):
        os.link(top / "c" / "a.txt", top / name)
    os.symlink("../c/1.jpg", top / "d" / "z.jpg")
    os.symlink("z.jpg", top / "d" / "y.jpg")
    os.symlink("1.jpg", top / "c" / "notes.txt")
    os.symlink("../c/a.txt", top / "d" / "text.png")
    os.symlink("hard.txt", top / "c" / "soft.txt")
    write_tar(program, tar_format, tmp_path / "a.tar", top, ["."])
    images, problems = read_all(tmp_path / "a.tar")
    subprocess.run(["tar", "-xf", str(tmp_path / "a.tar"), "-C", str(tmp_path)], check=True)
    paths = [path for folder in list_folder(str(tmp_path)).folders for path in folder.paths()]
    unpacked = {path: (tmp_path / path).read_bytes() for path in paths if path[:2] in ("c/", "d/")}
    assert problems == [] and images == unpacked
    assert images["d/y.jpg"] == jpeg(b"1") and images["d/hard.jpg"] == images["d/text.png"]


@pytest.mark.parametrize(
    "members,reason",
    [
        ([link("c/x.jpg", "y.jpg"), link("c/y.jpg", "x.jpg")], "no image in this archive"),
        ([link("c/x.jpg", "x.jpg")], "no image in this archive"),
        ([link("c/x", "x", tarfile.LNKTYPE)], "no image in this archive"),
        ([link("d", "c")], "no image in this archive"),
        ([link("c/notes.txt", "/etc/hostname")], "no image in this archive"),
        ([link("c/x.jpg", "pipe"), make_member("c/pipe", kind=tarfile.FIFOTYPE)], "not a regular"),
        ([link("c/x.zip", "y"), make_member("c/y", b"text")], "packed archive"),
        ([link("c/a\tb.jpg", "1.jpg")], "tab or a line break"),
    ],
)
def test_links_that_cannot_be_used(tmp_path, members, reason):
    write_members(tmp_path / "a.tar", [make_member("c/1.jpg", jpeg(b"1")), *members])
    images, problems = read_all(tmp_path / "a.tar")
    assert images == {"c/1.jpg": jpeg(b"1")}
    assert problems and all(reason in str(problem) for problem in problems)


HARD = tarfile.LNKTYPE
REPEATED = [
    # A hard link keeps the first a.jpg; tar -r has added the second one.
    (
        [("a.jpg", b"1"), link("b.jpg", "a.jpg", HARD), ("a.jpg", b"2")],
        {"a.jpg", "b.jpg"},
    ),
    ([("t.txt", b"1"), link("b.jpg", "t.txt", HARD), ("t.txt", b"2")], {"b.jpg"}),
    (
        [
            ("t.txt", b"1"),
            ("u.txt", b"2"),
            link("l", "t.txt"),
            link("b.jpg", "l"),
            link("l", "u.txt"),
        ],
        {"b.jpg"},
    ),
    (
        [("t.txt", b"1"), link("l", "t.txt"), link("b.jpg", "l", HARD), ("l", b"2")],
        {"b.jpg"},
    ),
    ([("t.txt", b"1"), ("u.txt", b"2"), link("b.jpg", "t.txt"), link("b.jpg", "u.txt")], {"b.jpg"}),
]


@pytest.mark.parametrize("members,refused", REPEATED)
def test_links_to_a_name_of_more_than_one_member(tmp_path, members, refused):
    members = [
        member if isinstance(member[0], tarfile.TarInfo) else make_member(member[0], member[1])
        for member in members
    ]
    other = [make_member("0.jpg", jpeg(b"0")), link("c.jpg", "0.jpg", tarfile.LNKTYPE)]
    write_members(tmp_path / "a.tar", [*other, *members])
    images, problems = read_all(tmp_path / "a.tar")
    assert images == dict.fromkeys(["0.jpg", "c.jpg"], jpeg(b"0"))
    assert {os.path.basename(problem.path) for problem in problems} == refused
    assert all(problem.skippable for problem in problems)
    if {"b.jpg"} == refused and members[-1][0].name != "b.jpg":
        assert "more than one member" in str(problems[0])


def test_repeated_links_that_are_no_images_are_ignored(tmp_path):
    links = [link("notes.txt", "1.jpg"), link("notes.txt", "text"), link("x.txt", "notes.txt")]
    write_members(
        tmp_path / "a.tar",
        [make_member("1.jpg", jpeg(b"1")), make_member("text", b"text"), *links],
    )
    assert read_all(tmp_path / "a.tar") == ({"1.jpg": jpeg(b"1")}, [])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", [HARD_LINK, SYMBOLIC_LINK])
def test_a_long_chain_of_links_takes_linear_time(order, kind):
    """With quadratic time this test would take hours."""
    count = 100000
    names = [f"{number}.jpg" for number in range(count + 1)]
    links = [
        TarMember(name, kind, 0, 0, target, sparse=False) for name, target in zip(names, names[1:])
    ]
    assert final_targets(links[::order]) == [names[-1]] * count
    circle = [*links, TarMember(names[-1], kind, 0, 0, names[0], sparse=False)]
    assert final_targets(circle[::order]) == [None] * (count + 1)
