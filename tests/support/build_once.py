# SPDX-License-Identifier: Apache-2.0
"""Folders that are built once in a test session and read by all its processes."""

from __future__ import annotations

import fcntl
import os
import pathlib
import shutil
from typing import Callable

import pytest


def build_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, build: Callable[[pathlib.Path], object]
) -> pathlib.Path:
    """Return the folder of this name, which the first process that asks for it builds.

    With pytest-xdist each worker has its own session fixtures. The workers share one session
    folder, in which the others wait until the first has built. Tests must not change the folder.

    Args:
        tmp_path_factory: pytest's fixture.
        name: The folder's name in the session folder.
        build: Fills the folder, which exists. When it raises an exception, the next process that
            asks for the folder calls it again, on a new folder of the same name.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, complete = base / name, base / f"{name}.complete"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            complete.touch()
    return folder
