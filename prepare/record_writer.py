# SPDX-License-Identifier: Apache-2.0
"""The files being written: the record file, the journal that lets a killed run go on, and renaming into place."""

import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BLOCK_BYTES = 4096  # what direct I/O wants offsets and sizes to be a multiple of
STAGE_BYTES = (
    32 << 20
)  # two of them; smaller ones leave the disk waiting for the writing thread to be woken
DIRECT = getattr(os, "O_DIRECT", 0)
JOURNAL = "journal"
SUFFIXES = (".rec", ".idx", ".lst", ".sums")  # of the data files; the manifest (.json) comes last
FORMAT, VERSION = "mxresnet-recordio", 1


class Refused(Exception):
    """The destination holds something that must not be overwritten or mixed; the message says what to do."""


class RecordFile:
    """Appends to a file from a given offset on, past the page cache where the file system allows it.

    Direct I/O leaves the CPUs to reading and hashing (through the page cache a write costs several times the CPU), and
    does not push the source out of memory. One full stage is being written, by a thread, while the next is filled.
    What `flushed` covers is in the file; the rest waits in memory.
    """

    def __init__(self, path, offset):
        self.flushed = self._base = offset - offset % BLOCK_BYTES
        self._fill = offset - self._base
        # mmap, because direct I/O wants memory that begins at a page.
        self._stage, self._other = (
            np.frombuffer(mmap.mmap(-1, STAGE_BYTES), np.uint8) for _ in range(2)
        )
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems have no direct I/O
                raise
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with open(path, "rb") as stream:
            stream.seek(self._base)
            self._stage[: self._fill] = np.frombuffer(stream.read(self._fill), np.uint8)
        self._thread = ThreadPoolExecutor(1)
        self._writing = None

    @property
    def position(self):
        """Where the next byte goes."""
        return self._base + self._fill

    def write(self, view):
        """Appends the bytes of `view`. Raises OSError, for this or an earlier call, for instance when the disk is full."""
        data = np.frombuffer(view, np.uint8)
        while len(data):
            count = min(len(data), STAGE_BYTES - self._fill)
            self._stage[self._fill : self._fill + count] = data[:count]
            self._fill += count
            data = data[count:]
            if self._fill == STAGE_BYTES:
                self._wait()
                self._writing = self._thread.submit(self._put, self._stage, self._base)
                self._stage, self._other = self._other, self._stage
                self._base += STAGE_BYTES
                self._fill = 0

    def _wait(self):
        if self._writing is not None:
            self._writing.result()

    def _put(self, data, offset):
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._file, data[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._leave_direct():
                    raise
        self.flushed = offset + len(data)

    def _leave_direct(self):
        """Goes on through the page cache; returns False when that was so already."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~DIRECT)
        return bool(flags & DIRECT)

    def finish(self):
        """Writes what waits, ends the file there and makes it durable."""
        self._wait()
        self._leave_direct()  # the last block is not a whole one
        self._put(self._stage[: self._fill], self._base)
        os.ftruncate(self._file, self.position)
        os.fsync(self._file)

    def close(self):
        self._thread.shutdown()
        os.close(self._file)


class Journal:
    """One line per finished piece of the record file, after a first line that says what the file is made from.

    A line carries the SHA-256 of the record file up to the piece's end, so a line is only believed when the file agrees:
    nothing needs to be forced to disk on the way, and what a power cut took is written again.
    """

    def __init__(self, folder, header):
        """Opens or begins the journal in `folder`. Raises Refused when it belongs to another conversion."""
        os.makedirs(folder, exist_ok=True)
        self.folder = folder
        self._file = open(os.path.join(folder, JOURNAL), "ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused("%s: another conversion is writing here: wait for it" % folder) from None
        except OSError:
            pass  # a file system without locks
        if (
            not self._is_in_place()
        ):  # whoever held the lock has removed the folder since this file was opened
            raise Refused("%s: another conversion was writing here: run it again" % folder)
        self._waiting = []
        self.lines = self._read(header)

    def _is_in_place(self):
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._file.name))
        except OSError:
            return False

    def _read(self, header):
        self._file.seek(0)
        # What follows the last line feed was cut off; a power cut can leave zeros. Neither is a line.
        lines = [parsed(line) for line in self._file.read().split(b"\n")[:-1]]
        if not lines or lines[0] is None:
            self._file.truncate(0)
            self._append(header)
            return []
        if lines[0] != header:
            raise Refused(
                "%s: is the unfinished conversion of another source, of other options, or of files changed since: "
                "finish that one, or remove the folder to start over" % self.folder
            )
        return lines[1 : lines.index(None)] if None in lines else lines[1:]

    def keep(self, count):
        """Forgets all but the first `count` lines of those found."""
        self._file.seek(0)
        kept = self._file.read().split(b"\n")[: count + 1]
        self._file.truncate(sum(len(line) + 1 for line in kept))
        self.lines = self.lines[:count]

    def add(self, line, end):
        """Notes a piece; it is written down once the record file is flushed up to `end`."""
        self._waiting.append((end, line))

    def flushed(self, position):
        """Writes down the pieces that end at or before `position`."""
        while self._waiting and self._waiting[0][0] <= position:
            self._append(self._waiting.pop(0)[1])

    def _append(self, line):
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def close(self):
        self._file.close()


def part_folder(folder, prefix):
    """Where the files stand until they are whole."""
    return os.path.join(folder, prefix + ".part")


def manifest_path(folder, prefix):
    return os.path.join(folder, prefix + ".json")


def is_finished(folder, prefix, identity, options):
    """Whether `folder` holds this half whole, made from this source with these options. Takes an instant.

    Raises Refused when it holds another one, a damaged one, or files that are not from here.
    """
    path = manifest_path(folder, prefix)
    if not os.path.exists(path):
        strangers = [
            prefix + suffix
            for suffix in SUFFIXES
            if os.path.lexists(os.path.join(folder, prefix + suffix))
        ]
        if strangers and not os.path.exists(os.path.join(part_folder(folder, prefix), JOURNAL)):
            raise Refused(
                "%s: exists without a manifest: move it away" % os.path.join(folder, strangers[0])
            )
        return False
    manifest = load_manifest(folder, prefix)
    for name, facts in manifest["files"].items():
        size = (
            os.path.getsize(os.path.join(folder, name))
            if os.path.exists(os.path.join(folder, name))
            else None
        )
        if size != facts["bytes"]:
            found = "is missing" if size is None else "has %d bytes" % size
            raise Refused(
                "%s: %s, not %d: remove %s to make it again"
                % (os.path.join(folder, name), found, facts["bytes"], path)
            )
    # Without a bad image the two ways of treating one give the same bytes.
    same = manifest["options"]["check"] == options["check"]
    same = same and (
        manifest["options"]["on_error"] == options["on_error"] or not manifest["skipped"]
    )
    if not same or manifest["source"]["identity"] != identity:
        flags = " ".join(
            "--%s=%s" % (name.replace("_", "-"), value)
            for name, value in sorted(manifest["options"].items())
        )
        raise Refused(
            "%s: was made from %s, as it was then, with %s: choose another folder, or remove its files"
            % (path, manifest["source"]["path"], flags)
        )
    return True


def sweep(folder, prefix):
    """Removes what a finished half's conversion left when it died after its last rename."""
    shutil.rmtree(part_folder(folder, prefix), ignore_errors=True)


def load_manifest(folder, prefix):
    """Returns the manifest. Raises Refused when it is not a finished half's, or not one that this version understands."""
    path = manifest_path(folder, prefix)
    with open(path, encoding="utf-8") as stream:
        try:
            manifest = json.load(stream)
            known = (manifest["format"], manifest["version"]) == (FORMAT, VERSION)
        except (ValueError, KeyError, TypeError):
            known = False
    if not known:
        raise Refused("%s: is not a manifest of %s version %d" % (path, FORMAT, VERSION))
    wrong = wrong_field(manifest, [prefix + suffix for suffix in SUFFIXES])
    if wrong:
        raise Refused(
            '%s: is damaged: its "%s" is not what a manifest has: remove it to make this half again'
            % (path, wrong)
        )
    return manifest


def wrong_field(manifest, names):
    """The name of the first field that is missing or of another kind, or None. `names`: of the data files."""

    def fits(value, **kinds):
        return isinstance(value, dict) and all(
            isinstance(value.get(key), kind) for key, kind in kinds.items()
        )

    def all_fit(values, **kinds):
        return isinstance(values, list) and all(fits(value, **kinds) for value in values)

    files, examples = manifest.get("files"), manifest.get("examples")
    good = {
        "complete": manifest.get("complete") is True,
        "examples": isinstance(examples, int) and examples >= 0,
        "classes": all_fit(manifest.get("classes"), name=str, label=int, examples=int),
        "files": isinstance(files, dict)
        and sorted(files) == sorted(names)
        and all(
            fits(facts, bytes=int, sha256=str) and 0 <= facts["bytes"] < 1 << 62
            for facts in files.values()
        ),
        "options": fits(manifest.get("options"), check=str, on_error=str),
        "source": fits(manifest.get("source"), path=str, identity=str),
        "skipped": all_fit(manifest.get("skipped"), path=str, reason=str),
    }
    return next((name for name, fine in good.items() if not fine), None)


def bytes_written(folder, prefix):
    """How much of the record file of an unfinished half an earlier run left, in its part folder or already renamed."""
    for place in (folder, part_folder(folder, prefix)):
        try:
            return os.path.getsize(os.path.join(place, prefix + ".rec"))
        except OSError:
            pass
    return 0


def take_back(folder, prefix):
    """Undoes a publication that was cut off before the manifest: the record file goes back to be looked at again."""
    record = os.path.join(folder, prefix + ".rec")
    if os.path.exists(
        manifest_path(folder, prefix)
    ):  # without locks on this file system nothing else tells
        raise Refused(
            "%s: has appeared meanwhile: another conversion was writing here"
            % manifest_path(folder, prefix)
        )
    if os.path.exists(record):
        os.replace(record, os.path.join(part_folder(folder, prefix), prefix + ".rec"))


def publish(folder, prefix, manifest):
    """Renames the finished files into `folder`, the manifest last, and removes the part folder."""
    part = part_folder(folder, prefix)
    write_file(
        os.path.join(part, prefix + ".json"), [json.dumps(manifest, indent=1).encode() + b"\n"]
    )
    for suffix in SUFFIXES:
        os.replace(os.path.join(part, prefix + suffix), os.path.join(folder, prefix + suffix))
    sync_folder(folder)
    os.replace(os.path.join(part, prefix + ".json"), manifest_path(folder, prefix))
    sync_folder(folder)
    sweep(folder, prefix)


def parsed(line):
    """A line of a journal, or None when it is damaged."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def write_file(path, blocks):
    """Writes `blocks` to `path` durably; returns {"bytes": ..., "sha256": ...}."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as stream:
        for block in blocks:
            stream.write(block)
            digest.update(block)
            size += len(block)
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def sync_folder(path):
    """Makes renames in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot
    finally:
        os.close(descriptor)
