# SPDX-License-Identifier: Apache-2.0
"""Check classes and numbers of images against those of ImageNet (ILSVRC 2012)."""

from __future__ import annotations

import hashlib
from typing import Dict, List, Sequence

import numpy as np

from prepare.listing import Problem, SourceError
from prepare.plan import Plan

IMAGENET_IMAGES = {"train": 1281167, "val": 50000}
IMAGENET_VAL_IMAGES_PER_CLASS = 50
MAX_CLASSES_NAMED = 20
# SHA-256 of the 1,000 sorted synset names, each followed by a line feed.
IMAGENET_CLASSES_SHA256 = "70002b0ff5de60a3a17a82dbfcff291931f96225ddf941ad2e182fc39e183d15"


def is_imagenet(classes: Sequence[str]) -> bool:
    """Return whether these class names are the 1,000 synsets of ILSVRC 2012."""
    lines = "".join(f"{name}\n" for name in sorted(classes))
    digest = hashlib.sha256(lines.encode("utf-8", "surrogateescape"))
    return digest.hexdigest() == IMAGENET_CLASSES_SHA256


def image_count_problems(plan: Plan, train_counts: Dict[str, int]) -> List[Problem]:
    """Return a problem for each count of images that differs from ImageNet's.

    Args:
        plan: the plan of one split.
        train_counts: number of training images by class, for the classes where it is known.

    Returns:
        The problems; none when the classes are not ImageNet's.
    """
    if not is_imagenet(plan.classes):
        return []
    problems = []
    found, expected = len(plan.paths) + plan.left_out, IMAGENET_IMAGES[plan.prefix]
    if found != expected:
        reason = f"ImageNet has {expected} images here, this has {found}"
        problems.append(Problem(plan.top, reason))
    counts = np.bincount(plan.labels, minlength=len(plan.classes)).tolist()
    for name, count in zip(plan.classes, counts):
        if plan.prefix == "val":
            expected = IMAGENET_VAL_IMAGES_PER_CLASS
        else:
            expected = train_counts.get(name, count)
        if count != expected:
            reason = f"ImageNet has {expected} images in this class, this has {count}"
            problems.append(Problem(f"{plan.top}/{name}", reason))
    return problems


def check_same_classes(train: Plan, val: Plan) -> None:
    """Check that both splits have the same classes, so that a label means the same in both.

    Raises:
        SourceError: the classes differ.
    """
    if val.classes == ["."] and train.classes != ["."]:
        raise SourceError(
            f"{val.top}: its images are not in class folders and there are no labels for them: put "
            f"ILSVRC2012_devkit_t12.tar.gz or valprep.sh next to it, or name a file with "
            f"--val-labels"
        )
    messages = []
    for plan, other in ((train, val), (val, train)):
        missing = sorted(set(plan.classes) - set(other.classes))
        if missing:
            names = ", ".join(missing[:MAX_CLASSES_NAMED])
            more = len(missing) - MAX_CLASSES_NAMED
            names += f" and {more} more" if more > 0 else ""
            messages.append(
                f"{other.top}: has no class {names}, which {plan.top} has: the labels of training "
                "and validation would differ: give both the same classes"
            )
    if messages:
        raise SourceError(*messages)
