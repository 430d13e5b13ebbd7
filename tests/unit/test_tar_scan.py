# SPDX-License-Identifier: Apache-2.0
"""Test that scanning many headers at a time lists exactly what reading them one by one does."""

import random
import tarfile

import pytest
from support.tar_fixtures import make_member, write_members

from prepare import tar_index, tar_scan

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = [
    *("{}.JPEG", "{}.jpg", "n01/{}.png", "./n01/{}.Jpeg", "n02/n03/{}_1.JPEG", "n-1/{}.PNG"),
    *(
        "n01/{} 1.jpg",
        "n01/{}.tar.jpg",
        "n01/{}.txt",
        "n01//{}.jpg",
        "n01/../{}.jpg",
        "{}\u00fc.jpg",
    ),
    *("/{}.jpg", ".{}.jpg", "n.1/{}.jpg", "{}", "{}.jpg/", "n01/" + "long" * 35 + "/{}.jpg"),
]


def mixed_members(seed):
    """Return members in random order: long runs of plain images, and others between them."""
    source = random.Random(seed)
    members = []
    for number in range(1500):
        name = "plain_{}.JPEG" if source.random() < 0.9 else source.choice(NAMES)
        content = bytes(source.choice([0, 1, 511, 512, 513, 2000]))
        fields = {"mtime": source.choice([0, 1, 1.5])} if source.random() < 0.02 else {}
        members.append(make_member(name.format(number), content, **fields))
        if source.random() < 0.02:
            kind = source.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, b"7"])
            target = "plain_0.JPEG"
            members.append(make_member(f"other_{number}.jpg", kind=kind, linkname=target))
    return members


def listing_of(path):
    """Return all that is found in an archive, in a form that can be compared."""
    listing = tar_index.list_archive(str(path), 1)
    folders = [(vars(folder), folder.path) for folder in listing.folders]
    return folders, listing.problems, listing.ignored


def without_scans(monkeypatch, path):
    with monkeypatch.context() as patch:
        patch.setattr(tar_scan.PlainImageScanner, "scan", lambda self, begin: begin)
        return listing_of(path)


@pytest.mark.parametrize("tar_format", list(FORMATS))
def test_same_listing_as_one_header_at_a_time(tmp_path, monkeypatch, tar_format):
    path = tmp_path / "a.tar"
    write_members(path, mixed_members(tar_format), FORMATS[tar_format])
    expected = without_scans(monkeypatch, path)
    assert len(expected[0][0][0]["names"]) > 1000
    assert listing_of(path) == expected


def test_same_listing_of_damaged_archives(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    write_members(path, [make_member(f"{number}.jpg", b"x") for number in range(4)])
    whole = path.read_bytes()
    source = random.Random(1)
    for _ in range(400):
        damaged = bytearray(whole)
        # Mostly in the header of the third member.
        at = 2048 + source.randrange(350) if source.random() < 0.9 else source.randrange(len(whole))
        damaged[at] = source.choice([0, 32, 45, 48, 55, 57, 128, 255, damaged[at] ^ 1])
        cut = source.randrange(1500, len(whole)) if source.random() < 0.1 else len(whole)
        path.write_bytes(damaged[:cut])
        assert listing_of(path) == without_scans(monkeypatch, path), (at, damaged[at], cut)


def test_same_listing_of_headers_with_a_valid_checksum(tmp_path, monkeypatch):
    """A changed field with the checksum of the changed header, as a strange program may write."""
    path = tmp_path / "a.tar"
    source = random.Random(2)
    for _ in range(300):
        blocks = [bytearray(tarfile.TarInfo(f"{number}.jpg").tobuf()) for number in range(4)]
        header = blocks[2]
        at = source.choice([*range(10), *range(124, 136), 156, *range(257, 265), 345, 346])
        header[at] = source.choice([0, 32, 45, 46, 47, 48, 49, 55, 56, 83, 92, 128, 255])
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        path.write_bytes(b"".join(blocks) + bytes(4096))
        assert listing_of(path) == without_scans(monkeypatch, path), (at, header[at])


def test_most_plain_images_are_scanned(tmp_path, monkeypatch):
    """Images after other members are scanned too."""
    path = tmp_path / "a.tar"
    write_members(path, mixed_members(1))
    read_one_by_one = []
    add_member = tar_index.TarIndexer.add_member
    monkeypatch.setattr(
        tar_index.TarIndexer,
        "add_member",
        lambda self, member: (read_one_by_one.append(member.name), add_member(self, member)),
    )
    listing_of(path)
    plain = [name for name in read_one_by_one if name.startswith("plain_")]
    assert len(plain) < 150
