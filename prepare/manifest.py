# SPDX-License-Identifier: Apache-2.0
"""The destination folder: its layout, the manifest of a finished split, and publishing by rename.

Data files are written to PREFIX.part/ and renamed into the destination when they are complete, the
manifest last: a split without a manifest is not finished.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from typing import Any, Dict, Iterable, List, Optional, TypedDict, cast

from prepare.bounded_read import TooLargeError, read_file
from prepare.regular_file import NotRegularFileError

SUFFIXES = (".rec", ".idx", ".lst", ".sums")  # of the data files
MANIFEST_SUFFIX = ".json"
JOURNAL_NAME = "journal"  # in the part folder
# Version 1 had no sum of its own. Both are read; the other fields are the same.
FORMAT, VERSION, VERSION_WITHOUT_SUM = "mxresnet-recordio", 2, 1
# The last field of the file: the SHA-256 of all bytes before it (hexadecimal).
SUM_BEGIN, SUM_END = b'\n "manifest_sha256": "', b'"\n}\n'
MAX_FILE_BYTES = 1 << 62
# That of ImageNet has 0.1 MB, but each skipped or unusual image is listed.
MAX_MANIFEST_BYTES = 512 << 20
FOLDERS = "folders"  # the kind of a source whose images are files


class DestinationError(Exception):
    """The destination has content that must not be overwritten, or is not a finished data set."""


class FileFacts(TypedDict):
    """Size and SHA-256 (hexadecimal) of a data file."""

    bytes: int
    sha256: str


class ClassFacts(TypedDict):
    """A class and its number of records."""

    name: str
    label: int
    examples: int


class SkippedImage(TypedDict):
    """An image without a record; the path is relative to the top of the source."""

    path: str
    reason: str


class UnusualImage(TypedDict):
    """An image with unusual ends that has a record; the path is that of the list."""

    path: str
    description: str


class SourceFacts(TypedDict):
    """The source of a split; the identity is a digest of names, sizes and modification times."""

    path: str
    kind: str
    identity: str


class Options(TypedDict):
    """The options of prepare.imagenet that determine which images get a record."""

    check: str
    on_error: str


class Manifest(TypedDict):
    """The content of a manifest file, in the order of the file."""

    format: str
    version: int
    complete: bool
    prefix: str
    examples: int
    classes: List[ClassFacts]
    image_bytes: int
    files: Dict[str, FileFacts]  # by file name
    digest: str  # of the plan
    source: SourceFacts
    options: Options
    ignored: Dict[str, int]
    skipped: List[SkippedImage]
    unusual: List[UnusualImage]


def part_folder(folder: str, prefix: str) -> str:
    """Return the folder that holds the files of a split until they are complete."""
    return os.path.join(folder, prefix + ".part")


def manifest_path(folder: str, prefix: str) -> str:
    """Return the path of the manifest of a split."""
    return os.path.join(folder, prefix + MANIFEST_SUFFIX)


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
    journal = os.path.join(part, JOURNAL_NAME)
    record_file = os.path.join(part, prefix + ".rec")
    expected = ((part, os.path.isdir), (journal, os.path.isfile), (record_file, os.path.isfile))
    for path, is_expected in expected:
        if os.path.lexists(path) and not is_expected(path):
            raise DestinationError(f"{path}: would be replaced: move it away")
    if os.path.exists(journal):
        return
    data_files = [prefix + suffix for suffix in SUFFIXES]
    paths = [os.path.join(folder, name) for name in data_files]
    paths += [os.path.join(part, name) for name in (*data_files, prefix + MANIFEST_SUFFIX)]
    for path in paths:
        if os.path.lexists(path):
            raise DestinationError(
                f"{path}: exists without a manifest and would be overwritten: move it away"
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


def different_conversion(path: str, manifest: Manifest, difference: str) -> DestinationError:
    """Return the error for a finished split that the same command would not make now.

    Args:
        path: Of the manifest.
        manifest: Its content.
        difference: What is different, if that is known.
    """
    flags = " ".join(
        f"--{name.replace('_', '-')}={value}" for name, value in sorted(manifest["options"].items())
    )
    return DestinationError(
        f"{path}: the split was made from {manifest['source']['path']} as it was at that time, "
        f"with {flags}: {difference}choose another destination, or remove the files of this split"
    )


def load_manifest(folder: str, prefix: str) -> Manifest:
    """Read and check the manifest of a finished split.

    Raises:
        DestinationError: It is not a manifest, is damaged, or has an unknown version.
    """
    path = manifest_path(folder, prefix)
    if not os.path.isfile(path):
        raise DestinationError(f"{path}: is not a file, so it is no manifest: move it away")
    try:
        content = read_file(path, MAX_MANIFEST_BYTES)
    except NotRegularFileError as error:
        raise DestinationError(f"{path}: {error.reason}") from None
    except TooLargeError as error:
        raise DestinationError(f"{error}, so it is no manifest: move it away") from None
    try:
        manifest = json.loads(content.decode())
        form, version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        form, version = None, None
    if form != FORMAT or version not in (VERSION, VERSION_WITHOUT_SUM):
        raise DestinationError(f"{path}: is not a manifest of {FORMAT} version {VERSION}")
    again = f"remove {prefix}{{.rec,.idx,.lst,.sums,.json}} to make the split again"
    field = _find_invalid_field(manifest, [prefix + suffix for suffix in SUFFIXES])
    if field:
        raise DestinationError(
            f'{path}: is damaged: its field "{field}" is missing or invalid: {again}'
        )
    if (version == VERSION or SUM_BEGIN in content) and not _is_sum_right(content):
        raise DestinationError(f"{path}: is damaged: its content differs from its sum: {again}")
    return cast(Manifest, manifest)


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the content of a manifest file: JSON, whose last field is the sum of the others."""
    fields = json.dumps(manifest, indent=1).encode()[: -len("\n}")] + b","
    return fields + SUM_BEGIN + hashlib.sha256(fields).hexdigest().encode() + SUM_END


def _is_sum_right(content: bytes) -> bool:
    fields, begin, end = content.rpartition(SUM_BEGIN)
    return bool(begin) and end == hashlib.sha256(fields).hexdigest().encode() + SUM_END


def _find_invalid_field(manifest: Dict[str, Any], names: List[str]) -> Optional[str]:
    """Return the name of the first field that is missing or has a wrong type; None: all are valid.

    Args:
        manifest: Parsed JSON.
        names: The data files that it must describe.
    """

    def is_record(value: Any, **types: type) -> bool:
        return isinstance(value, dict) and all(
            isinstance(value.get(key), expected) for key, expected in types.items()
        )

    def is_list_of(values: Any, **types: type) -> bool:
        return isinstance(values, list) and all(is_record(value, **types) for value in values)

    files, examples = manifest.get("files"), manifest.get("examples")
    valid = {
        "complete": manifest.get("complete") is True,
        "examples": isinstance(examples, int) and examples >= 0,
        "classes": is_list_of(manifest.get("classes"), name=str, label=int, examples=int),
        "files": isinstance(files, dict)
        and sorted(files) == sorted(names)
        and all(
            is_record(facts, bytes=int, sha256=str) and 0 <= facts["bytes"] < MAX_FILE_BYTES
            for facts in files.values()
        ),
        "digest": isinstance(manifest.get("digest"), str),
        "options": is_record(manifest.get("options"), check=str, on_error=str),
        "source": is_record(manifest.get("source"), path=str, identity=str),
        "skipped": is_list_of(manifest.get("skipped"), path=str, reason=str),
        # Earlier versions had no such field.
        "unusual": is_list_of(manifest.get("unusual", []), path=str, description=str),
    }
    return next((name for name, is_valid in valid.items() if not is_valid), None)


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

    Moves the record file back to the part folder, where it is checked against the journal.

    Raises:
        DestinationError: There is a manifest.
    """
    path = manifest_path(folder, prefix)
    # On a file system without locks, the manifest is the only sign of another conversion.
    if os.path.exists(path):
        raise DestinationError(
            f"{path}: has appeared during this run: another conversion was writing here"
        )
    record_file = os.path.join(folder, prefix + ".rec")
    if os.path.exists(record_file):
        os.replace(record_file, os.path.join(part_folder(folder, prefix), prefix + ".rec"))


def publish(folder: str, prefix: str, manifest: Manifest) -> None:
    """Rename the finished files into `folder`, the manifest last, and remove the part folder."""
    part = part_folder(folder, prefix)
    part_manifest = manifest_path(part, prefix)
    write_durably(part_manifest, [manifest_bytes(manifest)])
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
        if os.path.exists(os.path.join(part, JOURNAL_NAME)):
            for name in [*names, JOURNAL_NAME]:  # the journal last, in case of a kill
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(part, name))
        os.rmdir(part)


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
