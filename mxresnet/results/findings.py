# SPDX-License-Identifier: Apache-2.0
"""Findings about a series of runs: what is wrong or unlike systems of its kind, with evidence."""

from __future__ import annotations

from typing import Callable, Dict, Iterator, List, Tuple

from mxresnet.results import findings_kind, findings_validity
from mxresnet.results.finding import LEVELS, Finding, Subject

_CHECKS: List[Callable[[Subject], Iterator[Finding]]] = [
    findings_validity.check_completeness,
    findings_validity.check_official,
    findings_validity.check_resumed,
    findings_validity.check_data,
    findings_validity.check_settings_of_trials,
    findings_validity.check_file_damage,
    findings_validity.check_page_cache,
    findings_kind.check_throughput,
    findings_kind.check_drift,
    findings_kind.check_ranks,
    findings_kind.check_evaluation,
    findings_kind.check_initialization,
    findings_kind.check_accuracy,
    findings_kind.check_settings_of_round,
    findings_kind.check_log_throughput,
]


MAX_MERGED = 5


def find_all(subject: Subject) -> List[Finding]:
    """Return all findings, problems first; the same of several runs is one."""
    merged: Dict[Tuple[str, str], List[Finding]] = {}
    for check in _CHECKS:
        for finding in check(subject):
            merged.setdefault((finding.level, finding.title), []).append(finding)
    found = [_merge(same, len(subject.runs)) for same in merged.values()]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def _merge(same: List[Finding], number_of_runs: int) -> Finding:
    """Return the findings of several runs with one title as one, with the evidence of each."""
    first = same[0]
    if len(same) == 1:
        return first
    if number_of_runs == 1 or not first.run:
        return first._replace(evidence="; ".join(finding.evidence for finding in same[:MAX_MERGED]))
    parts = [f"{finding.run}: {finding.evidence}" for finding in same[:MAX_MERGED]]
    if len(same) > MAX_MERGED:
        parts.append(f"and {len(same) - MAX_MERGED} more")
    return first._replace(evidence="; ".join(parts), run="")
