# SPDX-License-Identifier: Apache-2.0
"""Where images come from: what a source holds, and the bytes of one image. Knows nothing of records or labels."""

import errno
import hashlib
import os
import stat
import threading
from dataclasses import dataclass, replace
from typing import Tuple

from prepare import tar_index, val_labels
from prepare.cpus import run_all
from prepare.listing import Folder, Listing, Problem, SourceError, is_image_name, name_problem

OFFICIAL = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
# What storage or this process lacks for a while: no image is to blame. Not every system has each of these numbers.
OUTAGES = {
    getattr(errno, name)
    for name in [
        "EMFILE",
        "ENFILE",
        "ENOMEM",
        "EIO",
        "ESTALE",
        "ETIMEDOUT",
        "ENOTCONN",
        "EHOSTDOWN",
        "ENODEV",
        "ENXIO",
        "EREMOTEIO",
    ]
    if hasattr(errno, name)
}


@dataclass(frozen=True)
class Half:
    """Where the training or the validation set is, and how it is kept."""

    path: str
    kind: str  # "folders", "class archives" or "archive"
    label_files: Tuple[str, ...] = ()  # for images that do not stand in class folders
    folder: str = ""  # that the archive or class archives stand in, if it should hold nothing else

    def list(self, workers):
        """Returns the Listing, made on `workers` threads. Raises SourceError when the source cannot be used."""
        if self.kind == "folders":
            listing = list_folder(self.path, workers)
        elif self.kind == "archive":
            listing = tar_index.list_archive(self.path, workers)
        else:
            listing = tar_index.list_class_archives(
                self.path, class_archives(self.path)[0], workers
            )
        if self.label_files:
            val_labels.apply(listing, self.label_files)
        if self.folder:
            look_beside_archives(self.folder, listing)
        return listing

    def identity(self):
        """A digest that tells in an instant whether this is the source of an earlier run: top names, sizes and times."""
        digest = hashlib.sha256(self.kind.encode())
        paths = [self.path, *self.label_files]
        if self.kind != "archive":
            paths = (
                sorted(os.path.join(self.path, name) for name in os.listdir(self.path)) + paths[1:]
            )
        for path in paths:
            status = os.stat(path) if os.path.exists(path) else os.lstat(path)
            size = status.st_size if stat.S_ISREG(status.st_mode) else 0
            text = "%s %d %d\n" % (os.path.basename(path), size, status.st_mtime_ns)
            digest.update(text.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def find_splits(source, label_file=None):
    """Returns {"train": Half, "val": Half} for what the folder `source` holds.

    `label_file`: one more source of validation labels. Raises SourceError, or FileNotFoundError and its like.
    """
    source = os.path.normpath(source)
    names = sorted(os.listdir(source))
    halves = {prefix: find_split(source, prefix) for prefix in OFFICIAL}
    label_files = [
        os.path.join(source, name) for name in names if val_labels.looks_like_labels(name)
    ]
    if label_file is not None:
        os.stat(label_file)
        label_files.append(label_file)
    halves["val"] = replace(halves["val"], label_files=tuple(label_files))
    return halves


def find_split(source, prefix):
    """Class folders win over archives that they may have been unpacked from. Raises SourceError when there is nothing."""
    folder, official = os.path.join(source, prefix), OFFICIAL[prefix]
    if os.path.isdir(folder) and os.listdir(folder):
        names, others = class_archives(folder)
        if os.path.exists(os.path.join(folder, official)) and not others:
            return Half(os.path.join(folder, official), "archive", folder=folder)
        if not names or others:
            missing = [name for name in names if os.path.splitext(name)[0] not in others]
            if missing:
                raise SourceError(
                    "%s: not unpacked, though there are class folders beside it: unpack it, or move it away"
                    % os.path.join(folder, missing[0])
                )
            return Half(folder, "folders")
        return Half(folder, "class archives", folder=folder)
    for name in (official, prefix + ".tar"):
        if os.path.isfile(os.path.join(source, name)):
            return Half(os.path.join(source, name), "archive")
    raise SourceError(
        "%s: holds neither a folder %s/ with anything in it nor %s" % (source, prefix, official)
    )


def class_archives(folder):
    """Returns the names of the .tar files in a folder, but for the official ones, and those of its sub-folders."""
    with os.scandir(folder) as entries:
        found = [(entry.name, is_folder(entry)) for entry in entries]
    names = sorted(name for name, is_folder in found if name.endswith(".tar") and not is_folder)
    return [name for name in names if name not in OFFICIAL.values()], {
        name for name, is_folder in found if is_folder
    }


def list_folder(top, workers=1):
    """Lists the images under the folder `top` as im2rec does: links followed, three extensions, nested folders too."""
    listing = Listing(top)
    lock = threading.Lock()

    def scan(item):
        relative, ancestors = item
        absolute = os.path.join(top, relative) if relative else top
        folder, problems, ignored, deeper = Folder(relative), [], [], []
        try:
            status = os.stat(absolute)
            identity = (status.st_dev, status.st_ino)
            if identity in ancestors:
                raise SourceError(
                    "%s: a symbolic link that leads back to a folder above it: remove it" % absolute
                )
            with os.scandir(absolute) as entries:
                for entry in entries:
                    path = relative + "/" + entry.name if relative else entry.name
                    if is_folder(entry):
                        folder.has_folders = True
                        deeper.append((path, ancestors + (identity,)))
                    else:
                        scan_file(entry, path, folder, problems, ignored)
        except OSError as error:
            raise_outage(error, absolute, top)
            problems.append(Problem(absolute, "cannot be listed: %s" % error.strerror))
        with lock:
            listing.folders.append(folder)
            listing.problems += problems
            count_ignored(listing, ignored)
        return deeper

    level = [("", ())]
    while level:
        level = [item for found in run_all(scan, level, workers) for item in found]
    return listing


def count_ignored(listing, paths):
    for path in paths:
        suffix = os.path.splitext(path)[1].lower() or os.path.basename(path)
        listing.ignored[suffix] = listing.ignored.get(suffix, 0) + 1


def look_beside_archives(top, listing):
    """Adds to `listing` what stands beside the archives in the folder `top`: an image there belongs to no class."""
    loose, problems, ignored = Folder(""), [], []
    with os.scandir(top) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.name.endswith(".tar") and not is_folder(entry):
                scan_file(entry, entry.name, loose, problems, ignored)
    named = {problem.path for problem in problems}
    listing.problems += problems
    for path in (os.path.join(top, name) for name in loose.names):
        if path not in named:
            listing.problems.append(
                Problem(path, "stands beside archives, in no class: move it to one, or away")
            )
    count_ignored(listing, ignored)


def is_folder(entry):
    """Whether a directory entry is a folder or leads to one. What cannot be followed is none: scan_file says why."""
    try:
        return entry.is_dir()
    except OSError as error:
        raise_outage(error, entry.path)
        return False


def raise_outage(error, path, *above):
    """Raises an OSError that names `path` if `error`, met there, says more of the storage than of the file.

    So does a file that is not there when the folder that held it, one of `above`, is gone or empty too: an unmounted
    share leaves an empty folder.
    """
    if error.errno in OUTAGES:
        raise OSError(error.errno, error.strerror, path) from None
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        for place in above:
            if not os.path.isfile(place) and not (os.path.isdir(place) and os.listdir(place)):
                # Not ENOENT: a path that was there is no mistake in the command line.
                raise OSError(errno.ENODEV, "was there and is gone", place) from None
        if above and os.path.exists(path):
            raise OSError(errno.ENODEV, "was gone for a moment", path) from None


def scan_file(entry, path, folder, problems, ignored):
    """Adds one directory entry that is not a folder to `folder`, `problems` or `ignored`."""
    try:
        status = entry.stat()
    except OSError as error:
        raise_outage(error, entry.path)
        dangling = error.errno != errno.ELOOP and entry.is_symlink()
        reason = "a symbolic link to something that is not there" if dangling else error.strerror
        problems.append(Problem(entry.path, reason))
        return
    if not is_image_name(entry.name):
        ignored.append(path)
        return
    if not stat.S_ISREG(status.st_mode):
        problems.append(Problem(entry.path, "not a regular file"))
        return
    reason = name_problem(path)
    if reason:
        problems.append(Problem(entry.path, reason))
        return
    # A call less per image on network storage: who everybody may read needs no question.
    if not status.st_mode & stat.S_IROTH and not os.access(entry.path, os.R_OK):
        problems.append(Problem(entry.path, "cannot be read: permission denied"))
    folder.add(entry.name, status.st_size, time=status.st_mtime_ns)


def read_exactly(descriptor, view, offset):
    """Fills `view` from the file at `offset`; raises SourceError when the file ends before."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise SourceError(
                "shorter than when it was listed: %d bytes are missing" % (len(view) - done)
            )
        done += count


class ImageReader:
    """Reads the images of a plan; any number of threads may share it. Close it, or use it in a `with`."""

    KEPT_OPEN = 64  # archives; a folder of a thousand class archives would use up the descriptors a process may have

    def __init__(self, plan):
        self._plan = plan
        self._top = os.path.join(plan.top, "")
        self._open = []
        if len(plan.archives) <= self.KEPT_OPEN:
            for archive in plan.archives:
                try:
                    self._open.append(os.open(archive, os.O_RDONLY))
                except OSError as error:
                    raise_outage(error, archive, archive)
                    raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for descriptor in self._open:
            os.close(descriptor)
        self._open = []

    def read(self, record, view):
        """Fills `view` with the image of this record. Raises OSError, or SourceError when its size has changed."""
        plan = self._plan
        if not plan.archives:
            self._read_file(self._file(record), view)
            return
        number = plan.archive_numbers[record]
        if self._open:
            read_exactly(self._open[number], view, int(plan.offsets[record]))
        else:
            descriptor = os.open(plan.archives[number], os.O_RDONLY)
            try:
                read_exactly(descriptor, view, int(plan.offsets[record]))
            finally:
                os.close(descriptor)

    def _file(self, record):
        path = self._plan.paths[record]
        return self._top + (os.path.basename(path) if self._plan.flat else path)

    def raise_outage(self, error, record):
        """Raises an OSError if `error`, met when this record was read, is not its image's fault."""
        if self._plan.archives:
            archive = self._plan.archives[self._plan.archive_numbers[record]]
            raise_outage(error, archive, self._plan.top, archive)
        else:
            path = self._file(record)
            # The folder that really holds it: the image may be a link to other storage.
            raise_outage(error, path, self._plan.top, os.path.dirname(os.path.realpath(path)))

    @staticmethod
    def _read_file(path, view):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            read_exactly(descriptor, view, 0)
            if os.fstat(descriptor).st_size != len(view):
                raise SourceError("longer than when it was listed")
        finally:
            os.close(descriptor)
