# SPDX-License-Identifier: Apache-2.0
"""The charts of a report about convergence and about where the time went."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Optional

from mxresnet.results.charts import (
    PUBLISHED,
    SERIES_COLORS,
    TARGET,
    Chart,
    axis,
    figure_of,
    label,
    layout_of,
)

# Parts of a run's time: key in the JSON content, name, color.
PARTS = (
    ("init_to_run_start", "initialization (not timed)", "--part-init"),
    ("train", "training", "--part-train"),
    ("eval", "evaluation", "--part-eval"),
    ("other", "other", "--part-other"),
)
MAX_RANKS = 64
REFERENCE = "--ink-2"


def _epoch_range(series: Dict[str, Any]) -> List[float]:
    """Return the range of epochs around those of the runs and of the reference."""
    reference = series["official"]["reference"]
    shown = [run["epochs_run"] for run in series["runs"] if run["outcome"] == "reached"]
    shown += [reference[key] for key in ("mean_epochs", "min_epochs") if reference[key]]
    return [min(shown) - 2, max(shown) + 4]


def _reference_trace(series: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Return the reference at the batch of the runs, where there is one."""
    reference = series["official"]["reference"]
    if reference["mean_epochs"] is None:
        return []
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": f"reference here ({reference['kind']})",
            "x": [series["global_batch"]] * 2,
            "y": [reference["mean_epochs"], reference["min_epochs"]],
            "marker": {
                "color": REFERENCE,
                "size": 15,
                "symbol": "line-ew-open",
                "line": {"width": 3},
            },
        }
    ]


def convergence_chart(series: Dict[str, Any]) -> Optional[Chart]:
    """Return the epochs of the runs beside the reference convergence points (RCP)."""
    reference = series["official"]["reference"]
    batch = series["global_batch"]
    runs = [run for run in series["runs"] if run["outcome"] == "reached"]
    if not reference or not batch or not runs or not series["is_imagenet"]:
        return None
    points = reference["points"]
    traces: List[Dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "reference, mean",
            "x": [one["batch"] for one in points],
            "y": [one["mean_epochs"] for one in points],
            "line": {"color": PUBLISHED, "width": 2},
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "fewest accepted",
            "x": [one["batch"] for one in points],
            "y": [one["min_epochs"] for one in points],
            "line": {"color": TARGET, "width": 1.5, "dash": "dash"},
        },
        *_reference_trace(series),
        {
            "type": "scatter",
            "mode": "markers",
            "name": "these runs",
            "x": [batch for _ in runs],
            "y": [run["epochs_run"] for run in runs],
            "marker": {
                "color": SERIES_COLORS[0],
                "size": 13,
                "symbol": "diamond",
                "line": {"width": 2, "color": "--surface"},
            },
        },
    ]
    ticks = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
    texts = [str(one) if one < 1024 else f"{one // 1024}k" for one in ticks]
    layout = layout_of(
        axis(
            "global batch",
            type="log",
            tickvals=ticks,
            ticktext=texts,
            range=[math.log10(batch / 3), math.log10(batch * 3)],
        ),
        axis("epochs to the target", range=_epoch_range(series)),
    )
    listed = ", ".join(str(run["epochs_run"]) for run in runs)
    summary = f"Epochs to the target at a global batch of {batch:g}: {listed}."
    if reference["mean_epochs"] is not None:
        summary += (
            f" Reference ({reference['kind']}): {reference['mean_epochs']:.2f}, at least "
            f"{reference['min_epochs']:.2f} accepted."
        )
    return Chart("convergence", "Epochs to converge", summary, figure_of(traces, layout), 320)


def time_chart(series: Dict[str, Any]) -> Optional[Chart]:
    """Return the parts of each run's time as bars."""
    runs = [run for run in series["runs"] if run["seconds"]["run"] is not None]
    if not runs:
        return None
    names = [label(run["name"], 22) for run in runs]
    traces = []
    for key, name, color in PARTS:
        values = [run["seconds"][key] for run in runs]
        if any(value is not None for value in values):
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": name,
                    "y": names,
                    "x": [None if value is None else value / 60 for value in values],
                    "hovertemplate": "%{x:.2f} min<extra>%{fullData.name}</extra>",
                    "marker": {"color": color},
                }
            )
    layout = layout_of(
        axis("minutes", rangemode="tozero"),
        {"autorange": "reversed", "automargin": True, "ticklabelstandoff": 6},
        barmode="stack",
        bargap=0.45,
    )
    first = runs[0]["seconds"]
    parts = ", ".join(
        f"{name} {first[key] / 60:.2f}" for key, name, _ in PARTS if first[key] is not None
    )
    summary = f"Minutes of each run by what it did. {runs[0]['name']}: {parts}."
    height = 130 + 34 * len(runs)
    return Chart("time", "Minutes of each run", summary, figure_of(traces, layout), height)


def rank_chart(series: Dict[str, Any]) -> Optional[Chart]:
    """Return the step times of the ranks of the first run that has them, the slowest first."""
    run = next((run for run in series["runs"] if run["step_times"]["ranks"]), None)
    if run is None:
        return None
    ranks = sorted(run["step_times"]["ranks"], key=lambda one: -one["p50_ms"])[:MAX_RANKS]
    names = [str(one["rank"]) for one in ranks]
    traces = [
        {
            "type": "bar",
            "name": "median",
            "x": names,
            "y": [one["p50_ms"] for one in ranks],
            "marker": {"color": SERIES_COLORS[0]},
            "hovertemplate": "rank %{x}: %{y:.2f} ms<extra>median</extra>",
        },
        {
            "type": "scatter",
            "mode": "markers",
            "name": "99th percentile",
            "x": names,
            "y": [one["p99_ms"] for one in ranks],
            "marker": {
                "color": SERIES_COLORS[1],
                "size": 9,
                "symbol": "line-ew-open",
                "line": {"width": 3},
            },
            "hovertemplate": "rank %{x}: %{y:.2f} ms<extra>99th percentile</extra>",
        },
    ]
    layout = layout_of(
        axis("rank, the slowest first", type="category", tickangle=0),
        axis("ms per step", rangemode="tozero"),
        bargap=0.4,
    )
    slowest = ranks[0]
    summary = (
        f"Step times of {len(run['step_times']['ranks'])} ranks of {run['name']}. The slowest is "
        f"rank {slowest['rank']}: median {slowest['p50_ms']:.2f} ms, 99th percentile "
        f"{slowest['p99_ms']:.2f} ms."
    )
    return Chart("ranks", "Step times by rank", summary, figure_of(traces, layout), 300)
