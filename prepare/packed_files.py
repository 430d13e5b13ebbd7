# SPDX-License-Identifier: Apache-2.0
"""Recognize packed files, by name and by content: images in them would be missing in silence."""

from __future__ import annotations

import re
from typing import Optional

from prepare.listing import is_image_name
from prepare.tar_format import BLOCK_BYTES, ZERO_BLOCK, TarDamageError, verify_checksum

# A packed file's extension, and what may follow it: another compression, and the traces of parts,
# copies and downloads that are not finished, such as n1.tar.gz.part, n1.zip.001 or n1 (2).tar~.
PACKED_NAME = re.compile(
    r"""\.(?:tar|t[abglx]z|tbz?2|tz2|tzst?|tzo|taz|tz|gz|z|bz|bz2|bz3|xz|lzma|lzip|lz|lz4|lzo|zstd?
    |br|sz|zip|zipx|z\d\d|7z|rar|r\d\d|arj|ace|cab|lha|lzh|cpio|pax|shar|iso|img|dmg|sqfs|sqsh|sfs
    |squashfs|wim|xar|gpg|pgp|enc|aes|age)
    (?:~|\W*\(\d+\)|\.(?:\d+|[a-z]{2}|bak|old|orig|tmp|temp|part\d*|partial|filepart
    |crdownload|download|aria2))*$""",
    re.IGNORECASE | re.VERBOSE,
)
MAGIC_NUMBERS = {
    b"\x1f\x8b": "gzip",
    b"\x1f\x9d": "compress",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x5d\0\0": "lzma",
    b"LZIP": "lzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x02\x21\x4c\x18": "lz4",
    b"\x89LZO\0": "lzop",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
    b"PK\x03\x04": "zip",
    b"hsqs": "squashfs",
}
SKIPPABLE_FRAME = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # of zstd and lz4
MAX_UNKNOWN_FILES = 1000  # of a folder or an archive; no more are looked into
GIT_LFS_START = b"version https://git-lfs"
MARKUP = re.compile(rb"\s*<[!?a-zA-Z]")


def packed_stem(name: str) -> Optional[str]:
    """Return the name of a packed file without what makes it one, such as n1 of n1.tar.gz.

    Return None for an image, for a file that is not packed, and for the file with metadata that
    macOS adds to each file on a foreign file system (._n1.tar).
    """
    if is_image_name(name) or name.startswith("._"):
        return None
    stem, match = name, PACKED_NAME.search(name)
    if match is None:
        return None
    while match is not None:
        stem = stem[: match.start()]
        match = PACKED_NAME.search(stem)
    return stem


def compression(begin: bytes) -> Optional[str]:
    """Return the format of a compressed file from its first bytes, or None if it is unknown."""
    for magic, name in MAGIC_NUMBERS.items():
        if begin.startswith(magic):
            return name
    return "zstd or lz4" if SKIPPABLE_FRAME.match(begin) else None


def is_tar(block: bytes) -> bool:
    """Return whether these bytes, the first 512 of a file, are the header of a tar archive."""
    if len(block) < BLOCK_BYTES or block == ZERO_BLOCK:
        return False
    try:
        verify_checksum(block, 0)
    except TarDamageError:
        return False
    return True


def packed_content(block: bytes) -> Optional[str]:
    """Return the format of an archive or a compressed file from its first 512 bytes, or None.

    Zip is not among the formats, as it is that of many documents, too.
    """
    name = "tar" if is_tar(block) else compression(block)
    return None if name == "zip" else name


def archive_problem(block: bytes) -> Optional[str]:
    """Return why a file with these first bytes cannot be read as a tar archive.

    Args:
        block: the first 512 bytes, or all of a smaller file.

    Returns:
        The reason, to follow the file's name; None if the bytes may begin an archive, which may
        still be cut short.
    """
    name = compression(block)
    if is_tar(block):
        return None
    if name is not None:
        return f"is compressed ({name}) and cannot be read in place: decompress it"
    if block.startswith(GIT_LFS_START):
        return "is a pointer of Git LFS: download the file with git lfs pull"
    if MARKUP.match(block):
        return "is no tar archive but a page of HTML or XML: download it again"
    if len(block) < BLOCK_BYTES or block == ZERO_BLOCK:
        return None
    begin = " ".join(f"{byte:02x}" for byte in block[:8])
    return f"is no tar archive: it begins with {begin}"
