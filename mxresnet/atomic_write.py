# SPDX-License-Identifier: Apache-2.0
"""Write files that appear complete, under their name, or not at all."""

from __future__ import annotations

import contextlib
import os
from typing import Optional


def write_atomically(path: str, content: bytes, mode: Optional[int] = None) -> None:
    """Write a file, or replace it; it is on the disk before it gets its name.

    Args:
        path: Path of the file.
        content: All of its bytes.
        mode: Its permissions; None: those of a new file.

    Raises:
        OSError: It cannot be written. Nothing is left of it, and an earlier file is as it was.
    """
    partial = f"{path}.part"
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(partial, mode)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
