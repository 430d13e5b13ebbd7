# SPDX-License-Identifier: Apache-2.0
"""Numbers in calls of MXNet's operators, which MXNet passes as text and parses.

It refuses "inf" when this thread's errno is ERANGE from any earlier call, and always refuses
numbers that float32 cannot hold.
"""

import ctypes
import errno

import mxnet as mx
import numpy as np
import pytest

from mxresnet.config import Config
from mxresnet.data.loader import Batch
from mxresnet.errors import UserError
from mxresnet.lars import Lars
from mxresnet.lr_schedule import make_schedule
from mxresnet.metrics import AccuracyCounter
from mxresnet.model.select_ops import select_ops
from mxresnet.parallel.world import World
from mxresnet.run_plan import make_plan
from mxresnet.trainer import Trainer, seed_everything

CLASSES = 3


@pytest.fixture
def stale_errno(monkeypatch):
    """Set errno to ERANGE before each call of an operator."""
    address = ctypes.CDLL(None).__errno_location
    address.restype = ctypes.POINTER(ctypes.c_int)
    for name in ("MXImperativeInvokeEx", "MXSymbolCreateAtomicSymbol"):
        original = getattr(mx.base._LIB, name)

        def call(*arguments, original=original):
            address().contents.value = errno.ERANGE
            return original(*arguments)

        monkeypatch.setattr(mx.base._LIB, name, call)


def test_the_fixture_makes_mxnet_refuse_infinity(stale_errno):
    with pytest.raises(mx.MXNetError, match="Out of range value"):
        mx.nd.contrib.isfinite(mx.nd.ones((2,)))


def test_an_evaluation(stale_errno):
    counter = AccuracyCounter(top_k=2)
    counter.add(mx.nd.array([[0.1, 0.7, 0.2]]), mx.nd.array([2]))
    assert counter.counts() == [0, 1, 1]


@pytest.mark.parametrize("scale", [1e38, 1e-38, 1e-44, np.inf, np.nan])
def test_lars_with_rates_that_are_not_normal_numbers(stale_errno, scale):
    """The trust ratio of a tensor may be infinite, NaN or subnormal when training diverges."""
    names = {0: "conv0_weight"}
    optimizer = Lars(momentum=0.9, eta=10.0, eps=0.0, param_idx2name=names, learning_rate=1.0)
    optimizer.lr_scheduler = lambda update: 1.0
    weight, gradient = mx.nd.array([scale] * 4), mx.nd.ones((4,))
    state = optimizer.create_state_multi_precision(0, weight)
    optimizer.update_multi_precision([0], [weight], [gradient], [state])
    result = weight.asnumpy()
    assert result.shape == (4,) and not (result == 1).any()


@pytest.mark.parametrize("optimizer, lr", [("sgd", 1e4), ("sgdwfastlars", 1e6)])
def test_training_that_diverges_ends_with_one_line(stale_errno, optimizer, lr):
    config = Config(
        image_shape=(3, 8, 8),
        resize=8,
        num_layers=18,
        batch_size=8,
        optimizer=optimizer,
        lr=lr,
        warmup_epochs=0,
        lr_step_epochs="pow2",
        num_epochs=5,
    )
    seed_everything(1)
    ops = select_ops(config, on_gpu=False)
    trainer = Trainer(config, make_plan(config, 64, 1), World(), CLASSES, mx.cpu(), ops)
    trainer.initialize()
    trainer.warm_up()
    random = np.random.RandomState(1)
    images, labels = random.randn(8, 3, 8, 8), random.randint(0, CLASSES, 8)
    batch = Batch(mx.nd.array(images), mx.nd.array(labels), 8)
    for _ in range(20):
        trainer.forward(batch)
        trainer.backward()
        trainer.update()
    with pytest.raises(UserError, match="training diverged"):
        trainer.evaluate([batch])


def test_a_rate_that_float32_cannot_hold_is_zero():
    epochs = ",".join(map(str, range(1, 80)))
    schedule = make_schedule(Config(lr_step_epochs=epochs, warmup_epochs=0), steps_per_epoch=1)
    rates = [schedule.learning_rate(update) for update in range(90)]
    assert rates[0] == 0.6 and rates[-1] == 0
    assert all(rate == 0 or np.float32(rate) >= np.finfo(np.float32).tiny for rate in rates)
