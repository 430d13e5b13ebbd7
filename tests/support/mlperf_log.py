# SPDX-License-Identifier: Apache-2.0
"""Read MLPerf log lines from the output of a run."""

import json


def log_lines(text):
    """Return the content of every :::MLLOG line, in order."""
    return [
        json.loads(line.split(":::MLLOG ", 1)[1])
        for line in text.splitlines()
        if ":::MLLOG " in line
    ]
