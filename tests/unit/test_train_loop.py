# SPDX-License-Identifier: Apache-2.0
"""The order of events and log lines of a run, with fakes of everything that computes or reads."""

import dataclasses
import io
import json

import pytest
from mlperf_logging.mllog import get_mllogger
from support.fake_collaborators import FakeDataLoaders, FakeTrainer, FakeWorld

from mxresnet import mllog
from mxresnet.config import Config
from mxresnet.data.dataset import DataSet
from mxresnet.errors import UserError
from mxresnet.profiling import Timing
from mxresnet.progress import Progress
from mxresnet.run_plan import make_plan
from mxresnet.train_loop import TrainLoop

CONFIG = Config(
    optimizer="sgdwfastlars",
    batch_size=4,
    lr=6.0,
    wd=5e-5,
    lr_step_epochs="pow2",
    num_epochs=6,
    warmup_epochs=2,
    eval_period=2,
    eval_offset=0,
    accuracy_threshold=0.76,
    seed=7,
)
DATA = DataSet(train_examples=12, val_examples=6, classes=10, has_manifests=True)


class FakeStream:
    """Stream of the logger that appends log lines to the events of the fakes."""

    def __init__(self, events):
        self.events = events

    def write(self, text):
        if text.strip():
            line = json.loads(text.split(":::MLLOG ", 1)[1])
            self.events.append((line["key"], line["value"], line["metadata"]))

    def flush(self):
        pass


def run_with_fakes(monkeypatch, accuracies=(0.5, 0.8), config=CONFIG, **changes):
    """Return the result of the loop or its exception, the events, and the progress text."""
    events, progress_text = [], io.StringIO()
    logger = get_mllogger().logger
    for handler in logger.handlers:
        monkeypatch.setattr(handler, "stream", FakeStream(events))
    plan = make_plan(config, DATA.train_examples, 1)
    trainer = FakeTrainer(events, accuracies, changes.get("fail_in_step", 0))
    data_loaders = FakeDataLoaders(events, changes.get("val_num_valid", (4, 2)))
    progress = Progress(plan, 12, 4, interval_steps=0, rank=0, streams=[progress_text])
    try:
        timing = Timing(config, trainer.wait)
        loop = TrainLoop(
            config,
            DATA,
            plan,
            FakeWorld(events),
            mllog.RunLog(0),
            progress,
            trainer,
            data_loaders,
            timing,
        )
        outcome = loop.run()
    except Exception as error:
        outcome = error
    return outcome, events, progress_text.getvalue()


def keys(events):
    return [event if isinstance(event, str) else event[0] for event in events]


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
        "tracked_stats",
        "throughput",
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
    assert metadata("epoch_start") == [{"epoch_num": 1}, {"epoch_num": 2}, {"epoch_num": 3}]
    assert metadata("eval_accuracy") == [{"epoch_num": 1}, {"epoch_num": 3}] and value(
        "eval_accuracy"
    ) == [0.5, 5 / 6]
    assert metadata("run_stop") == [{"status": "success"}]
    assert value("train_samples") == [12] and value("eval_samples") == [6] and value("seed") == [7]
    assert value("lars_opt_learning_rate_decay_steps") == [6] and value("global_batch_size") == [4]
    names = [meta["tensor"] for meta in metadata("weights_initialization")]
    assert len(names) == 161 and names == sorted(names)


def test_lines_name_the_file_that_wrote_them(monkeypatch):
    _, events, _ = run_with_fakes(monkeypatch)
    files = {event[2]["file"].rsplit("/", 1)[1] for event in events if isinstance(event, tuple)}
    assert files == {"train_loop.py", "mllog.py"}


def test_equality_with_the_target_does_not_stop(monkeypatch):
    config = dataclasses.replace(CONFIG, accuracy_threshold=0.5)
    reached, events, _ = run_with_fakes(monkeypatch, (0.5, 0.5, 0.5), config)
    assert reached is False and keys(events).count("eval_accuracy") == 3


def test_a_missed_target_is_aborted_after_the_last_epoch_and_its_block_is_closed(monkeypatch):
    reached, events, seen = run_with_fakes(monkeypatch, (0.1, 0.2, 0.3))
    assert reached is False and events[-1][0] == "run_stop" and events[-1][2]["status"] == "aborted"
    order = keys(events)
    assert (
        order.count("block_start") == order.count("block_stop") == 4
        and order.count("eval_start") == 3
    )
    assert "missed: best 0.3333" in seen


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


def test_time_tags_log_every_part_and_wait_at_its_ends(monkeypatch):
    _, events, _ = run_with_fakes(monkeypatch, config=dataclasses.replace(CONFIG, time_tags=1))
    values = {event[0]: event[1] for event in events if isinstance(event, tuple)}
    steps = 3 * keys(events).count("epoch_start")
    for tag in ("fwd", "bwd", "opt", "load", "iter"):
        assert values[f"{tag}_time_count"] == {"r": 0, "t": steps}
        least, most, total = (values[f"{tag}_time_{kind}"]["t"] for kind in ("min", "max", "total"))
        assert 0 <= least <= most <= total
    assert values["epoch_time_count"]["t"] == 3 and values["eval_time_count"]["t"] == 2
    assert (
        values["iter_time_total"]["t"]
        >= values["fwd_time_total"]["t"]
        + values["bwd_time_total"]["t"]
        + values["opt_time_total"]["t"]
    )
    assert keys(events).index("fwd_time_total") > keys(events).index("run_stop")
    first = keys(events).index("forward")
    assert keys(events)[first - 1] == keys(events)[first + 1] == "wait"


def test_epoch_prof_times_epochs_only(monkeypatch):
    _, events, _ = run_with_fakes(monkeypatch, config=dataclasses.replace(CONFIG, epoch_prof=1))
    assert {key for key in keys(events) if "_time_" in key} == {
        f"epoch_time_{kind}" for kind in ("total", "count", "min", "max")
    }
