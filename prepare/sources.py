# SPDX-License-Identifier: Apache-2.0
"""Find the training and the validation images in a source folder, and how they are stored."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, replace
from typing import Dict, List, Optional, Set, Tuple

from prepare import tar_index, val_classes, val_labels
from prepare.folder_index import add_files_beside_archives, is_folder, list_folder
from prepare.listing import Listing, SourceError

OFFICIAL_ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}


@dataclass(frozen=True)
class Split:
    """Where the training or the validation images are, and how they are stored."""

    path: str
    kind: str  # "folders", "class archives" or "archive"
    label_files: Tuple[str, ...] = ()  # classes of images that are not in class folders
    archive_folder: Optional[str] = None  # folder that should contain nothing but the archives

    def list(self, workers: int) -> Listing:
        """List the images on `workers` threads.

        Raises:
            SourceError: the source cannot be used.
            OSError: the storage failed.
        """
        if self.kind == "folders":
            listing = list_folder(self.path, workers)
        elif self.kind == "archive":
            listing = tar_index.list_archive(self.path, workers)
        else:
            archives, _ = class_archives_and_folders(self.path)
            listing = tar_index.list_class_archives(self.path, archives, workers)
        if self.label_files:
            val_classes.apply_label_files(listing, self.label_files)
        if self.archive_folder is not None:
            add_files_beside_archives(self.archive_folder, listing)
        return listing

    def identity(self) -> str:
        """Return a SHA-256 that changes when an archive changes, without listing its images.

        It covers the names, sizes and modification times of the top-level entries and of the label
        files; those of images in class folders are not among them.
        """
        digest = hashlib.sha256(self.kind.encode())
        if self.kind == "archive":
            paths = [self.path]
        else:
            paths = sorted(os.path.join(self.path, name) for name in os.listdir(self.path))
        for path in [*paths, *self.label_files]:
            status = os.stat(path) if os.path.exists(path) else os.lstat(path)
            size = status.st_size if stat.S_ISREG(status.st_mode) else 0
            line = f"{os.path.basename(path)} {size} {status.st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def find_splits(source: str, label_file: Optional[str] = None) -> Dict[str, Split]:
    """Find the training and the validation split in a source folder.

    Args:
        source: path of the folder.
        label_file: one more file of validation labels, or None.

    Returns:
        {"train": Split, "val": Split}.

    Raises:
        SourceError: a split is missing or only partly unpacked.
        OSError: a path does not exist or cannot be read.
    """
    source = os.path.normpath(source)
    names = sorted(os.listdir(source))
    splits: Dict[str, Split] = {}
    errors: List[str] = []
    missing: List[str] = []
    for prefix, official in OFFICIAL_ARCHIVES.items():
        try:
            split = find_split(source, prefix)
        except SourceError as error:
            errors += error.messages
            continue
        if split is None:
            missing.append(f"neither a folder {prefix}/ that is not empty nor {official}")
        else:
            splits[prefix] = split
    if missing:
        them = "one of them" if len(missing) == 1 else "them"
        errors.append(
            f"{source}: contains {', and '.join(missing)}: name the folder that contains {them}"
        )
    if errors:
        raise SourceError(*errors)
    label_files = [
        os.path.join(source, name) for name in names if val_labels.is_label_file_name(name)
    ]
    if label_file is not None:
        os.stat(label_file)  # raises FileNotFoundError and similar errors
        label_files.append(label_file)
    splits["val"] = replace(splits["val"], label_files=tuple(label_files))
    return splits


def find_split(source: str, prefix: str) -> Optional[Split]:
    """Find one split; prefer class folders to the archives that they may be unpacked from.

    Return None if the split is missing.

    Args:
        source: path of the source folder.
        prefix: "train" or "val".

    Raises:
        SourceError: the split is only partly unpacked.
    """
    folder, official = os.path.join(source, prefix), OFFICIAL_ARCHIVES[prefix]
    if os.path.isdir(folder) and os.listdir(folder):
        archives, subfolders = class_archives_and_folders(folder)
        if os.path.exists(os.path.join(folder, official)) and not subfolders:
            return Split(os.path.join(folder, official), "archive", archive_folder=folder)
        if archives and not subfolders:
            return Split(folder, "class archives", archive_folder=folder)
        packed = [name for name in archives if os.path.splitext(name)[0] not in subfolders]
        if packed:
            raise SourceError(
                *(
                    f"{os.path.join(folder, name)}: not unpacked, although there are class folders "
                    "next to it, so its images would be missing: unpack it, or move it away"
                    for name in packed
                )
            )
        return Split(folder, "folders")
    for name in (official, f"{prefix}.tar"):
        if os.path.isfile(os.path.join(source, name)):
            return Split(os.path.join(source, name), "archive")
    return None


def class_archives_and_folders(folder: str) -> Tuple[List[str], Set[str]]:
    """Return the sorted names of class archives, and the names of sub-folders, in a folder.

    Class archives are all .tar files other than the official ones.
    """
    archives, subfolders = [], set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_folder(entry):
                subfolders.add(entry.name)
            elif entry.name.endswith(".tar") and entry.name not in OFFICIAL_ARCHIVES.values():
                archives.append(entry.name)
    return sorted(archives), subfolders
