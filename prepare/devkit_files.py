# SPDX-License-Identifier: Apache-2.0
"""Read the two files of the ImageNet devkit that a conversion uses, from a folder or an archive.

A compressed file can unpack to a thousand times its size, and a single header of an archive can
require as much memory. Therefore at most MAX_BYTES are unpacked, and MAX_META_BYTES of meta.mat.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
from typing import IO, Any, Callable, Dict, List, cast

from prepare.bounded_read import BLOCK_BYTES, BoundedStream, TooLargeError
from prepare.matlab_file import check_matlab_file
from prepare.regular_file import open_regular

GROUND_TRUTH_FILE, META_FILE = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
MAX_BYTES = 64 << 20  # the official devkit is an archive of 2.6 MB
MAX_META_BYTES = 16 << 20
# By the first two bytes of a compressed file.
_OPENERS: Dict[bytes, Callable[[str], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZ": bz2.open,
    b"\xfd7": lzma.open,
}


def files_read(path: str) -> List[str]:
    """Return the files that are read from a devkit folder; of anything else, only its own path."""
    if os.path.isdir(path):
        return [os.path.join(path, "data", name) for name in (GROUND_TRUTH_FILE, META_FILE)]
    return [path]


class DevkitError(Exception):
    """It is unclear which file of a devkit is the right one."""


def is_archive(path: str) -> bool:
    """Return whether `path` is a readable tar archive, packed or not."""
    try:
        with _open_unpacked(path) as stream, _open_archive(stream):
            return True
    except TooLargeError:
        return True  # reading it fails with the same reason
    except Exception:  # each compression module raises its own exceptions for damaged files
        return False


def _open_unpacked(path: str) -> IO[bytes]:
    """Open a file, or the content of a compressed file."""
    with open_regular(path) as stream:
        opener = _OPENERS.get(stream.read(2))
    return opener(path) if opener else open(path, "rb")


def _open_archive(stream: IO[bytes]) -> tarfile.TarFile:
    bounded = cast(IO[bytes], BoundedStream(stream, "the unpacked archive", MAX_BYTES))
    return tarfile.open(fileobj=bounded, mode="r|")


def read_devkit_files(path: str) -> Dict[str, bytes]:
    """Return {file name: content} of the ground truth and meta.mat; a missing member is absent.

    Raises:
        TooLargeError: more than MAX_BYTES would be unpacked.
        DevkitError: it has several of these files, with different contents.
        Exception: the archive or a file cannot be read; its kind depends on the compression.
    """
    files = {}
    if os.path.isdir(path):
        for file_path in files_read(path):
            name = os.path.basename(file_path)
            with open_regular(file_path) as stream:
                files[name] = BoundedStream(stream, name, MAX_BYTES).read_all()
    else:
        files = _read_members(path)
    if META_FILE in files:
        check_matlab_file(files[META_FILE], META_FILE, MAX_META_BYTES)
    return files


def _read_members(path: str) -> Dict[str, bytes]:
    """Return {file name: content} of the two files in an archive.

    Raises:
        DevkitError: the archive has several files of one of these names with different contents.
    """
    candidates: Dict[str, Dict[str, bytes]] = {GROUND_TRUTH_FILE: {}, META_FILE: {}}
    with _open_unpacked(path) as stream:
        bounded = BoundedStream(stream, "the unpacked archive", MAX_BYTES)
        with tarfile.open(fileobj=cast(IO[bytes], bounded), mode="r|") as archive:
            for member in archive:
                name = os.path.basename(member.name)
                if name in candidates and not member.isdir():
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is None:
                        raise DevkitError(f"{member.name} in it is a link or no regular file")
                    _add_candidate(candidates[name], member.name, content.read())
        # gzip verifies its checksum at the end of the file: SciPy may crash on a damaged table.
        while bounded.read(BLOCK_BYTES):
            pass
    return {name: _choose(files) for name, files in candidates.items() if files}


def _add_candidate(files: Dict[str, bytes], path: str, content: bytes) -> None:
    """Add a file; raise DevkitError if the archive has the same path with another content."""
    path = os.path.normpath(path)
    if files.setdefault(path, content) != content:
        raise DevkitError(f"it has {path} twice, with different contents: keep one of them")


def _choose(files: Dict[str, bytes]) -> bytes:
    """Return the content of the file of some paths that is in data/, as in the official archive.

    Raises:
        DevkitError: there are several such files, or none is in data/, and their contents differ.
    """
    in_data = [path for path in files if os.path.basename(os.path.dirname(path)) == "data"]
    paths = sorted(in_data or files)
    for path in paths[1:]:
        if files[path] != files[paths[0]]:
            raise DevkitError(f"{paths[0]} and {path} in it differ: keep one of them")
    return files[paths[0]]
