# SPDX-License-Identifier: Apache-2.0
"""Plan the records: image, label, key and size of each, in record order.

Reads no image and writes nothing.
"""

from __future__ import annotations

import hashlib
import posixpath
import random
from dataclasses import dataclass, replace
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from prepare import recordio
from prepare.file_state import FileState
from prepare.listing import EXTENSIONS, LOST_AND_FOUND, Folder, Listing, Problem, SourceError

# A worker reads this much at a time: large enough for low overhead, small enough for CPU caches.
PIECE_BYTES = 4 << 20
PIECE_RECORDS = 256
ARRAYS = ("keys", "labels", "sizes", "offsets", "archive_indices", "mtimes_ns")  # of a Plan
SHUFFLE_SEED = 100  # im2rec's, for the training and the validation split alike


@dataclass
class Plan:
    """The records of one split of the data set.

    Arrays and `paths` are in record order; sizes and offsets are in bytes.
    """

    prefix: str  # "train" or "val"
    top: str  # folder or archive that the images are in
    paths: List[str]  # class folder and name, as they are written to the .lst file
    keys: np.ndarray  # image number in the sorted walk, before shuffling
    labels: np.ndarray  # index into `classes`
    sizes: np.ndarray  # of the image
    offsets: np.ndarray  # of the image in its archive
    archive_indices: np.ndarray  # index into `archives`; -1: the image is its own file
    mtimes_ns: np.ndarray  # modification time of the image or its archive
    archives: List[str]
    archive_states: List[FileState]  # of each archive, when it was listed
    classes: List[str]
    # By class: the folder that its images are in, relative to the top; None: the class folders.
    image_folders: Optional[List[str]]
    problems: List[Problem]  # faults found without reading an image
    ignored: Dict[str, int]  # extension -> files that im2rec does not use either
    notes: List[str]  # to print: what else of the source is not used, and why
    left_out: int  # number of listed images that get no record because of a problem
    digest: str  # SHA-256 of everything that determines the output

    def pieces(self) -> List[Tuple[int, int]]:
        """Divide the records into pieces; return [(first record, last record + 1)].

        The result depends on nothing but the plan, so that a resumed run has the same pieces.
        """
        ends = np.cumsum(recordio.record_bytes(self.sizes))
        pieces, first, begin = [], 0, 0
        while first < len(ends):
            last = int(np.searchsorted(ends, begin + PIECE_BYTES, side="right"))
            last = min(max(last, first + 1), first + PIECE_RECORDS)
            pieces.append((first, last))
            first, begin = last, int(ends[last - 1])
        return pieces

    def source_path(self, record: int) -> str:
        """Return the path of a record's image relative to the top: of a file or a tar member."""
        if self.image_folders is None:
            return self.paths[record]
        folder = self.image_folders[self.labels[record]]
        return posixpath.join(folder, posixpath.basename(self.paths[record]))

    def select(self, records: Sequence[int]) -> Plan:
        """Return the plan of only these records (indices); it has no digest."""
        arrays = {name: getattr(self, name)[records] for name in ARRAYS}
        return replace(self, paths=[self.paths[record] for record in records], digest="", **arrays)

    def output_bytes(self) -> int:
        """Estimate the size in bytes of .rec, .idx, .lst and .sums together.

        The 4 bytes that each split at a magic word adds are not included.
        """
        name_bytes = 2 * sum(len(path) for path in self.paths)  # most names are ASCII; allow more
        lines_bytes = 60 * len(self.paths)
        return int(recordio.record_bytes(self.sizes).sum()) + name_bytes + lines_bytes


def make_plan(prefix: str, listing: Listing, allow_empty: bool = False) -> Plan:
    """Order and number the images of a listing; empty the listing's lists of names.

    Args:
        prefix: "train" or "val".
        listing: what the source contains.
        allow_empty: whether an image of 0 bytes is an image rather than a problem.

    Raises:
        SourceError: there is no image, or two folders are the same class.
    """
    folders = sorted(listing.folders, key=lambda folder: walk_order_key(folder.path))
    problems = listing.problems + empty_class_problems(listing, folders)
    folders = [folder for folder in folders if folder.names]
    if not folders and listing.problems:
        raise SourceError(*map(str, listing.problems))
    check_folders(listing.top, folders)
    paths, source_paths, columns = flatten(folders)
    problems += size_problems(listing.top, source_paths, columns["size"], allow_empty)
    problems += duplicate_problems(listing.top, paths, source_paths)
    order = record_order(len(paths))
    faulty = {problem.path for problem in problems}
    if faulty:
        usable = [
            key for key in order.tolist() if f"{listing.top}/{source_paths[key]}" not in faulty
        ]
        order = np.array(usable, dtype=np.int64)
    notes = listing.notes + unusual_class_notes(listing.top, folders)
    labels = columns["label"][order]
    archives = sorted({folder.archive for folder in folders if folder.archive})
    archive_of_class = [
        archives.index(folder.archive) if folder.archive else -1 for folder in folders
    ]
    plan = Plan(
        prefix=prefix,
        top=listing.top,
        paths=[paths[key] for key in order.tolist()],
        keys=order,
        labels=labels,
        sizes=columns["size"][order],
        offsets=columns["offset"][order],
        archive_indices=np.array(archive_of_class, dtype=np.int32)[labels],
        mtimes_ns=columns["mtime_ns"][order],
        archives=archives,
        archive_states=[listing.archive_states[archive] for archive in archives],
        classes=[folder.path or "." for folder in folders],
        image_folders=image_folders(folders),
        problems=problems,
        ignored=listing.ignored,
        notes=notes,
        left_out=len(paths) - len(order),
        digest="",
    )
    plan.digest = plan_digest(plan)
    return plan


def walk_order_key(path: str) -> Tuple[str, ...]:
    """Return a sort key: folder paths ("" is the top) sort as a sorted walk visits them."""
    return tuple(path.split("/")) if path else ()


def record_order(count: int) -> np.ndarray:
    """Return the image numbers 0 to `count` - 1 in the order of im2rec's records (int64)."""
    order = list(range(count))
    random.Random(SHUFFLE_SEED).shuffle(order)
    return np.array(order, dtype=np.int64)


def empty_class_problems(listing: Listing, folders: Sequence[Folder]) -> List[Problem]:
    """Return a problem for each folder, other than the top, with neither images nor folders.

    Folders that have a problem already, for instance because they cannot be listed, are left out.
    """
    top, named = listing.top, {problem.path for problem in listing.problems}
    parents = {posixpath.dirname(path) for path in named}
    problems = []
    for folder in folders:
        path = f"{top}/{folder.path}"
        is_empty = not folder.names and not folder.has_folders
        if is_empty and folder.path not in ("", LOST_AND_FOUND) and path not in named:
            found = "not one usable image" if path in parents else "0 images"
            reason = f"{found} in a class folder: fill or remove it"
            problems.append(Problem(path, reason, skippable=False))
    return problems


def check_folders(top: str, folders: Sequence[Folder]) -> None:
    """Check the folders with images, in walk order.

    Raises:
        SourceError: there is none, or two of them have the same path.
    """
    if not folders:
        raise SourceError(
            f"{top}: contains no image ({' '.join(EXTENSIONS)}): name the folder of a data set"
        )
    twice = [
        folder.path for folder, other in zip(folders, folders[1:]) if folder.path == other.path
    ]
    if twice:
        raise SourceError(
            *(f"{top}: contains the class {path} twice: remove one of them" for path in twice)
        )


def unusual_class_notes(top: str, folders: Sequence[Folder]) -> List[str]:
    """Return a note for each folder that is a class for im2rec, but may not be meant as one."""
    notes = []
    if len(folders) > 1 and not folders[0].path:
        notes.append(f"the images directly in {top} are a class of their own: .")
    for folder in folders:
        if any(part.startswith((".", "__MACOSX")) for part in folder.path.split("/")):
            notes.append(f"the images in {top}/{folder.path}, a hidden folder, are a class")
    return notes


def image_folders(folders: Sequence[Folder]) -> Optional[List[str]]:
    """Return where the images of each folder are, or None if they are in their class folders."""
    if all(folder.location is None for folder in folders):
        return None
    return [folder.path if folder.location is None else folder.location for folder in folders]


def flatten(
    folders: Sequence[Folder],
) -> Tuple[List[str], List[str], Dict[str, np.ndarray]]:
    """Return all images in walk order; empty the folders' lists of names.

    The lists are emptied because two copies of a million names need much memory.

    Returns:
        The paths in class folders, the paths in the source (both relative to the top), and arrays
        (int64, one entry for each image) called size, offset, mtime_ns and label.
    """
    locations = image_folders(folders)
    paths: List[str] = []
    source_paths: List[str] = [] if locations else paths
    columns: Dict[str, List[np.ndarray]] = {"size": [], "offset": [], "mtime_ns": [], "label": []}
    for label, folder in enumerate(folders):
        order = sorted(range(len(folder.names)), key=folder.names.__getitem__)
        folder_paths = folder.paths()
        paths += [folder_paths[index] for index in order]
        if locations:
            location = locations[label]
            source_paths += [posixpath.join(location, folder.names[index]) for index in order]
        folder.names = []
        columns["size"].append(np.array(folder.sizes, dtype=np.int64)[order])
        columns["offset"].append(np.array(folder.offsets, dtype=np.int64)[order])
        columns["mtime_ns"].append(np.array(folder.mtimes_ns, dtype=np.int64)[order])
        columns["label"].append(np.full(len(order), label, dtype=np.int64))
    return paths, source_paths, {name: np.concatenate(arrays) for name, arrays in columns.items()}


def size_problems(
    top: str, paths: Sequence[str], sizes: np.ndarray, allow_empty: bool
) -> List[Problem]:
    """Return a problem for each image that is too large for a record, or empty if not allowed."""
    problems = []
    for index in np.flatnonzero((sizes == 0) | (sizes > recordio.MAX_IMAGE_BYTES)).tolist():
        path = f"{top}/{paths[index]}"
        if sizes[index]:
            problems.append(Problem(path, "larger than a record can hold (512 MiB)"))
        elif not allow_empty:
            problems.append(Problem(path, "empty"))
    return problems


def duplicate_problems(
    top: str, paths: Sequence[str], source_paths: Sequence[str]
) -> List[Problem]:
    """Return a problem for each path that occurs more than once, as it can in an archive.

    Args:
        top: folder or archive that the images are in.
        paths: in walk order, where equal paths are adjacent.
        source_paths: where each image is, relative to the top.
    """
    duplicates = {
        source_path
        for path, following, source_path in zip(paths, paths[1:], source_paths)
        if path == following
    }
    return [
        Problem(f"{top}/{path}", "more than one image has this name") for path in sorted(duplicates)
    ]


def check_no_class_lost(plan: Plan, kept_labels: np.ndarray) -> None:
    """Check that each class has a record: without one, the labels of later classes would shift.

    Args:
        plan: the plan of one split.
        kept_labels: the labels of the records that are written.

    Raises:
        SourceError: a class has no record left.
    """
    counts = np.bincount(kept_labels, minlength=len(plan.classes))
    lost = [plan.classes[label] for label in np.flatnonzero(counts == 0)]
    if lost:
        raise SourceError(
            *(
                f"{plan.top}/{name}: not one usable image in this class: "
                f"repair its images, or remove the class from both splits"
                for name in lost
            )
        )


def plan_digest(plan: Plan) -> str:
    """Return a SHA-256 of everything that determines the output, and of modification times."""
    digest = hashlib.sha256()
    lines = [plan.prefix, *plan.classes]
    digest.update("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
    for name in ARRAYS:
        digest.update(getattr(plan, name).tobytes())
    for begin in range(0, len(plan.paths), 65536):
        paths = "\n".join(plan.paths[begin : begin + 65536])
        digest.update(paths.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def piece_digest(plan: Plan, first: int, last: int) -> str:
    """Return a SHA-256 of what determines the records `first` to `last` - 1 of a plan."""
    digest = hashlib.sha256()
    for name in ARRAYS:
        digest.update(getattr(plan, name)[first:last].tobytes())
    paths = "\n".join(plan.paths[first:last])
    digest.update(paths.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
