# SPDX-License-Identifier: Apache-2.0
"""Which class is which number, in which order records come, and what ImageNet must hold."""

import hashlib
import random

import numpy as np

from prepare.listing import Problem, SourceError

SHUFFLE_SEED = 100  # im2rec's, for the training and the validation set alike

IMAGENET_CLASSES = 1000
IMAGENET_IMAGES = {"train": 1281167, "val": 50000}
IMAGENET_VAL_PER_CLASS = 50
# SHA-256 of the 1,000 sorted synset names, each followed by a line feed.
IMAGENET_DIGEST = "70002b0ff5de60a3a17a82dbfcff291931f96225ddf941ad2e182fc39e183d15"


def walk_key(path):
    """Sorts folder paths ("" is the root) in the order in which a sorted walk from the top meets them."""
    return tuple(path.split("/")) if path else ()


def record_order(count):
    """Returns the numbers 0 to count - 1 in the order in which im2rec writes them, as an int64 array."""
    order = list(range(count))
    random.Random(SHUFFLE_SEED).shuffle(order)
    return np.array(order, dtype=np.int64)


def is_imagenet(classes):
    """Whether these class names are the 1,000 synsets of ILSVRC 2012."""
    text = "".join(name + "\n" for name in sorted(classes))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest() == IMAGENET_DIGEST


def count_problems(plan, train_counts):
    """What differs from the counts that ImageNet must have; nothing when the classes are not ImageNet's.

    `train_counts`: class -> images, as far as known.
    """
    if not is_imagenet(plan.classes):
        return []
    problems = []
    found, expected = len(plan.paths) + plan.left_out, IMAGENET_IMAGES[plan.prefix]
    if found != expected:
        problems.append(
            Problem(plan.top, "ImageNet has %d images here, this has %d" % (expected, found))
        )
    for name, count in zip(
        plan.classes, np.bincount(plan.labels, minlength=len(plan.classes)).tolist()
    ):
        expected = IMAGENET_VAL_PER_CLASS if plan.prefix == "val" else train_counts.get(name, count)
        if count != expected:
            reason = "ImageNet has %d images in this class, this has %d" % (expected, count)
            problems.append(Problem(plan.top + "/" + name, reason))
    return problems


def check_same_classes(train, val):
    """Raises SourceError unless both plans have the same classes: the same name must mean the same label in both."""
    if val.classes == ["."] and train.classes != ["."]:
        raise SourceError(
            "%s: its images stand in no class folders and there are no labels for them: put ILSVRC2012_devkit_t12.tar.gz "
            "or valprep.sh beside it, or name a file with --val-labels" % val.top
        )
    for one, other in ((train, val), (val, train)):
        missing = sorted(set(one.classes) - set(other.classes))
        if missing:
            raise SourceError(
                "%s: has no class %s, which %s has (%d such classes): the labels of training and validation would differ"
                % (other.top, missing[0], one.top, len(missing))
            )
