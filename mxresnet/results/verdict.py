# SPDX-License-Identifier: Apache-2.0
"""The verdict on a series of runs in one sentence, from the verdicts of MLPerf's own tools."""

from __future__ import annotations

import enum
from typing import List, NamedTuple, Optional, Sequence

from mxresnet.results.official import REQUIRED_RUNS, RunVerdict, SeriesVerdict
from mxresnet.results.published_round import Placement
from mxresnet.results.run_figures import TARGET_ACCURACY, RunFigures

REACHED, MISSED, INCOMPLETE, REJECTED, RESUMED, NOT_JUDGED = (
    *("reached", "missed", "incomplete", "rejected", "resumed", "not judged"),
)


class ReportStatus(enum.IntEnum):
    """Exit statuses of the report."""

    VALID = 0  # the target was reached, and MLPerf's tools accept the logs
    UNREADABLE = 2  # a mistake in the arguments, or a log that cannot be read
    MISSED = 3  # a run ended below the target
    NOT_VALID = 4  # incomplete, resumed, rejected or not judged


class Verdict(NamedTuple):
    """The verdict on a series.

    Attributes:
        status: What scripts need.
        title: In a few words.
        sentence: What it means, for a reader who knows nothing of MLPerf.
    """

    status: ReportStatus
    title: str
    sentence: str


def outcome(run: RunFigures, official: RunVerdict) -> str:
    """Return what came of one run."""
    if run.resumptions:
        return RESUMED
    if run.status is None:
        return INCOMPLETE
    if not run.reached:
        return MISSED
    if official.accepted is None:
        return NOT_JUDGED
    return REACHED if official.accepted else REJECTED


def ordinal(number: int) -> str:
    """Return "1st" for 1."""
    last_two = number % 100
    suffix = "th" if 11 <= last_two <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def describe_place(placement: Optional[Placement]) -> str:
    """Return where a result stands among its kind, or ""."""
    if placement is None or not placement.peers or placement.ratio is None:
        return ""
    total = len(placement.peers) + 1
    if placement.ratio >= 1:
        relation = f"{placement.ratio:.2f} x the time of the fastest"
    else:
        relation = f"{1 / placement.ratio:.2f} x as fast as the next"
    return f"{ordinal(placement.rank)} of {total} on {placement.label}, {relation}"


def judge_series(
    runs: Sequence[RunFigures], official: SeriesVerdict, placement: Optional[Placement]
) -> Verdict:
    """Return the verdict on a series."""
    outcomes = [outcome(run, one) for run, one in zip(runs, official.runs)]
    failed = [one for one in outcomes if one != REACHED]
    allowed = 1 if len(runs) >= REQUIRED_RUNS and official.score_minutes is not None else 0
    if RESUMED in outcomes:
        return Verdict(
            ReportStatus.NOT_VALID,
            "Not scored: resumed",
            "A run was resumed from a checkpoint. MLPerf's time to train is that of one "
            "uninterrupted run, so this one has no score.",
        )
    if len(failed) <= allowed and official.rcp_passed is not False:
        return _valid(runs, official, placement, outcomes)
    if MISSED in outcomes and len(failed) > allowed:
        return _missed(runs, outcomes)
    return _not_valid(runs, official, outcomes)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _minutes(minutes: float) -> str:
    return f"{minutes:.2f} minutes" if minutes >= 0.1 else f"{60 * minutes:.1f} seconds"


def _valid(
    runs: Sequence[RunFigures],
    official: SeriesVerdict,
    placement: Optional[Placement],
    outcomes: List[str],
) -> Verdict:
    """Return the verdict on a series that MLPerf's tools accept."""
    target, reached = f"{100 * TARGET_ACCURACY:.1f} %", outcomes.count(REACHED)
    if official.score_minutes is not None:
        time = _minutes(official.score_minutes)
        what = f"{reached} of {len(runs)} runs reached {target} accuracy; the score is {time}"
    else:
        times = [run.run_seconds / 60 for run in runs if run.run_seconds is not None]
        time = _minutes(sum(times) / len(times)) if times else "unknown time"
        start = "The run" if len(runs) == 1 else f"All {len(runs)} runs"
        what = f"{start} reached {target} accuracy in {time}"
        what += "" if len(runs) == 1 else " on average"
    place = describe_place(placement)
    sentence = what + (f": {place}." if place else ".")
    title = "Valid"
    if not all(run.is_imagenet for run in runs):
        title = "Reached, on other data"
        sentence += " The images are not ImageNet: a test, not a result of the benchmark."
    elif official.score_minutes is None:
        title = "Reached"
        sentence += f" MLPerf's checker accepts the log; a score needs {REQUIRED_RUNS} runs."
    return Verdict(ReportStatus.VALID, title, sentence)


def _missed(runs: Sequence[RunFigures], outcomes: List[str]) -> Verdict:
    """Return the verdict on a series with runs that ended below the target."""
    target = f"{100 * TARGET_ACCURACY:.1f} %"
    missed = [run for run, one in zip(runs, outcomes) if one == MISSED]
    finals = [run.evaluations[-1] for run in missed if run.evaluations]
    if not finals:
        return Verdict(ReportStatus.MISSED, "Target missed", "The run evaluated nothing.")
    best = max(finals, key=lambda one: one.accuracy)
    if len(runs) == 1:
        sentence = (
            f"The run ended at {_percent(best.accuracy)} accuracy after epoch {best.epoch}; "
            f"the target is {target}."
        )
    else:
        sentence = (
            f"{len(missed)} of {len(runs)} runs ended below the target of {target}, at best at "
            f"{_percent(best.accuracy)}: there is no score."
        )
    return Verdict(ReportStatus.MISSED, "Target missed", sentence)


def _not_valid(runs: Sequence[RunFigures], official: SeriesVerdict, outcomes: List[str]) -> Verdict:
    """Return the verdict on a series that MLPerf's tools reject or cannot judge."""
    count = len(runs)
    if NOT_JUDGED in outcomes:
        reason = f"MLPerf's tools did not judge it ({official.note or 'no verdict'})."
        return Verdict(ReportStatus.NOT_VALID, "Not judged", f"The target was reached; {reason}")
    if INCOMPLETE in outcomes:
        which = "The log" if count == 1 else f"{outcomes.count(INCOMPLETE)} of {count} logs"
        verb = "has" if count == 1 or outcomes.count(INCOMPLETE) == 1 else "have"
        sentence = f"{which} {verb} no end: the run was ended, or the log is cut off."
        return Verdict(ReportStatus.NOT_VALID, "Incomplete", sentence)
    if REJECTED in outcomes:
        which = "the log" if count == 1 else f"{outcomes.count(REJECTED)} of {count} logs"
        sentence = f"The target was reached, but MLPerf's compliance checker rejects {which}."
        return Verdict(ReportStatus.NOT_VALID, "Not valid", sentence)
    return Verdict(
        ReportStatus.NOT_VALID,
        "Not valid",
        f"The runs converge in fewer epochs than MLPerf accepts ({official.rcp_message}).",
    )
