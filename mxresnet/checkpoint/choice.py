# SPDX-License-Identifier: Apache-2.0
"""Which run of a folder continues, and from which checkpoint. Only rank 0 does this.

A folder holds one run; runs that start anew in it later are in run_2, run_3, ... below it. The
newest of them is the one that may continue:

- It is finished, or --resume is "no": a new run starts, and nothing of the others is touched.
- Otherwise its newest intact checkpoint is taken. One that is damaged, cannot be read or belongs to
  another run is passed over with a note.
- If settings, data set, ranks, versions or a given seed differ from those of that checkpoint, the
  run is refused.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import time
from dataclasses import dataclass, field
from typing import IO, List, Optional, Tuple

from mxresnet.checkpoint import store
from mxresnet.checkpoint.fingerprint import Fingerprint
from mxresnet.checkpoint.manifest import DamagedError, Manifest
from mxresnet.errors import UserError

SUFFIX = ".checkpoints"  # of a folder beside a log
LOCK_FILE = "lock"
_LATER_RUN = re.compile(r"run_(\d{1,6})", re.ASCII)
# The processes of a run that was killed may need this long to end.
LOCK_WAIT_SECONDS = 10.0
_LOCK_POLL_SECONDS = 0.2
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass
class Choice:
    """The folder of a run and where it continues.

    Attributes:
        folder: for the checkpoints of this run.
        checkpoint: path of the checkpoint to continue from; None: the run starts anew.
        manifest: of this checkpoint.
        notes: what was passed over, one line each.
        lock: open file that is locked until the process ends.
        replaced_log: log of the unfinished run in whose place this one starts anew; "" without one.
    """

    folder: str
    checkpoint: Optional[str] = None
    manifest: Optional[Manifest] = None
    notes: List[str] = field(default_factory=list)
    lock: Optional[IO[str]] = None
    replaced_log: str = ""


def has_checkpoints(folder: str) -> bool:
    """Return whether an unfinished run of the folder has a checkpoint, intact or not."""
    runs = list_runs(folder)
    return bool(runs) and bool(store.list_checkpoints(runs[0])) and not _is_finished(runs[0])


def is_used(folder: str) -> bool:
    """Return whether a run was started in the folder; it may be running."""
    return os.path.lexists(os.path.join(folder, LOCK_FILE))


def list_runs(folder: str) -> List[str]:
    """Return the folders of the runs in a folder, the newest first; none if there is no run."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    later = [(int(match[1]), match[0]) for match in map(_LATER_RUN.fullmatch, names) if match]
    runs = [os.path.join(folder, name) for _, name in sorted(later, reverse=True)]
    if store.RUN_FILE in names or store.list_checkpoints(folder):
        runs.append(folder)
    return runs


def choose(
    folder: str, fingerprint: Fingerprint, seed: Optional[int], resume: bool, input_threads: bool
) -> Choice:
    """Lock a folder and return where this run writes and continues.

    Args:
        folder: --checkpoint-dir; it is created if needed.
        fingerprint: of this run.
        seed: --seed; None: that of the checkpoint.
        resume: whether a run may continue.
        input_threads: see Fingerprint.differences().

    Raises:
        UserError: the folder cannot be written, another run uses it, or its unfinished run is not
            this one.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        lock, notes = _lock(folder)
    except OSError as error:
        raise UserError(
            f"--checkpoint-dir {folder} cannot be written ({error.strerror}): name another folder, "
            "or write no checkpoints (--checkpoints 0)"
        ) from None
    choice = _choose(folder, fingerprint, seed, resume, input_threads)
    choice.lock, choice.notes = lock, notes + choice.notes
    try:
        os.makedirs(choice.folder, exist_ok=True)
        store.remove_unfinished(choice.folder)
    except OSError as error:
        raise UserError(f"--checkpoint-dir {folder} cannot be used ({error.strerror})") from None
    return choice


def _choose(
    folder: str, fingerprint: Fingerprint, seed: Optional[int], resume: bool, input_threads: bool
) -> Choice:
    runs = list_runs(folder)
    if not runs:
        return Choice(folder)
    notes: List[str] = []
    replaced_log = ""
    if resume and not _is_finished(runs[0]):
        checkpoint, manifest, notes = _newest_intact(runs[0])
        if checkpoint and manifest:
            differences = fingerprint.differences(manifest.fingerprint, input_threads)
            if seed not in (None, manifest.seed):
                differences.append(f"--seed {seed}, there {manifest.seed}")
            if differences:
                raise UserError(
                    f"checkpoint {checkpoint} is of an unfinished run that differs from this one "
                    f"({'; '.join(differences)}): start anew with --resume no, or name another "
                    "--checkpoint-dir"
                )
            return Choice(runs[0], checkpoint, manifest, notes)
        replaced_log = _log_of(runs[0])
        if not store.list_checkpoints(runs[0]):  # it ended before its first checkpoint
            return Choice(runs[0], replaced_log=replaced_log)
        notes.append(f"no checkpoint in {runs[0]} can be used: the run starts anew")
    later = [int(os.path.basename(run)[len("run_") :]) for run in runs if run != folder]
    anew = os.path.join(folder, f"run_{max([1, *later]) + 1}")
    return Choice(anew, notes=notes, replaced_log=replaced_log)


def _log_of(folder: str) -> str:
    try:
        return store.read_run(folder).log
    except DamagedError:
        return ""


def _is_finished(folder: str) -> bool:
    try:
        return bool(store.read_run(folder).outcome)
    except DamagedError:
        return False


def _newest_intact(folder: str) -> Tuple[Optional[str], Optional[Manifest], List[str]]:
    """Return the newest intact checkpoint of the run, its manifest, and notes on newer ones."""
    notes = []
    try:
        run_id: Optional[str] = store.read_run(folder).run_id
    except DamagedError as error:
        notes.append(f"{os.path.join(folder, store.RUN_FILE)} is passed over: {error}")
        run_id = None  # that of the newest checkpoint
    for path in store.list_checkpoints(folder):
        try:
            manifest = store.verify(path)
            if run_id in (None, manifest.run_id):
                return path, manifest, notes
            reason = "it is of another run"
        except DamagedError as error:
            reason = str(error)
        notes.append(f"checkpoint {path} is passed over: {reason}")
    return None, None, notes


def _lock(folder: str) -> Tuple[Optional[IO[str]], List[str]]:
    """Return the locked file of a folder, and a note where its file system has no locks.

    Raises:
        OSError: the file cannot be opened.
        UserError: another process has the lock.
    """
    path = os.path.join(folder, LOCK_FILE)
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")  # noqa: SIM115 (kept open)
    try:
        _wait_for_lock(file)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None, [f"{folder}: its file system has no locks: do not start two runs in it"]
        owner = file.read(200).strip() or "of unknown number"
        file.close()
        raise UserError(
            f"--checkpoint-dir {folder} is in use by another run (process {owner}): wait for its "
            "end or name another folder"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file, []


def _wait_for_lock(file: IO[str]) -> None:
    """Lock a file, or raise OSError when another process keeps its lock for LOCK_WAIT_SECONDS."""
    end = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
            time.sleep(_LOCK_POLL_SECONDS)


def is_locked(folder: str) -> bool:
    """Return whether a run uses the folder, and has not ended after LOCK_WAIT_SECONDS."""
    try:
        with open(os.path.join(folder, LOCK_FILE), "r+") as file:
            _wait_for_lock(file)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False
