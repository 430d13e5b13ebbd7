# SPDX-License-Identifier: Apache-2.0
"""Findings about the validity of a series: completeness, damage, MLPerf's verdicts, trials."""

from __future__ import annotations

from typing import Any, Dict, Iterator, List

from mxresnet.results.finding import NOTE, NOTICE, PROBLEM, Finding, Subject, named_runs
from mxresnet.results.official import REQUIRED_RUNS, RunVerdict
from mxresnet.results.run_figures import (
    IMAGENET_TRAIN_IMAGES,
    IMAGENET_VAL_IMAGES,
    SETTINGS,
    TARGET_ACCURACY,
    RunFigures,
)


def check_completeness(subject: Subject) -> Iterator[Finding]:
    cut = named_runs(subject, lambda run: run.status is None)
    if cut:
        yield Finding(
            PROBLEM,
            "The log has no end (run_stop): the run was ended, or the log is cut off.",
            cut,
            "Figures are those up to the last complete line.",
        )
    missed = [
        f"{name}: {run.evaluations[-1].accuracy:.5f} at epoch {run.evaluations[-1].epoch}"
        if run.evaluations
        else f"{name}: nothing evaluated"
        for run, name in zip(subject.runs, subject.names)
        if run.status is not None and not run.reached
    ]
    if missed:
        yield Finding(
            NOTICE if subject.verdict.score_minutes is not None else PROBLEM,
            f"Target accuracy {TARGET_ACCURACY} not reached in {len(missed)} of "
            f"{len(subject.runs)} runs.",
            "; ".join(missed[:5]),
            "MLPerf drops one such run of five as the slowest."
            if len(missed) == 1 and len(subject.runs) >= REQUIRED_RUNS
            else "",
        )


def check_file_damage(subject: Subject) -> Iterator[Finding]:
    for run, name in zip(subject.runs, subject.names):
        scan = run.scan
        parts = []
        if scan.damaged:
            first = scan.damaged_samples[0]
            sample = first.text[:80]
            parts.append(
                f"{scan.damaged} events cannot be read, first line {first.number}: {sample}"
            )
        if scan.joined_lines:
            parts.append(f"{scan.joined_lines} lines hold the output of several processes")
        if scan.long_lines:
            parts.append(f"{scan.long_lines} lines of more than 1 MiB were skipped")
        if scan.dropped_events:
            parts.append(f"{scan.dropped_events} repeated events were counted and not used")
        if scan.encoding:
            parts.append(
                f"the file is in {scan.encoding.upper()}, which MLPerf's tools cannot read"
            )
        if parts:
            yield Finding(
                NOTICE,
                "The log is damaged or mixed.",
                "; ".join(parts),
                "Let rank 0 write the log to a file of its own (--log-file).",
                name,
            )
        if run.run_starts > 1:
            yield Finding(
                NOTICE,
                "The log has the starts of several ranks or runs.",
                f"{run.run_starts} run_start, {run.run_stops} run_stop",
                "Times are taken as MLPerf's summarizer takes them: up to the first run_stop.",
                name,
            )


def _lacks_only_accuracy(figures: RunFigures, verdict: RunVerdict) -> bool:
    """Return whether the checker rejects a run that missed the target for nothing else."""
    missed = figures.status is not None and not figures.reached
    return missed and all("eval_accuracy" in message for message in verdict.messages)


def check_official(subject: Subject) -> Iterator[Finding]:
    verdict = subject.verdict
    for run, figures, name in zip(verdict.runs, subject.runs, subject.names):
        if run.accepted is False and not _lacks_only_accuracy(figures, run):
            messages = [" ".join(message.split())[:250] for message in run.messages]
            yield Finding(
                PROBLEM if figures.reached else NOTICE,
                f"MLPerf's compliance checker (rules {verdict.ruleset}) rejects the log.",
                " | ".join(messages[:3]) or "its messages are in its own output",
                "",
                name,
            )
        elif run.warnings:
            first = " ".join(run.warnings[0].split())[:250]
            yield Finding(NOTE, "The compliance checker warns about the log.", first, "", name)
    if verdict.rcp_passed is False:
        yield Finding(
            PROBLEM,
            "MLPerf's RCP checker rejects the convergence.",
            str(verdict.rcp_message),
            "A submission needs at least the epochs of the reference for its batch.",
        )
    elif verdict.rcp_passed is None and verdict.rcp_message:
        yield Finding(NOTICE, "MLPerf's RCP checker gave no verdict.", verdict.rcp_message)
    if verdict.note and not any(run.resumptions for run in subject.runs):
        level = NOTE if "needs" in verdict.note else NOTICE
        yield Finding(level, "There is no official score.", verdict.note)
    elif len(subject.runs) not in (REQUIRED_RUNS, 0) and verdict.score_minutes:
        yield Finding(
            NOTE,
            f"The score is of {len(subject.runs)} runs; MLPerf requires {REQUIRED_RUNS}.",
            f"{len(subject.runs)} logs",
        )


def check_resumed(subject: Subject) -> Iterator[Finding]:
    for run, name in zip(subject.runs, subject.names):
        for one in run.resumptions[:5]:
            parts = [f"epoch {one.epoch}" if one.epoch is not None else ""]
            parts.append(f"step {one.step}" if one.step is not None else "")
            if one.gap_seconds is not None:
                parts.append(f"after a gap of {one.gap_seconds:.0f} s")
            parts.append(f"from {one.checkpoint}" if one.checkpoint else "")
            yield Finding(
                PROBLEM,
                "The run was resumed from a checkpoint: it is never scored.",
                " ".join(filter(None, parts)) or "the log has the event resumed",
                "MLPerf's time to train is that of one uninterrupted run.",
                name,
            )


def check_data(subject: Subject) -> Iterator[Finding]:
    for key, expected in (
        ("train_samples", IMAGENET_TRAIN_IMAGES),
        ("eval_samples", IMAGENET_VAL_IMAGES),
    ):
        found = {run.number(key) for run in subject.runs} - {None, float(expected)}
        if found:
            listed = ", ".join(f"{value:,.0f}" for value in sorted(filter(None, found)))
            yield Finding(
                PROBLEM,
                f"{listed} {SETTINGS[key]}, where ImageNet has {expected:,}.",
                f"{key} in the log",
                "Accuracy and time are not those of the benchmark.",
            )


def _distinct(subject: Subject, key: str) -> List[Any]:
    values: Dict[str, Any] = {}
    for run in subject.runs:
        if key in run.settings:
            values.setdefault(str(run.settings[key]), run.settings[key])
    return list(values.values())


def check_settings_of_trials(subject: Subject) -> Iterator[Finding]:
    unequal = [
        f"{label} {', '.join(map(str, _distinct(subject, key)[:5]))}"
        for key, label in SETTINGS.items()
        if key != "seed" and len(_distinct(subject, key)) > 1
    ]
    if unequal:
        yield Finding(
            NOTICE,
            "The runs do not have the same settings.",
            "; ".join(unequal),
            "Runs of one result must differ in nothing but the seed.",
        )
    seeds = [run.settings.get("seed") for run in subject.runs if "seed" in run.settings]
    if len(set(map(str, seeds))) < len(seeds):
        yield Finding(
            PROBLEM,
            "Runs have the same seed; MLPerf requires different ones.",
            "seeds " + ", ".join(map(str, seeds[:10])),
        )


def check_page_cache(subject: Subject) -> Iterator[Finding]:
    kept = named_runs(subject, lambda run: run.settings.get("cache_clear") is False)
    if kept:
        yield Finding(
            NOTICE,
            "The page cache was not dropped before the run, as MLPerf requires.",
            f"cache_clear false: {kept}",
            "CLEAR_CACHES=1 as root, or CLEAR_CACHES=sudo.",
        )
