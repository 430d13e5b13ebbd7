# SPDX-License-Identifier: Apache-2.0
"""Training data continues after a checkpoint with the bytes that would have come."""

import ctypes
import hashlib
import json
import random

import mxnet as mx
import pytest
from support.records import SETTINGS, make_loaders, random_images, write_records

from mxresnet.checkpoint.state import InputState
from mxresnet.config import Config
from mxresnet.data import dali_graph
from mxresnet.parallel.world import World

IMAGES = 53  # a prime number: batches of 8 end in mid-epoch
ROI = {"dali_roi_decode": True}
BACKENDS = {
    "dali": {},
    "dali_roi": ROI,
    "image_record_iter": {"use_dali": False},
    "synthetic": {"synth_data": 1, "num_examples": IMAGES, "num_val_examples": 8},
}

M_MMAP_THRESHOLD = -3  # <malloc.h>


@pytest.fixture(scope="module", autouse=True)
def buffers_are_given_back():
    """Let glibc give large buffers back to the system.

    Otherwise the untouched buffers of DALI's many pipelines stay in a heap of 30 GiB. The kernel
    copies no area above the machine's memory, so that later tests in this process could not fork.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17)


class Stream:
    """The training batches of a rank, as hashes, by a number of steps an epoch."""

    def __init__(self, folder, steps, world, state=None, saves_state=True, **settings):
        mx.random.seed(5)
        self.config = Config(data_root=str(folder), **{**SETTINGS, **settings})
        loaders = make_loaders(self.config, IMAGES, 8, world, saves_state=saves_state, state=state)
        self.loader, _ = loaders.open()
        self.steps = steps

    def read(self, first, last):
        """Yield the hashes of batches first..last-1, counted from 0 over all epochs."""
        number = first
        while number < last:
            left = self.steps - number % self.steps
            for batch in self.loader.batches(left):
                content = batch.image.asnumpy().tobytes() + batch.label.asnumpy().tobytes()
                yield hashlib.sha256(content).hexdigest()
                number += 1
                if number == last:
                    return


def stored(state):
    """Return a state as it comes out of a checkpoint."""
    return InputState(json.loads(json.dumps(state.values)), dict(state.arrays))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    write_records(folder, random_images(IMAGES), random_images(8))
    return folder


@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_interrupted_any_number_of_times(records, backend, ranks, multiplier):
    settings = {**BACKENDS[backend], "input_batch_multiplier": multiplier}
    world = World(ranks - 1, ranks)
    steps = -(-IMAGES // ranks // 8)
    count = 8 * steps
    whole = Stream(records, steps, world, saves_state=False, **settings)
    expected = list(whole.read(0, count))
    assert len(set(expected)) > count // 2 or backend == "synthetic"
    choose = random.Random(f"{backend}{ranks}{multiplier}")
    for _ in range(3):
        stream, position, got = Stream(records, steps, world, **settings), 0, []
        while position < count:
            end = min(count, position + choose.randint(1, 2 * steps))
            got += stream.read(position, end)
            while end < count and not stream.loader.can_save:
                got += stream.read(end, end + 1)
                end += 1
            position = end
            if position < count:
                state = stored(stream.loader.state())
                got_more = list(stream.read(position, position + 1))  # fetched ahead, and lost
                assert got_more == [expected[position]]
                stream = Stream(records, steps, world, state, **settings)
        assert got == expected


def test_the_end_of_an_epoch_can_always_be_saved(records):
    settings = {"input_batch_multiplier": 4}
    expected = list(Stream(records, 7, World(), **settings).read(0, 28))
    for epoch in (1, 2, 3):
        stream = Stream(records, 7, World(), **settings)
        list(stream.read(0, 7 * epoch))
        assert stream.loader.can_save
        state = stored(stream.loader.state())
        assert state.values["cut"] == 7 * epoch % 4
        rest = Stream(records, 7, World(), state, **settings).read(7 * epoch, 28)
        assert list(rest) == expected[7 * epoch :]


def test_a_dali_without_state_starts_another_pass(records, monkeypatch):
    """NVIDIA's container has such a DALI: the run continues from the end of an epoch."""
    monkeypatch.setattr(dali_graph, "can_save_state", lambda: False)
    stream = Stream(records, 7, World())
    first = list(stream.read(0, 7))
    assert not stream.loader.restores_exactly
    state = stored(stream.loader.state())
    second = list(Stream(records, 7, World(), state).read(7, 14))
    third = list(Stream(records, 7, World(), state).read(7, 14))
    assert second == third and not set(first) & set(second)
