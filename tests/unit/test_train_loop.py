# SPDX-License-Identifier: Apache-2.0
"""The order of events and log lines of a run, with fakes of everything that computes or reads."""

import dataclasses

import pytest
from support.fake_collaborators import FakeWorld
from support.fake_run import CONFIG, keys, run_with_fakes

from mxresnet.checkpoint.manifest import Position
from mxresnet.errors import UserError
from mxresnet.step_times import StepTimes


def test_order_of_a_run(monkeypatch):
    reached, events, seen = run_with_fakes(monkeypatch)
    assert reached is True
    order = keys(events)
    before, after = order[: order.index("run_start")], order[order.index("run_start") :]
    assert (
        before[0] == "initialize"
        and before[-1] == "barrier"
        and before.index("init_stop") < before.index("warm up")
    )
    assert not {"open data", "fetch", "forward"} & set(before)
    step = ["forward", "fetch", "backward", "update"]
    last = ["forward", "backward", "update", "wait"]
    epoch = [
        "epoch_start",
        "fetch",
        *step,
        *step,
        *last,
        "epoch_stop",
        "take loss",
        "tracked_stats",
        "throughput",
        "train_loss",
        "step_times",
    ]
    evaluation = ["eval_start", "evaluate", "eval_stop", "eval_accuracy", "block_stop"]
    assert after == [
        "run_start",
        "barrier",
        "open data",
        "train_samples",
        "eval_samples",
        "block_start",
        *epoch,
        *evaluation,
        "block_start",
        *epoch,
        *epoch,
        *evaluation,
        "run_stop",
    ]
    assert "target reached" in seen and "after epoch 3: accuracy 0.8333 (5 of 6)" in seen


def test_values_and_metadata(monkeypatch):
    _, events, _ = run_with_fakes(monkeypatch)
    lines = [event for event in events if isinstance(event, tuple)]

    def metadata(key):
        return [
            {k: v for k, v in meta.items() if k not in ("file", "lineno")}
            for name, _, meta in lines
            if name == key
        ]

    def value(key):
        return [value for name, value, _ in lines if name == key]

    assert metadata("block_start") == [
        {"first_epoch_num": 1, "epoch_count": 1},
        {"first_epoch_num": 2, "epoch_count": 2},
    ]
    assert metadata("block_stop") == [{"first_epoch_num": 1}, {"first_epoch_num": 2}]
    assert metadata("epoch_start") == [{"epoch_num": 1}, {"epoch_num": 2}, {"epoch_num": 3}]
    assert metadata("eval_accuracy") == [{"epoch_num": 1}, {"epoch_num": 3}] and value(
        "eval_accuracy"
    ) == [0.5, 5 / 6]
    assert metadata("run_stop") == [{"status": "success"}]
    assert value("train_samples") == [12] and value("eval_samples") == [6] and value("seed") == [7]
    assert value("lars_opt_learning_rate_decay_steps") == [6] and value("global_batch_size") == [4]
    assert value("train_loss") == [1.5] * 3
    assert metadata("train_loss") == metadata("step_times") == metadata("epoch_start")
    names = [meta["tensor"] for meta in metadata("weights_initialization")]
    assert len(names) == 161 and names == sorted(names)


def test_the_loss_is_the_mean_of_the_ranks_and_the_times_are_those_of_each_rank(monkeypatch):
    other = (2.5, StepTimes(1.0, 2.0, 3.0, 0.5))
    monkeypatch.setattr(FakeWorld, "size", 2)
    monkeypatch.setattr(FakeWorld, "gather", lambda self, value: [value, other])
    _, events, seen = run_with_fakes(monkeypatch)
    values = {event[0]: event[1] for event in events if isinstance(event, tuple)}
    assert values["train_loss"] == 2.0 and "loss 2.0000" in seen
    times = values["step_times"]
    assert {name: rows[1] for name, rows in times.items()} == dataclasses.asdict(other[1])
    assert all(len(rows) == 2 for rows in times.values())


def test_lines_name_the_file_that_wrote_them(monkeypatch):
    _, events, _ = run_with_fakes(monkeypatch)
    files = {event[2]["file"].rsplit("/", 1)[1] for event in events if isinstance(event, tuple)}
    assert files == {"train_loop.py", "mllog.py"}


def test_equality_with_the_target_does_not_stop(monkeypatch):
    config = dataclasses.replace(CONFIG, accuracy_threshold=0.5)
    reached, events, _ = run_with_fakes(monkeypatch, (0.5, 0.5, 0.5), config)
    assert reached is False and keys(events).count("eval_accuracy") == 3


def blocks_of(events):
    """Return (first epoch, number of epochs) of each block that starts, and the first of those
    that end.
    """
    lines = [event for event in events if isinstance(event, tuple)]
    starts = [
        (line[2]["first_epoch_num"], line[2]["epoch_count"])
        for line in lines
        if line[0] == "block_start"
    ]
    return starts, [line[2]["first_epoch_num"] for line in lines if line[0] == "block_stop"]


def test_a_missed_target_is_aborted_after_the_last_epoch(monkeypatch):
    reached, events, seen = run_with_fakes(monkeypatch, (0.1, 0.2, 0.3))
    assert reached is False and events[-1][0] == "run_stop" and events[-1][2]["status"] == "aborted"
    assert keys(events).count("eval_start") == 3
    assert "missed: best 0.3333" in seen


def test_a_block_without_an_evaluation_is_not_closed(monkeypatch):
    _, events, _ = run_with_fakes(monkeypatch, (0.1, 0.2, 0.3))
    assert blocks_of(events) == ([(1, 1), (2, 2), (4, 2), (6, 1)], [1, 2, 4])


@pytest.mark.parametrize(
    "changes", [{"profile": 1}, {"synth_data": 1}, {"num_epochs": 2, "warmup_epochs": 1}]
)
def test_a_run_without_evaluations_announces_the_epochs_up_to_the_first(monkeypatch, changes):
    """As the reference, which takes the number from its settings alone."""
    config = dataclasses.replace(CONFIG, eval_period=4, eval_offset=2, **changes)
    _, events, _ = run_with_fakes(monkeypatch, config=config)
    assert blocks_of(events) == ([(1, 3)], [])
    assert keys(events).count("epoch_stop") == config.num_epochs


def test_an_exception_in_a_step_leaves_exactly_one_run_stop_aborted(monkeypatch):
    outcome, events, _ = run_with_fakes(monkeypatch, fail_in_step=3)
    assert isinstance(outcome, RuntimeError)
    stops = [event for event in events if event[0] == "run_stop"]
    assert (
        len(stops) == 1 and stops[0][2]["status"] == "aborted" and "epoch_stop" not in keys(events)
    )


@pytest.mark.parametrize("num_valid", [(4, 3), (4, 1)])
def test_an_evaluation_that_did_not_count_every_image_once_fails(monkeypatch, num_valid):
    outcome, events, _ = run_with_fakes(monkeypatch, val_num_valid=num_valid)
    assert isinstance(outcome, UserError) and f"counted {sum(num_valid)} images of 6" in str(
        outcome
    )
    assert "eval_accuracy" not in keys(events)


def test_a_profiled_run_evaluates_nothing_and_is_a_success(monkeypatch):
    reached, events, seen = run_with_fakes(
        monkeypatch, config=dataclasses.replace(CONFIG, profile=1)
    )
    assert reached is None and "eval_start" not in keys(events) and "nothing was evaluated" in seen
    assert events[-1][0] == "run_stop" and events[-1][2]["status"] == "success"


def test_a_run_on_synthetic_data_is_never_a_success(monkeypatch):
    reached, events, _ = run_with_fakes(
        monkeypatch, config=dataclasses.replace(CONFIG, synth_data=1)
    )
    assert (
        reached is None
        and "eval_start" not in keys(events)
        and events[-1][2]["status"] == "aborted"
    )


def test_a_resumed_run_takes_only_the_steps_that_are_left(monkeypatch):
    checkpoints = {"position": Position(2, 1), "log_continues": True}
    reached, events, _ = run_with_fakes(monkeypatch, (0.8,), checkpoints=checkpoints)
    order = keys(events)
    assert reached and order.index("warm up") < order.index("restore") < order.index("fetch")
    assert order.count("forward") == 2 + 3
    assert "block_start" not in order  # the earlier process has logged it, and epoch 2's start
    starts = [event[2]["epoch_num"] for event in events if event[0] == "epoch_start"]
    stops = [event[2]["epoch_num"] for event in events if event[0] == "epoch_stop"]
    assert (starts, stops) == ([3], [2, 3])


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_run_resumed_at_the_end_of_an_epoch(monkeypatch, evaluated):
    checkpoints = {"position": Position(1, 3, evaluated), "log_continues": True}
    _, events, _ = run_with_fakes(monkeypatch, (0.1, 0.8), checkpoints=checkpoints)
    order = keys(events)
    assert order.count("evaluate") == 2
    first = next(key for key in order if key in ("epoch_stop", "block_start", "forward"))
    assert first == ("block_start" if evaluated else "epoch_stop")


def test_checkpoints_after_steps_evaluations_and_the_last_epoch(monkeypatch):
    _, events, _ = run_with_fakes(monkeypatch, (0.1, 0.2, 0.3), checkpoints={"due_after": (2, 9)})
    saved = [(event[1], event[2]) for event in events if event[0] == "checkpoint"]
    assert saved == [
        (Position(1, 2), None),
        (Position(1, 3, True), 1 / 6),
        (Position(3, 3), None),
        (Position(3, 3, True), 1 / 6),
        (Position(5, 3, True), 2 / 6),
        (Position(6, 3, True), None),
    ]
    assert events[-1] == ("finish", "aborted", None)


def test_a_run_stopped_after_its_last_epoch_repeats_nothing(monkeypatch):
    """Epoch 6 has no evaluation: the run ends with it."""
    _, events, _ = run_with_fakes(
        monkeypatch, (0.5, 0.5, 0.5), checkpoints={"due_after": [99], "position": None}
    )
    last = [event for event in events if event[0] == "checkpoint"][-1][1]
    assert (last.epoch, last.step) == (6, 3)
    outcome, events, text = run_with_fakes(
        monkeypatch, (), checkpoints={"position": last, "log_continues": True}
    )
    assert outcome is False and "forward" not in events and "missed" in text
    assert not {"epoch_start", "epoch_stop", "train_loss", "throughput"} & set(keys(events))


def test_a_run_without_evaluations_stopped_after_its_last_epoch(monkeypatch):
    config = dataclasses.replace(CONFIG, synth_data=1)
    _, events, _ = run_with_fakes(monkeypatch, (), config, checkpoints={"due_after": [99]})
    last = [event for event in events if event[0] == "checkpoint"][-1][1]
    outcome, events, text = run_with_fakes(monkeypatch, (), config, checkpoints={"position": last})
    assert outcome is None and "take loss" not in events and "nothing was evaluated" in text
