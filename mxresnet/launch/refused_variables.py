# SPDX-License-Identifier: Apache-2.0
"""What the launchers refuse, each with the reason: mostly variables of NVIDIA's v2.1 launchers."""

from __future__ import annotations

from typing import Mapping, Sequence

from mxresnet.errors import UserError

_APILOG = "apiLog.sh, NVIDIA's logger of library calls, was not published"
_REASONS = {
    "PROFILE_EXCEL": "the scripts that make spreadsheets of a profile were not published",
    "API_LOGGING": _APILOG,
    "API_LOG_DIR": _APILOG,
}


def check(environ: Mapping[str, str], flags: Sequence[str] = ()) -> None:
    """Raise UserError for a variable or a flag that the launchers do not support."""
    if environ.get("EVALUATE") or any(flag.split("=")[0] == "--evaluate" for flag in flags):
        raise UserError(
            "--evaluate is not a timed run: use python -m mxresnet --evaluate CHECKPOINT, under "
            "mpirun for several ranks"
        )
    for name, reason in _REASONS.items():
        if environ.get(name, "") not in ("", "0"):
            raise UserError(f"{name}={environ[name]} is not supported: {reason}; unset it")
    if environ.get("LOGGER") == "apiLog.sh":
        raise UserError(f"LOGGER=apiLog.sh is not supported: {_APILOG}; unset it")
