# SPDX-License-Identifier: Apache-2.0
"""Times in the log and NVTX ranges, in a run with fakes of everything that computes or reads."""

import dataclasses

import pytest
from support.fake_run import CONFIG, keys, run_with_fakes

from mxresnet import profiling

PARTS = ("fwd", "load", "bwd", "opt", "iter")
SUFFIXES = ("total", "count", "min", "max")
PART_KEYS = [f"{part}_time_{suffix}" for part in PARTS for suffix in SUFFIXES]


class FakeNvtx:
    """Records the ranges, as "<name" and ">"."""

    def __init__(self):
        self.ranges = []

    def nvtxRangePushA(self, name):  # noqa: N802 (the library's name)
        self.ranges.append("<" + name.decode())

    def nvtxRangePop(self):  # noqa: N802
        self.ranges.append(">")


def timed_run(monkeypatch, **changes):
    """Return the events of a run of three epochs of three steps, with two evaluations."""
    _, events, _ = run_with_fakes(monkeypatch, config=dataclasses.replace(CONFIG, **changes))
    return events


def times(events):
    """Return the keys with times that only TIME_TAGS logs, in order."""
    return [key for key in keys(events) if "_time" in key and key != "step_times"]


def after(events, key, number):
    """Return the log keys from the n-th line with a key on."""
    lines = [event[0] for event in events if isinstance(event, tuple)]
    positions = [position for position, found in enumerate(lines) if found == key]
    return lines[positions[number] :]


def test_time_tags_log_the_parts_and_the_epoch_before_its_end(monkeypatch):
    events = timed_run(monkeypatch, time_tags=1)
    epoch = [*PART_KEYS, "epoch_time"]
    for number in range(3):
        assert after(events, "epoch_start", number)[1 : len(epoch) + 2] == [*epoch, "epoch_stop"]
    for number in range(2):
        assert after(events, "eval_stop", number)[1:3] == ["eval_time", "eval_accuracy"]
    assert times(events) == epoch + ["eval_time"] + 2 * epoch + ["eval_time"]
    assert after(events, "run_stop", 0) == ["run_stop"]


def test_times_are_those_of_the_steps_of_one_epoch_and_name_the_rank(monkeypatch):
    events = timed_run(monkeypatch, time_tags=1)
    for epoch in range(3):
        first = [event[0] for event in events].index("epoch_start")
        del events[:first]
        end = [event[0] for event in events].index("epoch_stop")
        values = {event[0]: event[1] for event in events[:end] if isinstance(event, tuple)}
        del events[:end]
        assert all(value["r"] == 0 for key, value in values.items() if "_time" in key), epoch
        for part in PARTS:
            least, most, total = (
                values[f"{part}_time_{kind}"]["t"] for kind in ("min", "max", "total")
            )
            assert values[f"{part}_time_count"]["t"] == 3 and 0 <= least <= most <= total
        assert values["epoch_time"]["t"] >= values["iter_time_total"]["t"]
        assert values["iter_time_total"]["t"] >= sum(
            values[f"{part}_time_total"]["t"] for part in ("fwd", "load", "bwd", "opt")
        )


def test_the_device_is_waited_for_around_each_part(monkeypatch):
    events = timed_run(monkeypatch, time_tags=1)
    first = keys(events).index("forward")
    assert keys(events)[first - 1] == keys(events)[first + 1] == "wait"


def test_an_epoch_of_too_many_steps_ends_the_timing_of_the_parts(monkeypatch):
    """The reference times at most 1,000 steps: it stops after one more."""
    monkeypatch.setattr(profiling, "MAX_TIMED_STEPS", 1)
    events = timed_run(monkeypatch, time_tags=1)
    epochs = ["epoch_time", "eval_time", "epoch_time", "epoch_time", "eval_time"]
    assert times(events) == [*PART_KEYS, *epochs]
    counts = [event[1]["t"] for event in events if event[0] == "opt_time_count"]
    assert counts == [2]


def test_without_settings_nothing_is_timed(monkeypatch):
    events = timed_run(monkeypatch)
    assert times(events) == [] and keys(events).count("wait") == 3


def test_epoch_prof_times_epochs_only(monkeypatch):
    events = timed_run(monkeypatch, epoch_prof=1)
    assert times(events) == ["epoch_time"] * 3
    assert after(events, "epoch_time", 0)[:2] == ["epoch_time", "epoch_stop"]


@pytest.mark.parametrize("changes", [{"nvtx_flag": 1}, {"nvtx_flag": 1, "epoch_prof": 1}])
def test_nvtx_flag_marks_the_parts_and_times_epochs_and_evaluations(monkeypatch, changes):
    nvtx = FakeNvtx()
    monkeypatch.setattr(profiling, "_load_library", lambda *_: nvtx)
    events = timed_run(monkeypatch, **changes)
    epochs = ["epoch_time", "eval_time", "epoch_time", "epoch_time", "eval_time"]
    assert times(events) == epochs
    parts = [item for part in PARTS[:-1] for item in (f"<{part}_time", ">")]
    assert nvtx.ranges == 9 * ["<iter_time", *parts, ">"]


def test_profile_marks_epochs_and_steps_and_surrounds_the_run(monkeypatch):
    nvtx = FakeNvtx()
    monkeypatch.setattr(profiling, "_load_library", lambda *_: nvtx)
    calls = []
    monkeypatch.setattr(profiling.Timing, "profiler", lambda _, on: calls.append(on))
    events = timed_run(monkeypatch, profile=1, num_epochs=3)
    steps = ["<iter0", ">", "<iter1", ">", "<iter2", ">"]
    assert nvtx.ranges == [item for epoch in range(3) for item in (f"<epoch{epoch}", *steps, ">")]
    assert times(events) == [] and calls == [True, False]
