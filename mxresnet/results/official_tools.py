# SPDX-License-Identifier: Apache-2.0
"""Call MLPerf's own tools on folders of logs; official.py starts this module as a process.

Standard input has a JSON list of objects: "folder", with logs result_<n>.txt, and "ruleset".
Standard output gets a JSON list with one verdict for each. The tools read whole files, run the
rules with eval, print, and configure logging, therefore they run in a process of their own.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import re
import sys
from typing import Any, Dict, List, Optional

MAX_MESSAGES = 20
MAX_MESSAGE_CHARACTERS = 600
MIN_RUNS_FOR_SCORE = 3  # the fastest and the slowest are dropped


def check_compliance(path: str, ruleset: str) -> Dict[str, Any]:
    """Return the verdict of the compliance checker on one log."""
    from mlperf_logging.compliance_checker import mlp_compliance

    mlp_compliance.enqueued_configs.clear()  # an exception may leave rules in this global list
    checker = mlp_compliance.make_checker("training", ruleset, quiet=False, werror=False)
    try:
        accepted, *_ = mlp_compliance.main(path, f"training_{ruleset}/common.yaml", checker)
    except Exception as error:  # a log can make it fail anywhere
        return {"accepted": False, "messages": [_describe(error)], "warnings": []}
    messages = [*checker.not_overwritable, *checker.overwritable.values()]
    return {
        "accepted": bool(accepted),
        "messages": [_shorten(message) for message in messages[:MAX_MESSAGES]],
        "warnings": [_shorten(message) for message in list(checker.warnings.values())],
    }


def _shorten(message: Any) -> str:
    return str(message)[:MAX_MESSAGE_CHARACTERS]


def _describe(error: Exception) -> str:
    return _shorten(f"the tool ended with {type(error).__name__}: {error}")


def find_reference(folder: str, ruleset: str) -> Optional[Dict[str, Any]]:
    """Return the RCP for the batch of the logs: mean epochs and the fewest that are accepted."""
    from mlperf_logging.rcp_checker import rcp_checker

    batch, _, benchmark = rcp_checker.get_submission_epochs(_logs(folder), ruleset, False)
    if benchmark != "resnet" or batch == -1:
        return None
    checker = rcp_checker.RCP_Checker("training", ruleset, "resnet", False)
    points = checker.pruned_rcp_data.values()
    record, kind = checker._find_rcp(batch, "pruned_rcps"), "of this batch"
    if record is None:
        low = checker._find_top_min_rcp(batch, "pruned_rcps")
        high = checker._find_bottom_max_rcp(batch, "pruned_rcps")
        if low is not None and high is not None:
            record, kind = checker._create_interp_rcp(batch, low, high)[1], "interpolated"
        elif high is not None:
            record, kind = checker._find_min_rcp("pruned_rcps"), "of the smallest batch with one"
    return {
        "batch": batch,
        "kind": kind if record else "none",
        "mean_epochs": float(record["RCP Mean"]) if record else None,
        "min_epochs": float(record["Min Epochs"]) if record else None,
        "points": [
            {
                "batch": point["BS"],
                "mean_epochs": float(point["RCP Mean"]),
                "min_epochs": float(point["Min Epochs"]),
            }
            for point in points
        ],
    }


def check_convergence(folder: str, ruleset: str) -> Dict[str, Any]:
    """Return the verdict of the RCP checker; it leaves the scaling factor in the folder."""
    from mlperf_logging.rcp_checker import rcp_checker

    try:
        passed, message, _ = rcp_checker.check_directory(
            folder, "training", ruleset, False, False, rcp_pass="pruned_rcps", set_scaling=True
        )
    except Exception as error:
        return {"passed": None, "message": _describe(error)}
    return {"passed": bool(passed), "message": str(message)}


def score(folder: str, ruleset: str) -> Dict[str, Any]:
    """Return the minutes of the runs and the score, as the result summarizer computes them."""
    from mlperf_logging.result_summarizer import result_summarizer

    minutes, _, value, _, scaling = result_summarizer._compute_strong_score_standalone(
        "resnet", "system", False, folder, "training", ruleset, return_full_scores=True
    )
    return {
        "minutes": {_number(path): run for path, run in minutes.items()},
        "score_minutes": value,
        "scaling": scaling,
    }


def _logs(folder: str) -> List[str]:
    return sorted(glob.glob(os.path.join(glob.escape(folder), "result_*.txt")), key=_number)


def _number(path: str) -> int:
    found = re.search(r"result_(\d+)\.txt$", path)
    return int(found.group(1)) if found else -1


def judge(folder: str, ruleset: str) -> Dict[str, Any]:
    """Return the verdicts of all tools on the logs of one folder."""
    logs = _logs(folder)
    verdict: Dict[str, Any] = {"runs": [check_compliance(path, ruleset) for path in logs]}
    try:
        verdict["reference"] = find_reference(folder, ruleset)
    except Exception:
        verdict["reference"] = None
    if len(logs) >= MIN_RUNS_FOR_SCORE:
        verdict["rcp"] = check_convergence(folder, ruleset)
    try:
        verdict["score"] = score(folder, ruleset)
    except Exception as error:
        verdict["score"] = {"error": _describe(error)}
    return verdict


def main() -> int:
    """Judge the folders named on standard input; return the exit status."""
    requests = json.load(sys.stdin)
    logging.disable(logging.CRITICAL)
    with contextlib.redirect_stdout(sys.stderr):
        verdicts = [judge(request["folder"], request["ruleset"]) for request in requests]
    json.dump(verdicts, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
