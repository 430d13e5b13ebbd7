# SPDX-License-Identifier: Apache-2.0
"""The report as one self-contained HTML page, from the JSON content.

The page holds plotly's script and all data: it opens from a file, makes no request, and its content
security policy allows none. Text from logs is escaped by jinja2 (autoescape), in charts by
charts.label, and in the data of the script as JSON without "<".
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import os
from typing import Any, Callable, Dict, List, Optional

import jinja2
import markupsafe
import plotly.offline

from mxresnet.results import charts, charts_of_time
from mxresnet.results.charts import Chart

TEMPLATES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "templates")
_SERIES_CHARTS: List[Callable[[Dict[str, Any]], Optional[Chart]]] = [
    charts.accuracy_chart,
    charts.throughput_chart,
    charts_of_time.convergence_chart,
]
_TIME_CHARTS: List[Callable[[Dict[str, Any]], Optional[Chart]]] = [
    charts_of_time.time_chart,
    charts_of_time.rank_chart,
]


def number(value: Any, digits: int = 2) -> str:
    """Return a number with digits and thousands separators; a dash for none."""
    if value is None or isinstance(value, (bool, str)):
        return "\N{EN DASH}" if value is None else str(value)
    return f"{value:,.{digits}f}"


def setting(value: Any) -> str:
    """Return the value of a setting."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) and abs(value) >= 100_000 else f"{value:g}"
    return str(value)


def script_data(value: Any) -> markupsafe.Markup:
    """Return JSON for a script element: no text in it can end the element."""
    text = json.dumps(value, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return markupsafe.Markup(text)


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, setting=setting, unlabel=html.unescape)
    return environment


def _read(name: str) -> str:
    with open(os.path.join(TEMPLATES, name), encoding="utf-8") as file:
        return file.read()


def _script_hash(text: str) -> str:
    """Return a script's hash for the content security policy."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _charts(series: Dict[str, Any], number_of_series: int) -> Dict[str, List[Chart]]:
    """Return the charts of a series, with names that are unique in the page."""
    groups = {"main": _SERIES_CHARTS, "time": _TIME_CHARTS}
    found: Dict[str, List[Chart]] = {}
    for group, makers in groups.items():
        made = [maker(series) for maker in makers]
        found[group] = [
            chart._replace(name=f"{chart.name}-{number_of_series}") for chart in made if chart
        ]
    return found


def render_page(data: Dict[str, Any]) -> str:
    """Return the page.

    Args:
        data: The content that report_data.report_data returns.
    """
    scaling = charts.scaling_chart(data)
    groups = [_charts(series, index) for index, series in enumerate(data["series"])]
    everything = [scaling] if scaling else []
    everything += [chart for group in groups for part in group.values() for chart in part]
    plotly_script, page_script = plotly.offline.get_plotlyjs(), _read("report.js")
    hashes = " ".join(map(_script_hash, (plotly_script, page_script)))
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            scaling=scaling,
            groups=groups,
            figures=script_data({chart.name: chart.figure for chart in everything}),
            content=script_data(data),
            script_hashes=markupsafe.Markup(hashes),
            css=markupsafe.Markup(_read("report.css")),
            plotly_script=markupsafe.Markup(plotly_script),
            page_script=markupsafe.Markup(page_script),
        )
    )
