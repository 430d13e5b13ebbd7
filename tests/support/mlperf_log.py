# SPDX-License-Identifier: Apache-2.0
"""Read MLPerf log lines from the output of a run, and call the official checker on a log."""

import json
import os

from support.commands import python

# What the launchers read in the log of a run that ended by itself.
COMPLETE_LOG = """\
:::MLLOG {"key": "run_start", "value": null, "time_ms": 1}
:::MLLOG {"key": "eval_accuracy", "value": 0.8, "time_ms": 2, "metadata": {"epoch_num": 1}}
:::MLLOG {"key": "run_stop", "value": null, "time_ms": 3}
"""


def log_lines(text):
    """Return the content of every :::MLLOG line, in order."""
    return [
        json.loads(line.split(":::MLLOG ", 1)[1])
        for line in text.splitlines()
        if ":::MLLOG " in line
    ]


def check_compliance(path):
    """Run the official compliance checker on a log; return the finished process."""
    return python(
        "-m",
        "mlperf_logging.compliance_checker",
        "--usage",
        "training",
        "--ruleset",
        "2.1.0",
        "--log_output",
        os.devnull,
        path,
    )
