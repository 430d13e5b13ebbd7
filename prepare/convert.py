# SPDX-License-Identifier: Apache-2.0
"""Write the record file, index, list and checksums of a plan."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Deque, Dict, Iterator, List, Tuple

import numpy as np

from prepare import destination, recordio
from prepare import manifest as manifests
from prepare.image_check import ImageCheck
from prepare.journal import Journal
from prepare.listing import BadImagesError, Problem
from prepare.manifest import DestinationError, Manifest, Options, SourceFacts
from prepare.pieces import MAX_IN_FLIGHT, Piece, Release, build_pieces
from prepare.plan import Plan, check_no_class_lost
from prepare.record_writer import RecordWriter
from prepare.resume import (
    ConversionState,
    OnProgress,
    bad_images_now,
    is_complete,
    journal_entry,
    resume,
)

MAX_UNHASHED_BLOCKS = 8  # of a piece that is copied in several blocks


def copy_pieces(
    pieces: Iterator[Tuple[Piece, Release]],
    plan: Plan,
    writer: RecordWriter,
    journal: Journal,
    state: ConversionState,
    progress: OnProgress,
) -> None:
    """Append the pieces to the record file; bad images are left out and collected in `state`."""
    in_flight: Deque[Tuple[Piece, Release, Future[str], int]] = deque()

    def complete_oldest() -> None:
        piece, release, sha256, end = in_flight.popleft()
        journal.add(journal_entry(plan, piece, sha256.result()), end)
        journal.write_flushed(writer.flushed)
        release(piece)

    with ThreadPoolExecutor(1) as hasher:
        for piece, release in pieces:
            hashed: Deque[Future[None]] = deque()
            for block in piece.blocks:
                hashed.append(hasher.submit(state.sha256.update, block))
                writer.write(block)
                if len(hashed) > MAX_UNHASHED_BLOCKS:
                    hashed.popleft().result()
            state.add(piece.first, piece.last, piece.lengths, piece.sums)
            state.bad.update(piece.bad)
            state.unusual.update(piece.unusual)
            sha256 = hasher.submit(state.sha256.hexdigest)  # after the updates
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
    """Write the files of a split to `folder`, resuming an unfinished run; return the manifest.

    Args:
        plan: The records of the split.
        folder: The destination.
        workers: Number of reading threads.
        check: Finds bad and unusual images.
        source: Description of the source, for the manifest.
        options: Written to the manifest. Bad images get no record; with on_error "fail" the split
            remains unfinished when there are any, and a later run continues it.
        progress: Called with the images and bytes that were added.

    Raises:
        BadImagesError: There are bad images, and on_error is "fail".
        DestinationError: The destination has other content, or another conversion is using it.
        OSError: Writing failed or the source went away; what is written is kept.
    """
    prefix = plan.prefix
    part = manifests.part_folder(folder, prefix)
    header = {"digest": plan.digest, "source": source["path"], "check": options["check"]}
    journal = Journal(part, header)
    try:
        if _is_finished_meanwhile(plan, folder, journal, source, options):
            destination.remove_part_folder(folder, prefix)
            return manifests.load_manifest(folder, prefix)
        with _part_folder_kept(part, prefix, journal):
            state = _write_records(plan, part, workers, check, journal, options, progress)
            manifest = _write_tables(plan, part, state, source, options)
        destination.publish(folder, prefix, manifest)
        return manifest
    finally:
        journal.close()


@contextlib.contextmanager
def _part_folder_kept(part: str, prefix: str, journal: Journal) -> Iterator[None]:
    """Raise OSError at the end if the part folder of a split was removed or replaced meanwhile.

    Files that were written to it since then are removed: without a journal, the next run would take
    them for those of another program.
    """
    try:
        yield
    except OSError:
        if journal.is_in_place():
            raise
    finally:
        if not journal.is_in_place():
            destination.remove_files_without_journal(part, prefix)
    if not journal.is_in_place():
        raise OSError(errno.ENODEV, "was removed while it was being written", part)


def _is_finished_meanwhile(
    plan: Plan, folder: str, journal: Journal, source: SourceFacts, options: Options
) -> bool:
    """Return whether another process finished this split before this one took the lock.

    Undo an interrupted publication if it is not finished. Arguments and errors as of `convert`.
    """
    try:
        if destination.is_finished(folder, plan.prefix, source, plan.digest, options):
            return True
        destination.roll_back_publish(folder, plan.prefix)
        return False
    except DestinationError:
        if not journal.entries:  # no earlier run left a finished piece
            destination.remove_part_folder(folder, plan.prefix)
        raise


def _write_records(
    plan: Plan,
    part: str,
    workers: int,
    check: ImageCheck,
    journal: Journal,
    options: Options,
    progress: OnProgress,
) -> ConversionState:
    """Write the record file to the folder `part`; arguments and errors as of `convert`."""
    state, ranges = ConversionState(plan), plan.pieces()
    still_bad = None
    if options["on_error"] != "skip":
        still_bad = bad_images_now(plan, ranges, journal, workers, check)
        if still_bad and is_complete(plan, ranges, journal):
            raise BadImagesError(_problems(plan, still_bad))
    path = os.path.join(part, plan.prefix + ".rec")
    kept_pieces, end = resume(plan, ranges, journal, path, state, still_bad, progress)
    writer = RecordWriter(path, end)
    try:
        pieces = build_pieces(plan, ranges[kept_pieces:], workers, check)
        copy_pieces(pieces, plan, writer, journal, state, progress)
        writer.finish()
        journal.write_flushed(writer.flushed)
    finally:
        writer.close()
    if state.bad and options["on_error"] != "skip":
        raise BadImagesError(_problems(plan, state.bad))
    return state


def _problems(plan: Plan, bad: Dict[int, str]) -> List[Problem]:
    """Return a problem for each bad image; `bad` is {record: reason}."""
    return [
        Problem(os.path.join(plan.top, plan.source_path(record)), bad[record])
        for record in sorted(bad)
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
        files[plan.prefix + suffix] = destination.write_durably(path, blocks)
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
        "unusual": [
            {"path": plan.paths[record], "description": state.unusual[record]}
            for record in sorted(state.unusual)
        ],
    }


def _relative_to(top: str, path: str) -> str:
    """Return `path` relative to `top`, or `path` itself if it is outside `top`.

    A manifest has relative paths because the source folder may be moved or renamed.
    """
    if path.startswith(top + "/"):
        return path[len(top) + 1 :]
    return "." if path == top else path
