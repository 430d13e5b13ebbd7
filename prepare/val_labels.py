# SPDX-License-Identifier: Apache-2.0
"""Find the classes of validation images that are not in class folders.

They come from the ImageNet devkit, a shell script that moves the images (valprep.sh) or a text file
with one synset a line.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import Dict, Iterable, List, Optional, Sequence

from prepare.devkit import is_devkit, read_train_counts, read_validation_synsets
from prepare.listing import Folder, Listing, Problem, SourceError

LABEL_FILE_NAME = re.compile(
    r"ILSVRC2012_devkit_t12(\.tar\.gz)?|valprep.*\.sh|.*(synset|val).*labels.*\.txt", re.IGNORECASE
)
OFFICIAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")
SYNSET = re.compile(r"[^/\s]+")


def is_label_file_name(name: str) -> bool:
    """Return whether a file of this name in the source folder is read for validation labels."""
    return LABEL_FILE_NAME.fullmatch(name) is not None


def image_number(name: str) -> Optional[int]:
    """Return the number in an official image name, such as 7 of ILSVRC2012_val_00000007.JPEG.

    Return None for any other name.
    """
    match = OFFICIAL_NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def image_numbers(names: Iterable[str]) -> Optional[Dict[str, int]]:
    """Return {name: number} of official image names, or None if any name is not official."""
    numbers = {}
    for name in names:
        number = image_number(name)
        if number is None:
            return None
        numbers[name] = number
    return numbers


class LabelFile:
    """The content of one file: classes by image name, or classes in the order of the images."""

    def __init__(
        self,
        path: str,
        by_name: Optional[Dict[str, str]] = None,
        in_order: Sequence[str] = (),
    ) -> None:
        """Hold the content of a file.

        Args:
            path: path of the file, for messages.
            by_name: {image name: class}, or None.
            in_order: the class of each image, in the order of image numbers or names.
        """
        self.path, self._by_name, self._in_order = path, by_name, in_order

    def classes_of(self, names: Sequence[str]) -> Dict[str, str]:
        """Return {image name: class} of all these images.

        Raises:
            SourceError: the file has no class for an image, or not one line for each image.
        """
        found = self._known_classes(names)
        for name in names:
            if name not in found:
                raise SourceError(
                    f"{self.path}: has no label for the image {name}: add it, or remove the image"
                )
        return found

    def _known_classes(self, names: Sequence[str]) -> Dict[str, str]:
        if self._by_name is not None:
            return {name: self._by_name[name] for name in names if name in self._by_name}
        # Use the numbers where possible: with positions, one missing image would shift the classes
        # of all later ones.
        numbers = image_numbers(names)
        if numbers is not None:
            return {
                name: self._in_order[number - 1]
                for name, number in numbers.items()
                if 1 <= number <= len(self._in_order)
            }
        if len(names) != len(self._in_order):
            raise SourceError(
                f"{self.path}: has {len(self._in_order)} lines for {len(names)} images: "
                f"it needs one line for each image"
            )
        return dict(zip(sorted(names), self._in_order))

    def missing_images(self, names: Iterable[str]) -> List[str]:
        """Return the names of images that have a label here but are not among `names`."""
        names = set(names)
        if self._by_name is not None:
            return sorted(set(self._by_name) - names)
        numbers = image_numbers(names)
        if numbers is None:
            return []
        found = set(numbers.values())  # not names, because their extensions may differ
        return [
            f"ILSVRC2012_val_{number:08d}.JPEG"
            for number in range(1, len(self._in_order) + 1)
            if number not in found
        ]


def read_label_file(path: str) -> LabelFile:
    """Read a label file of any kind, recognized by its content, or an unpacked devkit folder.

    Raises:
        SourceError: the content is malformed.
        OSError: the file cannot be read.
    """
    if is_devkit(path):
        return LabelFile(path, in_order=read_validation_synsets(path))
    try:
        with open(path, encoding="utf-8") as stream:
            lines = [line.strip() for line in stream if line.strip()]
    except UnicodeDecodeError:
        raise SourceError(f"{path}: neither a devkit archive nor a text file of labels") from None
    if any(line.startswith("mv ") for line in lines):
        return LabelFile(path, by_name=parse_moves(path, lines))
    lines = [line for line in lines if not line.startswith("#")]
    malformed = [line for line in lines if not SYNSET.fullmatch(line)]
    if malformed or not lines:
        fault = repr(malformed[0]) if malformed else "it is empty"
        raise SourceError(f"{path}: not a list with one synset a line: {fault}")
    return LabelFile(path, in_order=lines)


def parse_moves(path: str, lines: Iterable[str]) -> Dict[str, str]:
    """Return {image name: class} of the lines `mv IMAGE CLASS/` of a shell script.

    Args:
        path: path of the script, for messages.
        lines: its lines; those without an `mv` command are ignored.

    Raises:
        SourceError: an `mv` command is malformed, or two of them disagree.
    """
    classes: Dict[str, str] = {}
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an unterminated quotation
            words = line.split()[:1]
        if not words or words[0] != "mv":
            continue
        target = words[-1].rstrip("/")
        if len(words) != 3 or not SYNSET.fullmatch(target):
            raise SourceError(f"{path}: not a line `mv IMAGE CLASS/`: {line}")
        name = os.path.basename(words[1])
        if classes.setdefault(name, target) != target:
            raise SourceError(f"{path}: moves {name} to {classes[name]} and to {target}")
    return classes


def train_counts(paths: Iterable[str]) -> Dict[str, int]:
    """Return {synset: number of training images} from the first devkit that contains them.

    Args:
        paths: label files of any kind.

    Returns:
        The counts; empty when no file contains them.

    Raises:
        SourceError: a devkit is malformed.
    """
    for path in paths:
        if is_devkit(path):
            counts = read_train_counts(path)
            if counts is not None:
                return counts
    return {}


def apply_label_files(listing: Listing, paths: Sequence[str]) -> None:
    """Move images from the top of `listing` to the folders of their classes.

    If there are none at the top, check that the images are in the folders of their classes.

    Args:
        listing: the validation images; changed in place.
        paths: the label files, at least one.

    Raises:
        SourceError: the label files disagree with each other or with the folders.
        OSError: a label file cannot be read.
    """
    top = next((folder for folder in listing.folders if not folder.path and folder.names), None)
    if top is None:
        check_class_folders(listing, paths)
        return
    label_files = [read_label_file(path) for path in paths]
    classes = consistent_classes(label_files, top.names)
    listing.folders.remove(top)
    listing.flat = True
    folders: Dict[str, Folder] = {}
    for name, size, offset, mtime_ns in zip(top.names, top.sizes, top.offsets, top.mtimes_ns):
        folder = folders.setdefault(classes[name], Folder(classes[name], archive=top.archive))
        folder.add(name, size, offset, mtime_ns)
    listing.folders += folders.values()
    reason = f"does not exist, but {label_files[0].path} has a label for it"
    for name in label_files[0].missing_images(top.names):
        listing.problems.append(Problem(f"{listing.top}/{name}", reason))


def consistent_classes(label_files: Sequence[LabelFile], names: Sequence[str]) -> Dict[str, str]:
    """Return {image name: class}, the same in all label files.

    Raises:
        SourceError: two files disagree, or one has no label for an image.
    """
    first = label_files[0]
    classes = first.classes_of(names)
    for other in label_files[1:]:
        for name, label in other.classes_of(names).items():
            if label != classes[name]:
                raise SourceError(
                    f"{name}: its class is {classes[name]} in {first.path}, but {label} in "
                    f"{other.path}: remove the label file that is wrong"
                )
    return classes


def check_class_folders(listing: Listing, paths: Sequence[str]) -> None:
    """Check that images with official names are in the folders of their classes.

    Args:
        listing: the validation images.
        paths: the label files.

    Raises:
        SourceError: an image is in another folder, or two label files disagree.
        OSError: a label file cannot be read.
    """
    # Pairs and not a dict, because a name may occur in two folders.
    locations = [
        (name, folder.path)
        for folder in listing.folders
        for name in folder.names
        if OFFICIAL_NAME.fullmatch(name)
    ]
    if not locations:
        return
    label_files = [read_label_file(path) for path in paths]
    classes = consistent_classes(label_files, sorted({name for name, _ in locations}))
    for name, folder_path in locations:
        if folder_path != classes[name]:
            raise SourceError(
                f"{listing.top}/{name}: is in {folder_path}, but its class is {classes[name]} in "
                f"{label_files[0].path}: move the image, or remove that file"
            )
