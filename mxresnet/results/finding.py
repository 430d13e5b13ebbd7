# SPDX-License-Identifier: Apache-2.0
"""What a finding about a series of runs is, and what findings are made from."""

from __future__ import annotations

import statistics
from typing import Callable, NamedTuple, Optional, Sequence

from mxresnet.results.official import SeriesVerdict
from mxresnet.results.published_round import PublishedSystem
from mxresnet.results.run_figures import RunFigures

PROBLEM, NOTICE, NOTE = "problem", "notice", "note"
LEVELS = (PROBLEM, NOTICE, NOTE)


class Finding(NamedTuple):
    """One finding.

    Attributes:
        level: PROBLEM: the result is not valid or not complete; NOTICE: unlike its kind; NOTE.
        title: What was found, in one sentence.
        evidence: The numbers that show it.
        action: What to do, or "".
        run: Name of the run, or "" for the series.
    """

    level: str
    title: str
    evidence: str
    action: str = ""
    run: str = ""


class Subject(NamedTuple):
    """What findings are made from.

    Attributes:
        runs: The runs of the series, with their names.
        names: One for each run.
        verdict: Of MLPerf's tools.
        peers: Published systems of the same kind and size.
        accelerators: Number of accelerators, or None.
    """

    runs: Sequence[RunFigures]
    names: Sequence[str]
    verdict: SeriesVerdict
    peers: Sequence[PublishedSystem]
    accelerators: Optional[int]


def named_runs(subject: Subject, is_wanted: Callable[[RunFigures], bool]) -> str:
    """Return the names of the runs for which something holds, or ""."""
    names = [name for run, name in zip(subject.runs, subject.names) if is_wanted(run)]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def mean_of(values: Sequence[Optional[float]]) -> Optional[float]:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None
