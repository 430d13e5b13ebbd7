# SPDX-License-Identifier: Apache-2.0
"""Compare series of trials with a base: spread, and whether a difference exceeds it.

The test is an exact permutation test on the difference of the means, two-sided: the share of all
ways to divide the trials into two groups of these sizes whose means differ at least as much. It
assumes no distribution, and shows honestly how little five trials can tell: with 3 trials on each
side the smallest possible p is 0.1.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from mxresnet.results.run_figures import RunFigures

SIGNIFICANCE = 0.05
MAX_EXACT_DIVISIONS = 200_000
RANDOM_DIVISIONS = 50_000
TEST = "exact permutation test on the difference of the means, two-sided"


@dataclass(frozen=True)
class Spread:
    """The values of one figure in the runs of a series."""

    values: List[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def sd(self) -> Optional[float]:
        """Sample standard deviation; None of a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """One figure of a series beside the base's.

    Attributes:
        base, change: The values of the base and of the other series.
        ratio: Mean of the other over mean of the base; None when the base's is 0.
        p_value: Of the test; None when a side has fewer than 2 values.
        smallest_p: The smallest p that the test can give for these numbers of trials.
        verdict: What it means, in words.
    """

    base: Spread
    change: Spread
    ratio: Optional[float]
    p_value: Optional[float]
    smallest_p: Optional[float]
    verdict: str


def _mean_eval(run: RunFigures) -> Optional[float]:
    known = [one.seconds for one in run.evaluations if one.seconds is not None]
    return sum(known) / len(known) if known else None


# Figures that are compared: title, unit, whether less is better (None: neither), how to get it.
FIGURES: Dict[str, Tuple[str, str, Optional[bool], Callable[[RunFigures], Optional[float]]]] = {
    "minutes": (
        *("time to train", "min", True),
        lambda run: run.run_seconds / 60 if run.reached and run.run_seconds else None,
    ),
    "images_per_second": ("throughput", "images/s", False, lambda run: run.images_per_second),
    "eval_seconds": ("one evaluation", "s", True, _mean_eval),
    "init_seconds": ("initialization", "s", True, lambda run: run.init_to_run_seconds),
    "epochs": (
        *("epochs to the target", "", True),
        lambda run: float(run.evaluations[-1].epoch) if run.reached else None,
    ),
    "accuracy": (
        *("final accuracy", "", None),
        lambda run: run.evaluations[-1].accuracy if run.evaluations else None,
    ),
}


def spread(runs: Sequence[RunFigures], figure: str) -> Optional[Spread]:
    """Return the values of a figure; None when no run has it."""
    values = [FIGURES[figure][3](run) for run in runs]
    known = [value for value in values if value is not None]
    return Spread(known) if known else None


def permutation_p(base: Sequence[float], change: Sequence[float]) -> float:
    """Return the p value of the permutation test."""
    everything, size = [*base, *change], len(base)
    total = math.fsum(everything)
    observed = abs(statistics.mean(base) - statistics.mean(change))
    tolerance = 1e-9 * max(1.0, *(abs(value) for value in everything))

    def differs(part: Sequence[float]) -> bool:
        ours = math.fsum(part)
        gap = ours / size - (total - ours) / (len(everything) - size)
        return abs(gap) >= observed - tolerance

    if math.comb(len(everything), size) <= MAX_EXACT_DIVISIONS:
        found = [differs(part) for part in itertools.combinations(everything, size)]
        return sum(found) / len(found)
    drawing = random.Random(0)  # the same p for the same logs
    found = [differs(drawing.sample(everything, size)) for _ in range(RANDOM_DIVISIONS)]
    return (1 + sum(found)) / (1 + len(found))


def smallest_p(base: int, change: int) -> float:
    """Return the smallest p that the exact test can give for these numbers of values."""
    return (2 if base == change else 1) / math.comb(base + change, base)


def difference(base: Spread, change: Spread, less_is_better: Optional[bool]) -> Difference:
    """Compare the values of two series."""
    ratio = change.mean / base.mean if base.mean else None
    if min(len(base.values), len(change.values)) < 2:
        return Difference(
            base, change, ratio, None, None, "one trial on a side has no spread: not tested"
        )
    p_value = permutation_p(base.values, change.values)
    least = smallest_p(len(base.values), len(change.values))
    if least > SIGNIFICANCE:
        verdict = f"too few trials: no difference can give p below {least:.2g}"
    elif p_value > SIGNIFICANCE:
        verdict = f"within the spread (p = {p_value:.2g})"
    else:
        word = "different"
        if less_is_better is not None:
            word = "better" if (change.mean < base.mean) == less_is_better else "worse"
        verdict = f"{word}, beyond the spread (p = {p_value:.2g})"
    return Difference(base, change, ratio, p_value, least, verdict)


def compare(base: Sequence[RunFigures], change: Sequence[RunFigures]) -> Dict[str, Difference]:
    """Return the differences of all figures that both series have."""
    found = {}
    for name, (_, _, less_is_better, _) in FIGURES.items():
        ours, theirs = spread(base, name), spread(change, name)
        if ours and theirs:
            found[name] = difference(ours, theirs, less_is_better)
    return found
