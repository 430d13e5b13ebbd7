# SPDX-License-Identifier: Apache-2.0
"""Copies what a plan says into a record file: workers read and frame pieces, one thread writes them in order."""

import hashlib
import os
import queue
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Dict, List

import numpy as np

from prepare import record_writer, recordio
from prepare.image_reader import ImageReader
from prepare.listing import Problem, SourceError
from prepare.plan import Plan, check_no_class_lost

HELD = 3  # pieces on their way to the file: being hashed, being written, just asked for
BODY = (
    recordio.FRAME_BYTES + recordio.IMAGE_HEADER_BYTES
)  # where an image begins in its record, bytes


@dataclass
class Piece:
    """Some consecutive records, framed. Numbers of records count from the start of the plan."""

    first: int
    last: int  # one past the end
    views: List[memoryview]  # the bytes, in order; they live in `buffer` until it is given back
    lengths: np.ndarray  # of each record, bytes; 0: left out
    sums: np.ndarray
    cuts: Dict[int, int]  # record -> how many times it was cut at the magic number
    bad: Dict[int, str]  # record -> why it was left out
    buffer: np.ndarray


def build_piece(plan: Plan, first, last, buffer, reader, check):
    """Reads the images of records `first` to `last` - 1 into `buffer` (uint32) and frames them there."""
    sizes = plan.sizes[first:last]
    lengths = recordio.record_bytes(sizes)
    starts = np.cumsum(lengths) - lengths
    total = int(starts[-1] + lengths[-1])
    words = buffer[: total // 4]
    recordio.write_prefixes(words, starts, sizes, plan.labels[first:last], plan.keys[first:last])
    raw = words.view(np.uint8)
    view = memoryview(raw)
    bad = {}
    begins = (starts + BODY).tolist()
    for number, (begin, size) in enumerate(zip(begins, sizes.tolist())):
        try:
            reader.read(first + number, view[begin : begin + size])
        except SourceError as error:
            bad[number] = str(error)
        except OSError as error:
            reader.raise_if_outage(error, first + number)
            bad[number] = "cannot be read: %s" % error.strerror
    for number, reason in check(raw, starts + BODY, sizes):
        bad.setdefault(number, reason)
    cuts = recordio.find_cuts(words, starts)
    sums = recordio.word_sums(words, starts)
    views = [view]
    if bad or cuts:
        views = assemble(view, starts, lengths, sums, cuts, bad)
    return Piece(
        first=first,
        last=last,
        views=views,
        lengths=lengths,
        sums=sums,
        cuts={first + number: len(where) for number, where in cuts.items() if number not in bad},
        bad={first + number: reason for number, reason in bad.items()},
        buffer=buffer,
    )


def assemble(view, starts, lengths, sums, cuts, bad):
    """Returns the views of a piece with bad records left out and others cut; corrects `lengths` and `sums`."""
    views, begin = [], 0
    for number in sorted({*cuts, *bad}):
        start, end = int(starts[number]), int(starts[number] + lengths[number])
        views.append(view[begin:start])
        begin = end
        record = b"" if number in bad else recordio.cut_record(view[start:end], cuts[number])
        views.append(memoryview(record))
        lengths[number] = len(record)
        sums[number] = np.frombuffer(record, recordio.WORD).sum(dtype=recordio.WORD)
    return views + [view[begin:]]


def build_pieces(plan: Plan, edges, workers, check):
    """Yields (piece, release) for each piece of `edges`, in order, read by `workers` threads.

    Call release(piece.buffer) when its bytes are used; at most HELD pieces may wait for that when the next is asked for.
    Threads suffice: reading, hashing and the array operations all run outside Python's lock.
    """
    capacity = (
        max((int(recordio.record_bytes(plan.sizes[a:b]).sum()) for a, b in edges), default=0) // 4
    )
    buffers = queue.SimpleQueue()
    for _ in range(workers + 1 + HELD):
        buffers.put(np.empty(capacity, recordio.WORD))
    with ImageReader(plan) as reader, ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        try:
            for first, last in edges:
                if len(waiting) > workers:
                    yield waiting.popleft().result(), buffers.put
                waiting.append(
                    pool.submit(build_piece, plan, first, last, buffers.get(), reader, check)
                )
            while waiting:
                yield waiting.popleft().result(), buffers.put
        finally:
            for future in waiting:
                future.cancel()


class BadImages(SourceError):
    """Images turned out to be bad while they were read; `problems` names each."""

    def __init__(self, problems):
        super().__init__("%d bad images" % len(problems))
        self.problems = problems


class Done:
    """What is known of the records written so far: lengths and sums by record, the bad ones, the file's SHA-256."""

    def __init__(self, plan: Plan):
        self.lengths = np.zeros(len(plan.paths), np.int64)
        self.sums = np.zeros(len(plan.paths), recordio.WORD)
        self.bad = {}
        self.hash = hashlib.sha256()

    def add(self, first, last, lengths, sums, bad):
        self.lengths[first:last] = lengths
        self.sums[first:last] = sums
        self.bad.update(bad)


def resume(plan: Plan, edges, journal, path, done, progress):
    """Reads back what an earlier run wrote and believes what agrees with its journal.

    Returns (pieces, bytes) that are there; forgets the rest.
    """
    pieces = end = 0
    if journal.lines and os.path.exists(path):
        with open(path, "rb") as stream:
            for (first, last), line in zip(edges, journal.lines):
                lengths = recordio.record_bytes(plan.sizes[first:last])
                for record, count in line["cuts"].items():
                    lengths[int(record) - first] += count * recordio.SPLIT_GROWTH
                for record in line["bad"]:
                    lengths[int(record) - first] = 0
                data = stream.read(int(lengths.sum()))
                digest = done.hash.copy()
                digest.update(data)
                if digest.hexdigest() != line["sha256"]:
                    break
                done.hash = digest
                sums = recordio.sums_of(data, lengths)
                done.add(
                    first,
                    last,
                    lengths,
                    sums,
                    {int(record): reason for record, reason in line["bad"].items()},
                )
                pieces, end = pieces + 1, end + len(data)
                progress(last - first, int(plan.sizes[first:last].sum()))
    journal.keep(pieces)
    return pieces, end


def hash_views(digest, views):
    for view in views:
        digest.update(view)
    return digest.hexdigest()


def copy(plan: Plan, edges, record, journal, done, workers, check, keep_going, progress):
    """Appends the pieces `edges` to the RecordFile `record`. After a bad image only looks for more, unless `keep_going`."""
    pending = deque()

    def settle():
        piece, release, hashed, end = pending.popleft()
        journal.add({"sha256": hashed.result(), "cuts": piece.cuts, "bad": piece.bad}, end)
        journal.flushed(record.flushed)
        release(piece.buffer)

    with ThreadPoolExecutor(1) as hasher:
        for piece, release in build_pieces(plan, edges, workers, check):
            done.add(piece.first, piece.last, piece.lengths, piece.sums, piece.bad)
            if done.bad and not keep_going:
                release(piece.buffer)
            else:
                hashed = hasher.submit(hash_views, done.hash, piece.views)
                for view in piece.views:
                    record.write(view)
                pending.append((piece, release, hashed, record.position))
                if len(pending) == HELD - 1:
                    settle()
            progress(piece.last - piece.first, int(plan.sizes[piece.first : piece.last].sum()))
        while pending:
            settle()


def convert(plan: Plan, folder, workers, check, keep_going, description, progress):
    """Writes the files of plan.prefix to `folder` if they are not there; returns the manifest. Goes on after a killed run.

    `keep_going`: leave bad images out; otherwise all of them are found, nothing is left behind and BadImages lists them.
    `description`: the manifest's "source" and "options". `progress(records, image bytes)` is called as work gets done.
    Raises Refused when something else is in the way, and OSError when writing fails: what is written then stays.
    """
    part = record_writer.part_folder(folder, plan.prefix)
    journal = record_writer.Journal(
        part, {"digest": plan.digest, "check": description["options"]["check"]}
    )
    try:
        # Another process may have finished this half since the caller looked; nobody can any more.
        if record_writer.is_finished(
            folder, plan.prefix, description["source"]["identity"], description["options"]
        ):
            record_writer.sweep(folder, plan.prefix)
            return record_writer.load_manifest(folder, plan.prefix)
        record_writer.take_back(folder, plan.prefix)
        done, edges = Done(plan), plan.pieces()
        path = os.path.join(part, plan.prefix + ".rec")
        pieces, end = resume(plan, edges, journal, path, done, progress)
        record = record_writer.RecordFile(path, end)
        try:
            copy(plan, edges[pieces:], record, journal, done, workers, check, keep_going, progress)
            bad = [
                Problem(os.path.join(plan.top, plan.paths[number]), done.bad[number])
                for number in sorted(done.bad)
            ]
            if bad and not keep_going:
                raise BadImages(bad)
            record.finish()
        finally:
            record.close()
        manifest = finish(plan, done, part, bad, description)
        record_writer.publish(folder, plan.prefix, manifest)
        return manifest
    except SourceError:
        shutil.rmtree(part)
        raise
    except record_writer.Refused:
        if not journal.lines:  # nothing was begun
            shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        journal.close()


def finish(plan: Plan, done, part, bad, description):
    """Writes the index, the list and the sums; returns the manifest, which is the last thing to be written."""
    kept = np.flatnonzero(done.lengths)
    check_no_class_lost(plan, plan.labels[kept])
    lengths, keys, numbers = done.lengths[kept], plan.keys[kept], plan.labels[kept]
    paths = [plan.paths[record] for record in kept.tolist()] if bad else plan.paths
    blocks = {
        ".idx": recordio.index_lines(keys, np.cumsum(lengths) - lengths),
        ".lst": recordio.list_lines(keys, numbers, paths),
        ".sums": [done.sums[kept].tobytes()],
    }
    files = {plan.prefix + ".rec": {"bytes": int(lengths.sum()), "sha256": done.hash.hexdigest()}}
    for suffix, content in blocks.items():
        files[plan.prefix + suffix] = record_writer.write_file(
            os.path.join(part, plan.prefix + suffix), content
        )
    counts = np.bincount(numbers, minlength=len(plan.classes)).tolist()
    return {
        "format": record_writer.FORMAT,
        "version": record_writer.VERSION,
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
        **description,
        "ignored": plan.ignored,
        "skipped": [
            {"path": below(plan.top, problem.path), "reason": problem.reason}
            for problem in plan.problems + bad
        ],
    }


def below(top, path):
    """`path` without `top`, which says nothing once the source is moved or named another way."""
    return path[len(top) + 1 :] if path.startswith(top + "/") else "." if path == top else path
