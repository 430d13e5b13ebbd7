# SPDX-License-Identifier: Apache-2.0
"""The manifest of a finished split: its content, its file, and the checks when it is read."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any, Dict, List, Optional, TypedDict, cast

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
