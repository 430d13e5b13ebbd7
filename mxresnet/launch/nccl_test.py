# SPDX-License-Identifier: Apache-2.0
"""NCCL_TEST=1: measure the all-reduce bandwidth of the ranks before the trials, or by itself.

run_and_time.sh then starts the ranks with mxresnet.bandwidth, which measures it instead of
training. A series of trials does so once, before its first trial and before any clock starts.
"""

from __future__ import annotations

from typing import Mapping

VARIABLE = "NCCL_TEST"
MODULE = "mxresnet.bandwidth"  # the program of a rank; it imports MXNet


def is_wanted(environ: Mapping[str, str]) -> bool:
    """Return whether the bandwidth is to be measured."""
    return environ.get(VARIABLE, "") not in ("", "0")
