# SPDX-License-Identifier: Apache-2.0
"""Describe a data set from its files' sizes and the manifests of `prepare`; reads no record."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

from mxresnet.bounded_read import read_file
from mxresnet.config import Config
from mxresnet.errors import UserError

IMAGENET_TRAIN_EXAMPLES = 1281167
IMAGENET_VAL_EXAMPLES = 50000
IMAGENET_CLASSES = 1000
MANIFEST_FORMAT = "mxresnet-recordio"
MANIFEST_VERSION = 2
# Version 1, which has no sum of its own, is read too.
MANIFEST_VERSION_WITHOUT_SUM = 1
# The last field of the file: the SHA-256 of all bytes before it (hexadecimal).
_SUM_BEGIN, _SUM_END = b'\n "manifest_sha256": "', b'"\n}\n'
CONVERT_COMMAND = "python -m prepare.imagenet SOURCE DESTINATION"
_CONVERT_AGAIN = f"convert the data set again with: {CONVERT_COMMAND}"
_MIN_INDEX_LINE_BYTES = len("0\t0\n")
# That of ImageNet has 0.1 MB, but each skipped or unusual image is listed.
_MAX_MANIFEST_BYTES = 512 << 20


@dataclass(frozen=True)
class DataSet:
    """The number of images and classes of a data set.

    Attributes:
        train_examples: training images in one epoch.
        val_examples: validation images.
        classes: number of classes.
        has_manifests: False when there is no manifest and the counts are those of the settings.
        has_sums: False when a manifest is of the version that has no sum of its own.
        class_names: in the order of the labels; empty without manifests.
    """

    train_examples: int
    val_examples: int
    classes: int
    has_manifests: bool
    has_sums: bool = True
    class_names: Tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class _Manifest:
    """The part of a manifest that training uses; class_names are in label order."""

    examples: int
    class_names: List[str]
    has_sum: bool


def describe(config: Config) -> DataSet:
    """Return the counts of the data set that the settings name.

    Raises:
        UserError: a file is missing or damaged, or the settings contradict the manifests or the
            sizes of the files.
    """
    if config.synth_data:
        return _counts_from_settings(config, has_manifests=True)
    manifests = {}
    for prefix, name in (("train", "training"), ("val", "validation")):
        records = config.path(f"data_{prefix}")
        _check_file(records, f"{name} records")
        _check_file(config.path(f"data_{prefix}_idx"), f"index of the {name} records")
        manifests[prefix] = _read_manifest(_manifest_path(config, prefix), prefix)
    _check_different_files(config)
    train, val = manifests["train"], manifests["val"]
    if train and val:
        _check_same_classes(train, val)
        _check_settings(config, train, val)
        classes = len(train.class_names)
        data = DataSet(
            config.num_examples or train.examples,
            val.examples,
            classes,
            has_manifests=True,
            has_sums=train.has_sum and val.has_sum,
            class_names=tuple(train.class_names),
        )
    elif train or val:
        found, missing = ("train", "val") if train else ("val", "train")
        raise UserError(
            f"manifest {_manifest_path(config, missing)} does not exist, but "
            f"{_manifest_path(config, found)} does: the conversion is not finished, or files of "
            f"two data sets are mixed: {_CONVERT_AGAIN}"
        )
    else:
        data = _counts_from_settings(config, has_manifests=False)
    _check_index_size(config, "train", data.train_examples)
    _check_index_size(config, "val", data.val_examples)
    return data


def _manifest_path(config: Config, prefix: str) -> str:
    return os.path.splitext(config.path(f"data_{prefix}"))[0] + ".json"


def _check_index_size(config: Config, prefix: str, examples: int) -> None:
    """Raise UserError if an index is too small for a number of records; it is not read."""
    path = config.path(f"data_{prefix}_idx")
    size = os.path.getsize(path)
    if examples > size // _MIN_INDEX_LINE_BYTES:
        raise UserError(
            f"{path} has {size} bytes, too few for an index of {examples} records: set "
            f"--num-examples and --num-val-examples to the data set's counts, or {_CONVERT_AGAIN}"
        )


def _counts_from_settings(config: Config, has_manifests: bool) -> DataSet:
    """Return the counts of the settings, or ImageNet's where a setting is 0."""
    return DataSet(
        config.num_examples or IMAGENET_TRAIN_EXAMPLES,
        config.num_val_examples or IMAGENET_VAL_EXAMPLES,
        config.num_classes or IMAGENET_CLASSES,
        has_manifests,
    )


def _check_file(path: str, contents: str) -> None:
    """Raise UserError unless `path` is a readable file that is not empty."""
    if not os.path.isfile(path):
        raise UserError(
            f"{contents}: file {path} does not exist: set --data-root to the folder of the "
            f"data set, or make one with: {CONVERT_COMMAND}"
        )
    if not os.access(path, os.R_OK):
        raise UserError(
            f"{contents}: file {path} cannot be read by this user: change its permissions"
        )
    if os.path.getsize(path) == 0:
        raise UserError(f"{contents}: file {path} is empty: {_CONVERT_AGAIN}")


def _check_different_files(config: Config) -> None:
    """Raise UserError if the training records are the validation records too."""
    train, val = config.path("data_train"), config.path("data_val")
    if os.path.samefile(train, val):
        raise UserError(
            f"the validation records {val} are the file of the training records {train}: an "
            "accuracy on training images is no result: set --data-val to the validation records"
        )


def _read_manifest(path: str, prefix: str) -> Optional[_Manifest]:
    """Return the manifest of a split, "train" or "val", or None when the file does not exist.

    Raises:
        UserError: the file is not a manifest of this split, or does not match the files in its
            folder.
    """
    try:
        content = read_file(path, _MAX_MANIFEST_BYTES)
        manifest = json.loads(content.decode())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"manifest {path} cannot be read ({error}): {_CONVERT_AGAIN}") from None
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != MANIFEST_FORMAT
        or type(manifest.get("version")) is not int
        or manifest["version"] not in (MANIFEST_VERSION, MANIFEST_VERSION_WITHOUT_SUM)
    ):
        raise UserError(
            f"manifest {path} is not of format {MANIFEST_FORMAT} version {MANIFEST_VERSION}: "
            f"{_CONVERT_AGAIN}"
        )
    if manifest.get("complete") is not True:
        raise UserError(
            f"manifest {path} marks the data set as incomplete: run python -m prepare.imagenet "
            "again to complete it"
        )
    if manifest.get("prefix", prefix) != prefix:
        raise UserError(
            f"manifest {path} describes records of the split {manifest['prefix']!r}, and "
            f"--data-{prefix} names them: set it to the records of the split {prefix!r}"
        )
    _check_file_sizes(path, manifest.get("files"))
    counts = _parse_counts(path, manifest)
    if (counts.has_sum or _SUM_BEGIN in content) and not _is_sum_right(content):
        raise UserError(
            f"manifest {path} is damaged: its content differs from its sum: {_CONVERT_AGAIN}"
        )
    return counts


def _is_sum_right(content: bytes) -> bool:
    """Return whether the last field of a manifest is the SHA-256 of the bytes before it."""
    fields, begin, end = content.rpartition(_SUM_BEGIN)
    return bool(begin) and end == hashlib.sha256(fields).hexdigest().encode() + _SUM_END


def _check_file_sizes(manifest_path: str, files: Any) -> None:
    """Raise UserError unless the files that training reads have the sizes in the manifest.

    Args:
        files: the manifest's value of "files": {file name: {"bytes": size, ...}}.
    """
    stem = os.path.splitext(os.path.basename(manifest_path))[0]
    if (
        not isinstance(files, dict)
        or not all(isinstance(facts, dict) and "bytes" in facts for facts in files.values())
        or not {f"{stem}.rec", f"{stem}.idx"} <= files.keys()
    ):
        raise UserError(
            f'manifest {manifest_path} has no list of files with their sizes ("files"), or '
            f"{stem}.rec or {stem}.idx is not in it: {_CONVERT_AGAIN}"
        )
    for name, facts in files.items():
        if not name.endswith((".rec", ".idx")):
            continue  # training reads no other files
        path = os.path.join(os.path.dirname(manifest_path), name)
        size = os.path.getsize(path) if os.path.exists(path) else None
        if size != facts["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(
                f"{path} {found}, but its manifest {manifest_path} lists {facts['bytes']} bytes: "
                f"{_CONVERT_AGAIN}"
            )


def _parse_counts(path: str, manifest: Dict[str, Any]) -> _Manifest:
    """Return the number of images and the class names; raise UserError where they are invalid."""
    examples, classes = manifest.get("examples"), manifest.get("classes")
    if not isinstance(examples, int) or isinstance(examples, bool) or examples < 1:
        raise UserError(
            f'manifest {path} has no positive number of images ("examples"): {_CONVERT_AGAIN}'
        )
    if (
        not isinstance(classes, list)
        or not classes
        or not all(
            isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and repr(entry.get("label")) == str(number)
            for number, entry in enumerate(classes)
        )
    ):
        raise UserError(
            f'manifest {path} has no list of named classes in the order of their labels ("classes")'
            f": {_CONVERT_AGAIN}"
        )
    names = [entry["name"] for entry in classes]
    if len(set(names)) != len(names):
        raise UserError(f"manifest {path} has a class name twice: {_CONVERT_AGAIN}")
    return _Manifest(examples, names, manifest["version"] != MANIFEST_VERSION_WITHOUT_SUM)


def _check_same_classes(train: _Manifest, val: _Manifest) -> None:
    """Raise UserError unless both manifests have the same classes in the same order."""
    if train.class_names != val.class_names:
        examples = [repr(name) for name in sorted(set(train.class_names) ^ set(val.class_names))]
        raise UserError(
            "the training and the validation set have different classes "
            f"(for example {', '.join(examples[:3]) or 'in another order'}): {_CONVERT_AGAIN}"
        )


def _check_settings(config: Config, train: _Manifest, val: _Manifest) -> None:
    """Raise UserError when a count in the settings contradicts the manifests."""
    folder = os.path.dirname(config.path("data_train"))
    for flag, setting, count in (
        ("--num-classes", config.num_classes, len(train.class_names)),
        ("--num-val-examples", config.num_val_examples, val.examples),
    ):
        if setting not in (0, count):
            raise UserError(
                f"{flag} {setting} contradicts the data set in {folder}, which has {count}: "
                "leave the flag out to use the data set's own count"
            )
    if config.num_examples > train.examples:
        raise UserError(
            f"--num-examples {config.num_examples} exceeds the {train.examples} training images "
            f"of the data set in {folder}: the flag can only shorten an epoch"
        )
