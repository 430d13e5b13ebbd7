# SPDX-License-Identifier: Apache-2.0
"""Logs for tests of the report: changed copies of the published logs that ship with it."""

import copy
import json
import pathlib

from mxresnet.results.official import RunVerdict, SeriesVerdict
from mxresnet.results.run_figures import read_figures
from support.commands import ROOT

DEMO = ROOT / "mxresnet/results/demo"
DEMO_LOGS = sorted((DEMO / "results/dgxa100_ngc22.04_mxnet/resnet").glob("result_*.txt"))
PREFIX = ":::MLLOG "


def demo_events(number=0):
    """Return the events of one of the logs as JSON content."""
    lines = DEMO_LOGS[number].read_text().splitlines()
    return [json.loads(line[len(PREFIX) :]) for line in lines]


def write_events(path, events):
    """Write a log; return its path."""
    path = pathlib.Path(path)
    path.write_text("".join(PREFIX + json.dumps(event) + "\n" for event in events))
    return path


def changed(events, key, **fields):
    """Return events in which all those of a key have other fields."""
    return [
        {**event, **copy.deepcopy(fields)} if event["key"] == key else event for event in events
    ]


def without(events, *keys):
    """Return events without those of some keys."""
    return [event for event in events if event["key"] not in keys]


def figures_of(tmp_path, events, name="log.txt"):
    """Return the figures of a log with these events."""
    return read_figures(str(write_events(tmp_path / name, events)))


def accepted(number=1, **fields):
    """Return what MLPerf's tools answer when they accept a number of logs."""
    return SeriesVerdict("2.1.0", [RunVerdict(True) for _ in range(number)], **fields)
