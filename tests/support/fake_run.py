# SPDX-License-Identifier: Apache-2.0
"""A run with fakes of everything that computes or reads, for the order of its events and lines."""

import io
import json

from mlperf_logging.mllog import get_mllogger

from mxresnet import mllog
from mxresnet.config import Config
from mxresnet.data.dataset import DataSet
from mxresnet.profiling import Timing
from mxresnet.progress import Progress
from mxresnet.run_plan import make_plan
from mxresnet.train_loop import TrainLoop
from support.fake_collaborators import FakeCheckpoints, FakeDataLoaders, FakeTrainer, FakeWorld

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
            FakeCheckpoints(events, **changes.get("checkpoints", {})),
        )
        outcome = loop.run()
    except Exception as error:
        outcome = error
    return outcome, events, progress_text.getvalue()


def keys(events):
    return [event if isinstance(event, str) else event[0] for event in events]
