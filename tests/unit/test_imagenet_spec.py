# SPDX-License-Identifier: Apache-2.0
"""Test the comparison of image counts with ImageNet's."""

from prepare import imagenet_spec
from prepare.listing import Folder, Listing
from prepare.plan import make_plan


def plan_of_1000_classes(prefix, count_of):
    """Return a plan of 1,000 classes; the class number n has count_of(n) images."""
    listing = Listing("top")
    for number in range(1000):
        folder = Folder(f"n{number:08d}")
        for image in range(count_of(number)):
            folder.add(f"n{number:08d}_{image}.JPEG", 100)
        listing.folders.append(folder)
    return make_plan(prefix, listing)


def problem_lines(plan, train_counts=None):
    problems = imagenet_spec.image_count_problems(plan, train_counts or {})
    return [str(problem) for problem in problems]


def test_counts_are_checked_when_the_classes_are_imagenets(monkeypatch):
    plan = plan_of_1000_classes("val", lambda number: 50 if number else 49)
    assert problem_lines(plan) == []
    # Only a digest of the 1,000 names is known here, so declare any names to be ImageNet's.
    monkeypatch.setattr(imagenet_spec, "is_imagenet", lambda classes: True)
    assert problem_lines(plan) == [
        "top: ImageNet has 50000 images here, this has 49999",
        "top/n00000000: ImageNet has 50 images in this class, this has 49",
    ]
    assert problem_lines(plan_of_1000_classes("val", lambda number: 50)) == []
    plan = plan_of_1000_classes("train", lambda number: 3)
    assert problem_lines(plan, {"n00000007": 4, "n00000008": 3}) == [
        "top: ImageNet has 1281167 images here, this has 3000",
        "top/n00000007: ImageNet has 4 images in this class, this has 3",
    ]
