# SPDX-License-Identifier: Apache-2.0
"""The charts of a report as plotly figures, from the JSON content; they compute no number.

Plotly takes parts of every text for HTML, therefore text from logs goes through `label`. Colors are
the page's CSS variables by name (`--series-1`), which its script replaces for the color scheme.
"""

from __future__ import annotations

import html
from typing import Any, Dict, List, NamedTuple, Optional, Set

from mxresnet.errors import one_line

MAX_LABEL_CHARACTERS = 48
SERIES_COLORS = ("--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6")
BAND, BAND_LINE, PUBLISHED, MUTED, TARGET = (
    *("--band", "--band-line", "--published", "--muted", "--target"),
)


class Chart(NamedTuple):
    """One chart.

    Attributes:
        name: Unique in the page.
        title: What it shows.
        summary: Its content in words, for readers who do not see it.
        figure: A plotly figure as JSON content.
        height: Of the chart, pixels.
    """

    name: str
    title: str
    summary: str
    figure: Dict[str, Any]
    height: int


def label(text: Any, limit: int = MAX_LABEL_CHARACTERS) -> str:
    """Return a text from a log for a chart: one line, short, without markup for plotly."""
    line = one_line(str(text))
    if len(line) > limit:
        line = line[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return html.escape(line, quote=False)


def axis(title: str, **options: Any) -> Dict[str, Any]:
    return {"title": {"text": title}, **options}


def epoch_axis(runs: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Return the axis of epochs, with whole numbers."""
    last = max((run["epochs_run"] or 1 for run in runs), default=1)
    return axis("epoch", rangemode="tozero", **({"dtick": 1} if last < 10 else {}))


def layout_of(x_axis: Dict[str, Any], y_axis: Dict[str, Any], **options: Any) -> Dict[str, Any]:
    return {"xaxis": x_axis, "yaxis": y_axis, **options}


def _published_traces(systems: List[Dict[str, Any]], kinds: Set[str]) -> List[Dict[str, Any]]:
    """Return the published systems as points, those with the accelerators of `kinds` apart."""
    traces = []
    for same, name, color, size in (
        (False, "other published systems", MUTED, 7),
        (True, "published, same accelerator", PUBLISHED, 9),
    ):
        chosen = [one for one in systems if (one["kind"] in kinds) == same]
        if chosen:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": name,
                    "x": [one["accelerators"] for one in chosen],
                    "y": [one["score_minutes"] for one in chosen],
                    "text": [_system_text(one) for one in chosen],
                    "hovertemplate": "%{text}<extra></extra>",
                    "marker": {"color": color, "size": size},
                }
            )
    return traces


def _own_trace(series: Dict[str, Any], number: int) -> Dict[str, Any]:
    """Return a reported series as one point."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label(series["name"], 30),
        "x": [series["accelerators"]],
        "y": [series["minutes"]],
        "text": [f"{label(series['name'])}: {series['minutes']:.2f} min"],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {
            "color": SERIES_COLORS[number % len(SERIES_COLORS)],
            "size": 15,
            "symbol": "diamond",
            "line": {"width": 2, "color": "--surface"},
        },
    }


def scaling_chart(data: Dict[str, Any]) -> Optional[Chart]:
    """Return minutes against the number of accelerators, with all published systems."""
    systems = [one for one in data["published"]["systems"] if one["accelerators"]]
    own = [
        one
        for one in data["series"]
        if one["accelerators"] and one["minutes"] and one["is_imagenet"]
    ]
    if not own:
        return None
    traces = _published_traces(systems, {one["kind"] for one in own})
    traces += [_own_trace(one, number) for number, one in enumerate(own)]
    counts = [1, 4, 16, 64, 256, 1024, 4096]
    minutes = [0.3, 1, 3, 10, 30, 100, 300, 1000]
    layout = layout_of(
        axis("accelerators", type="log", tickvals=counts, ticktext=[f"{one}" for one in counts]),
        axis("minutes", type="log", tickvals=minutes, ticktext=[f"{one:g}" for one in minutes]),
    )
    summary = (
        f"Minutes to train against the number of accelerators of {len(systems)} published "
        "systems. "
        + "; ".join(
            f"{one['name']}: {one['minutes']:.2f} minutes on {one['accelerators']}" for one in own
        )
    )
    return Chart(
        *("scaling", "Time to train and number of accelerators", summary),
        *(figure_of(traces, layout), 380),
    )


def _system_text(system: Dict[str, Any]) -> str:
    return (
        f"{label(system['submitter'])} {label(system['system'])}<br>"
        f"{system['score_minutes']:.2f} min, {system['accelerators']} x {label(system['kind'])}, "
        f"batch {system['global_batch']}<br>MLPerf {system['round']}, {system['division']}"
    )


def figure_of(traces: List[Dict[str, Any]], layout: Dict[str, Any]) -> Dict[str, Any]:
    return {"data": traces, "layout": layout}


def _band(series: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Return the traces of the accuracies of published runs with the same batch."""
    points = [one for one in series["band"] if one["runs"] >= 3]
    if not points:
        return []
    common = {"type": "scatter", "mode": "lines", "x": [one["epoch"] for one in points]}
    return [
        {
            **common,
            "y": [one["high"] for one in points],
            "line": {"width": 0, "color": BAND_LINE},
            "hoverinfo": "skip",
            "showlegend": False,
            "meta": "band-high",
        },
        {
            **common,
            "y": [one["low"] for one in points],
            "line": {"width": 0, "color": BAND_LINE},
            "fill": "tonexty",
            "fillcolor": BAND,
            "name": f"published, batch {series['global_batch']:g}",
            "hoverinfo": "skip",
            "meta": "band-low",
        },
    ]


def _target_line(target: float) -> Dict[str, Any]:
    """Return the parts of a layout that draw the target accuracy."""
    line = {"color": TARGET, "width": 1.5, "dash": "dash"}
    across = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": target, "y1": target}
    text = {
        "xref": "paper",
        "x": 0.01,
        "y": target,
        "xanchor": "left",
        "yanchor": "bottom",
        "text": f"target {target:.1%}",
        "showarrow": False,
        "font": {"color": TARGET, "size": 12},
    }
    return {"shapes": [{**across, "line": line}], "annotations": [text]}


def accuracy_chart(series: Dict[str, Any]) -> Optional[Chart]:
    """Return the accuracy of each evaluation, over the band of published runs."""
    runs = [run for run in series["runs"] if run["evaluations"]]
    if not runs:
        return None
    traces = _band(series)
    for number, run in enumerate(runs):
        evaluations = run["evaluations"]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": label(run["name"], 24),
                "x": [one["epoch"] for one in evaluations],
                "y": [one["accuracy"] for one in evaluations],
                "hovertemplate": "epoch %{x}: %{y:.5f}<extra>%{fullData.name}</extra>",
                "line": {"color": SERIES_COLORS[number % len(SERIES_COLORS)], "width": 2},
                "marker": {"size": 6},
            }
        )
    target = series["target_accuracy"]
    values = [target, *(y for trace in traces for y in trace["y"])]
    low, high = min(values) - 0.05, max(values) + 0.05
    layout = layout_of(
        epoch_axis(runs),
        axis("top-1 accuracy", tickformat=".0%", range=[max(0.0, low), min(1.0, high)]),
        **_target_line(target),
    )
    finals = "; ".join(
        f"{run['name']} ends at {run['accuracy']:.5f} after epoch {run['epochs_run']}"
        for run in runs[:10]
    )
    summary = f"Top-1 accuracy by epoch, target {target}. {finals}."
    return Chart("accuracy", "Accuracy by epoch", summary, figure_of(traces, layout), 360)


def _level(published: Dict[str, float], last_epoch: int) -> List[Dict[str, Any]]:
    """Return the traces of the throughput of published systems, from their slowest to fastest."""
    common = {"type": "scatter", "mode": "lines", "x": [0, last_epoch], "hoverinfo": "skip"}
    edge = {"width": 1, "color": BAND_LINE}
    return [
        {**common, "y": [published["max"]] * 2, "line": edge, "showlegend": False},
        {
            **common,
            "y": [published["min"]] * 2,
            "line": edge,
            "fill": "tonexty",
            "fillcolor": BAND,
            "name": "published, this kind",
        },
    ]


def throughput_chart(series: Dict[str, Any]) -> Optional[Chart]:
    """Return images/s for each accelerator by epoch, with the level of published systems."""
    count = series["accelerators"] or 1
    per = "images/s per accelerator" if series["accelerators"] else "images/s"
    traces: List[Dict[str, Any]] = []
    for number, run in enumerate(series["runs"]):
        epochs = [one for one in run["epochs"] if one["images_per_second"]]
        if not epochs:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(epochs) < 3 else "lines",
                "name": label(run["name"], 24),
                "x": [one["epoch"] for one in epochs],
                "y": [one["images_per_second"] / count for one in epochs],
                "hovertemplate": "epoch %{x}: %{y:,.0f}<extra>%{fullData.name}</extra>",
                "line": {"color": SERIES_COLORS[number % len(SERIES_COLORS)], "width": 2},
            }
        )
    if not traces:
        return None
    published = series["published_images_per_second_each"]
    if published:
        last = max(x for trace in traces for x in trace["x"])
        traces = [*_level(published, last), *traces]
    values: List[float] = [y for trace in traces for y in trace["y"]]
    margin = 0.1 * (max(values) - min(values)) or 0.1 * max(values)
    layout = layout_of(
        epoch_axis(series["runs"]),
        axis(per, range=[max(0.0, min(values) - margin), max(values) + margin], tickformat=","),
    )
    each = series["images_per_second_each"]
    summary = f"Throughput by epoch, {per}."
    summary += f" Mean after the first epoch: {each:,.0f}." if each else ""
    if published:
        summary += (
            f" Published systems of this kind: {published['min']:,.0f} to {published['max']:,.0f}."
        )
    return Chart("throughput", "Throughput by epoch", summary, figure_of(traces, layout), 320)
