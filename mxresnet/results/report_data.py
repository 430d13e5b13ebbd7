# SPDX-License-Identifier: Apache-2.0
"""The content of a report as JSON: every number that the terminal and the page show.

report.schema.json describes it; docs/report.md explains it. A change that removes or renames a
field, or gives it another meaning, increases the number in SCHEMA.
"""

from __future__ import annotations

import math
from typing import Any, Dict, List, Optional, Sequence

from mxresnet.results import compare
from mxresnet.results.finding import Subject, mean_of
from mxresnet.results.findings import find_all
from mxresnet.results.log_files import Series
from mxresnet.results.official import REQUIRED_RUNS, SeriesVerdict
from mxresnet.results.published_round import (
    ROUND,
    Kind,
    Placement,
    PublishedSystem,
    accuracy_band,
    parse_kind,
    place,
    published_systems,
    systems_of_kind,
)
from mxresnet.results.report_runs import dropped_runs, run_data, run_names, settings_data
from mxresnet.results.run_figures import SETTINGS, TARGET_ACCURACY, RunFigures
from mxresnet.results.verdict import REACHED, ReportStatus, Verdict, judge_series, outcome

SCHEMA = "mxresnet-report/1"
UNVERIFIED = "Result not verified by MLCommons Association."
SOURCE = "MLPerf Training v2.1, https://github.com/mlcommons/training_results_v2.1 (Apache-2.0)"


def finite(value: Any) -> Any:
    """Return JSON content with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _kind(series: Series, runs: Sequence[RunFigures]) -> Optional[Kind]:
    """Return the kind of the accelerators, from the system's description or the log."""
    name = series.accelerator or str(runs[0].environment.get("accelerator", ""))
    return parse_kind(name)


def _accelerators(series: Series, runs: Sequence[RunFigures]) -> Optional[int]:
    return series.accelerators or runs[0].accelerators


def _minutes(runs: Sequence[RunFigures], official: SeriesVerdict) -> Optional[float]:
    """Return the score, or without one the mean minutes of the runs that reached the target."""
    if official.score_minutes is not None:
        return official.score_minutes
    times = [run.run_seconds / 60 for run in runs if run.reached and run.run_seconds]
    return sum(times) / len(times) if times else None


def _placement(
    series: Series, runs: Sequence[RunFigures], official: SeriesVerdict
) -> Optional[Placement]:
    minutes, kind = _minutes(runs, official), _kind(series, runs)
    accelerators = _accelerators(series, runs)
    resumed = any(run.resumptions for run in runs)
    if minutes is None or kind is None or accelerators is None or resumed:
        return None
    if not all(run.is_imagenet for run in runs):
        return None
    own = f"{series.submitter} {series.system}"
    found = place(minutes, accelerators, kind, own, runs[0].settings)
    if official.score_minutes is None:
        found.differences.append(
            "time of one run, theirs scores of five"
            if len(runs) == 1
            else "mean time, theirs scores of five runs"
        )
    if series.round_hint and f"v{series.round_hint}" != ROUND:
        found.differences.append(f"a result of round v{series.round_hint}, theirs of {ROUND}")
    return found


def _system(system: PublishedSystem) -> Dict[str, Any]:
    """Return a published system for the report."""
    each = system.images_per_second_each
    return {
        "submitter": system.submitter,
        "system": system.system,
        "round": ROUND,
        "division": system.division,
        "accelerators": system.accelerators,
        "accelerator": system.accelerator,
        "kind": str(system.kind) if system.kind else system.accelerator,
        "global_batch": system.global_batch,
        "network": system.network,
        "score_minutes": system.score_minutes,
        "epochs": system.epochs,
        "images_per_second_each": each,
        "eval_seconds": system.eval_seconds,
        "init_seconds": system.init_seconds,
    }


def _summary(runs: Sequence[RunFigures]) -> Dict[str, Any]:
    """Return mean, standard deviation and values of each compared figure."""
    summary: Dict[str, Any] = {}
    for name, (title, unit, _, _) in compare.FIGURES.items():
        found = compare.spread(runs, name)
        if found:
            summary[name] = {
                "title": title,
                "unit": unit,
                "mean": found.mean,
                "sd": found.sd,
                "values": found.values,
            }
    return summary


def _official(official: SeriesVerdict) -> Dict[str, Any]:
    return {
        "ruleset": official.ruleset,
        "score_minutes": official.score_minutes,
        "scaling": official.scaling,
        "rcp_passed": official.rcp_passed,
        "rcp_message": official.rcp_message,
        "reference": official.reference,
        "required_runs": REQUIRED_RUNS,
        "note": official.note,
    }


def _placement_data(placement: Optional[Placement]) -> Optional[Dict[str, Any]]:
    if placement is None:
        return None
    return {
        "kind": placement.label,
        "rank": placement.rank if placement.peers else None,
        "of": len(placement.peers) + 1,
        "ratio_to_fastest": placement.ratio,
        "is_published": placement.is_published,
        "differences": placement.differences,
        "peers": [_system(system) for system in placement.peers],
    }


def _speed(runs: Sequence[RunFigures]) -> Optional[float]:
    """Return the mean throughput of the runs that reached the target, or without one of all."""
    chosen = [run for run in runs if run.reached] or list(runs)
    plausible = all(run.log_throughput_is_plausible for run in chosen)
    return mean_of(
        [run.images_per_second if plausible else run.effective_images_per_second for run in chosen]
    )


def series_data(
    series: Series, runs: Sequence[RunFigures], official: SeriesVerdict
) -> Dict[str, Any]:
    """Return the content of a report about one series."""
    placement = _placement(series, runs, official)
    kind, accelerators = _kind(series, runs), _accelerators(series, runs)
    is_benchmark = all(run.is_imagenet for run in runs)
    peers = systems_of_kind(kind, accelerators) if is_benchmark else []
    verdict: Verdict = judge_series(runs, official, placement)
    names = run_names(series)
    batch = runs[0].number("global_batch_size")
    speed = _speed(runs)
    each = speed / accelerators if speed and accelerators else None
    published = [one.images_per_second_each for one in peers if one.images_per_second_each]
    subject = Subject(runs, names, official, peers, accelerators)
    reached = [outcome(run, one) == REACHED for run, one in zip(runs, official.runs)]
    dropped = dropped_runs(runs, official)
    return {
        "name": series.name,
        "submitter": series.submitter or runs[0].submission.get("org", ""),
        "system": series.system or runs[0].submission.get("platform", ""),
        "submission": runs[0].submission,
        "verdict": {
            "status": verdict.status.name.lower(),
            "exit_status": int(verdict.status),
            "title": verdict.title,
            "sentence": verdict.sentence,
        },
        "is_published": bool(placement and placement.is_published),
        "is_imagenet": is_benchmark,
        "target_accuracy": TARGET_ACCURACY,
        "minutes": _minutes(runs, official),
        "runs_reached": sum(reached),
        "accelerators": accelerators,
        "accelerator": series.accelerator or runs[0].environment.get("accelerator", ""),
        "kind": str(kind) if kind else "",
        "global_batch": batch,
        "images_per_second_each": each,
        "published_images_per_second_each": (
            {"min": min(published), "max": max(published)} if published else None
        ),
        "official": _official(official),
        "placement": _placement_data(placement),
        "summary": _summary(runs),
        "band": [point._asdict() for point in accuracy_band(batch)] if is_benchmark else [],
        "runs": [
            run_data(run, name, official, index, dropped[index])
            for index, (run, name) in enumerate(zip(runs, names))
        ],
        "settings": settings_data(runs),
        "hardware": series.hardware or {k: str(v) for k, v in runs[0].environment.items()},
        "findings": [finding._asdict() for finding in find_all(subject)],
    }


def comparison_data(
    series: Sequence[Series], all_runs: Sequence[Sequence[RunFigures]]
) -> Dict[str, Any]:
    """Return the comparison of every other series with the first."""
    rows = []
    base = all_runs[0]
    for other, runs in zip(series[1:], all_runs[1:]):
        figures = {}
        for name, one in compare.compare(base, runs).items():
            figures[name] = {
                "title": compare.FIGURES[name][0],
                "unit": compare.FIGURES[name][1],
                "base": {"mean": one.base.mean, "sd": one.base.sd, "values": one.base.values},
                "change": {
                    "mean": one.change.mean,
                    "sd": one.change.sd,
                    "values": one.change.values,
                },
                "ratio": one.ratio,
                "p_value": one.p_value,
                "verdict": one.verdict,
            }
        unequal = _unequal(base[0], runs[0])
        rows.append({"name": other.name, "unequal": unequal, "figures": figures})
    return {
        "base": series[0].name,
        "test": compare.TEST,
        "significance": compare.SIGNIFICANCE,
        "series": rows,
    }


def _unequal(base: RunFigures, change: RunFigures) -> List[str]:
    """Return the settings in which two runs differ."""
    return [
        f"{label}: {base.settings.get(key, 'none')} and {change.settings.get(key, 'none')}"
        for key, label in SETTINGS.items()
        if key not in ("seed", "cache_clear") and base.settings.get(key) != change.settings.get(key)
    ]


def report_data(
    series: Sequence[Series],
    all_runs: Sequence[Sequence[RunFigures]],
    verdicts: Sequence[SeriesVerdict],
) -> Dict[str, Any]:
    """Return the content of a report.

    Args:
        series: What is reported about, at least one.
        all_runs: The runs of each.
        verdicts: Of MLPerf's tools on each.

    Several series are compared with the first.
    """
    parts = [series_data(*one) for one in zip(series, all_runs, verdicts)]
    worst = max((part["verdict"]["exit_status"] for part in parts), default=ReportStatus.VALID)
    compared = None
    if len(series) > 1:
        compared = comparison_data(series, all_runs)
    return finite(
        {
            "schema": SCHEMA,
            "exit_status": worst,
            "unverified": UNVERIFIED,
            "series": parts,
            "comparison": compared,
            "published": {
                "round": ROUND,
                "source": SOURCE,
                "systems": [_system(system) for system in published_systems()],
            },
        }
    )
