# SPDX-License-Identifier: Apache-2.0
"""Findings of the report: each from a published log that was changed in one way."""

import pytest
from support.report_logs import accepted, changed, demo_events, figures_of, without, write_events

from mxresnet.results.finding import Subject
from mxresnet.results.findings import find_all
from mxresnet.results.official import RunVerdict, SeriesVerdict
from mxresnet.results.published_round import parse_kind, systems_of_kind
from mxresnet.results.run_figures import read_figures
from mxresnet.results.verdict import ReportStatus, judge_series

KIND = parse_kind("NVIDIA A100-SXM4-80GB")


def find(runs, verdict=None):
    """Return the findings about runs on 8 A100 with 80 GB, by title."""
    names = [f"run {number}" for number in range(len(runs))]
    verdict = verdict or accepted(len(runs))
    subject = Subject(runs, names, verdict, systems_of_kind(KIND, 8), 8)
    return {finding.title: finding for finding in find_all(subject)}


def slower(events, key, factor):
    """Return events in which the intervals of a key take longer, as do those that follow."""
    shift, start, result = 0.0, 0, []
    for event in events:
        if event["key"] == f"{key}_start":
            start = event["time_ms"]
        if event["key"] == f"{key}_stop":
            shift += (factor - 1) * (event["time_ms"] - start)
        result.append({**event, "time_ms": event["time_ms"] + shift})
    return result


def scaled_speed(events, factor_of_epoch):
    return [
        {**e, "value": {"imgs_sec": 27000.0 * factor_of_epoch(e["metadata"]["step"])}}
        if e["key"] == "tracked_stats"
        else e
        for e in events
    ]


STEADY = scaled_speed(demo_events(), lambda epoch: 1.0)
# The change of a log, and a part of the title and of the evidence that it must give.
CASES = {
    "steady": (STEADY, None, None),
    "val images": (changed(STEADY, "eval_samples", value=49999), "49,999 validation", "eval_sam"),
    "train images": (changed(STEADY, "train_samples", value=7), "7 training images", "train_sam"),
    "batch norm": (changed(STEADY, "model_bn_span", value=32), "batch-norm span is 32", "51, 102"),
    "rate": (
        *(changed(STEADY, "lars_opt_base_learning_rate", value=2), "base learning rate is 2"),
        "10.5",
    ),
    "cache": (changed(STEADY, "cache_clear", value=False), "page cache was not", "cache_clear"),
    "cut": (without(STEADY, "run_stop"), "no end (run_stop)", "run 0"),
    "missed": (changed(STEADY, "run_stop", metadata={"status": "aborted"}), "not reached", "epoch"),
    "drift": (
        *(scaled_speed(STEADY, lambda epoch: 1 - 0.002 * epoch), "Throughput falls"),
        "by 5.",
    ),
    "slow epoch": (
        *(scaled_speed(STEADY, lambda epoch: 0.8 if epoch == 9 else 1), "more than 10 % slower"),
        "9 (21,600)",
    ),
    "slow": (scaled_speed(STEADY, lambda epoch: 0.9), "% below the slowest", "3,310 to 3,416"),
    "evaluation": (slower(STEADY, "eval", 4), "An evaluation takes", "s; v2.1"),
    "initialization": (slower(STEADY, "init", 9), "Initialization takes", "s; v2.1"),
    "band": (
        [
            {**e, "value": 0.2} if e["key"] == "eval_accuracy" and e["value"] < 0.5 else e
            for e in STEADY
        ],
        "outside the band",
        "epoch 3: 0.2000, below",
    ),
    "throughput": (
        *(scaled_speed(STEADY, lambda epoch: 9.0), "contradicts the run's time"),
        "243,000 images/s logged",
    ),
    "ranks": (
        [
            *STEADY,
            {
                "time_ms": 1,
                "key": "step_times",
                "value": {
                    "p50_ms": [100.0, 100.0, 130.0],
                    "p99_ms": [110.0, 110.0, 140.0],
                    "max_ms": [150.0, 150.0, 150.0],
                    "input_wait_seconds": [1.0, 400.0, 1.0],
                },
                "metadata": {"epoch_num": 1},
            },
        ],
        *("One rank is slower", "rank 2: median step 130.0 ms, 30% above"),
    ),
    "resumed": (
        [
            *STEADY,
            {
                "time_ms": 1,
                "key": "resumed",
                "value": 61.0,
                "metadata": {"checkpoint": "c12", "epoch_num": 12, "step": 3},
            },
        ],
        *("resumed from a checkpoint", "epoch 12 step 3 after a gap of 61 s from c12"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_change_gives_its_finding(tmp_path, name):
    events, title, evidence = CASES[name]
    found = find([figures_of(tmp_path, events)])
    if title is None:
        assert not found
        return
    (finding,) = [one for key, one in found.items() if title in key]
    assert evidence in finding.evidence
    if name == "ranks":
        assert "rank 1 waits 400 s" in found["Training waits for images."].evidence


def test_trials_must_differ_in_the_seed_only(tmp_path):
    events = [STEADY, changed(STEADY, "lars_opt_momentum", value=0.8)]
    runs = [figures_of(tmp_path, one, f"{number}") for number, one in enumerate(events)]
    found = find(runs)
    assert found["The runs do not have the same settings."].evidence == "momentum 0.9, 0.8"
    assert "Runs have the same seed; MLPerf requires different ones." in found


def test_the_same_finding_of_several_runs_is_one(tmp_path):
    events = scaled_speed(STEADY, lambda epoch: 1 - 0.002 * epoch)
    events = changed(events, "seed", value=1)
    runs = [figures_of(tmp_path, changed(events, "seed", value=n), f"{n}") for n in range(3)]
    evidence = find(runs)["Throughput falls during the run."].evidence
    assert [f"run {number}: by 5." in evidence for number in range(3)] == [True] * 3


def test_damage_is_a_finding(tmp_path):
    path = write_events(tmp_path / "log", STEADY)
    text = path.read_text()
    path.write_text(text.replace(":::MLLOG", "x :::MLLOG {broken\n:::MLLOG", 1) + text[:300])
    found = find([read_figures(str(path))])
    assert "events cannot be read, first line 1" in found["The log is damaged or mixed."].evidence


def status(runs, verdict):
    return judge_series(runs, verdict, None)


def test_verdicts(tmp_path):
    reached = figures_of(tmp_path, STEADY, "reached")
    missed = figures_of(tmp_path, CASES["missed"][0], "missed")
    cut = figures_of(tmp_path, CASES["cut"][0], "cut")
    resumed = figures_of(tmp_path, CASES["resumed"][0], "resumed")
    five = accepted(5, score_minutes=28.0, rcp_passed=True)
    assert status([reached] * 5, five).status is ReportStatus.VALID
    assert status([reached] * 4 + [missed], five).status is ReportStatus.VALID
    two_missed = status([reached] * 3 + [missed] * 2, accepted(5))
    assert two_missed.status is ReportStatus.MISSED
    assert "2 of 5 runs ended below the target of 75.9 %" in two_missed.sentence
    assert status([missed], accepted()).status is ReportStatus.MISSED
    assert status([cut], accepted()).title == "Incomplete"
    for runs in ([resumed], [reached] * 4 + [resumed]):
        assert status(runs, accepted(len(runs))).title == "Not scored: resumed"
    rejected = SeriesVerdict("2.1.0", [RunVerdict(False, ["bad"])])
    assert status([reached], rejected).status is ReportStatus.NOT_VALID
    assert status([reached], SeriesVerdict("2.1.0", [RunVerdict()])).title == "Not judged"
    too_fast = accepted(5, score_minutes=28.0, rcp_passed=False, rcp_message="RCP found")
    assert status([reached] * 5, too_fast).status is ReportStatus.NOT_VALID
