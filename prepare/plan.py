# SPDX-License-Identifier: Apache-2.0
"""What will be written: every record's image, label, key and size, in record order. Reads no image and writes nothing."""

import hashlib
from dataclasses import dataclass, replace
from typing import Dict, List

import numpy as np

from prepare import imagenet_spec, recordio
from prepare.listing import EXTENSIONS, Folder, Listing, Problem, SourceError

PIECE_BYTES = (
    4 << 20
)  # what one worker reads at a time: large enough to cost nothing, small enough for a CPU's cache
PIECE_RECORDS = 256


@dataclass
class Plan:
    """The records of one half of the data set. Arrays and `paths` are in record order; sizes and offsets in bytes."""

    prefix: str
    top: str
    flat: bool  # the files stand at the top: only the last part of a path is theirs
    paths: List[str]  # relative to the top, as they stand in the .lst file
    keys: np.ndarray  # position in the walk, before shuffling
    labels: np.ndarray
    sizes: np.ndarray  # of the image
    offsets: np.ndarray  # of the image in its archive
    archive_numbers: np.ndarray  # into `archives`, -1: a file of its own
    archives: List[str]
    classes: List[str]  # the number of a class is its place
    problems: List[Problem]  # what is wrong, known without reading an image
    ignored: Dict[str, int]  # extension -> files that im2rec does not look at either
    left_out: int  # how many listed images get no record because of a problem
    digest: str  # of everything above that decides the output: the same digest, the same bytes

    def pieces(self):
        """Cuts the records into pieces; returns [(first record, last record + 1)]. Depends on nothing but the plan."""
        ends = np.cumsum(recordio.record_bytes(self.sizes))
        edges, first, begin = [], 0, 0
        while first < len(ends):
            last = int(np.searchsorted(ends, begin + PIECE_BYTES, side="right"))
            last = min(max(last, first + 1), first + PIECE_RECORDS)
            edges.append((first, last))
            first, begin = last, int(ends[last - 1])
        return edges

    def select(self, records):
        """Returns the plan of only these records."""
        arrays = {
            name: getattr(self, name)[records]
            for name in ("keys", "labels", "sizes", "offsets", "archive_numbers")
        }
        return replace(self, paths=[self.paths[record] for record in records], digest="", **arrays)

    def output_bytes(self):
        """What .rec, .idx, .lst and the sums will need together, but for cut records (4 bytes each)."""
        names = (
            sum(len(path) for path in self.paths) * 2
        )  # names are rarely ASCII-only and never large in all
        return int(recordio.record_bytes(self.sizes).sum()) + names + 60 * len(self.paths)


def make_plan(prefix, listing: Listing, allow_empty=False):
    """Orders and numbers what `listing` holds. Raises SourceError when it holds no image, or a class twice.

    `allow_empty`: whether an image of 0 bytes is an image.
    """
    folders = sorted(listing.folders, key=lambda folder: imagenet_spec.walk_key(folder.path))
    problems = list(listing.problems)
    for folder in folders:
        if not folder.names and not folder.has_folders and folder.path:
            problems.append(
                Problem(
                    listing.top + "/" + folder.path, "0 images in a class folder: fill or remove it"
                )
            )
    filled = [folder for folder in folders if folder.names]
    if not filled:
        raise SourceError("%s: holds no image (%s)" % (listing.top, " ".join(EXTENSIONS)))
    for one, other in zip(filled, filled[1:]):
        if one.path == other.path:
            raise SourceError("%s: holds the class %s twice" % (listing.top, one.path))
    paths, columns = flatten(filled)
    problems += size_problems(listing.top, paths, columns["size"], allow_empty) + repeated(
        listing.top, paths
    )
    order = imagenet_spec.record_order(len(paths))
    bad = {problem.path for problem in problems}
    if bad:
        top = listing.top + "/"
        order = np.array(
            [number for number in order.tolist() if top + paths[number] not in bad], dtype=np.int64
        )
    classes = [folder.path or "." for folder in filled]
    archives = sorted({folder.archive for folder in filled if folder.archive})
    numbers = np.array(
        [archives.index(folder.archive) if folder.archive else -1 for folder in filled],
        dtype=np.int32,
    )
    plan = Plan(
        prefix=prefix,
        top=listing.top,
        flat=listing.flat,
        paths=[paths[number] for number in order.tolist()],
        keys=order,
        labels=columns["label"][order],
        sizes=columns["size"][order],
        offsets=columns["offset"][order],
        archive_numbers=numbers[columns["label"][order]],
        archives=archives,
        classes=classes,
        problems=problems,
        ignored=listing.ignored,
        left_out=len(paths) - len(order),
        digest="",
    )
    plan.digest = plan_digest(plan, columns["time"][order])
    return plan


def flatten(folders: List[Folder]):
    """Returns all paths in walk order and a dict of arrays: size, offset, time, label. Takes the folders' names away.

    A million names twice would be a good part of the memory that a conversion may use.
    """
    paths = []
    columns = {"size": [], "offset": [], "time": [], "label": []}
    for label, folder in enumerate(folders):
        order = sorted(range(len(folder.names)), key=folder.names.__getitem__)
        folder_paths = folder.paths()
        paths += [folder_paths[number] for number in order]
        folder.names = []
        columns["size"].append(np.array(folder.sizes, dtype=np.int64)[order])
        columns["offset"].append(np.array(folder.offsets, dtype=np.int64)[order])
        columns["time"].append(np.array(folder.times, dtype=np.int64)[order])
        columns["label"].append(np.full(len(order), label, dtype=np.int64))
    return paths, {name: np.concatenate(arrays) for name, arrays in columns.items()}


def size_problems(top, paths, sizes, allow_empty):
    problems = []
    for number in np.flatnonzero((sizes == 0) | (sizes > recordio.MAX_IMAGE_BYTES)).tolist():
        if sizes[number]:
            problems.append(
                Problem(top + "/" + paths[number], "larger than a record can hold (512 MiB)")
            )
        elif not allow_empty:
            problems.append(Problem(top + "/" + paths[number], "empty"))
    return problems


def repeated(top, paths):
    """Problems for paths that come twice (in an archive; they stand next to each other in walk order)."""
    again = {later for earlier, later in zip(paths, paths[1:]) if earlier == later}
    return [
        Problem(top + "/" + path, "more than one image has this name") for path in sorted(again)
    ]


def check_no_class_lost(plan, kept_labels):
    """Raises SourceError when a class has no record left: every later class would get another number."""
    for label in np.flatnonzero(np.bincount(kept_labels, minlength=len(plan.classes)) == 0)[:1]:
        raise SourceError(
            "%s/%s: not one usable image in this class" % (plan.top, plan.classes[label])
        )


def plan_digest(plan, times):
    digest = hashlib.sha256()
    digest.update(
        ("%s\n%s\n" % (plan.prefix, "\n".join(plan.classes))).encode("utf-8", "surrogateescape")
    )
    for array in (plan.keys, plan.labels, plan.sizes, plan.offsets, plan.archive_numbers, times):
        digest.update(array.tobytes())
    for begin in range(0, len(plan.paths), 65536):
        digest.update(
            "\n".join(plan.paths[begin : begin + 65536]).encode("utf-8", "surrogateescape")
        )
    return digest.hexdigest()
