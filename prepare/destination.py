# SPDX-License-Identifier: Apache-2.0
"""The destination folder: finished and unfinished splits, and publishing by rename.

Data files are written to PREFIX.part/ and renamed into the destination when they are complete, the
manifest last: a split without a manifest is not finished. Files of other programs are never moved,
overwritten or removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from typing import Dict, Iterable, List, Optional

from prepare.bounded_read import file_sha256
from prepare.journal import HEADER_BEGIN, may_begin_journal
from prepare.manifest import (
    FOLDERS,
    JOURNAL_NAME,
    MANIFEST_SUFFIX,
    SUFFIXES,
    DestinationError,
    FileFacts,
    Manifest,
    Options,
    SourceFacts,
    different_conversion,
    load_manifest,
    manifest_bytes,
    manifest_path,
    part_folder,
)


def is_finished(
    folder: str, prefix: str, source: SourceFacts, digest: Optional[str], options: Options
) -> bool:
    """Return whether `folder` holds the complete split, made from this source with these options.

    Reads the manifest and the sizes of the files only.

    Args:
        source: If it is an archive, its identity suffices to recognize it.
        digest: Of the plan; recognizes any source. None: the images were not listed, so the source
            is not compared.
        options: Compared with those that the split was made with.

    Raises:
        DestinationError: The files of a different or damaged split are there, or files without a
            manifest.
    """
    path = manifest_path(folder, prefix)
    if not os.path.lexists(path):
        _check_no_unexpected_files(folder, prefix)
        return False
    manifest = load_manifest(folder, prefix)
    _check_file_sizes(folder, prefix, manifest)
    _check_same_conversion(path, manifest, source, digest, options)
    return True


def _check_no_unexpected_files(folder: str, prefix: str) -> None:
    """Raise DestinationError if there are files that an interrupted run did not leave behind."""
    part = part_folder(folder, prefix)
    if os.path.lexists(part) and not os.path.isdir(part):
        raise DestinationError(f"{part}: would be replaced: move it away")
    data_files = [prefix + suffix for suffix in SUFFIXES]
    part_files = [*data_files, prefix + MANIFEST_SUFFIX]
    journal = os.path.join(part, JOURNAL_NAME)
    # This program makes no links, and would write through them into files elsewhere.
    for path in (journal, *(os.path.join(part, name) for name in part_files)):
        if os.path.lexists(path) and not _is_own_kind(path):
            raise DestinationError(f"{path}: would be replaced: move it away")
    if os.path.lexists(journal):
        find_published(folder, prefix)
        return
    paths = [os.path.join(folder, name) for name in data_files]
    paths += [os.path.join(part, name) for name in part_files]
    for path in paths:
        if os.path.lexists(path):
            raise _foreign_file(path)


def _is_own_kind(path: str) -> bool:
    """Return whether there is a regular file at `path`, and no link to one."""
    return stat.S_ISREG(os.lstat(path).st_mode)


def _foreign_file(path: str) -> DestinationError:
    return DestinationError(
        f"{path}: exists without a manifest and would be overwritten: move it away"
    )


def find_published(folder: str, prefix: str) -> List[str]:
    """Return the data files that an interrupted `publish` has renamed into `folder`.

    Such a file is not in the part folder any more, but its size and SHA-256 are in the manifest
    there.

    Raises:
        DestinationError: There is a data file that `publish` did not rename.
    """
    part = part_folder(folder, prefix)
    names = [prefix + suffix for suffix in SUFFIXES]
    names = [name for name in names if os.path.lexists(os.path.join(folder, name))]
    files: Dict[str, FileFacts] = {}
    if names:
        with contextlib.suppress(DestinationError):
            files = load_manifest(part, prefix)["files"]
    for name in names:
        path = os.path.join(folder, name)
        in_part = os.path.lexists(os.path.join(part, name))
        if in_part or name not in files or not _has_content(path, files[name]):
            raise _foreign_file(path)
    return names


def _has_content(path: str, facts: FileFacts) -> bool:
    return (
        _is_own_kind(path)
        and os.path.getsize(path) == facts["bytes"]
        and file_sha256(path) == facts["sha256"]
    )


def _check_file_sizes(folder: str, prefix: str, manifest: Manifest) -> None:
    """Raise DestinationError if a data file is missing or has a different size."""
    for name, facts in manifest["files"].items():
        path = os.path.join(folder, name)
        size = os.path.getsize(path) if os.path.exists(path) else None
        if size != facts["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise DestinationError(
                f"{path}: {found}, expected {facts['bytes']} bytes: "
                f"remove {prefix}{{.rec,.idx,.lst,.sums,.json}} to make the split again"
            )


def _check_same_conversion(
    path: str, manifest: Manifest, source: SourceFacts, digest: Optional[str], options: Options
) -> None:
    """Raise DestinationError if the split was made from another source or with other options."""
    same_source = digest in (None, manifest["digest"]) or _is_same_archive(manifest, source)
    made_with = manifest["options"]
    # Without a bad image, both values of --on-error give the same bytes.
    same = made_with["check"] == options["check"] and (
        made_with["on_error"] == options["on_error"] or not manifest["skipped"]
    )
    if not same or not same_source:
        raise different_conversion(path, manifest, "")


def has_same_archive(folder: str, prefix: str, source: SourceFacts) -> bool:
    """Return whether a finished split was made from this archive; False: unknown."""
    return _is_same_archive(load_manifest(folder, prefix), source)


def _is_same_archive(manifest: Manifest, source: SourceFacts) -> bool:
    return source["kind"] != FOLDERS and manifest["source"]["identity"] == source["identity"]


def bytes_written(folder: str, prefix: str) -> int:
    """Return the size of an unfinished split's record file, which `publish` may have renamed."""
    for place in (folder, part_folder(folder, prefix)):
        try:
            return os.path.getsize(os.path.join(place, prefix + ".rec"))
        except OSError:
            pass
    return 0


def roll_back_publish(folder: str, prefix: str) -> None:
    """Undo a publication that was interrupted before the manifest was renamed.

    Moves the files back to the part folder, where the record file is checked against the journal.

    Raises:
        DestinationError: There is a manifest, or a data file that `publish` did not rename.
    """
    path = manifest_path(folder, prefix)
    # On a file system without locks, the manifest is the only sign of another conversion.
    if os.path.lexists(path):
        raise DestinationError(
            f"{path}: has appeared during this run: another conversion was writing here"
        )
    for name in find_published(folder, prefix):
        os.replace(os.path.join(folder, name), os.path.join(part_folder(folder, prefix), name))


def publish(folder: str, prefix: str, manifest: Manifest) -> None:
    """Rename the finished files into `folder`, the manifest last, and remove the part folder.

    Raises:
        DestinationError: A file of another program is in the place of one of them.
    """
    part = part_folder(folder, prefix)
    part_manifest = manifest_path(part, prefix)
    write_durably(part_manifest, [manifest_bytes(manifest)])
    for suffix in (*SUFFIXES, MANIFEST_SUFFIX):
        path = os.path.join(folder, prefix + suffix)
        if os.path.lexists(path):
            raise DestinationError(
                f"{path}: has appeared during this run and would be overwritten: move it away, and "
                "run the same command again"
            )
    for suffix in SUFFIXES:
        os.replace(os.path.join(part, prefix + suffix), os.path.join(folder, prefix + suffix))
    _sync_folder(folder)
    os.replace(part_manifest, manifest_path(folder, prefix))
    _sync_folder(folder)
    remove_part_folder(folder, prefix)


def check_still_there(folder: str, prefix: str) -> None:
    """Raise OSError if a file of a finished split was removed while the command was running."""
    for suffix in (*SUFFIXES, MANIFEST_SUFFIX):
        path = os.path.join(folder, prefix + suffix)
        if not os.path.exists(path):
            raise OSError(errno.ENODEV, "was removed while this command was running", path)


def remove_part_folder(folder: str, prefix: str) -> None:
    """Remove the part folder of a split, if there is one; keep files that are not of this program.

    Only with a journal are the other files of this program.
    """
    part = part_folder(folder, prefix)
    names = [prefix + suffix for suffix in (*SUFFIXES, MANIFEST_SUFFIX)]
    with contextlib.suppress(OSError):
        if _is_journal(os.path.join(part, JOURNAL_NAME)):
            for name in [*names, JOURNAL_NAME]:  # the journal last, in case of a kill
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(part, name))
        os.rmdir(part)


def remove_files_without_journal(part: str, prefix: str) -> None:
    """Remove the files of a split that this process has written to a part folder.

    If the folder has a journal, another conversion has begun there, and the files are kept.
    """
    with contextlib.suppress(OSError):
        if not os.path.lexists(os.path.join(part, JOURNAL_NAME)):
            for suffix in (*SUFFIXES, MANIFEST_SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(part, prefix + suffix))
            os.rmdir(part)


def _is_journal(path: str) -> bool:
    """Return whether a file begins as a journal does, or as what a power failure leaves of one."""
    if not (os.path.lexists(path) and _is_own_kind(path)):
        return False
    with open(path, "rb") as stream:
        return may_begin_journal(stream.read(len(HEADER_BEGIN)))


def write_durably(path: str, blocks: Iterable[bytes]) -> FileFacts:
    """Write `blocks` to the file `path` and flush it to the disk; return its size and digest."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as stream:
        for block in blocks:
            stream.write(block)
            digest.update(block)
            size += len(block)
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _sync_folder(path: str) -> None:
    """Flush the renames in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems do not support it
    finally:
        os.close(descriptor)
