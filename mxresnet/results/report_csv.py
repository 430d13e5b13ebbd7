# SPDX-License-Identifier: Apache-2.0
"""The runs of a report as CSV, one row each, from the JSON content."""

from __future__ import annotations

import csv
import io
from typing import Any, Dict

from mxresnet.errors import one_line

COLUMNS = (
    *("schema", "series", "submitter", "system", "run", "outcome", "dropped", "minutes"),
    *("score_minutes", "epochs", "accuracy", "global_batch", "accelerators", "kind"),
    *("images_per_second", "init_seconds", "train_seconds", "eval_seconds", "other_seconds"),
    *("checker_accepts", "rcp_passed", "seed"),
)


def _cell(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return "" if value is None else value
    text = one_line(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def format_csv(data: Dict[str, Any]) -> str:
    """Return the rows of all runs, with a header."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(COLUMNS)
    for series in data["series"]:
        official = series["official"]
        for run in series["runs"]:
            seconds = run["seconds"]
            row = [
                *(data["schema"], series["name"], series["submitter"], series["system"]),
                *(run["name"], run["outcome"], run["dropped"], run["minutes"]),
                *(official["score_minutes"], run["epochs_run"], run["accuracy"]),
                *(series["global_batch"], series["accelerators"], series["kind"]),
                *(run["images_per_second"], seconds["init"], seconds["train"], seconds["eval"]),
                *(seconds["other"], run["checker"]["accepted"], official["rcp_passed"]),
                run["seed"],
            ]
            writer.writerow([_cell(value) for value in row])
    return output.getvalue()
