# SPDX-License-Identifier: Apache-2.0
"""List the images of one tar archive: each member is an image, a problem or an ignored file."""

from __future__ import annotations

import os
import posixpath
from typing import Dict, List, Optional, Tuple

from prepare.listing import Folder, Listing, Problem, is_image_name, name_problem
from prepare.packed_files import MAX_UNKNOWN_FILES, archive_problem, packed_content, packed_stem
from prepare.tar_ends import cut_last_image
from prepare.tar_format import (
    BLOCK_BYTES,
    FOLDER,
    GNU_FOLDER,
    GNU_VOLUME_LABEL,
    REGULAR_KINDS,
    TarDamageError,
    TarMember,
    read_members,
    shorten,
)
from prepare.tar_links import (
    LINK_KINDS,
    final_targets,
    find_members,
    repeated_names,
    target_path,
)
from prepare.tar_scan import PlainImageScanner

SPLIT_FOLDERS = ("train", "val")  # the folder in an archive made by: tar -cf train.tar train
FOLDER_KINDS = (FOLDER, GNU_FOLDER)
MAX_PATH_LENGTH = 4096  # Linux's PATH_MAX
PACKED = "a packed archive in an archive cannot be read in place: unpack the outer one"


class TarIndexer:
    """Add the images of one archive to a listing."""

    def __init__(
        self,
        path: str,
        listing: Listing,
        base_folder: str,
        mtime_ns: int,
        class_archives: Optional[List[TarMember]] = None,
    ) -> None:
        """Prepare an empty index.

        Args:
            path: the file that contains the archive.
            listing: where to add folders, problems and ignored files.
            base_folder: the folder that the archive would be unpacked to, relative to the top; "",
                or the class of a class archive.
            mtime_ns: modification time of the file, nanoseconds.
            class_archives: where to add the archives in this archive; None: they are not expected.
        """
        self.path = path
        self.listing = listing
        self.base_folder = base_folder
        self.mtime_ns = mtime_ns
        self.class_archives = class_archives
        self.folders: Dict[str, Folder] = {}  # by name in the archive
        self.links: List[TarMember] = []
        self.faults: List[Tuple[str, str]] = []  # name of a member, reason
        self.unknown_files: List[TarMember] = []  # that are not images, by their names
        self.outer_folder = ""  # the first part of all names, if it is left out
        self.folder("")

    def index(self, descriptor: int, begin: int, end: int) -> None:
        """Index the archive between two offsets (bytes) of an open file."""
        damage = archive_problem(os.pread(descriptor, min(BLOCK_BYTES, end - begin), begin))
        is_empty = True
        if damage is None:
            # A list cannot hold the name of this class: each image is a problem of its own.
            is_plain = name_problem(self.base_folder) is None
            scan = PlainImageScanner(descriptor, end, self.add_images).scan if is_plain else None
            try:
                for member in read_members(descriptor, begin, end, scan):
                    self.add_member(member)
                    is_empty = False
                damage = cut_last_image(descriptor, self.folders.values())
                if is_empty and not any(folder.names for folder in self.folders.values()):
                    damage = "holds no file"
            except TarDamageError as error:
                damage = str(error)
        if damage is not None:
            inner = f"{self.base_folder}.tar in it " if begin else ""
            # Any number of images and classes may be lost.
            self.listing.problems.append(Problem(self.path, inner + damage, skippable=False))
        self.add_links(descriptor, begin, end)
        self.find_packed_files(descriptor)
        self.report_faults()
        for name in self.folders:
            if name:
                self.folders[posixpath.dirname(name)].has_folders = True
        self.remove_outer_folder()

    def add_member(self, member: TarMember) -> None:
        """Add one member: an image, a folder, a link, a problem or an ignored file."""
        name, is_regular = member.name, member.kind in REGULAR_KINDS
        if member.kind == GNU_VOLUME_LABEL or (not name and member.kind in FOLDER_KINDS):
            return
        unusable_name = path_problem(name)
        if unusable_name is not None:
            self.faults.append((name, unusable_name))
        elif member.kind in FOLDER_KINDS:
            self.folder(name)
        elif member.kind in LINK_KINDS:
            self.links.append(member)
        elif is_image_name(name):
            reason = content_problem(member) or name_problem(self.class_path(name))
            if reason is None:
                self.add_image(name, member.size, member.offset)
            else:
                self.faults.append((name, reason))
        elif packed_stem(posixpath.basename(name)) is not None:
            self.add_packed_file(member)
        elif is_regular and len(self.unknown_files) < MAX_UNKNOWN_FILES:
            self.unknown_files.append(member)
        else:
            self.listing.count_ignored([name])

    def add_packed_file(self, member: TarMember) -> None:
        """Add a class archive, or a fault if the file cannot be read in place."""
        parent, base_name = posixpath.split(member.name)
        reason = content_problem(member)
        if reason is not None:
            self.faults.append((member.name, reason))
        elif self.class_archives is not None and posixpath.splitext(base_name)[1] == ".tar":
            self.folder(parent).has_folders = True
            self.class_archives.append(member)
        else:
            self.faults.append((member.name, PACKED))

    def add_image(self, name: str, size: int, offset: int) -> None:
        """Add an image to its folder (`size` and `offset` in bytes)."""
        parent, base_name = posixpath.split(name)
        self.folder(parent).add(base_name, size, offset, self.mtime_ns)

    def add_images(
        self, folder: str, names: List[str], sizes: List[int], offsets: List[int]
    ) -> None:
        """Add images of one folder (`sizes` and `offsets` in bytes)."""
        self.folder(folder).add_all(names, sizes, offsets, self.mtime_ns)

    def class_path(self, name: str) -> str:
        """Return the path of a member relative to the top of the data set."""
        if self.outer_folder:
            name = name[len(self.outer_folder) + 1 :]
        return "/".join(part for part in (self.base_folder, name) if part)

    def folder(self, name: str) -> Folder:
        """Return the folder with this name in the archive; create it and its parents if needed."""
        current = name
        while current not in self.folders:
            path = "/".join(part for part in (self.base_folder, current) if part)
            self.folders[current] = Folder(path, archive=self.path)
            self.listing.folders.append(self.folders[current])
            current = posixpath.dirname(current)
        return self.folders[name]

    def add_links(self, descriptor: int, begin: int, end: int) -> None:
        """Add each link to an image in the archive as another image with the same bytes.

        The arguments are those of `index`. A link to another file is what it would be after
        unpacking: an image if its name is that of an image, else a file that is ignored.
        """
        if not self.links:
            return
        images: Dict[str, Tuple[int, int]] = {}  # name -> size, offset
        wanted = {target_path(link) for link in self.links}
        names = [link.name for link in self.links if link.name in wanted]  # of all members wanted
        for folder_name, folder in self.folders.items():
            for base_name, size, offset in zip(folder.names, folder.sizes, folder.offsets):
                name = posixpath.join(folder_name, base_name)
                images[name] = (size, offset)
                if name in wanted:
                    names.append(name)
        names += [name for name, _ in self.faults if name in wanted and name in images]
        members = find_members(descriptor, begin, end, wanted - images.keys())
        names += [member.name for members_of_name in members.values() for member in members_of_name]
        repeated = repeated_names(names)
        ends = final_targets(self.links, repeated)
        for link, target, end_of_chain in zip(self.links, final_targets(self.links), ends):
            member = members[target][-1] if target in members else None
            reason = self.link_problem(link, member, target in images)
            if reason is None and end_of_chain in repeated and end_of_chain != link.name:
                reason = repeated_problem(link, end_of_chain)
            if reason is not None:
                self.faults.append((link.name, reason))
            elif not is_image_name(link.name):
                self.listing.count_ignored([link.name])
            elif member is not None:
                self.add_image(link.name, member.size, member.offset)
            else:
                self.add_image(link.name, *images[target or ""])

    def link_problem(
        self, link: TarMember, member: Optional[TarMember], is_image: bool
    ) -> Optional[str]:
        """Return why a link cannot be used, or None if it can be, or is ignored.

        Args:
            link: the link.
            member: what it leads to if that is no image that can be used; None: nothing.
            is_image: whether it leads to an image that can be used.
        """
        target = shorten(link.target)
        if not is_image and (member is None or member.kind in FOLDER_KINDS):
            return f"a link to {target}, which is no image in this archive"
        if packed_stem(posixpath.basename(link.name)) is not None:
            return PACKED
        if not is_image_name(link.name):
            return None
        reason = None if member is None else content_problem(member)
        if reason is not None:
            return f"a link to {target}, which is {reason}"
        return name_problem(self.class_path(link.name))

    def find_packed_files(self, descriptor: int) -> None:
        """Look into the files that could be classes: in folders without images.

        Args:
            descriptor: of the open archive.
        """
        for member in self.unknown_files:
            parent = self.folders.get(posixpath.dirname(member.name))
            block = b""
            if parent is None or not parent.names:
                block = os.pread(descriptor, min(BLOCK_BYTES, member.size), member.offset)
            if packed_content(block) is not None:
                self.faults.append((member.name, PACKED))
            else:
                self.listing.count_ignored([member.name])

    def report_faults(self) -> None:
        """Add a problem for each fault.

        An image may be skipped, and a file in a class folder. Anything else may be a class.
        """
        for name, reason in self.faults:
            parent, base_name = posixpath.split(name)
            stem = packed_stem(base_name) or posixpath.splitext(base_name)[0]
            if reason == PACKED and posixpath.join(parent, stem) in self.folders:
                self.listing.count_ignored([name])  # it is there unpacked, too
                continue
            folder = self.folders.get(parent)
            in_class = folder is not None and bool(folder.names)
            parts = (self.listing.top, self.base_folder, shorten(name))
            path = "/".join(part for part in parts if part)
            is_image = is_image_name(name) and path_problem(name) is None
            self.listing.problems.append(Problem(path, reason, skippable=in_class or is_image))
            if is_image:
                self.folder(parent)  # a class, also if it has no other image

    def remove_outer_folder(self) -> None:
        """Leave out an outer folder that is named like the archive or like a split.

        For instance n01440764/ in n01440764.tar, and train/ or val/ in any archive.
        """
        outer = posixpath.basename(self.base_folder)
        if not outer:
            outer = next((name for name in SPLIT_FOLDERS if name in self.folders), "")
        names = [name for name in self.folders if name]
        outside = [*names, *(member.name for member in self.class_archives or [])]
        if self.folders[""].names or any(name.split("/")[0] != outer for name in outside):
            return
        self.outer_folder = outer if names else ""
        for name in names:
            self.folders[name].path = self.class_path(name)
        if names:
            self.listing.folders.remove(self.folders[""])


def path_problem(name: str) -> Optional[str]:
    """Return why a member cannot be unpacked under this name, or None if it can."""
    if not name:
        return "a file without a name"
    if len(name) > MAX_PATH_LENGTH:
        return f"a name of {len(name)} characters, too long for a file system"
    if ".." in name.split("/"):
        return "a name that contains .., which tar would not unpack"
    return "a name that contains a zero byte" if "\0" in name else None


def repeated_problem(link: TarMember, target: str) -> Optional[str]:
    """Return why a link to the name of several members cannot be used; None: it is no image.

    Which member a link leads to depends on their order and on the program that unpacks them.
    """
    if not is_image_name(link.name):
        return None
    return f"a link to {shorten(target)}, which is the name of more than one member"


def content_problem(member: TarMember) -> Optional[str]:
    """Return why the bytes of a member are not those of a file, or None if they are."""
    if member.sparse:
        return "stored as a sparse file: write the archive without --sparse"
    if member.kind not in REGULAR_KINDS:
        return f"not a regular file (tar type {member.kind.decode('latin-1')!r})"
    return None
