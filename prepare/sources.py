# SPDX-License-Identifier: Apache-2.0
"""Find the training and the validation images in a source folder, and how they are stored."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, replace
from typing import Dict, List, Optional, Set, Tuple

from prepare import devkit_files, tar_index, val_classes, val_labels
from prepare.bounded_read import file_sha256
from prepare.folder_index import add_files_beside_archives, is_folder, list_folder
from prepare.listing import Listing, SourceError
from prepare.regular_file import NotRegularFileError

OFFICIAL_ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}


@dataclass(frozen=True)
class Split:
    """Where the training or the validation images are, and how they are stored."""

    path: str
    kind: str  # "folders", "class archives", "archive" or "missing"
    label_files: Tuple[str, ...] = ()  # classes of images that are not in class folders
    archive_folder: Optional[str] = None  # folder that should contain nothing but the archives
    faults: Tuple[str, ...] = ()  # why the split cannot be listed, if it cannot
    notes: Tuple[str, ...] = ()  # to print

    def list(self, workers: int) -> Listing:
        """List the images on `workers` threads.

        Raises:
            SourceError: the source cannot be used.
            OSError: the storage failed.
        """
        if self.faults:
            raise SourceError(*self.faults)
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
        listing.notes += self.notes
        return listing

    def identity(self) -> str:
        """Return a SHA-256 that changes when an archive changes, without listing its images.

        It covers the names, sizes and modification times of the archives, of all files next to
        class archives or in `archive_folder`, and of the label files, of which it covers the
        content too. It does not cover the images in class folders.
        """
        digest = hashlib.sha256(self.kind.encode())
        if self.kind == "missing":
            return digest.hexdigest()
        folder = self.archive_folder if self.kind == "archive" else self.path
        paths = [self.path]
        if folder is not None:
            paths = sorted(os.path.join(folder, name) for name in os.listdir(folder))
        lines = [identity_line(path) for path in paths]
        for label_file in self.label_files:
            lines.append(identity_line(label_file))
            lines += [content_line(path) for path in devkit_files.files_read(label_file)]
        digest.update("".join(lines).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def identity_line(path: str) -> str:
    """Return a line with the name, the size and the modification time of a file or a folder."""
    status = os.stat(path) if os.path.exists(path) else os.lstat(path)
    size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return f"{os.path.basename(path)} {size} {status.st_mtime_ns}\n"


def content_line(path: str) -> str:
    """Return a line with the name and the SHA-256 of a label file, or why it is not read."""
    try:
        too_large = os.path.getsize(path) > val_labels.MAX_LABEL_FILE_BYTES
        found = "too large" if too_large else file_sha256(path)
    except OSError as error:  # reading the labels reports it
        found = str(error.errno)
    return f"{os.path.basename(path)} {found}\n"


def find_splits(source: str, label_file: Optional[str] = None) -> Dict[str, Split]:
    """Find the training and the validation split in a source folder.

    Args:
        source: path of the folder.
        label_file: one more file of validation labels, or None.

    Returns:
        {"train": Split, "val": Split}.

    Raises:
        SourceError: both splits are missing.
        OSError: a path does not exist or cannot be read.
    """
    source = os.path.normpath(source)
    names = sorted(os.listdir(source))
    splits = {prefix: find_split(source, prefix) for prefix in OFFICIAL_ARCHIVES}
    if all(split.kind == "missing" for split in splits.values()):
        wanted = " and ".join(
            f"neither a folder {prefix}/ that is not empty nor {official}"
            for prefix, official in OFFICIAL_ARCHIVES.items()
        )
        raise SourceError(f"{source}: contains {wanted}: name the folder that contains them")
    label_files: List[str] = []
    faults = list(splits["val"].faults)
    for path in (os.path.join(source, name) for name in names):
        if val_labels.is_label_file_name(os.path.basename(path)):
            try:
                val_labels.check_label_path(path)
                label_files.append(path)
            except NotRegularFileError as error:
                faults.append(f"{path}: {error.reason}")
    if label_file is not None:
        val_labels.check_label_path(label_file)
        label_files.append(label_file)
    splits["val"] = replace(splits["val"], label_files=tuple(label_files), faults=tuple(faults))
    return splits


def find_split(source: str, prefix: str) -> Split:
    """Find one split; prefer class folders to the archives that they may be unpacked from.

    A split that is missing or only partly unpacked has faults.

    Args:
        source: path of the source folder.
        prefix: "train" or "val".
    """
    folder, official = os.path.join(source, prefix), OFFICIAL_ARCHIVES[prefix]
    archives_beside = [
        path
        for path in (os.path.join(source, name) for name in (official, f"{prefix}.tar"))
        if os.path.lexists(path)
    ]
    if os.path.isdir(folder) and os.listdir(folder):
        split = find_split_in_folder(folder, official)
        notes = [f"{path} is not read, because {folder} is not empty" for path in archives_beside]
        return replace(split, notes=(*split.notes, *notes))
    if archives_beside:
        used, *unused = archives_beside
        notes = [f"{path} is not read, because {used} is next to it" for path in unused]
        return Split(used, "archive", notes=tuple(notes))
    fault = (
        f"{source}: contains neither a folder {prefix}/ that is not empty nor {official}: "
        "name the folder that contains one of them"
    )
    return Split(source, "missing", faults=(fault,))


def find_split_in_folder(folder: str, official: str) -> Split:
    """Find one split in its folder, which is not empty.

    Args:
        folder: path of the folder, SRC/train or SRC/val.
        official: name of the official archive, which may be in it.
    """
    archives, subfolders = class_archives_and_folders(folder)
    if os.path.lexists(os.path.join(folder, official)) and not subfolders:
        return Split(os.path.join(folder, official), "archive", archive_folder=folder)
    if archives and not subfolders:
        return Split(folder, "class archives", archive_folder=folder)
    packed = [name for name in archives if os.path.splitext(name)[0] not in subfolders]
    faults = tuple(
        f"{os.path.join(folder, name)}: not unpacked, although there are class folders "
        "next to it, so its images would be missing: unpack it, or move it away"
        for name in packed
    )
    unpacked = [name for name in archives if name not in packed]
    notes = [
        f"{len(unpacked)} class archives in {folder}, such as {name}, are not read, because "
        "folders of the same names are next to them"
        for name in unpacked[:1]
    ]
    if os.path.lexists(os.path.join(folder, official)):
        notes.append(f"{os.path.join(folder, official)} is not read, because of the class folders")
    return Split(folder, "folders", faults=faults, notes=tuple(notes))


def class_archives_and_folders(folder: str) -> Tuple[List[str], Set[str]]:
    """Return the sorted names of class archives, and the names of sub-folders, in a folder."""
    archives, subfolders = [], set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_folder(entry):
                subfolders.add(entry.name)
            elif is_class_archive_name(entry.name):
                archives.append(entry.name)
    return sorted(archives), subfolders


def is_class_archive_name(name: str) -> bool:
    """Return whether a file of this name is a class archive: a .tar file, but no official one.

    Nor is it the file ._NAME.tar with metadata that macOS adds on foreign file systems.
    """
    official = name in OFFICIAL_ARCHIVES.values()
    return name.endswith(".tar") and not official and not name.startswith("._")
