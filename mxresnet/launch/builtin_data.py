# SPDX-License-Identifier: Apache-2.0
"""Create the built-in data set of a configuration (BUILTIN_DATA) if it is not complete."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import sys
from typing import Mapping

from mxresnet.errors import ExitStatus, UserError
from mxresnet.launch import processes
from mxresnet.launch.terminal import print_to_stderr

OTHER_DATA = 3  # exit status of prepare.imagenet if the folder has other data


def make_builtin_data(program: str, python: str, environ: Mapping[str, str]) -> None:
    """Create the built-in data set if the configuration names one and it is not complete.

    Args:
        program: Name of the launcher, for messages.
        python: Python of the environment.
        environ: Environment with the configuration.

    Raises:
        UserError: The name of the data set is unknown, or DATAROOT cannot be created.
        CommandFailedError: The data set could not be created.
    """
    name = environ.get("BUILTIN_DATA")
    root = environ.get("DATAROOT", "").rstrip("/")
    if not name or _has_manifests(root):
        return
    if name != "digits":
        raise UserError(f"BUILTIN_DATA={name} is not a built-in data set: use digits")
    parent = os.path.dirname(root) or "."
    try:
        os.makedirs(parent, exist_ok=True)
        folder = os.open(parent, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"DATAROOT={root} cannot be made: {error.strerror}") from error
    try:
        # Of two runs that start together, one creates the data and the other waits for it.
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(folder, fcntl.LOCK_EX)
        if not _has_manifests(root):
            _make_digits(program, python, environ, root)
    finally:
        os.close(folder)


def _has_manifests(root: str) -> bool:
    return all(pathlib.Path(root, f"{split}.json").is_file() for split in ("train", "val"))


def _make_digits(program: str, python: str, environ: Mapping[str, str], root: str) -> None:
    """Create the data set of digits in a folder; raise CommandFailedError if that fails."""
    images = f"{root}.images"
    had_images = os.path.lexists(images)
    for arguments in (["prepare.digits", images], ["prepare.imagenet", images, root]):
        # Standard output is for RESULT.
        status = processes.run_to_end([python, "-m", *arguments], env=environ, stdout=sys.stderr)
        if status == 0:
            continue
        processes.raise_if_stopped()
        if status == OTHER_DATA and not had_images:
            shutil.rmtree(images, ignore_errors=True)
        print_to_stderr(
            f"{program}: the built-in data set could not be made in DATAROOT={root} "
            "(DGXSYSTEM=CPU trains on other data)"
        )
        # 3 is a missed target here.
        raise processes.CommandFailedError(
            ExitStatus.USER_ERROR if status == OTHER_DATA else status
        )
