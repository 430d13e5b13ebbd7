# SPDX-License-Identifier: Apache-2.0
"""The report as text of one screen, from the JSON content."""

from __future__ import annotations

import textwrap
from typing import Any, Dict, List, Optional

from mxresnet.errors import one_line

WIDTH = 100
MAX_RUNS, MAX_FINDINGS = 8, 5


def clean(value: Any) -> str:
    """Return a value as one line without control characters, which could act on a terminal."""
    return one_line(str(value))


def _number(value: Optional[float], digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _wrap(text: str, indent: str = "  ") -> List[str]:
    return textwrap.wrap(
        clean(text), WIDTH - len(indent), initial_indent=indent, subsequent_indent=indent
    )


def _row(cells: List[str]) -> str:
    formats = ("{:<28.28}", "{:<11}", "{:>9}", "{:>7}", "{:>9}", "{:>10}", "{:>7}", " {}")
    return "  " + " ".join(form.format(cell) for form, cell in zip(formats, cells)).rstrip()


def _runs(series: Dict[str, Any]) -> List[str]:
    lines = [
        _row(["run", "outcome", "minutes", "epochs", "accuracy", "images/s", "checker", "dropped"])
    ]
    for run in series["runs"][:MAX_RUNS]:
        accepted = run["checker"]["accepted"]
        lines.append(
            _row(
                [
                    clean(run["name"]),
                    run["outcome"],
                    _number(run["minutes"], 3),
                    str(run["epochs_run"] or "-"),
                    _number(run["accuracy"], 5),
                    _number(run["images_per_second"], 0),
                    "-" if accepted is None else ("accepts" if accepted else "rejects"),
                    run["dropped"] or "",
                ]
            )
        )
    if len(series["runs"]) > MAX_RUNS:
        lines.append(f"  and {len(series['runs']) - MAX_RUNS} more")
    if any(run["dropped"] for run in series["runs"]):
        lines.append(
            "  dropped: MLPerf's score is the mean without the fastest and the slowest run"
        )
    return lines


def _figures(series: Dict[str, Any]) -> List[str]:
    """Return the lines of figures below the verdict."""
    lines = []
    official, placement = series["official"], series["placement"]
    if official["score_minutes"] is not None:
        rcp = {True: "passed", False: "FAILED", None: "no verdict"}[official["rcp_passed"]]
        lines.append(
            f"  official score {official['score_minutes']:.4f} min (rules {official['ruleset']}), "
            f"scaling {_number(official['scaling'], 4)}, convergence check {rcp}"
        )
    each, published = series["images_per_second_each"], series["published_images_per_second_each"]
    if each is not None:
        line = f"  {each:,.0f} images/s for each of {series['accelerators']} accelerators"
        if published:
            line += f"; published: {published['min']:,.0f} to {published['max']:,.0f}"
        lines.append(line)
    if placement and placement["peers"]:
        lines += _wrap(
            "published on "
            + placement["kind"]
            + ": "
            + "; ".join(
                f"{peer['submitter']} {peer['system']} {peer['score_minutes']:.2f} min"
                for peer in placement["peers"][:3]
            )
        )
        if placement["differences"]:
            lines += _wrap("not equal: " + "; ".join(placement["differences"]))
    spent = series["runs"][0]["seconds"]
    if spent["run"] is not None and spent["train"] is not None:
        lines.append(
            f"  time of {clean(series['runs'][0]['name'])}: initialization "
            f"{_number(spent['init_to_run_start'], 1)} s; then training "
            f"{_number(spent['train'], 1)}"
            f", evaluation {_number(spent['eval'], 1)}, other {_number(spent['other'], 1)} s"
        )
    return lines


def _findings(series: Dict[str, Any]) -> List[str]:
    lines = []
    for finding in series["findings"][:MAX_FINDINGS]:
        run = f" ({finding['run']})" if finding["run"] and len(series["runs"]) > 1 else ""
        text = f"{finding['level']}: {finding['title']}{run} {finding['evidence']}"
        lines += _wrap(text if len(text) < 260 else text[:257] + "...")
    if len(series["findings"]) > MAX_FINDINGS:
        lines.append(f"  and {len(series['findings']) - MAX_FINDINGS} more findings in the page")
    return lines


def _comparison(comparison: Dict[str, Any]) -> List[str]:
    lines = [f"Compared with {clean(comparison['base'])} ({comparison['test']}):"]
    for series in comparison["series"]:
        lines.append(f"  {clean(series['name'])}")
        for figure in series["figures"].values():
            ratio = "" if figure["ratio"] is None else f"{figure['ratio']:.3f} x"
            unit = f" {figure['unit']}" if figure["unit"] else ""
            lines.append(
                f"    {figure['title']:<20} {figure['base']['mean']:>12,.3f} -> "
                f"{figure['change']['mean']:>12,.3f}{unit:<9} {ratio:>8}  {figure['verdict']}"
            )
        if series["unequal"]:
            lines += _wrap("unequal settings: " + "; ".join(series["unequal"]), "    ")
    return lines


def format_report(data: Dict[str, Any]) -> str:
    """Return the text of a report."""
    lines: List[str] = []
    for series in data["series"]:
        name = " ".join(filter(None, [series["submitter"], series["name"]]))
        lines.append(f"{series['verdict']['title'].upper()}  {clean(name)}")
        lines += _wrap(series["verdict"]["sentence"])
        lines += [*_figures(series), *_runs(series), *_findings(series), ""]
    if data["comparison"]:
        lines += [*_comparison(data["comparison"]), ""]
    if not all(series["is_published"] for series in data["series"]):
        lines.append(data["unverified"])
    return "\n".join(lines).rstrip() + "\n"
