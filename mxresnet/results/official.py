# SPDX-License-Identifier: Apache-2.0
"""Verdicts of MLPerf's own tools on series of logs: compliance, convergence (RCP), score.

The tools are called and not rewritten (official_tools.py); where a report's figures and their
verdict would differ, the report shows theirs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence

from mxresnet.results.log_scan import event_lines, key_of
from mxresnet.results.run_figures import WANTED_KEYS, RunFigures

DEFAULT_RULESET = "2.1.0"
RULESETS = ("1.0.0", "1.1.0", "2.0.0", "2.1.0", "3.0.0", "3.1.0", "4.0.0")
REQUIRED_RUNS = 5
MIN_SCORED_RUNS = 3
# The tools keep a log in memory several times; the largest published one has 1 MB of events.
MAX_EVENT_BYTES = 16 << 20
TIMEOUT_SECONDS, TIMEOUT_SECONDS_PER_LOG = 120, 15
# Where many events make a log too large: keys that no rule of the checker has.
_UNCHECKED_KEYS = frozenset(["tracked_stats", "throughput", "step_times"])


@dataclass
class RunVerdict:
    """The compliance checker's verdict on one log; accepted is None: it was not asked."""

    accepted: Optional[bool] = None
    messages: List[str] = field(default_factory=list)
    warnings: List[str] = field(default_factory=list)


@dataclass
class SeriesVerdict:
    """The verdicts on a series of runs; None where a tool was not asked or gave none.

    Attributes:
        ruleset: Of the tools.
        runs: One for each log.
        rcp_passed, rcp_message: Of the RCP checker, which needs 3 runs.
        scaling: Factor of the score for a convergence faster than the reference.
        score_minutes: Score of the result summarizer.
        run_minutes: Its time of each run; None for one that it drops.
        reference: The RCP for the global batch, and all points.
        note: Why a verdict is missing.
    """

    ruleset: str
    runs: List[RunVerdict]
    rcp_passed: Optional[bool] = None
    rcp_message: Optional[str] = None
    scaling: Optional[float] = None
    score_minutes: Optional[float] = None
    run_minutes: List[Optional[float]] = field(default_factory=list)
    reference: Optional[Dict[str, Any]] = None
    note: Optional[str] = None


class _LogTooLargeError(Exception):
    """A log has more events than MLPerf's tools can read in bounded memory."""


def _copy_events(figures: RunFigures, path: str) -> None:
    """Write the lines of a log that the tools read to a file.

    Raises:
        OSError: A file cannot be read or written.
        _LogTooLargeError: There are too many.
    """
    scan, size = figures.scan, 0
    reduces = scan.size_bytes > MAX_EVENT_BYTES
    with open(path, "wb") as file:
        if scan.encoding is not None:
            return  # in UTF-16 the tools find no line
        for line in event_lines(scan.path):
            if reduces:
                key = key_of(line)
                if key in _UNCHECKED_KEYS or (key and _is_repeated(scan.counts, key)):
                    continue
            size += len(line) + 1
            if size > MAX_EVENT_BYTES:
                raise _LogTooLargeError
            file.write(line + b"\n")


def _is_repeated(counts: Dict[str, int], key: str) -> bool:
    """Return whether a key is no event of a run and occurs more often than any such event."""
    return key not in WANTED_KEYS and counts.get(key, 0) > 5000


def _run_tools(requests: Sequence[Dict[str, str]], timeout: float) -> List[Dict[str, Any]]:
    """Run the tools on folders, each with its ruleset, in another process.

    Raises:
        ValueError: They gave no verdict; the message is the reason.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mxresnet.results.official_tools"],
            input=json.dumps(list(requests)),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"MLPerf's tools took more than {timeout} s") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"MLPerf's tools failed (status {done.returncode}): {last}")
    return list(json.loads(done.stdout))


def judge(series: Sequence[Sequence[RunFigures]], rulesets: Sequence[str]) -> List[SeriesVerdict]:
    """Return the verdicts on several series of runs.

    A resumed run is never scored: MLPerf's time to train is that of one uninterrupted run.

    Args:
        series: The figures of the runs of each series.
        rulesets: One of RULESETS for each series.
    """
    verdicts = [
        SeriesVerdict(ruleset, [RunVerdict() for _ in runs])
        for ruleset, runs in zip(rulesets, series)
    ]
    with tempfile.TemporaryDirectory(prefix="mxresnet-report-") as temporary:
        judged: List[int] = []
        for number, runs in enumerate(series):
            folder = os.path.join(temporary, str(number))
            os.mkdir(folder)
            try:
                for index, run in enumerate(runs):
                    _copy_events(run, os.path.join(folder, f"result_{index}.txt"))
                judged.append(number)
            except _LogTooLargeError:
                limit = MAX_EVENT_BYTES >> 20
                verdicts[number].note = f"a log has more than {limit} MiB of events: not judged"
            except OSError as error:
                verdicts[number].note = f"not judged: {error}"
        try:
            requests = [
                {"folder": os.path.join(temporary, str(number)), "ruleset": rulesets[number]}
                for number in judged
            ]
            logs = sum(len(series[number]) for number in judged)
            timeout = TIMEOUT_SECONDS + TIMEOUT_SECONDS_PER_LOG * logs
            answers = _run_tools(requests, timeout) if judged else []
        except (ValueError, OSError) as error:
            answers = []
            for number in judged:
                verdicts[number].note = str(error)
    for number, answer in zip(judged, answers):
        _store(verdicts[number], answer, series[number])
    return verdicts


def _store(verdict: SeriesVerdict, answer: Dict[str, Any], runs: Sequence[RunFigures]) -> None:
    """Store the answer of the tools in a verdict."""
    verdict.runs = [RunVerdict(**run) for run in answer["runs"]]
    verdict.reference = answer.get("reference")
    score = answer["score"]
    minutes = {int(index): value for index, value in score.get("minutes", {}).items()}
    verdict.run_minutes = [minutes.get(index) for index in range(len(runs))]
    if any(run.resumptions for run in runs):
        verdict.note = "a run that was resumed from a checkpoint is never scored"
    elif len(runs) < MIN_SCORED_RUNS:
        verdict.note = f"a score needs {REQUIRED_RUNS} runs"
    else:
        rcp = answer["rcp"]
        verdict.rcp_passed, verdict.rcp_message = rcp["passed"], rcp["message"]
        verdict.scaling = score.get("scaling")
        verdict.score_minutes = score.get("score_minutes")
        verdict.note = score.get("error")
