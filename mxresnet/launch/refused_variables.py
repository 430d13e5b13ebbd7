# SPDX-License-Identifier: Apache-2.0
"""Variables of NVIDIA's v2.1 launchers that are refused here, each with the reason."""

from __future__ import annotations

from typing import Mapping

from mxresnet.errors import UserError

_APILOG = "apiLog.sh, NVIDIA's logger of library calls, was not published"
_REASONS = {
    "PROFILE_EXCEL": "the scripts that make spreadsheets of a profile were not published",
    "API_LOGGING": _APILOG,
    "API_LOG_DIR": _APILOG,
}


def check(environ: Mapping[str, str]) -> None:
    """Raise UserError if a variable is set that the launchers do not support."""
    for name, reason in _REASONS.items():
        if environ.get(name, "") not in ("", "0"):
            raise UserError(f"{name}={environ[name]} is not supported: {reason}; unset it")
    if environ.get("LOGGER") == "apiLog.sh":
        raise UserError(f"LOGGER=apiLog.sh is not supported: {_APILOG}; unset it")
