# SPDX-License-Identifier: Apache-2.0
"""Stand-ins that record the order of events; for loop.py only. What they stand for is tested for real elsewhere."""

from mxresnet.data.loader import Batch
from mxresnet.metrics import Score


class FakeDataLoaders:
    def __init__(self, events, val_real=(4, 2)):
        self.events, self.val_real = events, val_real

    def open(self):
        self.events.append("open data")
        return self, FakeValLoader(self.val_real)

    def batches(self, steps):
        for step in range(steps):
            self.events.append("fetch")
            yield Batch(None, None, 4)


class FakeValLoader:
    def __init__(self, reals):
        self.reals = reals

    def batches(self):
        return (Batch(None, None, real) for real in self.reals)


class FakeTrainer:
    """Scores accuracies in turn; raises in the given step."""

    def __init__(self, events, accuracies, fail_in_step=0):
        self.events, self.accuracies, self.fail_in_step, self.steps = (
            events,
            list(accuracies),
            fail_in_step,
            0,
        )

    def initialize(self):
        from mxresnet.model.resnet import parameter_names

        self.events.append("initialize")
        return parameter_names(50)

    def warm_up(self):
        self.events.append("warm up")

    def start_profile(self):
        pass

    def stop_profile(self):
        pass

    def forward(self, batch):
        self.steps += 1
        if self.steps == self.fail_in_step:
            raise RuntimeError("step failed")
        self.events.append("forward")

    def backward(self):
        self.events.append("backward")

    def update(self):
        self.events.append("update")

    def wait(self):
        self.events.append("wait")

    def evaluate(self, batches):
        total = sum(batch.num_valid for batch in batches)
        self.events.append("evaluate")
        return Score(round(self.accuracies.pop(0) * total), total)


class FakeWorld:
    rank, size = 0, 1

    def __init__(self, events):
        self.events = events

    def gather(self, value):
        return [value]

    def raise_if_any_failed(self, problem):
        if problem:
            raise problem

    def run_on_all_ranks(self, what):
        return what()

    def barrier(self):
        self.events.append("barrier")
