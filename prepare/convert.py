# SPDX-License-Identifier: Apache-2.0
"""Write the record file, index, list and checksums of a plan."""

from __future__ import annotations

import errno
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Deque, Dict, Iterator, List, Tuple

import numpy as np

from prepare import manifest as manifests
from prepare import recordio
from prepare.journal import Journal
from prepare.listing import BadImagesError, Problem, SourceError
from prepare.manifest import DestinationError, Manifest, Options, SourceFacts
from prepare.pieces import MAX_IN_FLIGHT, ImageCheck, Piece, Release, build_pieces
from prepare.plan import Plan, check_no_class_lost
from prepare.record_writer import RecordWriter
from prepare.resume import ConversionState, OnProgress, resume


def _hash_up_to_piece(state: ConversionState, views: List[memoryview]) -> str:
    """Add a piece to the SHA-256 sum of the record file; return the sum up to its end."""
    for view in views:
        state.sha256.update(view)
    return state.sha256.hexdigest()


def copy_pieces(
    pieces: Iterator[Tuple[Piece, Release]],
    writer: RecordWriter,
    journal: Journal,
    state: ConversionState,
    skip_bad_images: bool,
    progress: OnProgress,
) -> None:
    """Append the pieces to the record file.

    Without `skip_bad_images`, nothing is written after the first bad image; the remaining images
    are read only to find the other bad ones.
    """
    in_flight: Deque[Tuple[Piece, Release, Future[str], int]] = deque()

    def complete_oldest() -> None:
        piece, release, sha256, end = in_flight.popleft()
        # Do not rename the keys: they are in the journals of interrupted conversions.
        entry = {"sha256": sha256.result(), "cuts": piece.magic_splits, "bad": piece.bad}
        journal.add(entry, end)
        journal.write_flushed(writer.flushed)
        release(piece.buffer)

    with ThreadPoolExecutor(1) as hasher:
        for piece, release in pieces:
            state.add(piece.first, piece.last, piece.lengths, piece.sums, piece.bad)
            if state.bad and not skip_bad_images:
                release(piece.buffer)
            else:
                sha256 = hasher.submit(_hash_up_to_piece, state, piece.views)
                for view in piece.views:
                    writer.write(view)
                in_flight.append((piece, release, sha256, writer.position))
                if len(in_flight) == MAX_IN_FLIGHT - 1:
                    complete_oldest()
            progress(piece.last - piece.first, piece.image_bytes)
        while in_flight:
            complete_oldest()


def convert(
    plan: Plan,
    folder: str,
    workers: int,
    check: ImageCheck,
    source: SourceFacts,
    options: Options,
    progress: OnProgress,
) -> Manifest:
    """Write the files of a split to `folder`, resuming an interrupted run; return the manifest.

    Args:
        workers: Number of reading threads.
        check: Returns the bad images among those it is called with.
        source: Description of the source, for the manifest.
        options: Written to the manifest. With on_error "skip" bad images get no record; with "fail"
            all of them are found and nothing is kept.
        progress: Called with the images and bytes that were added.

    Raises:
        BadImagesError: There are bad images, and on_error is "fail".
        DestinationError: The destination has other content, or another conversion is using it.
        OSError: Writing failed or the source went away; what is written is kept.
    """
    prefix, skip_bad_images = plan.prefix, options["on_error"] == "skip"
    part = manifests.part_folder(folder, prefix)
    journal = Journal(part, {"digest": plan.digest, "check": options["check"]})
    try:
        # Another process may have finished this split before this one took the lock.
        if manifests.is_finished(folder, prefix, source, plan.digest, options):
            manifests.remove_part_folder(folder, prefix)
            return manifests.load_manifest(folder, prefix)
        manifests.roll_back_publish(folder, prefix)
        state, ranges = ConversionState(plan), plan.pieces()
        path = os.path.join(part, prefix + ".rec")
        kept_pieces, end = resume(plan, ranges, journal, path, state, progress)
        writer = RecordWriter(path, end)
        try:
            pieces = build_pieces(plan, ranges[kept_pieces:], workers, check)
            copy_pieces(pieces, writer, journal, state, skip_bad_images, progress)
            if state.bad and not skip_bad_images:
                raise BadImagesError(_bad_image_problems(plan, state))
            writer.finish()
        finally:
            writer.close()
        manifest = _write_tables(plan, part, state, source, options)
        if not journal.is_in_place():
            raise OSError(errno.ENODEV, "was removed while it was being written", part)
        manifests.publish(folder, prefix, manifest)
        return manifest
    except SourceError:
        manifests.remove_part_folder(folder, prefix)
        raise
    except DestinationError:
        if not journal.entries:  # no earlier run left a finished piece
            manifests.remove_part_folder(folder, prefix)
        raise
    finally:
        journal.close()


def _bad_image_problems(plan: Plan, state: ConversionState) -> List[Problem]:
    return [
        Problem(os.path.join(plan.top, plan.source_path(record)), state.bad[record])
        for record in sorted(state.bad)
    ]


def _write_tables(
    plan: Plan, part: str, state: ConversionState, source: SourceFacts, options: Options
) -> Manifest:
    """Write the index, the list and the sums to the folder `part`; return the manifest."""
    kept = np.flatnonzero(state.lengths)
    check_no_class_lost(plan, plan.labels[kept])
    lengths, keys, labels = state.lengths[kept], plan.keys[kept], plan.labels[kept]
    paths = [plan.paths[record] for record in kept.tolist()] if state.bad else plan.paths
    tables = {
        ".idx": recordio.index_lines(keys, np.cumsum(lengths) - lengths),
        ".lst": recordio.list_lines(keys, labels, paths),
        ".sums": [state.sums[kept].tobytes()],
    }
    files: Dict[str, manifests.FileFacts] = {
        plan.prefix + ".rec": {"bytes": int(lengths.sum()), "sha256": state.sha256.hexdigest()}
    }
    for suffix, blocks in tables.items():
        path = os.path.join(part, plan.prefix + suffix)
        files[plan.prefix + suffix] = manifests.write_durably(path, blocks)
    counts = np.bincount(labels, minlength=len(plan.classes)).tolist()
    skipped: List[manifests.SkippedImage] = [
        {"path": _relative_to(plan.top, problem.path), "reason": problem.reason}
        for problem in plan.problems
    ]
    skipped += [
        {"path": plan.paths[record], "reason": state.bad[record]} for record in sorted(state.bad)
    ]
    return {
        "format": manifests.FORMAT,
        "version": manifests.VERSION,
        "complete": True,
        "prefix": plan.prefix,
        "examples": len(kept),
        "classes": [
            {"name": name, "label": label, "examples": count}
            for label, (name, count) in enumerate(zip(plan.classes, counts))
        ],
        "image_bytes": int(plan.sizes[kept].sum()),
        "files": files,
        "digest": plan.digest,
        "source": source,
        "options": options,
        "ignored": plan.ignored,
        "skipped": skipped,
    }


def _relative_to(top: str, path: str) -> str:
    """Return `path` relative to `top`, or `path` itself if it is outside `top`.

    A manifest has relative paths because the source folder may be moved or renamed.
    """
    if path.startswith(top + "/"):
        return path[len(top) + 1 :]
    return "." if path == top else path
