# SPDX-License-Identifier: Apache-2.0
"""Read the headers of a tar archive: the name, kind, size and position of each member.

Reads what GNU tar, bsdtar and Python write in the v7, ustar, GNU and pax formats (POSIX.1-2008,
`pax`; GNU tar manual, "Basic Tar Format"). Data are skipped, not read.
"""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, Optional

BLOCK_BYTES = 512
ZERO_BLOCK = bytes(BLOCK_BYTES)
# Largest long name or set of pax records; a larger one indicates damage.
MAX_EXTENSION_BYTES = 1 << 20
DEFAULT_RECORD_BYTES = 10240  # of a record, the size that programs write by default
MAX_RECORD_BYTES = 1 << 21  # of the largest blocking factor, 4096
POWERS_OF_TWO = tuple(1 << power for power in range(14, 22))  # records of larger blocking factors
RARE_RECORD_BYTES = 1 << 16  # one in 32 multiples of the usual record is a multiple of this, too
# An archive that is at least so many times larger than its padding may have any blocking factor.
MAX_PADDING_DIVISOR = 1000
MAX_PADDING_BYTES = 4 << 20  # at an archive's end; more than all record sizes allow
MAX_SHOWN_CHARACTERS = 400  # of a name in a message
MAX_NUMBER_DIGITS = 20  # of a decimal size; 2 ** 64 has 20
# Programs stop at the first space or zero byte after the digits; they disagree about digits after a
# leading zero byte. int() also accepts signs, "_" and "0o", which are no numbers in a tar header.
OCTAL_FIELD = re.compile(rb"[ \t]*(?:([0-7]+)(?:[ \t\0].*)?|\0*[ \0]*)", re.DOTALL)
DECIMAL = re.compile(rb"[0-9]{1,%d}" % MAX_NUMBER_DIGITS)
REGULAR, HARD_LINK, SYMBOLIC_LINK, FOLDER = b"0", b"1", b"2", b"5"
REGULAR_KINDS = (REGULAR, b"\0", b"7")
KINDS_WITHOUT_DATA = (HARD_LINK, SYMBOLIC_LINK, b"3", b"4", FOLDER, b"6")
PAX_GLOBAL, PAX_KINDS = b"g", (b"x", b"X")
GNU_LONG_NAME, GNU_LONG_LINK = b"L", b"K"
GNU_SPARSE, GNU_FOLDER, GNU_VOLUME_LABEL = b"S", b"D", b"V"
SPARSE_KEYWORDS = (b"GNU.sparse.", b"SCHILY.realsize")
USED_KEYWORDS = (b"path", b"linkpath", b"size")  # and those of sparse files
LONG_NAME_KEY, LONG_LINK_KEY = b"", b"="  # GNU's long names among pax records; no keywords
EXTENSION_KINDS = (*PAX_KINDS, PAX_GLOBAL, GNU_LONG_NAME, GNU_LONG_LINK)


class TarDamageError(Exception):
    """An archive ends too early or is malformed; the archive is the subject of the message."""


@dataclass
class TarMember:
    """One member of an archive."""

    name: str  # without leading "./" or "/"; "" for the top folder itself
    kind: bytes  # the header's type flag
    size: int  # bytes
    offset: int  # of the data in the file, bytes
    target: str  # of a link
    sparse: bool


def read_members(
    descriptor: int, begin: int, end: int, scan: Optional[Callable[[int], int]] = None
) -> Iterator[TarMember]:
    """Read each header of an archive and yield the member that it describes.

    Args:
        descriptor: an open file.
        begin: offset of the archive in the file, bytes.
        end: offset of the archive's end in the file, bytes.
        scan: called with the offset of each header to which no pax record applies; returns the
            offset of the first header to be read here. Members before it are not yielded.

    Raises:
        TarDamageError: the archive ends too early or is malformed.
    """
    at = begin
    global_pax: Dict[bytes, bytes] = {}
    member_pax: Dict[bytes, bytes] = {}  # of the next member
    pax_header_end = -1  # where the newest pax header of a member ends
    if end <= begin:
        raise TarDamageError("is empty")
    while True:
        if scan is not None and not global_pax and not member_pax:
            at = scan(at)
        header = read_exactly(descriptor, at, BLOCK_BYTES, end)
        if header == ZERO_BLOCK:
            if member_pax:
                raise TarDamageError(f"lacks the member that the header before byte {at} names")
            check_zeros(descriptor, at, min(end, at + MAX_PADDING_BYTES))
            if not is_padding(at - begin, end - begin):
                raise TarDamageError(
                    f"has its end mark {end - at} bytes before its end, farther than tar writes "
                    f"it: members may be lost in an incomplete copy; copy it again, or make it "
                    f"again without --blocking-factor"
                )
            return
        verify_checksum(header, at)
        kind, data = header[156:157], at + BLOCK_BYTES
        size = 0 if kind in KINDS_WITHOUT_DATA else parse_number(header[124:136], at)
        if kind in EXTENSION_KINDS:
            if kind in PAX_KINDS and pax_header_end == at:  # programs use the first or the last
                raise TarDamageError(f"has two pax headers for one member at byte {at}")
            extension = read_extension(descriptor, kind, at, size, end)
            (global_pax if kind == PAX_GLOBAL else member_pax).update(extension)
        else:
            pax = {**global_pax, **member_pax} if global_pax or member_pax else member_pax
            member_pax = {}
            if kind not in KINDS_WITHOUT_DATA and b"size" in pax:
                size = parse_pax_size(pax[b"size"], at)
            if kind == GNU_SPARSE:
                data = skip_sparse_map(descriptor, header, data, end)
            member = parse_member(header, kind, size, data, pax)
            if data + size > end:
                missing = data + size - end
                name = shorten(member.name)
                raise TarDamageError(f"is cut short: {name} lacks its last {missing} bytes")
            yield member
        at = data + (size + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
        if kind in PAX_KINDS:
            pax_header_end = at


def read_exactly(descriptor: int, offset: int, size: int, end: int) -> bytes:
    """Return `size` bytes at `offset` of an archive that ends at `end`.

    Raises:
        TarDamageError: the archive ends too early.
    """
    data = os.pread(descriptor, min(size, max(end - offset, 0)), offset)
    while data and len(data) < min(size, end - offset):
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    if len(data) < size:
        where = "inside a header" if data else "without its end mark"
        raise TarDamageError(f"is cut short: it ends at byte {end}, {where}")
    return data


def check_zeros(descriptor: int, offset: int, end: int) -> None:
    """Check that only zeros follow the end mark at `offset`, so that no image is overlooked.

    Raises:
        TarDamageError: other data follow.
    """
    while offset < end:
        data = os.pread(descriptor, min(1 << 20, end - offset), offset)
        if not data:
            return
        if data.count(0) != len(data):
            raise TarDamageError(
                f"has more data after its end mark (after byte {offset}): "
                f"a damaged header or two archives in one"
            )
        offset += len(data)


def is_padding(used: int, size: int) -> bool:
    """Return whether only an end mark and the rest of a record follow the members of an archive.

    An archive consists of records of the same size, and an end mark has two blocks. A file to which
    only a part of an archive was copied may have many more zeros.

    Args:
        used: bytes of the members.
        size: bytes of the archive.
    """
    padding = size - used - 2 * BLOCK_BYTES
    if padding < DEFAULT_RECORD_BYTES:
        return True
    if padding >= MAX_RECORD_BYTES:
        return False
    if padding < size // MAX_PADDING_DIVISOR:
        larger = range(padding // BLOCK_BYTES + 1, MAX_RECORD_BYTES // BLOCK_BYTES + 1)
        return size % BLOCK_BYTES == 0 and any(size // BLOCK_BYTES % one == 0 for one in larger)
    # A size that is a multiple of the usual record indicates that the archive consists of those,
    # but few are a multiple of a large power of two as well.
    return any(
        size % record == 0 and padding < record
        for record in POWERS_OF_TWO
        if size % DEFAULT_RECORD_BYTES != 0 or record >= RARE_RECORD_BYTES
    )


def verify_checksum(header: bytes, offset: int) -> None:
    """Check the checksum of a header: the sum of its bytes, with spaces in the checksum field.

    Args:
        header: the 512 bytes.
        offset: position of the header, for messages.

    Raises:
        TarDamageError: the sum differs.
    """
    recorded = parse_number(header[148:156], offset)
    # The low 16 bits of Adler-32 are 1 + the sum of the bytes, modulo 65521. zlib is faster than
    # a sum in Python.
    adler = zlib.adler32(header[156:], zlib.adler32(header[:148])) & 0xFFFF
    if adler == (recorded - 256 + 1) % 65521:
        return
    # Some old programs summed the bytes as signed numbers.
    signed = sum(byte - 256 if byte > 127 else byte for byte in header[:148] + header[156:]) + 256
    if signed != recorded:
        raise TarDamageError(f"has a damaged header at byte {offset}")


def parse_number(field: bytes, offset: int) -> int:
    """Return the number in a header field: octal digits, or binary if the first bit is set.

    Args:
        field: the bytes of the field.
        offset: position of the header, for messages.

    Raises:
        TarDamageError: the field is malformed or the number is negative.
    """
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        if field[0] & 0x40:
            raise TarDamageError(f"has a negative size at byte {offset}")
        return value
    octal = OCTAL_FIELD.fullmatch(field)
    if octal is None:
        if field.lstrip().startswith(b"-"):
            raise TarDamageError(f"has a negative size at byte {offset}")
        raise TarDamageError(f"has a damaged header at byte {offset}")
    return int(octal.group(1) or b"0", 8)


def read_extension(
    descriptor: int, kind: bytes, offset: int, size: int, end: int
) -> Dict[bytes, bytes]:
    """Return the used records of the pax header at `offset`, or a GNU long name as such a record.

    A pax record of the same name takes precedence over it, as in GNU tar.

    Args:
        descriptor: an open file.
        kind: the header's type flag, one of EXTENSION_KINDS.
        offset: position of the header.
        size: bytes after the header.
        end: offset of the archive's end.

    Raises:
        TarDamageError: the content is too long, incomplete or malformed.
    """
    if size > MAX_EXTENSION_BYTES:
        raise TarDamageError(f"has a header of {size} bytes at byte {offset}")
    content = read_exactly(descriptor, offset + BLOCK_BYTES, size, end)
    if kind in (GNU_LONG_NAME, GNU_LONG_LINK):
        key = LONG_NAME_KEY if kind == GNU_LONG_NAME else LONG_LINK_KEY
        return {key: content.split(b"\0", 1)[0]}
    records = parse_pax_records(content, offset)
    return {
        keyword: value
        for keyword, value in records.items()
        if keyword in USED_KEYWORDS or keyword.startswith(SPARSE_KEYWORDS)
    }


def parse_pax_records(content: bytes, offset: int) -> Dict[bytes, bytes]:
    """Return {keyword: value} of the `length keyword=value` lines of a pax header.

    Args:
        content: the lines; each length, in decimal, is that of the whole line in bytes.
        offset: position of the header, for messages.

    Raises:
        TarDamageError: a line is malformed.
    """
    records, begin = {}, 0
    end = len(content.rstrip(b"\0"))
    while begin < end:
        digits, space, _ = content[begin : begin + MAX_NUMBER_DIGITS].partition(b" ")
        length = int(digits) if space and DECIMAL.fullmatch(digits) else 0
        line = content[begin : begin + length]
        keyword, equals, value = line[len(digits) + 1 : -1].partition(b"=")
        if len(line) < length or not keyword or not equals or not line.endswith(b"\n"):
            raise TarDamageError(f"has a damaged pax header at byte {offset}")
        records[keyword] = value
        begin += length
    return records


def parse_pax_size(value: bytes, offset: int) -> int:
    """Return the size in bytes that a pax record contains.

    Raises:
        TarDamageError: the value is not a decimal number.
    """
    if not DECIMAL.fullmatch(value):
        raise TarDamageError(f"has a damaged pax header at byte {offset}")
    return int(value)


def skip_sparse_map(descriptor: int, header: bytes, data: int, end: int) -> int:
    """Return the offset of the data of a sparse file in GNU's format.

    Blocks of the sparse map may follow the header; a flag in each is set if another one follows.

    Args:
        descriptor: an open file.
        header: the 512 bytes.
        data: offset of the first block after the header.
        end: offset of the archive's end.

    Raises:
        TarDamageError: the archive ends too early.
    """
    map_continues = header[482]
    while map_continues:
        map_continues = read_exactly(descriptor, data, BLOCK_BYTES, end)[504]
        data += BLOCK_BYTES
    return data


def parse_member(
    header: bytes, kind: bytes, size: int, data: int, pax: Dict[bytes, bytes]
) -> TarMember:
    """Return the member that a header and the pax records before it describe.

    Args:
        header: the 512 bytes.
        kind: the header's type flag.
        size: bytes of data.
        data: offset of the data in the file.
        pax: pax records that apply to this member.
    """
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":  # GNU's own format ("ustar  ") has other fields at 345
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    name = pax.get(LONG_NAME_KEY, name)
    name = pax.get(b"GNU.sparse.name", pax.get(b"path", name))
    if kind in REGULAR_KINDS and name.endswith(b"/"):
        kind = FOLDER  # the v7 format has no type flag for folders
    raw_target = pax.get(LONG_LINK_KEY, header[157:257].split(b"\0", 1)[0])
    raw_target = pax.get(b"linkpath", raw_target)
    sparse = kind == GNU_SPARSE or any(key.startswith(SPARSE_KEYWORDS) for key in pax)
    # A symbolic link's target is relative to the link; a hard link's target is a member's name.
    is_symbolic = kind == SYMBOLIC_LINK
    target = os.fsdecode(raw_target) if is_symbolic else normalize_path(raw_target)
    return TarMember(normalize_path(name), kind, size, data, target, sparse)


def shorten(name: str) -> str:
    """Return a name as a message shows it: a hostile archive may have one of a million letters."""
    return name if len(name) <= MAX_SHOWN_CHARACTERS else f"{name[:MAX_SHOWN_CHARACTERS]}..."


def normalize_path(name: bytes) -> str:
    """Return a member's path as unpacking makes it: relative, without "." and empty parts."""
    return "/".join(part for part in os.fsdecode(name).split("/") if part not in ("", "."))
