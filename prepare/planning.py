# SPDX-License-Identifier: Apache-2.0
"""List the source and plan both splits; find everything that is wrong without reading an image."""

from __future__ import annotations

from typing import Dict, List, Sequence

from prepare import imagenet_spec, val_labels
from prepare.command_paths import check_destination_not_listed, wrong_source_is_usage_error
from prepare.listing import BadImagesError, SourceError, is_image_name
from prepare.plan import Plan, check_no_class_lost, make_plan
from prepare.progress_bar import print_line
from prepare.sources import Split

PREFIXES = ("val", "train")  # the small split first, to find errors sooner
MAX_IGNORED_SHOWN = 10  # kinds of ignored files


def make_plans(
    splits: Dict[str, Split],
    destination: str,
    workers: int,
    allow_empty: bool,
    skip_bad_images: bool,
) -> Dict[str, Plan]:
    """List the source and plan the records of both splits.

    Args:
        splits: by "train" and "val".
        destination: path of the destination, which may not be in the folders that are listed.
        workers: number of threads.
        allow_empty: whether an image of 0 bytes is an image.
        skip_bad_images: whether images with problems get no record; otherwise they are an error.

    Raises:
        BadImagesError: The source has problems; all that were found in both splits are named.
        WrongPathError: The source may not be read, or the destination is in it.
        OSError: The storage failed.
    """
    plans: Dict[str, Plan] = {}
    messages: List[str] = []
    with wrong_source_is_usage_error():
        for prefix in PREFIXES:
            try:
                plans[prefix] = plan_split(
                    prefix, splits[prefix], destination, workers, allow_empty
                )
            except SourceError as error:
                messages += error.messages
        check_plans(plans, messages, splits["val"].label_files, skip_bad_images)
    return plans


def plan_split(
    prefix: str, split: Split, destination: str, workers: int, allow_empty: bool
) -> Plan:
    """List the images of a split and plan its records."""
    print_line(f"{prefix}: listing {split.path} ({split.kind})")
    listing = split.list(workers)
    check_destination_not_listed(destination, listing.folder_ids)
    plan = make_plan(prefix, listing, allow_empty=allow_empty)
    print_line(f"{prefix}: {len(plan.paths):,} images in {len(plan.classes)} classes")
    if plan.ignored:
        shown = sorted(plan.ignored.items())[:MAX_IGNORED_SHOWN]
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in shown)
        print_line(f"{prefix}: other files, ignored: {kinds}")
    for note in plan.notes:
        print_line(f"{prefix}: {note}")
    return plan


def check_plans(
    plans: Dict[str, Plan],
    messages: List[str],
    label_files: Sequence[str],
    skip_bad_images: bool,
) -> None:
    """Raise BadImagesError if the splits cannot be converted as they were planned.

    Args:
        plans: of the splits that could be planned.
        messages: why the others could not.
        label_files: the validation labels.
        skip_bad_images: whether images with problems may be left out.
    """
    try:
        train_counts = val_labels.train_counts(label_files)
    except SourceError as error:
        train_counts = {}
        messages += [message for message in error.messages if message not in messages]
    for plan in plans.values():
        plan.problems += imagenet_spec.image_count_problems(plan, train_counts)
    problems = [problem for plan in plans.values() for problem in plan.problems]
    # Where classes may be missing already, a comparison of the classes would only find them again.
    classes_known = not messages and all(problem.skippable for problem in problems)
    if classes_known:
        messages += class_errors(plans, skip_bad_images)
    if skip_bad_images:
        problems = [problem for problem in problems if not problem.skippable]
    if messages or problems:
        raise BadImagesError(problems, messages)


def class_errors(plans: Dict[str, Plan], skip_bad_images: bool) -> List[str]:
    """Return why the classes of the splits would have the wrong labels."""
    messages: List[str] = []
    if skip_bad_images:
        messages += lost_folder_errors(plans)
        for plan in plans.values():
            try:
                check_no_class_lost(plan, plan.labels)
            except SourceError as error:
                messages += error.messages
    try:
        imagenet_spec.check_same_classes(plans["train"], plans["val"])
    except SourceError as error:
        messages += error.messages
    return messages


def lost_folder_errors(plans: Dict[str, Plan]) -> List[str]:
    """Return a message for each path that is unusable in both splits and would be a class."""
    splits: List[Dict[str, str]] = []  # relative path -> problem
    for plan in plans.values():
        top, classes = f"{plan.top}/", set(plan.classes)
        problems = {problem.path[len(top) :]: str(problem) for problem in plan.problems}
        splits.append(
            {
                path: problem
                for path, problem in problems.items()
                if problem.startswith(top) and path not in classes and not is_image_name(path)
            }
        )
    return [by_path[path] for path in splits[0] if path in splits[1] for by_path in splits]
