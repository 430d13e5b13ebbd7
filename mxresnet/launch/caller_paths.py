# SPDX-License-Identifier: Apache-2.0
"""Paths that the caller of a launcher gave, relative to the folder that it was called in.

The launchers' scripts change to the folder of this project, and pass the caller's folder in the
variable CALLER_FOLDER. Ranks and containers must get absolute paths.
"""

from __future__ import annotations

import os
from typing import Dict, List, Mapping, Sequence, Tuple

from mxresnet.config import FIELDS, flag_of
from mxresnet.launch.run_log import DEFAULT_LOGDIR

_SETTINGS = (
    *("data_root", "data_train", "data_train_idx", "data_val", "data_val_idx"),
    *("checkpoint_dir", "init_from"),
)
_VARIABLES = (
    "LOGDIR",
    "DATADIR",
    "COPY_DATASET",
    *(FIELDS[name].metadata["env"] for name in _SETTINGS),
)
_FLAGS = tuple(flag_of(name) for name in _SETTINGS)


def _absolute(folder: str, path: str) -> str:
    """Return an absolute path. The empty path, which stands for a default, stays empty."""
    while path.startswith("./"):
        path = path[2:].lstrip("/") or "."
    return os.path.join(folder, path) if path else path


def make_absolute(
    flags: Sequence[str], environ: Mapping[str, str]
) -> Tuple[List[str], Dict[str, str]]:
    """Return flags of mxresnet and an environment with absolute paths, without CALLER_FOLDER."""
    result = dict(environ)
    folder = result.pop("CALLER_FOLDER", "") or os.getcwd()
    for name in _VARIABLES:
        if name in result:
            result[name] = _absolute(folder, result[name])
    if not result.get("LOGDIR") and folder != os.getcwd():
        # The default is a folder of this project.
        result["LOGDIR"] = os.path.abspath(DEFAULT_LOGDIR)
    # pyxis takes an image for a file if its name starts with a dot or a slash.
    if result.get("CONT", "").startswith(("./", "../")):
        result["CONT"] = _absolute(folder, result["CONT"])
    paths = []
    for position, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name in _FLAGS and equals:
            paths.append(f"{name}={_absolute(folder, value)}")
        elif position > 0 and flags[position - 1] in _FLAGS:
            paths.append(_absolute(folder, flag))
        else:
            paths.append(flag)
    return paths, result
