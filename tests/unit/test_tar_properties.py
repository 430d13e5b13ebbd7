# SPDX-License-Identifier: Apache-2.0
"""Test the tar reader on generated archives: valid ones, and ones with damaged headers."""

import io
import itertools
import os
import tarfile

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from support.tar_fixtures import make_member, read_all, read_with_tarfile, write_members

from prepare import tar_format, tar_index
from prepare.tar_format import BLOCK_BYTES, TarDamageError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

with_tmp_path = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0\t\n\r/")
folder_names = st.text(letters, min_size=1, max_size=40).filter(lambda name: name.strip("."))
image_names = st.builds(
    lambda folders, name: "/".join([*folders, f"x{name}.jpg"]),
    st.lists(folder_names, max_size=3),
    st.text(letters, max_size=120),
)
# A last image of zeros only indicates an incomplete copy of the archive.
contents = st.integers(0, 1500).map(lambda size: bytes(1 + i % 251 for i in range(size)))
image_files = st.dictionaries(image_names, contents, min_size=1, max_size=5)


def is_writable(members, tar_format):
    """Return whether tarfile can write all members: ustar limits the length of names."""
    try:
        for info, _ in members:
            info.tobuf(tar_format)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("tar_format", list(FORMATS))
@with_tmp_path
@given(files=image_files)
def test_reads_what_tarfile_writes(tmp_path, tar_format, files):
    # The outer folder of everything is left out if it has one of these names.
    assume(not any(name.startswith(("train/", "val/")) for name in files))
    members = [make_member(name, content) for name, content in files.items()]
    first = next(iter(files))
    links = {"xhard.jpg": tarfile.LNKTYPE, "xsoft.jpg": tarfile.SYMTYPE}
    assume(not any(name in files for name in links))
    for name, kind in links.items():
        members.insert(0, make_member(name, kind=kind, linkname=first))
    assume(is_writable(members, FORMATS[tar_format]))
    path = tmp_path / "a.tar"
    write_members(path, members, FORMATS[tar_format])
    expected = {**files, **dict.fromkeys(links, files[first])}
    assert read_all(path) == (expected, [])


@pytest.mark.parametrize("tar_format", list(FORMATS))
@with_tmp_path
@given(files=image_files)
def test_positions_are_those_of_tarfile(tmp_path, tar_format, files):
    members = [make_member(name, content) for name, content in files.items()]
    assume(is_writable(members, FORMATS[tar_format]))
    path = tmp_path / "a.tar"
    write_members(path, members, FORMATS[tar_format])
    with tarfile.open(path) as tar, open(path, "rb") as stream:
        expected = [(member.size, member.offset_data) for member in tar]
        found = tar_format_members(stream.fileno())
    assert [(member.size, member.offset) for member in found] == expected
    assert sorted(member.name for member in found) == sorted(files)
    assert sorted(read_with_tarfile(path).values()) == sorted(files.values())


def tar_format_members(descriptor):
    """Return the members of an open archive; fail if there are more than it has blocks."""
    size = os.fstat(descriptor).st_size
    limit = size // BLOCK_BYTES + 1
    members = list(itertools.islice(tar_format.read_members(descriptor, 0, size), limit))
    assert len(members) < limit, "the reader does not reach the end"
    return members


def small_archive(tar_format):
    """Return the bytes of an archive with members of several kinds, and a class archive."""
    class_archive = io.BytesIO()
    with tarfile.open(fileobj=class_archive, mode="w", format=tar_format) as tar:
        info, content = make_member("1.jpg", b"one")
        tar.addfile(info, io.BytesIO(content))
    long_name = "d/" + "n" * (90 if tar_format == tarfile.USTAR_FORMAT else 200) + ".jpg"
    members = [
        make_member("c/1.jpg", b"x" * 600),
        make_member(long_name, b"y" * 10),
        make_member("c/link.jpg", kind=tarfile.SYMTYPE, linkname="1.jpg"),
        make_member("n01.tar", class_archive.getvalue()),
    ]
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tar_format) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return archive.getvalue()


ARCHIVES = [small_archive(tar_format) for tar_format in FORMATS.values()]
HEADER_FIELDS = {  # name -> offset and bytes in a header
    "name": (0, 100),
    "size": (124, 12),
    "checksum": (148, 8),
    "kind": (156, 1),
    "target": (157, 100),
    "magic": (257, 8),
    "prefix": (345, 155),
    "sparse flag": (482, 1),
}


def fix_checksum(header):
    """Return a header with the checksum that its bytes have."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def assert_listed_or_refused(path, content):
    """Assert that an archive is read to its end or TarDamageError is raised."""
    path.write_bytes(content)
    with open(path, "rb") as stream:
        try:
            tar_format_members(stream.fileno())
        except TarDamageError as damage:
            assert str(damage)
    listing = tar_index.list_archive(str(path), 1)
    for folder in listing.folders:
        for size, offset in zip(folder.sizes, folder.offsets):
            assert size >= 0 and offset >= 0 and offset + size <= len(content)


number_bytes = st.binary(max_size=12) | st.text("-+_ 01234567o\0", max_size=12).map(str.encode)


@settings(with_tmp_path, max_examples=200)
@given(
    content=st.sampled_from(ARCHIVES),
    block=st.integers(0, 60),
    field=st.sampled_from(sorted(HEADER_FIELDS)),
    value=number_bytes | st.sampled_from([b"x", b"g", b"L", b"K", b"S", b"5", b"0"]),
    keep_checksum=st.booleans(),
)
@example(  # a negative size that leads back to the same header
    content=ARCHIVES[0], block=0, field="size", value=b"-1000\0", keep_checksum=False
)
def test_a_damaged_header_field(tmp_path, content, block, field, value, keep_checksum):
    start = block * BLOCK_BYTES % len(content)
    header = content[start : start + BLOCK_BYTES]
    offset, length = HEADER_FIELDS[field]
    damaged = header[:offset] + value[:length].ljust(length, b"\0") + header[offset + length :]
    if not keep_checksum and field != "checksum":
        damaged = fix_checksum(damaged)
    damaged_content = content[:start] + damaged + content[start + BLOCK_BYTES :]
    assert_listed_or_refused(tmp_path / "a.tar", damaged_content)


@settings(with_tmp_path, max_examples=200)
@given(
    content=st.sampled_from(ARCHIVES),
    changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=20),
    size=st.integers(0, 1 << 20),
)
def test_damaged_bytes_anywhere(tmp_path, content, changes, size):
    damaged = bytearray(content)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    assert_listed_or_refused(tmp_path / "a.tar", bytes(damaged[:size]))


@settings(with_tmp_path, max_examples=100)
@given(
    records=st.binary(max_size=600)
    | st.sampled_from(
        [
            b"12 size=1e3\n",
            b"5016 size=" + b"9" * 5006 + b"\n",  # more digits than int() accepts
            b"14 size=99999\n",
            b"11 size=-5\n",
            b"9 path=\n",
            b"18 GNU.sparse.x=1\n",
            b"12 path=c/2.jpg\n",  # its length is wrong
            b"16 path=c/2.jpgx",  # no line feed at its end
            b"9 no sign\n",
            b"9 =value\n",
            b"+9 path=\n",
            b"0 path=\n",
        ]
    )
)
def test_any_content_of_a_pax_header(tmp_path, records):
    pax = tarfile.TarInfo("pax")
    pax.type, pax.size = tarfile.XHDTYPE, len(records)
    padded = records.ljust((len(records) + 511) // 512 * 512, b"\0")
    image, content = make_member("c/1.jpg", b"x" * 600)
    archive = pax.tobuf(tarfile.USTAR_FORMAT) + padded + image.tobuf(tarfile.USTAR_FORMAT)
    archive += content.ljust(1024, b"\0") + bytes(1024)
    assert_listed_or_refused(tmp_path / "a.tar", archive)


keywords = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="=\0"), min_size=1)


@given(records=st.dictionaries(keywords, st.text(letters, min_size=1), max_size=5))
def test_pax_records_round_trip(records):
    content = b""
    for keyword, value in records.items():
        line = f" {keyword}={value}\n".encode()
        length = len(line) + 1
        while len(str(length)) + len(line) != length:
            length += 1
        content += str(length).encode() + line
    assert tar_format.parse_pax_records(content, 0) == {
        keyword.encode(): value.encode() for keyword, value in records.items()
    }


@pytest.mark.parametrize(
    "field,number",
    [
        (b"00000001750\0", 1000),
        (b"  1750 \0garbage"[:12], 1000),
        (b"17 50" + bytes(7), 15),  # as GNU tar and bsdtar read it
        (bytes(12), 0),
        (b" " * 12, 0),
        (b"-0000001000\0", None),
        (b" -1\0", None),
        (b"-0000000000\0", None),
        (b"+0000000003\0", None),
        (b"0000_000003\0", None),
        (b"0o000000003\0", None),
        (b"00000000008\0", None),
        (b"1e3\0", None),
        (b"\x000000000003", None),  # 0 or 3: programs disagree
        (b"\xff" * 11 + b"\xfe", None),  # -2
        (b"\xc0" + bytes(11), None),
        (b"\x80" + bytes(10) + b"\x07", 7),
    ],
)
def test_numbers_in_headers(field, number):
    if number is not None:
        assert tar_format.parse_number(field, 0) == number
        return
    with pytest.raises(TarDamageError, match="(damaged header|negative size) at byte 512"):
        tar_format.parse_number(field, 512)


@given(number=st.integers(0, (1 << 87) - 1))
def test_numbers_of_tarfile_round_trip(number):
    field = tarfile.itn(number, 12, tarfile.GNU_FORMAT)
    assert tar_format.parse_number(field, 0) == number


@given(field=st.binary(min_size=1, max_size=12) | number_bytes.filter(bool))
def test_a_number_is_never_negative(field):
    try:
        assert tar_format.parse_number(field, 0) >= 0
    except TarDamageError as damage:
        assert "at byte 0" in str(damage)
