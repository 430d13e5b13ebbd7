# SPDX-License-Identifier: Apache-2.0
"""What a source holds: folders of images, and what is wrong with it. The common language of sources and plans."""

import os
from array import array
from dataclasses import dataclass, field
from typing import Dict, List, Optional

EXTENSIONS = (".jpeg", ".jpg", ".png")  # compared in lower case, as im2rec does


class SourceError(Exception):
    """The source cannot be used at all; the message names the path and what to do."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the source, so that an image or a class would be lost."""

    path: str
    reason: str

    def __str__(self):
        path = "".join(
            letter if letter.isprintable() else ascii(letter)[1:-1] for letter in self.path
        )
        return "%s: %s" % (path, self.reason)


@dataclass
class Folder:
    """The images that stand directly in one folder, in any order; sizes and offsets in bytes."""

    path: str  # relative to the top of the data set, "" is the top itself
    archive: Optional[str] = (
        None  # the archive that holds the bytes; None: each image is a file of its own
    )
    names: List[str] = field(default_factory=list)
    sizes: array = field(default_factory=lambda: array("q"))
    offsets: array = field(default_factory=lambda: array("q"))  # in the archive
    times: array = field(
        default_factory=lambda: array("q")
    )  # modification, nanoseconds: tells a changed source
    has_folders: bool = False

    def add(self, name, size, offset=0, time=0):
        self.names.append(name)
        self.sizes.append(size)
        self.offsets.append(offset)
        self.times.append(time)

    def paths(self):
        return [self.path + "/" + name for name in self.names] if self.path else self.names


@dataclass
class Listing:
    """All that one half (training or validation) of a data set holds."""

    top: str  # folder or archive, for messages and for opening files
    flat: bool = False  # the images stand at the top, whatever folders they are listed under
    folders: List[Folder] = field(default_factory=list)
    problems: List[Problem] = field(default_factory=list)
    ignored: Dict[str, int] = field(
        default_factory=dict
    )  # what was left out for its extension: example -> how many


def is_image_name(name):
    """As im2rec has it: by the extension, which a name that only begins with a dot does not have."""
    return name.lower().endswith(EXTENSIONS) and os.path.splitext(name)[1] != ""


def name_problem(path):
    """Why this path cannot stand in a list file, or None."""
    if "\t" in path or "\n" in path or "\r" in path:
        return "its name holds a tab or a line break, which a .lst file cannot hold: rename it"
    try:
        path.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8, which a .lst file must be: rename it"
    return None
