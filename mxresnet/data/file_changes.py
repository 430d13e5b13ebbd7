# SPDX-License-Identifier: Apache-2.0
"""Notice that a data set is written while it is read.

Size and time of change of each file are compared with those at the start. A file that was removed
or replaced by another is not changed: the run goes on with the file that it has open.
"""

from __future__ import annotations

import os
from typing import Dict, Iterable, Optional

from mxresnet.errors import UserError


class FileChanges:
    """The state of files at the start of a run."""

    def __init__(self, paths: Iterable[str]) -> None:
        """Store the state of the files that exist."""
        self._before: Dict[str, os.stat_result] = {}
        for path in paths:
            state = _stat(path)
            if state:
                self._before[path] = state

    def check(self) -> None:
        """Raise UserError if one of the files was written."""
        for path, before in self._before.items():
            now = _stat(path)
            if (
                now
                and (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
                and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns)
            ):
                raise UserError(
                    f"{path} was written during the run, whose result would be of no single data "
                    "set: start it again, and convert into another folder meanwhile"
                )


def _stat(path: str) -> Optional[os.stat_result]:
    try:
        return os.stat(path)
    except OSError:
        return None
