# SPDX-License-Identifier: Apache-2.0
"""python -m prepare.verify DST: reads a converted data set back and says whether it is whole, and if not, what is damaged."""

import argparse
import hashlib
import os
import sys
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from prepare import image_check, record_writer, recordio, sources
from prepare.convert import build_pieces
from prepare.cpus import positive, usable_cpus
from prepare.listing import SourceError
from prepare.plan import make_plan
from prepare.progress_bar import Progress, print_any_name

STATUSES = """\
exit status:
  0    everything is as the manifests say (and, with --against, as the source is)
  1    something is damaged, missing or different: it is named
  2    wrong command line, or a path that does not exist or may not be read
  3    DST is not a finished data set
"""
SHOWN = 50  # damaged records named before they are only counted
CHUNK_BYTES = 8 << 20


class Damaged(Exception):
    """The files disagree so much that no record can be looked at."""


class Half:
    """The index, the list and the sums of one half, and what is wrong with it."""

    def __init__(self, folder, prefix):
        self.folder, self.prefix = folder, prefix
        self.manifest = record_writer.load_manifest(folder, prefix)
        self.faults = []

    def path(self, suffix):
        return os.path.join(self.folder, self.prefix + suffix)

    def read_tables(self):
        """Reads .idx, .lst and .sums and compares them with the manifest and with each other. Raises Damaged."""
        for name, facts in sorted(self.manifest["files"].items()):
            path = os.path.join(self.folder, name)
            if not os.path.exists(path):
                raise Damaged("%s: is missing" % path)
            if os.path.getsize(path) != facts["bytes"]:
                self.faults.append(
                    "%s: has %d bytes, not %d" % (path, os.path.getsize(path), facts["bytes"])
                )
            elif not name.endswith(".rec") and file_digest(path) != facts["sha256"]:
                self.faults.append("%s: its SHA-256 is not the manifest's" % path)
        try:
            with open(self.path(".idx")) as stream:
                index = np.array(array("q", map(int, stream.read().split()))).reshape(-1, 2)
            self.keys, self.offsets = index[:, 0], index[:, 1]
            listed, labels, self.paths = array("q"), array("f"), []
            with open(self.path(".lst"), encoding="utf-8") as stream:
                for line in stream:
                    key, label, path = line.rstrip("\n").split("\t")
                    listed.append(int(key))
                    labels.append(float(label))
                    self.paths.append(path)
            self.labels = np.array(labels, dtype="<f4")
        except (ValueError, OverflowError) as error:
            raise Damaged(
                "%s: the index or the list cannot be read: %s" % (self.path(".idx"), error)
            ) from None
        counts = {
            "manifest": self.manifest["examples"],
            ".idx": len(self.keys),
            ".lst": len(self.paths),
        }
        if len(set(counts.values())) > 1:
            raise Damaged("%s: the numbers of records differ: %s" % (self.path(".rec"), counts))
        if not np.array_equal(listed, self.keys):
            raise Damaged("%s: its keys are not those of the list" % self.path(".idx"))
        self.ends = np.append(
            self.offsets[1:], self.manifest["files"][self.prefix + ".rec"]["bytes"]
        )
        if len(self.offsets) and (
            self.offsets[0] or (self.ends <= self.offsets).any() or (self.offsets % 4).any()
        ):
            raise Damaged(
                "%s: its offsets do not follow each other, or lead beyond the file's end"
                % self.path(".idx")
            )
        self.size = os.path.getsize(self.path(".rec"))
        self.check_classes()
        with open(self.path(".sums"), "rb") as stream:
            sums = stream.read()
        if len(sums) != 4 * len(self.keys):
            raise Damaged(
                "%s: has %d bytes for %d records, not 4 for each"
                % (self.path(".sums"), len(sums), len(self.keys))
            )
        self.sums = np.frombuffer(sums, recordio.WORD)

    def check_classes(self):
        """Compares the classes of the list, by label and folder, with the manifest's."""
        found = Counter(
            zip(self.labels.tolist(), (os.path.dirname(path) or "." for path in self.paths))
        )
        given = Counter()
        for row in self.manifest["classes"]:
            given[float(row["label"]), row["name"]] += row["examples"]
        for label, name in sorted((given - found) | (found - given)):
            self.faults.append(
                "%s: gives class %d, %s, %d images, the list %d"
                % (
                    record_writer.manifest_path(self.folder, self.prefix),
                    label,
                    name,
                    given[label, name],
                    found[label, name],
                )
            )

    def read_records(self, stream, first, last, buffer=None):
        """The bytes of the records `first` to `last` - 1, fewer where the file ends; into `buffer` if that is large enough."""
        size = int(
            min(self.ends[last - 1], max(self.size, self.offsets[first])) - self.offsets[first]
        )
        if buffer is None or len(buffer) < size:
            buffer = bytearray(size)
        return read_fully(stream, memoryview(buffer)[:size])

    def fault(self, record, reason):
        self.faults.append(
            "%s: record %d (key %d, %s, at byte %d): %s"
            % (
                self.path(".rec"),
                record,
                self.keys[record],
                self.paths[record],
                self.offsets[record],
                reason,
            )
        )

    def chunks(self):
        """Yields (first, last) of records that are read together."""
        first = 0
        while first < len(self.offsets):
            last = int(np.searchsorted(self.ends, self.offsets[first] + CHUNK_BYTES, side="right"))
            last = max(last, first + 1)
            yield first, last
            first = last

    def check_records(self, progress):
        """Reads every record: frame, header, sum; and the SHA-256 of the file."""
        digest, hashed = hashlib.sha256(), None
        before = len(self.faults)
        buffers = [bytearray(), bytearray()]
        with open(self.path(".rec"), "rb", buffering=0) as stream, ThreadPoolExecutor(1) as hasher:
            for number, (first, last) in enumerate(self.chunks()):
                data = self.read_records(stream, first, last, buffers[number % 2])
                buffers[number % 2] = data.obj
                if hashed:
                    hashed.result()  # in order, and before its buffer is filled again
                hashed = hasher.submit(digest.update, data)
                self.check_chunk(first, last, data)
                progress(last - first, len(data))
        if (
            digest.hexdigest() != self.manifest["files"][self.prefix + ".rec"]["sha256"]
            and len(self.faults) == before
        ):
            self.faults.append(
                "%s: its SHA-256 is not the manifest's, though each record agrees with its sum"
                % self.path(".rec")
            )

    def check_prefixes(self, workers, progress):
        """Reads only the first 32 bytes of every record, on `workers` threads."""
        size = 4 * recordio.PREFIX_WORDS

        def read(first):
            last = min(first + 4096, len(self.offsets))
            heads = [
                os.pread(descriptor, size, offset) for offset in self.offsets[first:last].tolist()
            ]
            words = np.frombuffer(
                b"".join(head.ljust(size, b"\0") for head in heads), recordio.WORD
            )
            at = np.arange(last - first) * recordio.PREFIX_WORDS
            lengths = self.ends[first:last] - self.offsets[first:last]
            whole, cut = look_at_prefixes(
                words, at, lengths, self.keys[first:last], self.labels[first:last]
            )
            return first, last, np.flatnonzero(~(whole | cut))

        descriptor = os.open(self.path(".rec"), os.O_RDONLY)
        try:
            with ThreadPoolExecutor(workers) as pool:
                for first, last, bad in pool.map(read, range(0, len(self.offsets), 4096)):
                    for number in bad.tolist():
                        self.fault(
                            first + number,
                            "its frame or header (length, label, key) is not what the index and list say",
                        )
                    progress(last - first, int(self.ends[last - 1] - self.offsets[first]))
        finally:
            os.close(descriptor)

    def compare(self, plan, workers, progress):
        """Builds every record again from the source and compares its bytes."""
        # Older manifests give these paths with the source in front, as it was named then.
        listed, skipped = (
            set(self.paths),
            {end for fault in self.manifest["skipped"] for end in ends_of(fault["path"])},
        )
        kept = [
            record
            for record, path in enumerate(plan.paths)
            if path in listed or path not in skipped
        ]
        plan = plan.select(kept)
        if plan.paths != self.paths or not np.array_equal(plan.labels, self.labels):
            odd = sorted(set(plan.paths) ^ set(self.paths))
            text = "%s: does not hold the images that %s lists" % (plan.top, self.path(".lst"))
            self.faults.append(
                text
                + (
                    ": %s is in only one of them (%d such)" % (odd[0], len(odd))
                    if odd
                    else " in this order"
                )
            )
            return
        with open(self.path(".rec"), "rb", buffering=0) as stream:
            for piece, release in build_pieces(
                plan, plan.pieces(), workers, image_check.check_nothing
            ):
                begin, end = int(self.offsets[piece.first]), int(self.ends[piece.last - 1])
                data, made = (
                    self.read_records(stream, piece.first, piece.last),
                    b"".join(piece.views),
                )
                if data != made:
                    self.compare_piece(piece, data, memoryview(made))
                release(piece.buffer)
                progress(piece.last - piece.first, end - begin)

    def compare_piece(self, piece, data, made):
        at = 0
        for record, length in zip(range(piece.first, piece.last), piece.lengths.tolist()):
            begin = int(self.offsets[record] - self.offsets[piece.first])
            end = int(self.ends[record] - self.offsets[piece.first])
            if record in piece.bad:
                self.fault(record, "the source cannot be read: " + piece.bad[record])
            elif data[begin:end] != made[at : at + length]:
                self.fault(record, "its bytes are not those of the source")
            at += length

    def check_chunk(self, first, last, data):
        """Compares the records `first` to `last` - 1, whose bytes are `data`, with the index, the list and the sums."""
        starts = self.offsets[first:last] - self.offsets[first]
        lengths = self.ends[first:last] - self.offsets[first:last]
        short = int(np.searchsorted(starts + lengths, len(data), side="right"))
        for record in range(first + short, last):
            self.fault(record, "the file ends before it does")
        starts, lengths = starts[:short], lengths[:short]
        if not short:
            return
        words = np.frombuffer(data, recordio.WORD, count=int(starts[-1] + lengths[-1]) // 4)
        keys, labels = self.keys[first : first + short], self.labels[first : first + short]
        whole, _ = look_at_prefixes(words, starts // 4, lengths, keys, labels)
        summed = recordio.word_sums(words, starts) == self.sums[first : first + short]
        for number in np.flatnonzero(~(whole & summed)).tolist():
            record = data[int(starts[number]) : int(starts[number] + lengths[number])]
            reason = self.reason(first + number, record, bool(summed[number]))
            if reason:
                self.fault(first + number, reason)

    def reason(self, record, data, summed):
        """What is wrong with one record's bytes, or None (it was only cut at a magic number)."""
        try:
            content = recordio.join_record(data)
        except ValueError as error:
            return str(error)
        want = np.zeros(6, recordio.WORD)
        want[1:2] = self.labels[record : record + 1].view(recordio.WORD)
        want[2], want[3] = self.keys[record] & 0xFFFFFFFF, self.keys[record] >> 32
        if content[: recordio.IMAGE_HEADER_BYTES] != want.tobytes():
            return "its header (label, key) is not the one that the list gives"
        return None if summed else "its bytes are not those that were written"


def look_at_prefixes(words, at, lengths, keys, labels):
    """Which records are whole and in one part, and which are the first part of one; both with the right header.

    `words` holds at least the first 32 bytes of each record, at the word offsets `at`; `lengths` in bytes. Nearly all
    records are of the first sort, so all are looked at at once.
    """
    rows = words.take(at[:, None] + np.arange(recordio.PREFIX_WORDS), mode="clip")
    want = np.zeros((len(at), 6), recordio.WORD)
    want[:, 1] = labels.view(recordio.WORD)
    want[:, 2], want[:, 3] = keys & 0xFFFFFFFF, keys >> 32
    good = (
        (lengths >= 4 * recordio.PREFIX_WORDS)
        & (rows[:, 0] == recordio.MAGIC)
        & (rows[:, 2:] == want).all(axis=1)
    )
    sizes = (rows[:, 1] & recordio.LENGTH_MASK).astype(np.int64) - recordio.IMAGE_HEADER_BYTES
    kinds = rows[:, 1] >> 29
    return (
        good & (kinds == recordio.WHOLE) & (recordio.record_bytes(sizes) == lengths),
        good & (kinds == recordio.FIRST) & (recordio.record_bytes(sizes) < lengths),
    )


def ends_of(path):
    """The path, and what is left of it without its first folder, its first two, and so on."""
    parts = path.split("/")
    return ["/".join(parts[at:]) for at in range(len(parts))]


def read_fully(stream, view):
    """Fills `view`; returns the part that could be filled, shorter only at the end of the file."""
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            break
        done += count
    return view[:done]


def file_digest(path):
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def verify_split(folder, prefix, against, fast, workers):
    """Returns the list of faults of one half, and a line that says what was looked at."""
    half = Half(folder, prefix)
    try:
        half.read_tables()
        size = half.manifest["files"][prefix + ".rec"]["bytes"]
        with Progress("verify " + prefix, len(half.paths), size) as progress:
            if fast:
                half.check_prefixes(workers, progress)
            else:
                half.check_records(progress)
        if against is not None:
            plan = make_plan(
                prefix,
                against.list(workers),
                allow_empty=half.manifest["options"]["check"] == "none",
            )
            with Progress("compare " + prefix, len(half.paths), size) as progress:
                half.compare(plan, workers, progress)
    except Damaged as damage:
        half.faults.append(str(damage))
    return half.faults, "%s: %s records in %d classes" % (
        prefix,
        format(half.manifest["examples"], ","),
        len(half.manifest["classes"]),
    )


def main(argv=None):
    """Returns the exit status; STATUSES says what each means."""
    parser = argparse.ArgumentParser(
        prog="python -m prepare.verify",
        description=__doc__.split(": ", 1)[1],
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DST", help="folder that prepare.imagenet wrote")
    parser.add_argument(
        "--against", metavar="SRC", help="also compare each record with the image in the source"
    )
    parser.add_argument(
        "--val-labels", metavar="FILE", help="as given to prepare.imagenet, for --against"
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="read no images: only the index, the list and each record's header",
    )
    parser.add_argument(
        "--workers", type=positive, default=None, help="reading threads (default: 4 per usable CPU)"
    )
    arguments = parser.parse_args(argv)
    print_any_name()
    try:
        return verify(arguments)
    except record_writer.Refused as error:
        return say(3, str(error))
    except SourceError as error:
        return say(1, str(error))
    except OSError as error:
        return say(2, "%s: %s" % (error.filename, error.strerror))


def verify(arguments):
    """Checks both halves and prints what it finds; returns the exit status."""
    os.listdir(arguments.folder)
    workers = arguments.workers or 4 * usable_cpus()
    halves = (
        sources.find_splits(arguments.against, arguments.val_labels) if arguments.against else {}
    )
    status = 0
    for prefix in ("train", "val"):
        if not os.path.exists(record_writer.manifest_path(arguments.folder, prefix)):
            raise record_writer.Refused(
                "%s: there is no %s.json here: the conversion is not finished"
                % (arguments.folder, prefix)
            )
        faults, text = verify_split(
            arguments.folder, prefix, halves.get(prefix), arguments.fast, workers
        )
        for fault in faults[:SHOWN]:
            status = say(1, fault)
        if len(faults) > SHOWN:
            status = say(1, "and %d more" % (len(faults) - SHOWN))
        print("%s, %s" % (text, "%d faults" % len(faults) if faults else "whole"))
    return status


def say(status, text):
    print("prepare.verify: " + text, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
