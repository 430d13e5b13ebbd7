# SPDX-License-Identifier: Apache-2.0
"""Data classes for the images found in a source: folders of images, and problems.

`sources` and `tar_index` produce a Listing; `val_labels` and `plan` consume it.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field
from typing import Dict, Iterable, List, Optional, Sequence, Set, Tuple

from prepare.file_state import FileState

FileId = Tuple[int, int]  # device and inode
# At the top of a mounted file system; usually empty, and only root may list it.
LOST_AND_FOUND = "lost+found"
EXTENSIONS = (".jpeg", ".jpg", ".png")  # compared in lower case, as im2rec does


class SourceError(Exception):
    """The source cannot be used at all; each message names a path and what to do."""

    def __init__(self, *messages: str) -> None:
        super().__init__(*messages)
        self.messages = messages

    def __str__(self) -> str:
        return "; ".join(self.messages)


@dataclass(frozen=True)
class Problem:
    """One fault of the source that would make an image or a class missing from the output."""

    path: str
    reason: str
    # False: without what is at `path`, a class could be missing, and the labels of all later
    # classes would be others; or the labels are contradictory.
    skippable: bool = True

    def __str__(self) -> str:
        path = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in self.path)
        return f"{path}: {self.reason}"


class BadImagesError(SourceError):
    """Images of the source cannot be used; `problems` has an entry for each.

    The messages also name what is wrong with the source as a whole.
    """

    def __init__(self, problems: Sequence[Problem], messages: Sequence[str] = ()) -> None:
        super().__init__(*messages, *map(str, problems))
        self.problems = problems

    @property
    def skippable(self) -> bool:
        """Whether all would be well without these images."""
        only_problems = len(self.messages) == len(self.problems)
        return only_problems and all(problem.skippable for problem in self.problems)


@dataclass
class Folder:
    """The images directly in one folder, in any order.

    `names`, `sizes`, `offsets` and `mtimes_ns` have one entry for each image.
    """

    path: str  # of the class, relative to the top of the data set; "" is the top itself
    archive: Optional[str] = None  # file that contains the images; None: each is a file
    names: List[str] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))  # bytes
    offsets: array[int] = field(default_factory=lambda: array("q"))  # bytes, in the archive
    mtimes_ns: array[int] = field(default_factory=lambda: array("q"))  # to detect a changed source
    has_folders: bool = False
    # Folder that the images are in, relative to the top, where that is not `path` because a label
    # file gives the class.
    location: Optional[str] = None

    def add(self, name: str, size: int, offset: int = 0, mtime_ns: int = 0) -> None:
        """Append one image."""
        self.names.append(name)
        self.sizes.append(size)
        self.offsets.append(offset)
        self.mtimes_ns.append(mtime_ns)

    def add_all(
        self, names: List[str], sizes: List[int], offsets: List[int], mtime_ns: int
    ) -> None:
        """Append images with the same modification time."""
        self.names += names
        self.sizes.extend(sizes)
        self.offsets.extend(offsets)
        self.mtimes_ns.extend([mtime_ns] * len(names))

    def paths(self) -> List[str]:
        """Return the images' paths relative to the top of the data set."""
        return [f"{self.path}/{name}" for name in self.names] if self.path else self.names


@dataclass
class Listing:
    """Everything that the training or the validation split of a source contains."""

    top: str  # folder or archive; used in messages and to open files
    folders: List[Folder] = field(default_factory=list)
    problems: List[Problem] = field(default_factory=list)
    ignored: Dict[str, int] = field(default_factory=dict)  # extension -> files not used
    folder_ids: Set[FileId] = field(default_factory=set)  # of all folders, links resolved
    notes: List[str] = field(default_factory=list)  # to print: what else is not used, and why
    archive_states: Dict[str, FileState] = field(default_factory=dict)  # by path, when listed

    def count_ignored(self, paths: Iterable[str]) -> None:
        """Count files that are not images, by extension (or by name if they have none)."""
        for path in paths:
            suffix = os.path.splitext(path)[1].lower() or os.path.basename(path)
            self.ignored[suffix] = self.ignored.get(suffix, 0) + 1

    def extend(self, other: Listing) -> None:
        """Add everything that `other` lists."""
        self.folders += other.folders
        self.problems += other.problems
        self.notes += other.notes
        self.archive_states.update(other.archive_states)
        for suffix, count in other.ignored.items():
            self.ignored[suffix] = self.ignored.get(suffix, 0) + count


def is_image_name(name: str) -> bool:
    """Return whether im2rec treats a file of this name as an image, by its extension.

    A name that consists of a dot and an extension only, such as ".jpg", has no extension.
    """
    return name.lower().endswith(EXTENSIONS) and os.path.splitext(name)[1] != ""


def name_problem(path: str) -> Optional[str]:
    """Return why a .lst file cannot contain this path, or None if it can."""
    if "\t" in path or "\n" in path or "\r" in path:
        return "its name contains a tab or a line break, which a .lst file cannot hold: rename it"
    try:
        path.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8, which a .lst file requires: rename it"
    return None
