# SPDX-License-Identifier: Apache-2.0
"""Figures of a run, compared with values that NumPy computes from the published logs."""

import json
import math

import numpy as np
import pytest
from support.report_logs import DEMO_LOGS, demo_events, figures_of, without

from mxresnet.results.run_figures import read_figures


def times(events, key):
    return np.array([event["time_ms"] for event in events if event["key"] == key], np.float64)


@pytest.mark.parametrize("number", range(5))
def test_figures_of_published_logs(number):
    events, figures = demo_events(number), read_figures(str(DEMO_LOGS[number]))
    run = (times(events, "run_stop") - times(events, "run_start")).item() / 1000
    assert figures.run_seconds == pytest.approx(run)
    init = times(events, "init_start").min()
    assert figures.init_seconds == pytest.approx((times(events, "init_stop").item() - init) / 1000)
    assert figures.init_to_run_seconds == pytest.approx(
        (times(events, "run_start").item() - init) / 1000
    )
    epochs = times(events, "epoch_stop") - times(events, "epoch_start")
    assert figures.train_seconds == pytest.approx(epochs.sum() / 1000)
    evaluations = times(events, "eval_stop") - times(events, "eval_start")
    assert figures.eval_seconds == pytest.approx(evaluations.sum() / 1000)
    assert figures.other_seconds == pytest.approx(run - (epochs.sum() + evaluations.sum()) / 1000)
    speeds = [e["value"]["imgs_sec"] for e in events if e["key"] == "tracked_stats"]
    assert figures.images_per_second == pytest.approx(np.mean(speeds[1:]))
    accuracies = [e["value"] for e in events if e["key"] == "eval_accuracy"]
    assert [one.accuracy for one in figures.evaluations] == accuracies
    last = figures.final_evaluation.epoch
    assert figures.effective_images_per_second == pytest.approx(1281167 * last / run)
    assert figures.accelerators == 8 and figures.is_imagenet
    assert figures.reached == (number != 2)
    assert figures.status == ("aborted" if number == 2 else "success")


def test_a_log_without_throughput_has_that_of_the_epoch_times(tmp_path):
    events = without(demo_events(), "tracked_stats")
    figures = figures_of(tmp_path, events)
    seconds = (times(events, "epoch_stop") - times(events, "epoch_start")) / 1000
    assert figures.epochs[4].source == "epoch time"
    assert figures.images_per_second == pytest.approx(np.mean(1281167 / seconds[1:]))


def test_a_log_that_has_only_blocks(tmp_path):
    events = without(demo_events(), "tracked_stats", "epoch_start", "epoch_stop")
    figures = figures_of(tmp_path, events)
    assert [epoch.epoch for epoch in figures.epochs] == list(range(1, 36))
    starts, stops = times(events, "block_start"), times(events, "block_stop")
    evaluations = times(events, "eval_stop") - times(events, "eval_start")
    training = (stops - starts - evaluations).sum() / 1000
    assert figures.train_seconds == pytest.approx(training)
    assert figures.epochs[0].source == "block time"


def test_several_ranks_in_one_file(tmp_path):
    """Each rank logs every event: the first start and the last stop count, accuracies once."""
    events = demo_events()
    later = [{**event, "time_ms": event["time_ms"] + 40} for event in events]
    merged = [event for pair in zip(events, later) for event in pair]
    alone, both = figures_of(tmp_path, events), figures_of(tmp_path, merged, "both")
    assert both.run_starts == 2 and len(both.evaluations) == len(alone.evaluations)
    assert both.epochs[3].seconds == pytest.approx(alone.epochs[3].seconds + 0.04)
    assert both.images_per_second == alone.images_per_second


def test_a_resumed_run(tmp_path):
    facts = {"checkpoint": "epoch12-step400", "epoch_num": 12, "step": 400}
    event = {"time_ms": 5, "key": "resumed", "value": 61.5, "metadata": facts}
    (resumed,) = figures_of(tmp_path, [*demo_events(), event]).resumptions
    assert resumed == (12, 400, 61.5, "epoch12-step400")


def step_event(epoch, p50, wait=(0.1, 0.2)):
    value = {
        "p50_ms": p50,
        "p99_ms": [one + 5 for one in p50],
        "max_ms": [one + 50 for one in p50],
        "input_wait_seconds": list(wait),
    }
    return {"time_ms": 1, "key": "step_times", "value": value, "metadata": {"epoch_num": epoch}}


def test_step_times_by_rank(tmp_path):
    added = [step_event(1, [900, 900]), step_event(2, [100, 112]), step_event(3, [102, 110])]
    damaged = [
        step_event(4, [1.0]),
        {"time_ms": 1, "key": "step_times", "value": [1], "metadata": {"epoch_num": 5}},
    ]
    found = figures_of(tmp_path, [*demo_events(), *added, *damaged]).step_times
    assert [epoch.epoch for epoch in found.epochs] == [1, 2, 3]
    assert [epoch.slowest_rank for epoch in found.epochs] == [0, 1, 1]
    assert found.slowest.rank == 1 and found.slowest.p50_ms == 111  # without the first epoch
    assert found.median_p50_ms == pytest.approx(106)
    assert found.longest_wait.input_wait_seconds == pytest.approx(0.4)


HOSTILE = [
    *(None, True, "0.76", [], {}, [0.76], -1, 10**400, float("nan"), float("inf"), -0.0, 1e308),
    *("<script>alert(1)</script>", "\x1b[31m", "a" * 10**4, {"imgs_sec": {"deep": [1]}}),
]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("field", ["value", "time_ms", "metadata"])
def test_any_values_give_finite_figures(tmp_path, value, field):
    if field == "metadata":
        value = {"epoch_num": value, "step": value, "status": value, "first_epoch_num": value}
    whole = without(demo_events(), "weights_initialization")
    for keys in (
        {"run_start", "eval_accuracy"},
        {"run_stop", "epoch_stop"},
        {e["key"] for e in whole},
    ):
        events = [{**event, field: value} if event["key"] in keys else event for event in whole]
        figures = figures_of(tmp_path, events)
        numbers = [figures.run_seconds, figures.images_per_second, figures.train_seconds]
        assert all(one is None or math.isfinite(one) for one in numbers), keys
        json.dumps(figures.settings, allow_nan=False)


def test_1e400_and_nan_as_text_of_the_log(tmp_path):
    text = DEMO_LOGS[0].read_text().replace('"value":3264', '"value":1e400')
    text = text.replace('"value":0.7606', '"value":NaN')
    path = tmp_path / "log"
    path.write_text(text)
    figures = read_figures(str(path))
    assert figures.number("global_batch_size") is None and figures.accelerators is None
    assert not figures.reached and len(figures.evaluations) == 8
