# SPDX-License-Identifier: Apache-2.0
"""Make the page that reports on runs at their end, where plotly and jinja2 are installed.

A run or a series never fails because of it, and neither does anything else that follows.
"""

from __future__ import annotations

from typing import List, Mapping

VARIABLE = "REPORT"


def is_wanted(environ: Mapping[str, str]) -> bool:
    """Return whether a report is made: unless REPORT is 0."""
    return environ.get(VARIABLE) != "0"


def python_arguments(log_or_folder: str, page: str) -> List[str]:
    """Return the arguments of Python that write the page about logs of this machine's runs.

    Without plotly or jinja2 the command ends at once.
    """
    return ["-m", "mxresnet.results.report", log_or_folder, "-o", page, "--this-machine"]
