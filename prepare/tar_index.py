# SPDX-License-Identifier: Apache-2.0
"""Images inside tar archives, found by their headers and read in place. Nothing is unpacked.

Reads what GNU tar, bsdtar and Python write in the v7, ustar, GNU and pax formats. A truncated or damaged archive is a
problem of its own, named with the place; what stands before the damage is still listed.
"""

import os
import posixpath
import re
import zlib
from dataclasses import dataclass

from prepare.cpus import run_all
from prepare.listing import Folder, Listing, Problem, SourceError, is_image_name, name_problem

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
MAX_EXTENSION_BYTES = 1 << 20  # of a long name or of pax records; more is damage
FILE, HARD_LINK, SYMBOLIC_LINK, FOLDER = b"0", b"1", b"2", b"5"
FILES = (FILE, b"\0", b"7")
WITHOUT_DATA = (HARD_LINK, SYMBOLIC_LINK, b"3", b"4", FOLDER, b"6")
WRAPPERS = ("train", "val")  # tar -cf train.tar train
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
PACKED_NAME = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|zip)$", re.IGNORECASE)


class Damage(Exception):
    """An archive that ends too early or makes no sense from some place on."""


@dataclass
class Member:
    name: str  # without leading "./" or "/", "" for the top itself
    kind: bytes
    size: int
    offset: int  # of the data, from the start of the file
    target: str  # of a link
    sparse: bool


def list_archive(path, workers):
    """Lists an archive of images, of folders of images, or of class archives (these on `workers` threads)."""
    listing = Listing(path)
    check_not_compressed(path)
    nested = []
    with open(path, "rb", buffering=0) as stream:
        status = os.fstat(stream.fileno())
        finder = Finder(path, listing, "", status.st_mtime_ns, nested)
        finder.walk(stream.fileno(), 0, status.st_size)
        parts = [Listing(path) for _ in nested]

        def step(item):
            member, part = item
            inner = Finder(path, part, member.name[: -len(".tar")], status.st_mtime_ns, None)
            inner.walk(stream.fileno(), member.offset, member.offset + member.size)

        run_all(step, list(zip(nested, parts)), workers)
    merge(listing, parts)
    return listing


def list_class_archives(folder, names, workers):
    """Lists a folder of archives, one for each class and named after it, on `workers` threads."""
    listing = Listing(folder)
    parts = [Listing(folder) for _ in names]

    def step(item):
        name, part = item
        path = os.path.join(folder, name)
        check_not_compressed(path)
        with open(path, "rb", buffering=0) as stream:
            status = os.fstat(stream.fileno())
            finder = Finder(path, part, os.path.splitext(name)[0], status.st_mtime_ns, None)
            finder.walk(stream.fileno(), 0, status.st_size)

    run_all(step, list(zip(names, parts)), workers)
    merge(listing, parts)
    return listing


def merge(listing, parts):
    for part in parts:
        listing.folders += part.folders
        listing.problems += part.problems
        for suffix, count in part.ignored.items():
            listing.ignored[suffix] = listing.ignored.get(suffix, 0) + count


def check_not_compressed(path):
    """Raises SourceError for a compressed archive: there is no reading it in place."""
    with open(path, "rb") as stream:
        head = stream.read(8)
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            raise SourceError(
                "%s: is compressed (%s) and cannot be read in place: decompress it" % (path, name)
            )


class Finder:
    """Collects the images of one archive into a listing; `base` is the folder that they would be unpacked to."""

    def __init__(self, path, listing, base, time, nested):
        self.path, self.listing, self.base, self.time, self.nested = (
            path,
            listing,
            base,
            time,
            nested,
        )
        self.folders = {}
        self.links = []
        self.folder("")

    def folder(self, name):
        """The Folder for this name in the archive; the folders above it come into being too."""
        if name not in self.folders:
            path = self.base + "/" + name if self.base and name else self.base or name
            self.folders[name] = Folder(path, archive=self.path)
            self.listing.folders.append(self.folders[name])
            if name:
                self.folder(posixpath.dirname(name)).has_folders = True
        return self.folders[name]

    def problem(self, name, reason):
        path = "/".join(part for part in (self.listing.top, self.base, name) if part)
        self.listing.problems.append(Problem(path, reason))

    def walk(self, descriptor, begin, end):
        """Looks at every member between two offsets of an open file."""
        try:
            for member in members(descriptor, begin, end):
                self.look(member)
        except Damage as damage:
            self.listing.problems.append(
                Problem(self.path, "%s%s" % (self.base + ".tar in it " if begin else "", damage))
            )
        self.resolve_links()
        self.unwrap()

    def unwrap(self):
        """Takes away a folder around everything that only repeats the archive's name (n01440764.tar) or role (train/)."""
        wrapper = posixpath.basename(self.base) or next(
            (name for name in WRAPPERS if name in self.folders), None
        )
        if self.folders[""].names or not all(
            name.split("/")[0] == wrapper for name in self.folders if name
        ):
            return
        for name, folder in self.folders.items():
            if name:
                inner = name[len(wrapper) + 1 :]
                folder.path = "/".join(part for part in (self.base, inner) if part)
        if len(self.folders) > 1:
            self.listing.folders.remove(self.folders[""])

    def look(self, member):
        name = member.name
        if not name or member.kind == b"V":  # the top itself, a volume label
            return
        if ".." in name.split("/"):
            self.problem(name, "a name with .. in it, which tar would not unpack")
        elif member.kind == FOLDER or member.kind == b"D":
            self.folder(name)
        elif member.kind in (HARD_LINK, SYMBOLIC_LINK):
            self.links.append(member)
        elif self.nested is not None and name.endswith(".tar") and member.kind in FILES:
            self.nested.append(member)
        elif PACKED_NAME.search(name):
            self.problem(
                name, "a packed archive in an archive cannot be read in place: unpack the outer one"
            )
        elif not is_image_name(name):
            suffix = os.path.splitext(name)[1].lower() or posixpath.basename(name)
            self.listing.ignored[suffix] = self.listing.ignored.get(suffix, 0) + 1
        elif member.sparse:
            self.problem(name, "stored as a sparse file: write the archive without --sparse")
        elif member.kind not in FILES:
            self.problem(name, "not a regular file (tar type %r)" % member.kind.decode("latin-1"))
        elif name_problem(self.base + name):
            self.problem(name, name_problem(self.base + name))
        else:
            self.add(name, member.size, member.offset)

    def add(self, name, size, offset):
        parent, base = posixpath.split(name)
        self.folder(parent).add(base, size, offset, self.time)

    def resolve_links(self):
        """Gives a link to an image in the archive that image's bytes, as unpacking would."""
        waiting, places = self.links, {}
        if waiting:
            for name, folder in self.folders.items():
                for image, size, offset in zip(folder.names, folder.sizes, folder.offsets):
                    places[posixpath.join(name, image)] = (size, offset)
        found = True
        while waiting and found:  # a link may lead to a link that comes later
            later = [member for member in waiting if not self.resolve(member, places)]
            found = len(later) < len(waiting)
            waiting = later
        for member in waiting:
            self.problem(
                member.name, "a link to %s, which is no image in this archive" % member.target
            )

    def resolve(self, member, places):
        """Adds a link's image if `places` (name -> size, offset) knows its target."""
        target = member.target
        if member.kind == SYMBOLIC_LINK:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), target))
        if (
            target not in places
            or not is_image_name(member.name)
            or name_problem(self.base + member.name)
        ):
            return False
        places[member.name] = places[target]
        self.add(member.name, *places[target])
        return True


def members(descriptor, begin, end):
    """Yields the members of the archive between two offsets. Raises Damage."""
    at, everywhere, own = begin, {}, {}
    if end <= begin:
        raise Damage("is empty")
    while True:
        header = read(descriptor, at, BLOCK, end)
        if header == ZERO_BLOCK:
            return check_rest(descriptor, at, end)
        check_sum(header, at)
        kind, data = header[156:157], at + BLOCK
        size = 0 if kind in WITHOUT_DATA else number(header[124:136], at)
        if kind in (b"x", b"X", b"g", b"L", b"K"):
            if size > MAX_EXTENSION_BYTES:
                raise Damage("has a header of %d bytes at byte %d" % (size, at))
            content = read(descriptor, data, size, end)
            if kind in (b"L", b"K"):
                own[b"path" if kind == b"L" else b"linkpath"] = content.split(b"\0", 1)[0]
            else:
                (everywhere if kind == b"g" else own).update(pax_records(content, at))
        else:
            extra, own = {**everywhere, **own} if everywhere or own else own, {}
            if kind not in WITHOUT_DATA and b"size" in extra:
                size = pax_size(extra[b"size"], at)
            if kind == b"S":
                data = skip_sparse_map(descriptor, header, data, end)
            member = make_member(header, kind, size, data, extra)
            if data + size > end:
                raise Damage(
                    "is cut short: %s lacks its last %d bytes" % (member.name, data + size - end)
                )
            yield member
        at = data + (size + BLOCK - 1) // BLOCK * BLOCK


def read(descriptor, at, size, end):
    """Returns exactly `size` bytes at `at`; raises Damage when the archive ends before."""
    data = os.pread(descriptor, min(size, max(end - at, 0)), at)
    while data and len(data) < min(size, end - at):
        more = os.pread(descriptor, size - len(data), at + len(data))
        if not more:
            break
        data += more
    if len(data) < size:
        raise Damage(
            "is cut short: it ends at byte %d, %s"
            % (end, "inside a header" if data else "without its end mark")
        )
    return data


def check_rest(descriptor, at, end):
    """After the mark of the end only zeros may follow; anything else would be images that nobody sees."""
    while at < end:
        data = os.pread(descriptor, min(1 << 20, end - at), at)
        if not data:
            return
        if data.count(0) != len(data):
            raise Damage(
                "has more data after its end mark (after byte %d): a damaged header or two archives in one"
                % at
            )
        at += len(data)


def check_sum(header, at):
    """Raises Damage unless the header's bytes add up to what it says (its own sum counting as eight blanks)."""
    said = number(header[148:156], at)
    # Adler-32 begins with 1 and adds up bytes in its lower half, modulo 65521: a sum of bytes at the speed of C.
    if (zlib.adler32(header[156:], zlib.adler32(header[:148])) & 0xFFFF) == (
        said - 256 + 1
    ) % 65521:
        return
    signed = sum(byte - 256 if byte > 127 else byte for byte in header[:148] + header[156:]) + 256
    if signed != said:  # some old programs took bytes for signed numbers
        raise Damage("has a damaged header at byte %d" % at)


def number(field, at):
    """A number in a header: octal digits, or binary when its first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        if field[0] & 0x40:
            raise Damage("has a negative size at byte %d" % at)
        return value
    text = field.split(b"\0", 1)[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError:
        raise Damage("has a damaged header at byte %d" % at) from None


def pax_records(content, at):
    """{name: value} of the `length name=value` lines of a pax header."""
    records, begin = {}, 0
    while begin < len(content.rstrip(b"\0")):
        length, blank, _ = content[begin : begin + 20].partition(b" ")
        if (
            not blank
            or not length.isdigit()
            or begin + int(length) > len(content)
            or int(length) < len(length) + 4
        ):
            raise Damage("has a damaged pax header at byte %d" % at)
        name, _, value = content[begin + len(length) + 1 : begin + int(length) - 1].partition(b"=")
        records[name] = value
        begin += int(length)
    return records


def pax_size(value, at):
    if not value.isdigit():
        raise Damage("has a damaged pax header at byte %d" % at)
    return int(value)


def skip_sparse_map(descriptor, header, data, end):
    """Where the data of an old GNU sparse file begin: after as many blocks of its map as there are."""
    more = header[482]
    while more:
        more = read(descriptor, data, BLOCK, end)[504]
        data += BLOCK
    return data


def make_member(header, kind, size, data, extra):
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":  # in GNU's own format ("ustar  ") other things stand there
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    name = extra.get(b"GNU.sparse.name", extra.get(b"path", name))
    if kind in FILES and name.endswith(b"/"):
        kind = FOLDER  # how the oldest archives write one
    target = extra.get(b"linkpath", header[157:257].split(b"\0", 1)[0])
    sparse = kind == b"S" or any(
        key.startswith((b"GNU.sparse.", b"SCHILY.realsize")) for key in extra
    )
    target = os.fsdecode(target) if kind == SYMBOLIC_LINK else tidy(target)
    return Member(tidy(name), kind, size, data, target, sparse)


def tidy(name):
    """A member's name as unpacking would make it: no "/" in front, no "." and no empty parts."""
    return "/".join(part for part in os.fsdecode(name).split("/") if part not in ("", "."))
