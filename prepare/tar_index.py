# SPDX-License-Identifier: Apache-2.0
"""List the images in tar archives by their headers, so that they can be read without unpacking.

A truncated or damaged archive is reported with the position of the damage; the images before it are
listed.
"""

from __future__ import annotations

import os
import posixpath
import re
from typing import Dict, List, Optional, Sequence, Tuple

from prepare.cpus import parallel_map
from prepare.listing import Folder, Listing, Problem, SourceError, is_image_name, name_problem
from prepare.tar_format import (
    FOLDER,
    GNU_FOLDER,
    GNU_VOLUME_LABEL,
    HARD_LINK,
    REGULAR_KINDS,
    SYMBOLIC_LINK,
    TarDamageError,
    TarMember,
    read_members,
)
from prepare.tar_scan import PlainImageScanner

SPLIT_FOLDERS = ("train", "val")  # the folder in an archive made by: tar -cf train.tar train
COMPRESSION_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
MAX_PATH_LENGTH = 4096  # Linux's PATH_MAX
PACKED_NAME = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|zip)$", re.IGNORECASE)


def list_archive(path: str, workers: int) -> Listing:
    """List an archive of images, of folders of images, or of class archives.

    Args:
        path: path of the archive.
        workers: number of threads for class archives in it.

    Raises:
        SourceError: the archive is compressed.
        OSError: the archive cannot be read.
    """
    listing = Listing(path)
    check_not_compressed(path)
    class_archives: List[TarMember] = []
    with open(path, "rb", buffering=0) as stream:
        descriptor = stream.fileno()
        status = os.fstat(descriptor)
        indexer = TarIndexer(path, listing, "", status.st_mtime_ns, class_archives)
        indexer.index(descriptor, 0, status.st_size)

        def list_member(member: TarMember) -> Listing:
            class_listing = Listing(path)
            class_name = member.name[: -len(".tar")]
            indexer = TarIndexer(path, class_listing, class_name, status.st_mtime_ns)
            indexer.index(descriptor, member.offset, member.offset + member.size)
            return class_listing

        for class_listing in parallel_map(list_member, class_archives, workers):
            listing.extend(class_listing)
    return listing


def list_class_archives(folder: str, names: Sequence[str], workers: int) -> Listing:
    """List a folder of archives, one for each class and named after it.

    Args:
        folder: path of the folder.
        names: file names of the archives.
        workers: number of threads.

    Raises:
        SourceError: an archive is compressed.
        OSError: an archive cannot be read.
    """
    listing = Listing(folder)

    def list_class_archive(name: str) -> Listing:
        class_listing = Listing(folder)
        path = os.path.join(folder, name)
        check_not_compressed(path)
        with open(path, "rb", buffering=0) as stream:
            status = os.fstat(stream.fileno())
            class_name = os.path.splitext(name)[0]
            indexer = TarIndexer(path, class_listing, class_name, status.st_mtime_ns)
            indexer.index(stream.fileno(), 0, status.st_size)
        return class_listing

    for class_listing in parallel_map(list_class_archive, names, workers):
        listing.extend(class_listing)
    return listing


def check_not_compressed(path: str) -> None:
    """Check that an archive can be read in place.

    Raises:
        SourceError: it is compressed.
    """
    with open(path, "rb") as stream:
        begin = stream.read(8)
    for magic, program in COMPRESSION_MAGIC.items():
        if begin.startswith(magic):
            raise SourceError(
                f"{path}: is compressed ({program}) and cannot be read in place: decompress it"
            )


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
        self.folder("")

    def index(self, descriptor: int, begin: int, end: int) -> None:
        """Index the archive between two offsets (bytes) of an open file."""
        try:
            scanner = PlainImageScanner(descriptor, end, self.add_images)
            for member in read_members(descriptor, begin, end, scanner.scan):
                self.add_member(member)
        except TarDamageError as damage:
            inner = f"{self.base_folder}.tar in it " if begin else ""
            problem = Problem(self.path, f"{inner}{damage}", skippable=not self.holds_classes())
            self.listing.problems.append(problem)
        self.add_links()
        for name in self.folders:
            if name:
                self.folders[posixpath.dirname(name)].has_folders = True
        self.remove_outer_folder()

    def add_member(self, member: TarMember) -> None:
        """Add one member: an image, a folder, a link, a problem or an ignored file."""
        name = member.name
        if not name or member.kind == GNU_VOLUME_LABEL:
            return
        if len(name) > MAX_PATH_LENGTH:
            self.add_problem(
                f"{name[:50]}...", f"a name of {len(name)} characters, too long for a file system"
            )
        elif ".." in name.split("/"):
            self.add_problem(name, "a name that contains .., which tar would not unpack")
        elif member.kind in (FOLDER, GNU_FOLDER):
            self.folder(name)
        elif member.kind in (HARD_LINK, SYMBOLIC_LINK):
            self.links.append(member)
        elif (
            self.class_archives is not None
            and name.endswith(".tar")
            and member.kind in REGULAR_KINDS
        ):
            self.class_archives.append(member)
        elif PACKED_NAME.search(name):
            self.add_problem(
                name, "a packed archive in an archive cannot be read in place: unpack the outer one"
            )
        elif not is_image_name(name):
            self.listing.count_ignored([name])
        else:
            reason = self.image_problem(member)
            if reason is None:
                self.add_image(name, member.size, member.offset)
            else:
                self.add_problem(name, reason)

    def image_problem(self, member: TarMember) -> Optional[str]:
        """Return why a member that has an image's name cannot be used, or None if it can."""
        if member.sparse:
            return "stored as a sparse file: write the archive without --sparse"
        if member.kind not in REGULAR_KINDS:
            return f"not a regular file (tar type {member.kind.decode('latin-1')!r})"
        return name_problem(self.base_folder + member.name)

    def add_image(self, name: str, size: int, offset: int) -> None:
        """Add an image to its folder (`size` and `offset` in bytes)."""
        parent, base_name = posixpath.split(name)
        self.folder(parent).add(base_name, size, offset, self.mtime_ns)

    def add_images(
        self, folder: str, names: List[str], sizes: List[int], offsets: List[int]
    ) -> None:
        """Add images of one folder (`sizes` and `offsets` in bytes)."""
        self.folder(folder).add_all(names, sizes, offsets, self.mtime_ns)

    def add_problem(self, name: str, reason: str) -> None:
        """Add a problem with the member `name`.

        The folder of an image is added even if it has no other image: it would be a class. A member
        that is no image may be a whole class.
        """
        parts = (self.listing.top, self.base_folder, name)
        is_image = is_image_name(name)
        problem = Problem("/".join(part for part in parts if part), reason, skippable=is_image)
        self.listing.problems.append(problem)
        if is_image and ".." not in name.split("/"):
            self.folder(posixpath.dirname(name))

    def holds_classes(self) -> bool:
        """Return whether the archive has class archives or folders, of which some may be lost."""
        return bool(self.class_archives) or any(self.folders)

    def folder(self, name: str) -> Folder:
        """Return the folder with this name in the archive; create it and its parents if needed."""
        current = name
        while current not in self.folders:
            path = "/".join(part for part in (self.base_folder, current) if part)
            self.folders[current] = Folder(path, archive=self.path)
            self.listing.folders.append(self.folders[current])
            current = posixpath.dirname(current)
        return self.folders[name]

    def add_links(self) -> None:
        """Add each link to an image in the archive as another image with the same bytes."""
        pending = self.links
        images: Dict[str, Tuple[int, int]] = {}  # name -> size, offset
        if pending:
            for folder_name, folder in self.folders.items():
                for name, size, offset in zip(folder.names, folder.sizes, folder.offsets):
                    images[posixpath.join(folder_name, name)] = (size, offset)
        resolved_any = True
        while pending and resolved_any:  # repeated, because a target may be a later link
            unresolved = [link for link in pending if not self.add_link(link, images)]
            resolved_any = len(unresolved) < len(pending)
            pending = unresolved
        for link in pending:
            self.add_problem(
                link.name, f"a link to {link.target}, which is no image in this archive"
            )

    def add_link(self, link: TarMember, images: Dict[str, Tuple[int, int]]) -> bool:
        """Add one link to the index and to `images`; return False if its target is unknown.

        Args:
            link: a hard or symbolic link.
            images: {name: (size, offset)} of the images known so far.
        """
        target = link.target
        if link.kind == SYMBOLIC_LINK:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(link.name), target))
        if (
            target not in images
            or not is_image_name(link.name)
            or name_problem(self.base_folder + link.name) is not None
        ):
            return False
        images[link.name] = images[target]
        self.add_image(link.name, *images[target])
        return True

    def remove_outer_folder(self) -> None:
        """Remove an outer folder that is named like the archive or like a split.

        For instance n01440764/ in n01440764.tar, and train/ or val/ in any archive.
        """
        outer = posixpath.basename(self.base_folder)
        if not outer:
            outer = next((name for name in SPLIT_FOLDERS if name in self.folders), "")
        names = [name for name in self.folders if name]
        if self.folders[""].names or any(name.split("/")[0] != outer for name in names):
            return
        for name in names:
            parts = (self.base_folder, name[len(outer) + 1 :])
            self.folders[name].path = "/".join(part for part in parts if part)
        if names:
            self.listing.folders.remove(self.folders[""])
