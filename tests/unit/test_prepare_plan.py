# SPDX-License-Identifier: Apache-2.0
"""Test the order of records, their labels, pieces, and planning at ImageNet's size."""

import subprocess
import sys

import numpy as np
import pytest
from support.image_fixtures import REPOSITORY

from prepare.listing import Folder, Listing
from prepare.plan import make_plan, record_order


def plan_of(folders):
    """Return a plan of {folder: image names}; every image has 100 bytes."""
    listing = Listing("top")
    for path, names in folders.items():
        folder = Folder(path)
        for name in names:
            folder.add(name, 100)
        listing.folders.append(folder)
    return make_plan("train", listing)


@pytest.mark.parametrize(
    "count,first_records",
    [
        (8, [0, 4, 7, 5, 1, 6, 3, 2]),
        (10, [4, 0, 5, 9, 3, 1, 6, 8, 7, 2]),
        (50000, [11251, 5926, 43812, 19737, 21514]),
        (1281167, [636970, 402111, 277585, 988818, 893467]),
    ],
)
def test_order_is_im2recs(count, first_records):
    order = record_order(count)
    assert order[: len(first_records)].tolist() == first_records
    assert len(order) == count


def test_labels_count_folders_with_images_in_walk_order():
    plan = plan_of(
        {
            "b": ["1.jpg"],
            "a/z": ["2.jpg"],
            "": ["0.jpg"],
            "a": [],
            "b-": ["3.jpg"],
            "b/c": ["4.jpg"],
        }
    )
    assert plan.classes == [".", "a/z", "b", "b/c", "b-"]


def test_folders_that_may_not_be_meant_as_classes_are_noted():
    names = ["0.jpg"]
    plan = plan_of({"": names, "a": names, ".checkpoints": names, "a/__MACOSX": names})
    assert plan.classes == [".", ".checkpoints", "a", "a/__MACOSX"]
    assert [note.split(",")[0] for note in plan.notes] == [
        "the images directly in top are a class of their own: .",
        "the images in top/.checkpoints",
        "the images in top/a/__MACOSX",
    ]
    assert plan_of({"": names}).notes == plan_of({"a": names}).notes == []


def test_planning_imagenet_takes_seconds_and_little_memory():
    program = """
import re, time
from prepare.file_state import FileState
from prepare.listing import Folder, Listing
from prepare.plan import make_plan
from prepare.progress_bar import Progress
listing = Listing("top", archive_states={"archive.tar": FileState(0, 0, 0)})
for number in range(1000):
    folder = Folder(f"n{number:08d}", archive="archive.tar")
    for image in range(1281 + (number < 167)):
        folder.add(f"n{number:08d}_{image}.JPEG", 100000 + image, 512 * image)
    listing.folders.append(folder)
start_seconds = time.process_time()
plan = make_plan("train", listing)
pieces = plan.pieces()
assert len(plan.paths) == 1281167 and pieces[-1][1] == 1281167
# Not ru_maxrss, which includes the size of the process that this one was forked from.
peak_kib = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1))
print(time.process_time() - start_seconds, peak_kib / 1024)
"""
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True).stdout
    seconds, peak_mib = map(float, output.split())
    assert seconds < 30 and peak_mib < 500


def test_pieces_hold_every_record_once():
    plan = plan_of({"a": [f"{number}.jpg" for number in range(1000)]})
    plan.sizes = np.array([5 << 20, 1, 0, 4 << 20] * 250)
    pieces = plan.pieces()
    assert pieces[0][0] == 0 and pieces[-1][1] == 1000
    for (first, last), (following, _) in zip(pieces, pieces[1:]):
        assert first < last == following
