# SPDX-License-Identifier: Apache-2.0
"""The folder of a run's checkpoints: list, verify, publish and remove them.

A checkpoint is written to a folder with a temporary name and renamed when it is complete.
run.json describes the run. Needs no framework: the launchers use it too.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass
from typing import Any, Callable, Dict, List, Optional

from mxresnet.atomic_write import write_atomically
from mxresnet.checkpoint import manifest as manifests
from mxresnet.checkpoint.fingerprint import sha256_of
from mxresnet.checkpoint.manifest import DamagedError, FileFacts, Manifest, Position, read_manifest
from mxresnet.errors import UserError

RUN_FILE, RUN_FORMAT = "run.json", "mxresnet-run"
KEPT = 2  # newest checkpoints, besides the best one
_NAME = re.compile(r"epoch_(\d{3,9})_step_(\d{6,9})", re.ASCII)
_UNFINISHED = ".unfinished-"
# A checkpoint must leave this much of the disk to the log: without its log the run ends.
_FREE_BYTES = 32 << 20


@dataclass(frozen=True)
class RunDescription:
    """What run.json says about the run of a folder.

    Attributes:
        run_id: random name of the run, also in the manifest of each checkpoint.
        settings: its effective settings.
        ranks: number of ranks.
        log: absolute path of its log file; "" without one.
        started: seconds since 1970.
        outcome: "" while the run is not finished, then "success" or "aborted", as in the log.
        job: JOB_UID, the job of a cluster that started it; "" without one.
    """

    run_id: str
    settings: Dict[str, Any]
    ranks: int
    log: str
    started: float
    outcome: str = ""
    job: str = ""


def read_run(folder: str) -> RunDescription:
    """Return the description of the run in a folder.

    Raises:
        DamagedError: it cannot be read.
    """
    content = manifests.parse_json_file(os.path.join(folder, RUN_FILE), RUN_FORMAT)
    try:
        run = RunDescription(**content)
    except TypeError:
        raise DamagedError(f"{RUN_FILE} is damaged") from None
    texts = (run.run_id, run.log, run.outcome, run.job)
    if not isinstance(run.settings, dict) or not all(isinstance(text, str) for text in texts):
        raise DamagedError(f"{RUN_FILE} is damaged")
    return run


def write_run(folder: str, run: RunDescription) -> None:
    """Write the description of the run of a folder; it appears by rename.

    Raises:
        OSError: it cannot be written.
    """
    text = manifests.format_json(RUN_FORMAT, asdict(run))
    write_atomically(os.path.join(folder, RUN_FILE), text.encode())


def list_checkpoints(folder: str) -> List[str]:
    """Return the paths of the checkpoints in a folder, the newest position first; none is read."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    matches = [match for match in map(_NAME.fullmatch, names) if match]
    matches.sort(key=lambda match: (int(match[1]), int(match[2])), reverse=True)
    return [os.path.join(folder, match[0]) for match in matches]


def verify(path: str) -> Manifest:
    """Return the manifest of a checkpoint whose files all have their sizes and sums.

    Raises:
        DamagedError: the checkpoint is not complete, cannot be read or is damaged.
    """
    manifest = read_manifest(path)
    for name, facts in manifest.files.items():
        try:
            size = os.path.getsize(os.path.join(path, name))
            if size != facts.size_bytes:
                raise DamagedError(f"{name} has {size} bytes, not {facts.size_bytes}")
            if sha256_of(os.path.join(path, name)) != facts.sha256:
                raise DamagedError(f"the content of {name} is not that of its sum")
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from None
    return manifest


def find_model(path: str) -> str:
    """Return the path of a verified checkpoint: `path`, or the best one in the folder of a run.

    Without an evaluation the best one is the newest.

    Raises:
        UserError: there is none, or it is damaged.
    """
    name = os.path.basename(os.path.normpath(path))
    if not os.path.isdir(path):
        raise UserError(f"checkpoint {path} is not a folder: name that of a checkpoint")
    try:
        if _NAME.fullmatch(name):
            verify(path)
            return path
        found = list_checkpoints(path)
        if found:
            best = best_of(found) or found[0]
            verify(best)
            return best
    except DamagedError as error:
        raise UserError(f"checkpoint {path} cannot be used: {error}: name another one") from None
    raise UserError(f"{path} has no checkpoint (epoch_<epoch>_step_<step>): name another folder")


def best_of(paths: List[str]) -> Optional[str]:
    """Return the checkpoint with the highest accuracy of its evaluation; None without one."""
    scores = {}
    for path in paths:
        with contextlib.suppress(DamagedError):
            accuracy = read_manifest(path).accuracy
            if accuracy is not None:
                scores[path] = accuracy
    return max(scores, key=lambda path: scores[path]) if scores else None


def publish(
    folder: str,
    position: Position,
    size_bytes: int,
    write_files: Callable[[str], None],
    make_manifest: Callable[[Dict[str, FileFacts]], Manifest],
) -> str:
    """Write a checkpoint and return its path; nothing is left of one that could not be written.

    Args:
        folder: of the run.
        position: where the checkpoint was taken.
        size_bytes: about what its files will have.
        write_files: writes all files but the manifest into a folder.
        make_manifest: returns the manifest for the facts about these files.

    Raises:
        OSError: a file cannot be written.
    """
    usage = os.statvfs(folder)
    free = usage.f_bavail * usage.f_frsize
    if free < size_bytes + _FREE_BYTES:
        raise OSError(f"{free >> 20} MiB free, {(size_bytes + _FREE_BYTES >> 20) + 1} needed")
    path = os.path.join(folder, position.folder_name)
    partial = os.path.join(folder, f"{_UNFINISHED}{position.folder_name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        os.mkdir(partial)
        write_files(partial)
        facts = {name: _facts_of(os.path.join(partial, name)) for name in os.listdir(partial)}
        text = make_manifest(facts).to_json()
        write_atomically(os.path.join(partial, manifests.FILE), text.encode())
        sync_folder(partial)
        if os.path.lexists(path):  # at the same position, but before the evaluation
            _remove(path)
        os.rename(partial, path)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def prune(folder: str, newest: str, kept: int = KEPT) -> None:
    """Remove checkpoints of a run, except the last ones and the best one.

    Those of later positions than the run has reached do not count, and stay: they are damaged or of
    another run.

    Args:
        folder: of the run.
        newest: path of the last checkpoint that the run has written or continued from. If it is
            gone, nothing is removed.
        kept: how many to keep, besides the best one.
    """
    paths = list_checkpoints(folder)
    if newest not in paths:
        return
    paths = paths[paths.index(newest) :]
    best = best_of(paths)
    for path in paths[kept:]:
        if path != best:
            _remove(path)


def remove_unfinished(folder: str) -> None:
    """Remove what a process that was killed has left. Only the process that has the lock may."""
    for name in os.listdir(folder):
        if name.startswith(_UNFINISHED):
            _delete(os.path.join(folder, name))


def _remove(path: str) -> None:
    """Remove a checkpoint. It disappears at once, by a rename."""
    folder, name = os.path.split(path)
    removed = os.path.join(folder, f"{_UNFINISHED}removed-{name}-{time.time_ns()}")
    os.rename(path, removed)
    _delete(removed)


def _delete(path: str) -> None:
    """Delete a folder or what is in its place, if it can be: a link, not what it leads to."""
    with contextlib.suppress(OSError):
        if os.path.islink(path) or not os.path.isdir(path):
            os.unlink(path)
        else:
            os.chmod(path, 0o700)  # a checkpoint that was passed over may not be readable
            shutil.rmtree(path, ignore_errors=True)


def _facts_of(path: str) -> FileFacts:
    return FileFacts(os.path.getsize(path), sha256_of(path))


def sync_folder(path: str) -> None:
    """Write the names in a folder to the disk, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
