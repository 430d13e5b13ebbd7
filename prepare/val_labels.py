# SPDX-License-Identifier: Apache-2.0
"""Classes of validation images that come without class folders: from the devkit, a valprep.sh or a list of synsets."""

import io
import os
import re
import shlex
import tarfile

from prepare.listing import Folder, Problem, SourceError

LOOKS = re.compile(
    r"ILSVRC2012_devkit_t12(\.tar\.gz)?|valprep.*\.sh|.*(synset|val).*labels.*\.txt", re.IGNORECASE
)
NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
SYNSET = re.compile(r"[^/\s]+")


def looks_like_labels(name):
    """Whether a file of this name in the source folder is taken for validation labels."""
    return LOOKS.fullmatch(name) is not None


class Labels:
    """What one file says: classes by image name, or a list of classes in the order of the images."""

    def __init__(self, path, by_name=None, in_order=None):
        self.path, self._by_name, self._in_order = path, by_name, in_order

    def of(self, names):
        """Returns {name: class} for image names; all of them, or SourceError."""
        if self._by_name is not None:
            found = {name: self._by_name[name] for name in names if name in self._by_name}
        elif all(NUMBERED.fullmatch(name) for name in names):
            # By number, so that a missing image does not give every later one its neighbour's class.
            numbers = {name: int(NUMBERED.fullmatch(name).group(1)) for name in names}
            found = {
                name: self._in_order[at - 1]
                for name, at in numbers.items()
                if 1 <= at <= len(self._in_order)
            }
        elif len(names) == len(self._in_order):
            found = dict(zip(sorted(names), self._in_order))
        else:
            raise SourceError(
                "%s: has %d lines for %d images" % (self.path, len(self._in_order), len(names))
            )
        for name in names:
            if name not in found:
                raise SourceError("%s: says nothing about the image %s" % (self.path, name))
        return found

    def unused(self, names):
        """Images that this file knows and `names` lacks."""
        names = set(names)
        if self._by_name is not None:
            return sorted(set(self._by_name) - names)
        if not all(NUMBERED.fullmatch(name) for name in names):
            return []
        numbers = {
            int(NUMBERED.fullmatch(name).group(1)) for name in names
        }  # whatever the extension
        return [
            "ILSVRC2012_val_%08d.JPEG" % at
            for at in range(1, len(self._in_order) + 1)
            if at not in numbers
        ]


def read_labels(path):
    """Reads a file (or the unpacked devkit folder) by looking at what it is. Raises SourceError or OSError."""
    if os.path.isdir(path) or is_archive(path):
        return Labels(path, in_order=read_devkit(path))
    try:
        with open(path, encoding="utf-8") as stream:
            lines = [line.strip() for line in stream if line.strip()]
    except UnicodeDecodeError:
        raise SourceError("%s: neither a devkit archive nor a text file of labels" % path) from None
    if any(line.startswith("mv ") for line in lines):
        return Labels(path, by_name=read_moves(path, lines))
    lines = [line for line in lines if not line.startswith("#")]
    odd = [line for line in lines if not SYNSET.fullmatch(line)]
    if odd or not lines:
        raise SourceError(
            "%s: not a list with one synset a line: %r" % (path, odd[0] if odd else "it is empty")
        )
    return Labels(path, in_order=lines)


def is_archive(path):
    try:
        return tarfile.is_tarfile(path)
    except Exception:  # each sort of compression has an error of its own for what is damaged
        return False


def read_moves(path, lines):
    """{image: class} of the lines `mv IMAGE CLASS/` of a shell script."""
    classes = {}
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation that does not end
            words = line.split()[:1]
        if not words or words[0] != "mv":
            continue
        target = words[-1].rstrip("/")
        if len(words) != 3 or not SYNSET.fullmatch(target):
            raise SourceError("%s: not a line `mv IMAGE CLASS/`: %s" % (path, line))
        name = os.path.basename(words[1])
        if classes.setdefault(name, target) != target:
            raise SourceError("%s: moves %s to %s and to %s" % (path, name, classes[name], target))
    return classes


def read_devkit(path):
    """The synset of every validation image, in order: ground truth IDs through meta.mat. IDs are not sorted synsets."""
    files, synsets = open_devkit(path)
    names = dict(zip(synsets["ILSVRC2012_ID"], synsets["WNID"]))
    try:
        return [names[int(line)] for line in files[TRUTH].decode().split()]
    except (ValueError, KeyError) as error:
        raise SourceError(
            "%s: %s: %s is no ILSVRC2012_ID of its meta.mat" % (path, TRUTH, error)
        ) from None


def train_counts(paths):
    """{synset: training images} if a devkit among these label files tells, else nothing."""
    for path in paths:
        if os.path.isdir(path) or is_archive(path):
            synsets = open_devkit(path)[1]
            if "num_train_images" in synsets:
                return dict(zip(synsets["WNID"], synsets["num_train_images"]))
    return {}


def open_devkit(path):
    """Returns the devkit's files that matter and the columns of the table in its meta.mat. Raises SourceError."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise SourceError(
            "%s: reading its meta.mat needs scipy: install it, or give another --val-labels" % path
        ) from None
    try:
        files = devkit_files(path)
        table = loadmat(io.BytesIO(files[META]), squeeze_me=True)["synsets"].reshape(-1)
        kinds = {"ILSVRC2012_ID": int, "WNID": str, "num_train_images": int}
        synsets = {
            name: [kind(value) for value in table[name]]
            for name, kind in kinds.items()
            if name in table.dtype.names
        }
        synsets["ILSVRC2012_ID"], synsets["WNID"], files[TRUTH]  # KeyError when one is not there
        return files, synsets
    except (
        Exception
    ) as error:  # scipy and each sort of compression have errors of their own for what is damaged
        text = "%s: cannot be read as the devkit (%s and %s in data/): %s" % (
            path,
            TRUTH,
            META,
            " ".join(str(error).split()),
        )
        raise SourceError(text) from None


def devkit_files(path):
    """{base name: bytes} of the two files that matter, from the archive or the folder."""
    files = {}
    if os.path.isdir(path):
        for name in (TRUTH, META):
            with open(os.path.join(path, "data", name), "rb") as stream:
                files[name] = stream.read()
        return files
    with tarfile.open(path) as archive:
        for member in archive:
            if os.path.basename(member.name) in (TRUTH, META) and member.isfile():
                files[os.path.basename(member.name)] = archive.extractfile(member).read()
        while archive.fileobj.read(
            1 << 20
        ):  # to its end, where gzip has its sum: scipy may crash on a damaged table
            pass
    return files


def apply(listing, paths):
    """Moves images that stand at the top of `listing` to their classes' folders; checks those that already are in one.

    Raises SourceError when the label files in `paths` disagree with each other or with the folders.
    """
    top = next((folder for folder in listing.folders if not folder.path and folder.names), None)
    if top is None:
        return check_folders(listing, paths)
    sources = [read_labels(path) for path in paths]
    classes = agreed(sources, top.names)
    listing.folders.remove(top)
    listing.flat = True
    folders = {}
    for name, size, offset, time in zip(top.names, top.sizes, top.offsets, top.times):
        folder = folders.setdefault(classes[name], Folder(classes[name], archive=top.archive))
        folder.add(name, size, offset, time)
    listing.folders += folders.values()
    for name in sources[0].unused(top.names):
        listing.problems.append(
            Problem(
                listing.top + "/" + name, "not there, though %s has its label" % sources[0].path
            )
        )


def agreed(sources, names):
    """{name: class} that every source gives. Raises SourceError at the first difference."""
    first = sources[0].of(names)
    for other in sources[1:]:
        for name, synset in other.of(names).items():
            if synset != first[name]:
                raise SourceError(
                    "%s says that %s is %s, %s says %s"
                    % (sources[0].path, name, first[name], other.path, synset)
                )
    return first


def check_folders(listing, paths):
    """Compares the label files with the class folders that the images stand in, if these are ImageNet's images."""
    places = [
        (name, folder.path)
        for folder in listing.folders
        for name in folder.names
        if NUMBERED.fullmatch(name)
    ]
    if not places:
        return
    sources = [read_labels(path) for path in paths]
    classes = agreed(sources, sorted({name for name, _ in places}))
    for name, folder in places:  # a name may stand in two folders
        if folder != classes[name]:
            text = "%s/%s: is in %s, but %s says %s" % (
                listing.top,
                name,
                folder,
                sources[0].path,
                classes[name],
            )
            raise SourceError(text)
