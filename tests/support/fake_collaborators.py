# SPDX-License-Identifier: Apache-2.0
"""Fakes of TrainLoop's collaborators that record the order of events.

Other tests run the real collaborators.
"""

from mxresnet.data.loader import Batch
from mxresnet.metrics import Score


class FakeDataLoaders:
    """Data loaders and training loader in one; val_num_valid: images of each validation batch."""

    wait_seconds = 0.0

    def __init__(self, events, val_num_valid=(4, 2)):
        self.events, self.val_num_valid = events, val_num_valid

    def open(self):
        self.events.append("open data")
        return self, FakeValLoader(self.val_num_valid)

    restores_exactly = can_save = True

    def state(self):
        return "state of the input"

    def batches(self, steps):
        for _ in range(steps):
            self.events.append("fetch")
            yield Batch(None, None, 4)


class FakeCheckpoints:
    """Checkpoints of a run that writes none, or one after the steps `due_after`.

    Args:
        events: records what is called.
        position: where the run is resumed.
        due_after: numbers of the steps of this process, from 1.
    """

    accuracy = None
    is_on = True

    def __init__(self, events, position=None, due_after=(), log_continues=False):
        self.events, self.position, self.due_after = events, position, due_after
        self.log_continues, self.steps = log_continues, 0

    def restore(self, trainer):
        if self.position:
            self.events.append("restore")

    def announce(self):
        pass

    def due(self, can_save, can_save_soon=True):
        self.steps += 1
        return self.steps in self.due_after

    def save(self, position, trainer, inputs, accuracy=None):
        if self.due_after:
            self.events.append(("checkpoint", position, accuracy))

    def finish(self, outcome):
        if self.due_after:
            self.events.append(("finish", outcome, None))


class FakeValLoader:
    def __init__(self, num_valid):
        self.num_valid = num_valid

    def batches(self):
        return (Batch(None, None, num_valid) for num_valid in self.num_valid)


class FakeTrainer:
    """Returns the given accuracies one after the other; raises in step fail_in_step, if not 0."""

    def __init__(self, events, accuracies, fail_in_step=0):
        self.events, self.accuracies = events, list(accuracies)
        self.fail_in_step, self.steps = fail_in_step, 0

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

    def bad_gradient(self, max_pending):
        return None

    def take_loss(self):
        self.events.append("take loss")
        return 1.5

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

    def raise_same_error(self, problem):
        raise problem

    def raise_if_any_failed(self, problem):
        if problem:
            raise problem

    def run_on_all_ranks(self, what):
        return what()

    def barrier(self):
        self.events.append("barrier")
