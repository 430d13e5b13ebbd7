# SPDX-License-Identifier: Apache-2.0
"""Compare the images of a source with those that a finished split was made from."""

from __future__ import annotations

import os
from typing import List

from prepare.manifest import Manifest, different_conversion, load_manifest, manifest_path
from prepare.plan import Plan


def check_unchanged(folder: str, plan: Plan) -> None:
    """Check that a finished split was made from the images that `plan` found in the source.

    Compares names, sizes and modification times; reads no image.

    Raises:
        DestinationError: An image was changed, added or removed.
    """
    manifest = load_manifest(folder, plan.prefix)
    if manifest["digest"] != plan.digest:
        path = manifest_path(folder, plan.prefix)
        change = _describe_change(folder, plan, manifest)
        raise different_conversion(path, manifest, f"since then, {change}: ")


def _describe_change(folder: str, plan: Plan, manifest: Manifest) -> str:
    """Return which images were added and removed, or else which one was changed."""
    with open(os.path.join(folder, plan.prefix + ".lst"), encoding="utf-8") as stream:
        listed = {line.rstrip("\n").split("\t")[-1] for line in stream}
    skipped = {image["path"] for image in manifest["skipped"]}
    added = [
        path
        for record, path in enumerate(plan.paths)
        if path not in listed and not {path, plan.source_path(record)} & skipped
    ]
    removed = listed.difference(plan.paths)
    changes = _count("added", added) + _count("removed", sorted(removed))
    return " and ".join(changes) or f"{_newer_image(folder, plan)} was changed (size or time)"


def _count(change: str, paths: List[str]) -> List[str]:
    images = f"{min(paths)} and {len(paths) - 1} more" if len(paths) > 1 else "".join(paths)
    return [f"{images} {'were' if len(paths) > 1 else 'was'} {change}"] if paths else []


def _newer_image(folder: str, plan: Plan) -> str:
    """Return the path of an image that was modified after the split was finished."""
    if plan.archives:
        return "an archive"
    finished_ns = os.stat(manifest_path(folder, plan.prefix)).st_mtime_ns
    for record in range(len(plan.paths)):
        path = plan.source_path(record)
        if os.stat(os.path.join(plan.top, path)).st_mtime_ns > finished_ns:
            return path
    return "an image"
