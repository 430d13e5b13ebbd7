# SPDX-License-Identifier: Apache-2.0
"""Give the validation images the classes of the label files, or compare them with the folders."""

from __future__ import annotations

import posixpath
from typing import Dict, Iterable, List, Sequence, Tuple

from prepare.listing import Folder, Listing, Problem, SourceError
from prepare.val_labels import LabelFile, image_number, read_label_file, read_label_files

MAX_CONTRADICTIONS = 50  # images that are named for each label file; the others are only counted

Image = Tuple[str, str]  # folder, relative to the top, and name
Contradictions = Iterable[Tuple[str, str]]  # path of an image, relative to the top, and reason


def apply_label_files(listing: Listing, paths: Sequence[str]) -> None:
    """Give each validation image the class that the label files name; change only `listing`.

    If there are none at the top, compare the label files with the folders that the images are in.
    Contradictions and missing images are added to the problems of `listing`.

    Args:
        listing: the validation images; changed in place.
        paths: the label files, at least one.

    Raises:
        SourceError: a label file is malformed, or only some images are in folders.
        OSError: a label file cannot be read.
    """
    top = next((folder for folder in listing.folders if not folder.path and folder.names), None)
    if top is None:
        compare_with_folders(listing, paths)
        return
    inside = [folder for folder in listing.folders if folder.path and folder.names]
    if inside:
        raise SourceError(
            f"{listing.top}: {top.names[0]} (one of {len(top.names)}) is directly in it, "
            f"{inside[0].paths()[0]} is in a folder: move each image into the folder of its class, "
            "or all images out of these folders"
        )
    label_files = read_label_files(paths)
    classes = agreed_classes(listing, label_files, sorted(top.names))
    listing.folders.remove(top)
    folders: Dict[str, Folder] = {}
    for name, size, offset, mtime_ns in zip(top.names, top.sizes, top.offsets, top.mtimes_ns):
        label = classes.get(name)
        if label is not None:
            folder = folders.setdefault(label, Folder(label, top.archive, location=top.path))
            folder.add(name, size, offset, mtime_ns)
    listing.folders += folders.values()
    add_count_problems(listing, label_files, [(top.path, name) for name in sorted(top.names)])


def agreed_classes(
    listing: Listing, label_files: Sequence[LabelFile], names: Sequence[str]
) -> Dict[str, str]:
    """Return {image name: class} of the images with a label.

    A problem is added to `listing` for each image that a file has no label for, or another one.
    """
    classes: Dict[str, str] = {}
    for label_file in label_files:
        known = label_file.classes_of(names)
        add_unlabelled(listing, label_file, (name for name in names if name not in known))
        conflicts = (
            (
                name,
                f"its class is {classes[name]} in {label_files[0].path}, but {label} in "
                f"{label_file.path}: remove the file that is wrong",
            )
            for name, label in known.items()
            if classes.setdefault(name, label) != label
        )
        add_contradictions(listing, label_file, conflicts)
    return classes


def compare_with_folders(listing: Listing, paths: Sequence[str]) -> None:
    """Check that the images are in the folders of the classes that the label files give.

    An image can be compared if its name alone gives the label. Problems are added to `listing`, and
    a note for each label file, whatever it contains, that cannot be compared with any image.

    Args:
        listing: the validation images; each in a folder.
        paths: the label files.

    Raises:
        SourceError: a label file is malformed, and there are images with official names.
        OSError: a label file cannot be read.
    """
    images = sorted((folder.path, name) for folder in listing.folders for name in folder.names)
    any_official = any(image_number(name) is not None for _, name in images)
    label_files = read_label_files(paths) if any_official else readable_label_files(listing, paths)
    used: List[LabelFile] = []
    for label_file in label_files:
        comparable = [image for image in images if label_file.identifies(image[1])]
        if comparable:
            compare_images(listing, label_file, comparable)
            used.append(label_file)
        else:
            add_unused_note(listing, label_file.path)
    add_count_problems(listing, used, images)


def readable_label_files(listing: Listing, paths: Sequence[str]) -> List[LabelFile]:
    """Read label files that may not be needed; add a note for each that is malformed."""
    label_files: List[LabelFile] = []
    for path in paths:
        try:
            label_files.append(read_label_file(path))
        except SourceError:
            add_unused_note(listing, path)
    return label_files


def compare_images(listing: Listing, label_file: LabelFile, images: Sequence[Image]) -> None:
    """Add a problem for each image that is not in the folder of its class in a label file."""
    classes = label_file.classes_of([name for _, name in images])
    unlabelled = (f"{folder}/{name}" for folder, name in images if name not in classes)
    add_unlabelled(listing, label_file, unlabelled)
    misplaced = (
        (
            f"{folder}/{name}",
            f"is in {folder}, but its class is {classes[name]} in {label_file.path}: move the "
            "image, or remove that file",
        )
        for folder, name in images
        if classes.get(name, folder) != folder
    )
    add_contradictions(listing, label_file, misplaced)


def add_unlabelled(listing: Listing, label_file: LabelFile, paths: Iterable[str]) -> None:
    """Add a problem for each image that a label file has no label for."""
    reason = f"{label_file.path} has no label for it: add the label, or remove the image"
    add_contradictions(listing, label_file, ((path, reason) for path in paths))


def add_contradictions(
    listing: Listing, label_file: LabelFile, contradictions: Contradictions
) -> None:
    """Add a problem for each contradiction, but only one for all after MAX_CONTRADICTIONS."""
    count = 0
    for count, (path, reason) in enumerate(contradictions, 1):
        if count <= MAX_CONTRADICTIONS:
            listing.problems.append(Problem(f"{listing.top}/{path}", reason, skippable=False))
    if count > MAX_CONTRADICTIONS:
        more = f"is wrong for {count - MAX_CONTRADICTIONS} more images in the same way"
        listing.problems.append(Problem(label_file.path, more, skippable=False))


def add_count_problems(
    listing: Listing, label_files: Sequence[LabelFile], images: Sequence[Image]
) -> None:
    """Add a problem for each missing image, each class without images and each repeated number.

    Args:
        listing: the validation images, in the folders of their classes.
        label_files: the files that give their classes.
        images: where they are.
    """
    names = [name for _, name in images]
    with_images = {folder.path for folder in listing.folders if folder.names}
    missing: Dict[str, Problem] = {}
    for label_file in label_files:
        for label in sorted(label_file.classes() - with_images):
            reason = (
                f"no image of this class exists, but {label_file.path} has labels for it: add the "
                "images, or use a label file without this class"
            )
            missing.setdefault(label, Problem(f"{listing.top}/{label}", reason, skippable=False))
        for name, label in label_file.missing_images(names).items():
            if label in with_images:
                reason = f"does not exist, but {label_file.path} has a label for it"
                missing.setdefault(name, Problem(f"{listing.top}/{name}", reason))
    listing.problems += missing.values()
    if label_files:
        add_repeated_numbers(listing, images)


def add_repeated_numbers(listing: Listing, images: Sequence[Image]) -> None:
    """Add a problem for each image whose official number another image in its folder has too.

    Where these images are in two folders, one of them contradicts its label.
    """
    by_number: Dict[Tuple[str, int], List[str]] = {}
    for folder, name in images:
        number = image_number(name)
        if number is not None:
            path = posixpath.join(listing.top, folder, name)
            by_number.setdefault((folder, number), []).append(path)
    for (_, number), image_paths in by_number.items():
        if len(image_paths) > 1:
            reason = f"more than one image has the number {number}: keep only one of them"
            listing.problems += [Problem(path, reason) for path in image_paths]


def add_unused_note(listing: Listing, path: str) -> None:
    """Add a note that a label file is not used because the images are in class folders."""
    listing.notes.append(
        f"labels not used: {path}: the images are in class folders, and none has a name by which "
        "its label could be compared"
    )
