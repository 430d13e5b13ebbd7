# SPDX-License-Identifier: Apache-2.0
"""The parts of a report about single runs and their settings, as JSON content."""

from __future__ import annotations

import os
from typing import Any, Dict, List, Optional, Sequence

from mxresnet.results.log_files import Series
from mxresnet.results.log_reader import finite_number
from mxresnet.results.official import SeriesVerdict
from mxresnet.results.published_round import same_batch
from mxresnet.results.run_figures import SETTINGS, RunFigures
from mxresnet.results.verdict import outcome

# Settings whose values of published systems with the same global batch are shown beside ours.
_PUBLISHED_SETTINGS = {
    "model_bn_span": "bn_span",
    "lars_opt_base_learning_rate": "base_lr",
    "lars_opt_weight_decay": "weight_decay",
    "lars_opt_momentum": "momentum",
    "lars_opt_learning_rate_warmup_epochs": "warmup_epochs",
}


def run_names(series: Series) -> List[str]:
    """Return a short name for each log of a series."""
    names = [os.path.basename(path) for path in series.paths]
    return names if len(set(names)) == len(names) else list(series.paths)


def dropped_runs(runs: Sequence[RunFigures], official: SeriesVerdict) -> List[Optional[str]]:
    """Return for each run why the score leaves it out, or None."""
    dropped: List[Optional[str]] = [None] * len(runs)
    if official.score_minutes is None:
        return dropped
    counted = {i: value for i, value in enumerate(official.run_minutes) if value is not None}
    order = sorted(counted, key=lambda index: counted[index])
    dropped[order[0]] = "fastest"
    if len(counted) == len(runs):
        dropped[order[-1]] = "slowest"
    return [
        reason or (None if index in counted else "as the slowest")
        for index, reason in enumerate(dropped)
    ]


def run_data(
    run: RunFigures, name: str, official: SeriesVerdict, index: int, dropped: Optional[str]
) -> Dict[str, Any]:
    """Return one run for the report."""
    verdict, final = official.runs[index], run.final_evaluation
    judged = official.run_minutes[index] if index < len(official.run_minutes) else None
    own = None if run.run_seconds is None else run.run_seconds / 60
    each = run.step_times
    return {
        "name": name,
        "path": run.scan.path,
        "outcome": outcome(run, verdict),
        "dropped": dropped,
        "minutes": judged if judged is not None else own,
        "checker": {
            "accepted": verdict.accepted,
            "messages": verdict.messages,
            "warnings": verdict.warnings,
        },
        "seed": run.settings.get("seed"),
        "accuracy": final.accuracy if final else None,
        "epochs_run": final.epoch if final else None,
        "seconds": {
            "init": run.init_seconds,
            "init_to_run_start": run.init_to_run_seconds,
            "run": run.run_seconds,
            "train": run.train_seconds,
            "eval": run.eval_seconds,
            "other": run.other_seconds,
        },
        "images_per_second": run.images_per_second,
        "effective_images_per_second": run.effective_images_per_second,
        "throughput_is_plausible": run.log_throughput_is_plausible,
        "epochs": [epoch._asdict() for epoch in run.epochs],
        "evaluations": [one._asdict() for one in run.evaluations],
        "resumed": [one._asdict() for one in run.resumptions],
        "step_times": {
            "ranks": [rank._asdict() for rank in each.ranks],
            "epochs": [epoch._asdict() for epoch in each.epochs],
        },
        "settings": dict(run.settings),
        "log": {
            "bytes": run.scan.size_bytes,
            "lines": run.scan.lines,
            "events": sum(run.scan.counts.values()),
            "damaged": run.scan.damaged,
            "joined_lines": run.scan.joined_lines,
            "encoding": run.scan.encoding or "utf-8",
            "missing": [
                key
                for key in ("init_start", "run_start", "eval_accuracy", "run_stop")
                if not run.scan.counts.get(key)
            ],
        },
    }


def settings_data(runs: Sequence[RunFigures]) -> List[Dict[str, Any]]:
    """Return the settings of a series, those of the trials and the published ones side by side."""
    batch = runs[0].number("global_batch_size")
    systems = same_batch(batch) if runs[0].is_imagenet else []
    rows = []
    for key, label in SETTINGS.items():
        values = [run.settings.get(key) for run in runs]
        if all(value is None for value in values):
            continue
        published = None
        if key in _PUBLISHED_SETTINGS and systems:
            found = {float(system.settings[_PUBLISHED_SETTINGS[key]]) for system in systems}
            published = sorted(found)
        distinct = list(dict.fromkeys(map(str, values)))
        number = finite_number(values[0])
        rows.append(
            {
                "key": key,
                "label": label,
                "values": values if len(distinct) > 1 else values[:1],
                "differs": len(distinct) > 1 and key != "seed",
                "published": published,
                "unlike_published": bool(published) and number not in (published or []),
            }
        )
    return rows
