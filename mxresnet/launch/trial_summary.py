# SPDX-License-Identifier: Apache-2.0
"""The summary of a series of trials: one row for each, and their Olympic mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import List, Optional, Sequence

from mxresnet.launch.trial_settings import TrialSettings
from mxresnet.results.log_reader import RunLog, read_log

REACHED = "reached"
MISSED = "target MISSED"
NOT_EVALUATED = "nothing EVALUATED"
RESUMED = "reached, but RESUMED"  # not a measured time to train
NOT_RUN = "NOT RUN"
# In the checker's column: it rejects the log, and would accept it with a sufficient accuracy.
ONLY_ACCURACY = "accuracy"
# The Olympic mean needs this many trials, because it drops the fastest and the slowest.
MIN_TRIALS_FOR_MEAN = 3


@dataclass(frozen=True)
class TrialResult:
    """The result of one trial that was run."""

    outcome: str
    compliant: Optional[bool] = None  # verdict of the official checker; None: not checked
    only_accuracy: bool = False  # whether it rejects the log for nothing but the accuracy


def read_log_or_empty(path: str) -> RunLog:
    """Return the log of a trial; one without events when it cannot be read."""
    try:
        return read_log(path)
    except OSError:
        return RunLog([], [])


def olympic_mean(minutes: Sequence[float]) -> Optional[float]:
    """Return the mean without the fastest and the slowest trial.

    Args:
        minutes: Time to train of at least 3 trials; infinite for one that missed its target.

    Returns:
        Minutes; None when more than one trial missed its target.
    """
    kept = sorted(minutes)[1:-1]
    mean = sum(kept) / len(kept)
    return mean if math.isfinite(mean) else None


def _row(*cells: object) -> str:
    return "{:<5} {:>9} {:>9} {:>6} {:>8}  {:<8} {}".format(*cells)


def _verdict(result: Optional[TrialResult]) -> str:
    if result is None or result.compliant is None:
        return "-"
    if result.compliant:
        return "accepts"
    return ONLY_ACCURACY if result.only_accuracy else "REJECTS"


def summarize(settings: TrialSettings, results: Sequence[TrialResult]) -> str:
    """Return the table of all trials, and their mean where all were run.

    Args:
        settings: Settings of the trials.
        results: Results of the trials that were run: the first ones.
    """
    lines = [_row("trial", "seed", "minutes", "epochs", "accuracy", "checker", "outcome")]
    all_minutes: List[float] = []
    for number, seed in enumerate(settings.seeds, start=1):
        result = results[number - 1] if number <= len(results) else None
        log = read_log_or_empty(settings.log_path(number))
        minutes, evaluation = log.minutes, log.last_evaluation
        lines.append(
            _row(
                number,
                seed,
                "-" if minutes is None else f"{minutes:.3f}",
                evaluation.epoch if evaluation else "-",
                f"{evaluation.accuracy:.5f}" if evaluation else "-",
                _verdict(result),
                result.outcome if result else NOT_RUN,
            )
        )
        reached = result is not None and result.outcome == REACHED
        all_minutes.append(minutes if reached and minutes is not None else math.inf)
    if any(_verdict(result) == ONLY_ACCURACY for result in results):
        lines.append(f"{ONLY_ACCURACY}: the checker rejects the log for nothing but its accuracy")
    if len(results) == len(settings.seeds) >= MIN_TRIALS_FOR_MEAN:
        mean = olympic_mean(all_minutes)
        lines.append(
            "no Olympic mean: more than one trial did not reach its target"
            if mean is None
            else f"Olympic mean of {len(results)} trials, fastest and slowest dropped: "
            f"{mean:.3f} minutes"
        )
    return "\n".join(lines) + "\n"
