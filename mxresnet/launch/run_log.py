# SPDX-License-Identifier: Apache-2.0
"""The files of a run: <LOGDIR>/<DATESTAMP>_<TRIAL>.log, and those of a series of trials.

No two runs may write to one log. The first process that creates a file, by O_EXCL, owns its name.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Iterator, Mapping, Optional

from mxresnet.errors import UserError
from mxresnet.results.log_reader import read_log

DEFAULT_LOGDIR = "./results"
SERIES_VARIABLE = "SERIES_STAMP"  # in the environment of a trial: the stamp of its series
# Most file systems allow names of 255 bytes, and the longest suffix has 13.
MAX_NAME_BYTES = {"DATESTAMP": 180, "TRIAL": 60}


def make_log_folder(folder: str) -> None:
    """Create LOGDIR if needed.

    Raises:
        UserError: It cannot be created or written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        writable = os.access(folder, os.W_OK)
        os.listdir(folder)
    except OSError as error:
        raise UserError(
            f"LOGDIR={folder} cannot be made ({error.strerror}): "
            "name a folder that this user may write"
        ) from error
    if not writable:
        raise UserError(
            f"LOGDIR={folder} cannot be written: name a folder that this user may write"
        )


def check_name_part(variable: str, value: str) -> None:
    """Raise UserError if the value of a variable cannot be a part of the name of a file."""
    if "/" in value or not value.isprintable():
        reason = "a / or an unprintable character"
    elif len(os.fsencode(value)) > MAX_NAME_BYTES[variable]:
        reason = f"more than {MAX_NAME_BYTES[variable]} bytes"
    else:
        return
    raise UserError(
        f"{variable}={ascii(value)[1:-1]}: it is a part of the names of files, "
        f"so it cannot have {reason}"
    )


def check_names(environ: Mapping[str, str]) -> None:
    """Raise UserError if DATESTAMP or TRIAL cannot be a part of the name of a file."""
    for variable in ("DATESTAMP", "TRIAL"):
        check_name_part(variable, environ.get(variable, ""))


def _stamps() -> Iterator[str]:
    """Yield the current time as a stamp, then the following seconds."""
    seconds = time.time()
    while True:
        yield time.strftime("%y%m%d%H%M%S", time.localtime(seconds))
        seconds += 1


def _create(path: str) -> bool:
    """Create an empty file; return False if it exists.

    Raises:
        UserError: It cannot be created.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): set another LOGDIR"
        ) from error
    return True


def create_log(environ: Mapping[str, str]) -> str:
    """Create the log of a run, which no other run has; return its path.

    Raises:
        UserError: DATESTAMP or TRIAL is unsuitable, the log of DATESTAMP and TRIAL exists, a series
            of trials that this run is not part of has the stamp, or the folder cannot be written.
    """
    folder = environ.get("LOGDIR") or DEFAULT_LOGDIR
    stamp, trial = environ.get("DATESTAMP") or "", environ.get("TRIAL") or "1"
    check_names(environ)
    make_log_folder(folder)
    if stamp:
        path = f"{folder}/{stamp}_{trial}.log"
        if not _create(path):
            raise UserError(
                f"DATESTAMP={stamp}, TRIAL={trial}: {path} is the log of another run: "
                "set another DATESTAMP"
            )
        if environ.get(SERIES_VARIABLE) != stamp and os.path.lexists(_summary_path(folder, stamp)):
            os.unlink(path)
            raise UserError(
                f"DATESTAMP={stamp} is the stamp of a series of trials "
                f"({_summary_path(folder, stamp)}): set another DATESTAMP"
            )
        return path
    for stamp in _stamps():
        path = f"{folder}/{stamp}_{trial}.log"
        if _create(path):
            if not os.path.lexists(_summary_path(folder, stamp)):
                return path
            os.unlink(path)  # a series of trials has this stamp
    raise AssertionError("the stamps have no end")


def _summary_path(folder: str, stamp: str) -> str:
    return f"{folder}/{stamp}_summary.txt"


def reserve_stamp(folder: str, stamp: str) -> str:
    """Return a stamp for a series of trials, whose files no other run has.

    Its summary is created, empty.

    Args:
        folder: LOGDIR.
        stamp: DATESTAMP. Empty: the current time, or a later one.

    Raises:
        UserError: DATESTAMP has files already, or the folder cannot be written.
    """
    for candidate in [stamp] if stamp else _stamps():
        summary = _summary_path(folder, candidate)
        if _create(summary):
            names = [name for name in os.listdir(folder) if name.startswith(f"{candidate}_")]
            if names == [os.path.basename(summary)]:
                return candidate
            os.unlink(summary)
    raise UserError(f"DATESTAMP={stamp}: {folder} has files of that stamp: set another DATESTAMP")


def release_stamp(folder: str, stamp: str) -> None:
    """Remove the summary of a series of trials of which none was run."""
    with contextlib.suppress(OSError):
        os.unlink(_summary_path(folder, stamp))


def remove_empty(path: str) -> bool:
    """Remove the log of a run that ended before it wrote one, so that its name is free again.

    Returns:
        Whether it was removed.
    """
    with contextlib.suppress(OSError):
        if os.path.getsize(path) == 0:
            os.unlink(path)
            return True
    return False


def explain_loss(path: str) -> Optional[str]:
    """Return in one line why the log of a run that ended by itself is lost, or None if it is not.

    Such a log has the event run_stop, unless the file was removed, moved or replaced meanwhile.
    """
    try:
        if read_log(path).last_event("run_stop") is not None:
            return None
        reason = "it has no run_stop"
    except OSError as error:
        reason = error.strerror or str(error)
    return (
        f"log {path}: {reason}: the file was removed, moved or changed during the run, which "
        "therefore counts as failed"
    )
